"""Trains a first stage or a latent diffusion model: python train.py --config=configs/emoji.py --workdir=runs/emoji

Run the same command again to go on where it stopped. Any field of the config can be changed: --config.optim.lr=1e-4
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file; configs/NAME.py:smoke is a short run.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, previews, metrics and the model.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"train.py: unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.INFO)
    from ldm_jax.train.loop import train

    train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    app.run(main)
