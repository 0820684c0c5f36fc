"""Whether a training fits and how fast it can be, before it starts: python -m ldm_jax.plan CONFIG --topology=v5e:4x4

--what=forward and --what=decode plan sampling instead: a call of the UNet, the decoding of latents.
CONFIG is as train.py takes it, and any field of it can be changed as there: --config.mesh.fsdp=16. No weights, no data and no device of the topology
need be there; where the first stage is a model directory that does not exist, model.first_stage gives the architecture.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from ldm_jax.cli import run as cli

config_flags.DEFINE_config_file(
    "config", None, "The config file, also without --config=.", lock_config=True
)
flags.DEFINE_string(
    "topology",
    "cpu",
    "KIND:SHAPE: v4, v5e, v5p, v6e (v5e:4x4), a100, h100, h200 (h200:8), cpu (cpu:8).",
)
flags.DEFINE_enum(
    "what",
    "train",
    ["train", "forward", "decode"],
    "A step of the training; or of sampling: a call of the UNet without guidance, the decoding of latents.",
)
flags.DEFINE_bool(
    "cached",
    False,
    "Train from a latent cache: no encoder in the step. So it is too with --config.data.cache=...",
)
flags.DEFINE_integer(
    "per_chip",
    0,
    "Pictures on a chip at a time, in place of config.batch_size (sampling: 1).",
    lower_bound=0,
)
flags.DEFINE_bool(
    "compile", True, "Ask the topology's compiler; --nocompile gives the analytic part, in seconds."
)
flags.DEFINE_bool(
    "find_batch",
    False,
    "Find the largest number of pictures that fit on a chip: up to three more compilations.",
)
flags.DEFINE_string("json", None, "A file for the same in figures.")
flags.DEFINE_bool("markdown", False, "Print a row of a table instead of the report.")
flags.mark_flags_as_required(["config"])


def plan_from_flags(args: Any) -> None:
    """Runs the command."""
    import jax

    from ldm_jax.plan.chips import parse_topology
    from ldm_jax.plan.planner import plan
    from ldm_jax.plan.report import HEAD, as_dict, as_row, as_text

    topology = parse_topology(args.topology)
    if topology.chip is None or topology.kind.startswith("v"):
        jax.config.update("jax_platforms", "cpu")  # an accelerator of this machine is not asked
    if topology.kind.startswith("v"):
        jax.config.update(
            "jax_enable_compilation_cache", False
        )  # programs that cannot be loaded here
    made = plan(
        args.config,
        topology,
        name=_name(),
        what=args.what,
        cached=args.cached,
        per_chip=args.per_chip,
        compile=args.compile,
        find_batch=args.find_batch,
    )
    if args.json:
        Path(args.json).write_text(json.dumps(as_dict(made), indent=1) + "\n")
    print(f"{HEAD}\n{as_row(made)}" if args.markdown else as_text(made))


def _name() -> str:
    """What the person called the config."""
    given = next((a.split("=", 1)[1] for a in sys.argv if a.startswith("--config=")), "")
    return Path(given).name.replace(".py", "")


def main() -> None:
    """Runs ``ldm-plan``."""
    rest = sys.argv[1:]
    sys.argv = [
        sys.argv[0],
        *(f"--config={a}" if i == 0 and not a.startswith("-") else a for i, a in enumerate(rest)),
    ]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    cli.run(plan_from_flags)
