"""KL autoencoder, f = 16, as released (Rombach et al. 2022), on 256x256 crops.

    python train.py --config=configs/kl_f16.py --config.data.path=PICTURES --workdir=runs/kl_f16 \\
        --config.loss.vgg16=FILE --config.loss.lpips_heads=FILE

Not trained here: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.released import first_stage


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a short, narrow one on the pictures that ship with the package."""
    return first_stage("kl_f16", variant, weight=0.5, start=50_001)
