r"""The VQGAN with f = 16 that taming-transformers released for ImageNet.

From Esser et al. 2021, on 256x256 crops.

    ldm-train --config=vqgan_f16 --config.data.path=IMAGES --workdir=runs/vqgan_f16 \
        --config.loss.vgg16=FILE --config.loss.lpips_heads=FILE

Not trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.released import first_stage


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    return first_stage("vqgan_f16", variant, weight=0.8, start=250_001)
