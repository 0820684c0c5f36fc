"""`python -m ldm_jax.data` runs the `ldm-data` command."""

import sys

from ldm_jax.cli import start_data

if __name__ == "__main__":
    sys.exit(start_data())
