"""Unconditional faces, CelebA-HQ at 256x256 (Rombach et al. 2022, table 12).

    python train.py --config=configs/celebahq.py --config.data.path=PICTURES --workdir=runs/celebahq

Not trained here: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.released import UNCONDITIONAL, diffusion, finish


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a short, narrow one on the pictures that ship with the package."""
    config = diffusion(
        "vq_f4", linear_end=0.0195, batch=48, steps=410_000, lr=9.6e-5, **UNCONDITIONAL
    )
    return finish(config, variant)
