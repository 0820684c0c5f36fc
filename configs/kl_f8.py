"""The KL autoencoder with f = 8 of latent diffusion and Stable Diffusion v1 (Rombach et al. 2022), on 256x256 pictures.

    python train.py --config=configs/kl_f8.py --config.data.path=PICTURES --workdir=runs/kl_f8

83.7 million parameters. What it needs on which chips: docs/scale.md; it has not been trained here. config.loss.vgg16 and config.loss.lpips_heads are
files of the perceptual distance's published weights.
"""

import ml_collections

from ldm_jax.configs.released import first_stage


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a short, narrow one on the pictures that ship with the package."""
    config = first_stage("kl_f8", variant, weight=0.5, start=50_001)
    if not variant:
        config.update(dtype="bfloat16", remat="blocks", ema=0.0)
        config.mesh.zero1 = True
        config.data.num_workers = 8
    return config
