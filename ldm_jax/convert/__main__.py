"""`python -m ldm_jax.convert` runs the `ldm-convert` command."""

import sys

from ldm_jax.cli import start_convert

if __name__ == "__main__":
    sys.exit(start_convert())
