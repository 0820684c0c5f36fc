r"""A LoRA of Stable Diffusion XL base at 1024x1024 pixels, of its UNet.

    ldm-convert sd_xl_base_1.0.safetensors --out runs/sdxl_base
    ldm-data encode sdxl_lora --config.data.path=IMAGES --out=CACHE
    ldm-train --config=sdxl_lora --config.data.path=IMAGES --config.data.cache=CACHE \
        --workdir=runs/sdxl_lora
    ldm-convert export runs/sdxl_lora/model --to kohya --out style.safetensors

The sizes and crops of the pictures are part of the condition, as in the model's own training. Not
trained by this project: it needs an accelerator.
"""

import ml_collections

from ldm_jax.configs.common import base, short
from ldm_jax.configs.presets import lora_of


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short run on the demo model."""
    config = base("lora")
    lora_of(config, path="runs/sdxl_base", like="sdxl", size=(1024, 1024))
    config.steps, config.batch_size = 2000, 4
    config.optim.update(lr=1e-4, warmup=100)
    config.adapter.update(rank=16, alpha=16.0)
    if variant == "smoke":
        short(config)
        config.dtype = config.base_dtype = "float32"
        config.data.update(size=(64, 64), num_workers=0)
        config.model.update(path="emoji", like="")
    elif variant:
        raise ValueError(f"sdxl_lora has no variant {variant!r}; choose smoke")
    return config
