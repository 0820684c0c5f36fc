"""A VQ first stage with the whole of the original's loss, on 128x128 crops of a folder or zip of photos: f = 4, 1024 codes.

    python train.py --config=configs/photos_vq_gan.py --config.data.path=photos.zip --workdir=runs/photos_vq_gan \\
        --config.loss.vgg16=vgg16.safetensors --config.loss.lpips_heads=lpips_vgg.safetensors

Weights and pictures as in configs/photos_kl_gan.py, whose network this is but for the codebook. Not trained in full;
docs/first_stages.md has commands, times and results of the `:small` variants.
"""

import ml_collections

from ldm_jax.configs import photos_kl_gan


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` as in configs/photos_kl_gan.py."""
    config = photos_kl_gan.get_config()
    config.loss.update(codebook_weight=1.0, restart_codes=True)
    config.adversary.update(weight=0.75, cap=10.0, alarm=100.0)
    config.model.first_stage = photos_kl_gan.first_stage(kind="vq", n_embed=1024)
    return photos_kl_gan.vary(config, variant)
