"""`python -m ldm_jax.data` runs the `ldm-data` command."""

import sys

from ldm_jax.cli.data import main

if __name__ == "__main__":
    sys.exit(main())
