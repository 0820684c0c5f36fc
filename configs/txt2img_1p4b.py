"""The text-to-image model of latent diffusion (Rombach et al. 2022, 1.45 billion parameters): 256x256 pictures, a BERT-style encoder trained with it.

    python -m ldm_jax.data encode configs/txt2img_1p4b.py --config.data.path=PICTURES --out=CACHE
    python train.py --config=configs/txt2img_1p4b.py --config.data.path=PICTURES --config.data.cache=CACHE --workdir=runs/txt2img_1p4b

takes the first stage of configs/kl_f8.py from runs/kl_f8/model. Batch, learning rate and number of steps are the paper's (table 15). What it needs on
which chips: docs/scale.md; it has not been trained here.
"""

import ml_collections

from ldm_jax.configs.common import base
from ldm_jax.configs.presets import sd_unet, smoke, text_to_image


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a narrow one of a minute on the pictures that ship with the package."""
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
        raise ValueError(f"txt2img_1p4b has no variant {variant!r}; there is smoke")
    return config
