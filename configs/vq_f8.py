"""VQ autoencoder, f = 8, as released (Rombach et al. 2022), on 256x256 crops.

    python train.py --config=configs/vq_f8.py --config.data.path=PICTURES --workdir=runs/vq_f8 \\
        --config.loss.vgg16=FILE --config.loss.lpips_heads=FILE

Not trained here: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.released import first_stage


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a short, narrow one on the pictures that ship with the package."""
    return first_stage("vq_f8", variant, weight=0.6, start=1, layers=2)
