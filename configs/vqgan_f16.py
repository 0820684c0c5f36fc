"""VQGAN, f = 16, as taming-transformers released it for ImageNet (Esser et al. 2021), on 256x256 crops.

    python train.py --config=configs/vqgan_f16.py --config.data.path=PICTURES --workdir=runs/vqgan_f16 \\
        --config.loss.vgg16=FILE --config.loss.lpips_heads=FILE

Not trained here: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.released import first_stage


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a short, narrow one on the pictures that ship with the package."""
    return first_stage("vqgan_f16", variant, weight=0.8, start=250_001)
