"""Trains a first stage or a latent diffusion model: python train.py --config=configs/emoji.py --workdir=runs/emoji

Run the same command again to go on where it stopped. Any field of the config can be changed: --config.optim.lr=1e-4
"""

from absl import flags
from ml_collections import config_flags

from ldm_jax.cli import run as cli

config_flags.DEFINE_config_file(
    "config", None, "The config file; configs/NAME.py:smoke is a short run.", lock_config=True
)
flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, previews, metrics and the model."
)
flags.DEFINE_bool(
    "distributed", False, "Join the other processes of a TPU pod, GKE, SLURM or Open MPI job."
)
flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where jax does not find the processes by itself."
)
flags.DEFINE_integer("processes", None, "How many processes there are, with --coordinator.")
flags.DEFINE_integer("process_index", None, "Which of them this is, with --coordinator.")
flags.mark_flags_as_required(["config", "workdir"])

if __name__ == "__main__":
    cli.run(cli.train)
