"""Trains a first stage or a latent diffusion model.

    ldm-train --config=emoji --workdir=runs/emoji

Run the same command again to resume where it stopped. Any field of the config can be changed, as in
--config.optim.lr=1e-4.
"""

import logging
import sys
from typing import Any

from absl import flags

from ldm_jax.cli import run as cli
from ldm_jax.cli.config import define_config_flag, with_config_path


def train(args: Any) -> None:
    """Runs a training as the flags say."""
    from ldm_jax.distributed import preemption, processes
    from ldm_jax.errors import ConfigError, TrainingStopped
    from ldm_jax.kernels import heap
    from ldm_jax.train.loop import train

    if not args.workdir:
        raise ConfigError("missing --workdir=...; --help explains every flag")
    if args.distributed or args.coordinator:
        processes.start(args.coordinator, args.processes, args.process_index)
        if not processes.is_first():
            logging.getLogger("ldm_jax").setLevel(logging.WARNING)
    if args.dry_run:
        sys.exit(dry_run(args.config, args.workdir))
    heap.keep_large_blocks()
    try:
        train(args.config, args.workdir, restore_step=args.restore_step)
    except TrainingStopped as error:
        sys.exit(cli.fail(error, preemption.STOPPED))


def dry_run(config: Any, workdir: str) -> int:
    """Prints a line for each check of a training; returns 1 where one fails, else 0."""
    from ldm_jax.distributed.processes import is_first
    from ldm_jax.plan.dry_run import dry_run

    failed = False
    for check in dry_run(config, workdir):
        failed |= not check.passed
        if is_first():
            verdict = "ok" if check.passed else "FAILED"
            print(f"{check.name:8}{verdict:8}{check.text}", flush=True)
    return int(failed)


def main() -> None:
    """Runs ``ldm-train``."""
    define_config_flag()
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run, also gs:// or s3://: checkpoints, previews, metrics and the model.",
    )
    flags.DEFINE_integer(
        "restore_step",
        None,
        "Resume from this checkpoint, not the newest; later ones are set aside.",
        lower_bound=0,
    )
    flags.DEFINE_bool(
        "dry_run",
        False,
        "Check config, data, memory and storage, print a line for each, and exit without training "
        "(status 1 where one fails).",
    )
    flags.DEFINE_bool(
        "distributed", False, "Join the other processes of a TPU pod, GKE, SLURM or Open MPI job."
    )
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where JAX does not find the processes."
    )
    flags.DEFINE_integer("processes", None, "Number of processes, with --coordinator.")
    flags.DEFINE_integer("process_index", None, "Index of this process, with --coordinator.")
    flags.mark_flags_as_required(["config", "workdir"])
    sys.argv = with_config_path(sys.argv)
    cli.run(train)
