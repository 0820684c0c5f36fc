"""Unconditional faces: CelebA-HQ at 256x256 (Rombach et al. 2022, table 12).

    ldm-train --config=celebahq --config.data.path=IMAGES --workdir=runs/celebahq

Not trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.released import UNCONDITIONAL, diffusion, finish


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    config = diffusion(
        "vq_f4", linear_end=0.0195, batch=48, steps=410_000, lr=9.6e-5, **UNCONDITIONAL
    )
    return finish(config, variant)
