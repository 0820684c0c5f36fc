"""Stable Diffusion v1 (Rombach et al. 2022): 512x512 pictures, CLIP ViT-L/14's text tower, frozen.

    python -m ldm_jax.data encode configs/sd_v1.py --config.data.path=PICTURES --out=CACHE
    python train.py --config=configs/sd_v1.py --config.data.path=PICTURES --config.data.cache=CACHE --workdir=runs/sd_v1

takes the first stage of configs/kl_f8.py from runs/kl_f8/model and the text tower from config.model.conditioner.path. Batch, learning rate and
warm-up are those of the released model's card. What it needs on which chips: docs/scale.md; it has not been trained here.
"""

import ml_collections

from ldm_jax.configs.common import base
from ldm_jax.configs.presets import sd_unet, smoke, text_to_image


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a narrow one of a minute on the pictures that ship with the package."""
    config = base("diffusion")
    config.steps = 500_000
    config.batch_size = 2048
    config.data.update(size=(512, 512), flip=False)
    config.optim.update(lr=1e-4, warmup=10_000, weight_decay=0.01)
    text_to_image(config, sd_unet(context_dim=768), size=(512, 512), guidance=7.5)
    config.model.conditioner.update(kind="clip", frozen=True, path="runs/clip_text/model")
    if variant == "smoke":
        smoke(config)
        width = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        config.model.conditioner.update(
            **width, frozen=False, path=""
        )  # there are no weights of CLIP to be frozen
    elif variant:
        raise ValueError(f"sd_v1 has no variant {variant!r}; there is smoke")
    return config
