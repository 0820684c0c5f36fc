"""`python -m ldm_jax.export` runs the `ldm-export` command."""

import sys

from ldm_jax.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
