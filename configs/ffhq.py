"""Unconditional faces: FFHQ at 256x256 (Rombach et al. 2022, table 12).

    ldm-train --config=ffhq --config.data.path=IMAGES --workdir=runs/ffhq

Not trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.released import UNCONDITIONAL, diffusion, finish


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    config = diffusion(
        "vq_f4", linear_end=0.0195, batch=42, steps=635_000, lr=8.4e-5, **UNCONDITIONAL
    )
    return finish(config, variant)
