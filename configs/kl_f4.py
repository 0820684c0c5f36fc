r"""The released KL autoencoder, f = 4 (Rombach et al. 2022), on 256x256 crops.

    ldm-train --config=kl_f4 --config.data.path=IMAGES --workdir=runs/kl_f4 \
        --config.loss.vgg16=FILE --config.loss.lpips_heads=FILE

Not trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.released import first_stage


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    return first_stage("kl_f4", variant, weight=0.5, start=50_001)
