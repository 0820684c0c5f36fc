"""`python -m ldm_jax.export` runs the `ldm-export` command."""

import sys

from ldm_jax.cli import start_export

if __name__ == "__main__":
    sys.exit(start_export())
