"""`python -m ldm_jax.convert` runs the `ldm-convert` command."""

import sys

from ldm_jax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
