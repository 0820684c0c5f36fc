"""Runs ``ldm-sample`` from a checkout."""

from ldm_jax.cli import start_sample

if __name__ == "__main__":
    start_sample()
