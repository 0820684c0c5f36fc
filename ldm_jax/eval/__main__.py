"""``python -m ldm_jax.eval``: the command ldm-eval."""

import sys

from ldm_jax.cli import start_eval

if __name__ == "__main__":
    sys.exit(start_eval())
