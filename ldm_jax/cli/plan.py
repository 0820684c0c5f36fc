"""Plans a training step or a part of sampling: does it fit, and how fast can it be?

    ldm-plan configs/sd_v1.py --topology=v5e:4x4
    ldm-plan configs/sd_v1.py --topology=h200:8 --what=forward --per_chip=2

CONFIG is given as to ldm-train, and any field of it can be changed as there:
--config.mesh.fsdp=16. No weights, no data and no device of the topology are needed; where the first
stage is a model directory that does not exist, model.first_stage gives the architecture.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags

from ldm_jax.cli import run as cli
from ldm_jax.cli.config import define_config_flag, with_config_path
from ldm_jax.io.atomic import write_atomic


def define_flags() -> None:
    """Defines the command's flags."""
    define_config_flag()
    flags.DEFINE_string(
        "topology",
        "cpu",
        "KIND:SHAPE: v4, v5e, v5p, v6e (v5e:4x4), a100, h100, h200 (h200:8), cpu (cpu:8).",
    )
    flags.DEFINE_enum(
        "what",
        "train",
        ["train", "forward", "decode"],
        "A training step; or of sampling a call of the UNet without guidance, or the decoding of "
        "latents.",
    )
    flags.DEFINE_bool(
        "cached",
        False,
        "Train from a latent cache, without an encoder in the step (as --config.data.cache=...).",
    )
    flags.DEFINE_integer(
        "per_chip",
        0,
        "Pictures on a chip at a time, in place of config.batch_size (sampling: 1).",
        lower_bound=0,
    )
    flags.DEFINE_bool(
        "compile",
        True,
        "Use the topology's compiler; --nocompile gives the analytic part, in seconds.",
    )
    flags.DEFINE_bool(
        "find_batch",
        False,
        "Find the largest number of pictures that fit on a chip: up to three more compilations.",
    )
    flags.DEFINE_string("json", None, "A file for the plan as JSON.")
    flags.DEFINE_bool("markdown", False, "Print a row of a table instead of the report.")
    flags.mark_flags_as_required(["config"])


def plan_from_flags(args: Any) -> None:
    """Runs the command."""
    import jax

    from ldm_jax.plan.chips import parse_topology
    from ldm_jax.plan.planner import plan
    from ldm_jax.plan.report import HEAD, as_dict, as_row, as_text

    topology = parse_topology(args.topology)
    jax.config.update("jax_platforms", "cpu")  # an accelerator of this machine is not needed
    if topology.platform != "cpu":
        # This machine could not load the programs.
        jax.config.update("jax_enable_compilation_cache", False)
    made = plan(
        args.config,
        topology,
        name=_config_name(),
        what=args.what,
        cached=args.cached,
        per_chip=args.per_chip,
        compile=args.compile,
        find_batch=args.find_batch,
    )
    if args.json:
        write_atomic(args.json, json.dumps(as_dict(made), indent=1) + "\n")
    print(f"{HEAD}\n{as_row(made)}" if args.markdown else as_text(made))


def _config_name() -> str:
    """The config as given, "sd_v1" or "emoji:smoke"."""
    given = next((a.split("=", 1)[1] for a in sys.argv if a.startswith("--config=")), "")
    return Path(given).name.replace(".py", "")


def main() -> None:
    """Runs ``ldm-plan``."""
    sys.argv = with_config_path(sys.argv, positional=1)
    define_flags()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    cli.run(plan_from_flags)
