"""Runs the `ldm-train` command; see ``python train.py --help``."""

from ldm_jax.cli import start_train

if __name__ == "__main__":
    start_train()
