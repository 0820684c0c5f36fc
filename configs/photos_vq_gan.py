r"""A VQ first stage (f = 4, 1024 codes) with the original's full loss, on 128x128 crops.

    ldm-train --config=photos_vq_gan --config.data.path=photos.zip --workdir=runs/photos_vq_gan \
        --config.loss.vgg16=vgg16.safetensors --config.loss.lpips_heads=lpips_vgg.safetensors

Weights, images and network are those of photos_kl_gan, plus the codebook. docs/first_stages.md has
commands, times and results of the `:small` variants.
"""

import ml_collections

from ldm_jax.configs import photos_kl_gan


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant`` as in photos_kl_gan."""
    config = photos_kl_gan.get_config()
    config.loss.update(codebook_weight=1.0, restart_codes=True)
    config.adversary.update(weight=0.75, cap=10.0, alarm=100.0)
    config.model.first_stage = photos_kl_gan.first_stage(kind="vq", n_embed=1024)
    return photos_kl_gan.vary(config, variant)
