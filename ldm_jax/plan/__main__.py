"""`python -m ldm_jax.plan` runs the `ldm-plan` command."""

import sys

from ldm_jax.cli import start_plan

if __name__ == "__main__":
    sys.exit(start_plan())
