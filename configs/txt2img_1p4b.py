r"""The 1.45-billion-parameter text-to-image model of latent diffusion.

From Rombach et al. 2022, table 15: 256x256 images, a BERT-style encoder trained with the UNet.

    ldm-data encode txt2img_1p4b --config.data.path=IMAGES --out=CACHE
    ldm-train --config=txt2img_1p4b --config.data.path=IMAGES --config.data.cache=CACHE \
        --workdir=runs/txt2img_1p4b

Reads its first stage from runs/kl_f8/model. docs/scale.md gives its memory and time by topology.
Not trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.common import base
from ldm_jax.configs.presets import sd_unet, smoke, text_to_image


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    config = base("diffusion")
    config.steps = 390_000
    config.batch_size = 680
    config.data.update(size=(256, 256), flip=False)
    config.optim.lr = 1e-4
    text_to_image(config, sd_unet(context_dim=1280), size=(256, 256), guidance=5.0)
    config.model.conditioner.update(kind="bert", dim=1280, depth=32)
    if variant == "smoke":
        smoke(config)
        config.model.conditioner.update(dim=64, depth=1, heads=2)
    elif variant:
        raise ValueError(f"txt2img_1p4b has no variant {variant!r}; choose smoke")
    return config
