"""Runs ``ldm-sample`` from a checkout."""

from ldm_jax.cli.sample import main

if __name__ == "__main__":
    main()
