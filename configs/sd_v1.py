r"""Stable Diffusion v1: text to 512x512 images, with CLIP ViT-L/14's text tower, frozen.

    ldm-data encode sd_v1 --config.data.path=IMAGES --out=CACHE
    ldm-train --config=sd_v1 --config.data.path=IMAGES --config.data.cache=CACHE \
        --workdir=runs/sd_v1

Reads its first stage from runs/kl_f8/model and the text tower from config.model.conditioner.path.
Batch size, learning rate and warm-up are those of the released model's card. docs/scale.md gives
its memory and time by topology. Not trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.common import base
from ldm_jax.configs.presets import sd_unet, smoke, text_to_image


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
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
        # CLIP's weights are not bundled, so a small tower is trained.
        config.model.conditioner.update(**width, frozen=False, path="")
    elif variant:
        raise ValueError(f"sd_v1 has no variant {variant!r}; choose smoke")
    return config
