"""Runs the `ldm-train` command; see ``python train.py --help``."""

from ldm_jax.cli.train import main

if __name__ == "__main__":
    main()
