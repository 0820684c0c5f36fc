r"""A LoRA of Stable Diffusion v1 at 512x512 pixels, of its UNet and its text encoder.

    ldm-convert v1-5-pruned-emaonly.safetensors --out runs/sd_v1
    ldm-train --config=sd_v1_lora --config.data.path=IMAGES --workdir=runs/sd_v1_lora
    ldm-convert export runs/sd_v1_lora/model --to kohya --out style.safetensors
    ldm-sample --model=runs/sd_v1 --lora=runs/sd_v1_lora/model --prompt="a harbour at dawn"

The same config trains a LoRA of Stable Diffusion 2.x: --config.model.path of a converted one. With
--config.adapter.targets='("^unet/.*/attn",)' the text encoder stays as it is. Not trained by this
project: it needs an accelerator.
"""

import ml_collections

from ldm_jax.configs.common import base, short
from ldm_jax.configs.presets import lora_of


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short run on the demo model."""
    config = base("lora")
    lora_of(config, path="runs/sd_v1", like="sd_v1", size=(512, 512))
    config.steps, config.batch_size = 2000, 4
    config.optim.update(lr=1e-4, warmup=100)
    config.adapter.update(rank=16, alpha=16.0)
    # The attention of the UNet, and of the text encoder.
    config.adapter.targets = (
        r"^unet/.*/attn\d/to_(q|k|v|out)$",
        r"^conditioner/.*(layers_\d+/(q|k|v|out)|attn_\d+/to_(q|k|v|out))$",
    )
    if variant == "smoke":
        short(config)
        config.dtype = config.base_dtype = "float32"
        config.data.update(size=(64, 64), num_workers=0)
        config.model.update(path="emoji", like="")
    elif variant:
        raise ValueError(f"sd_v1_lora has no variant {variant!r}; choose smoke")
    return config
