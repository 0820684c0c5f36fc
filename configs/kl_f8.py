r"""The KL autoencoder with f = 8 of latent diffusion and Stable Diffusion v1.

From Rombach et al. 2022, on 256x256 crops; 83.7 million parameters.

    ldm-train --config=kl_f8 --config.data.path=IMAGES --workdir=runs/kl_f8 \
        --config.loss.vgg16=FILE --config.loss.lpips_heads=FILE

docs/scale.md gives its memory and time by topology.
Not trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.released import first_stage


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    config = first_stage("kl_f8", variant, weight=0.5, start=50_001)
    if not variant:
        config.update(dtype="bfloat16", remat="blocks", ema=0.0)
        config.mesh.zero1 = True
        config.data.num_workers = 8
    return config
