"""``python -m ldm_jax.eval``: the command ldm-eval."""

import sys

from ldm_jax.cli.eval import main

if __name__ == "__main__":
    sys.exit(main())
