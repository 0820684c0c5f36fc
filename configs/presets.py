"""Fields that the text-to-image models of the family share."""

from typing import Any

import ml_collections

from ldm_jax.configs.common import section, short
from ldm_jax.configs.released import FIRST_STAGES


def sd_unet(context_dim: int) -> ml_collections.ConfigDict:
    """Returns the UNet of txt2img-1p4B and Stable Diffusion v1 (860 to 872 million parameters)."""
    return section(
        in_channels=4,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        attention_resolutions=(4, 2, 1),
        num_heads=8,
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=context_dim,
        legacy=False,
    )


def text_to_image(
    config: ml_collections.ConfigDict,
    unet: ml_collections.ConfigDict,
    size: tuple[int, int],
    guidance: float,
) -> None:
    """Sets the fields that do not depend on the text encoder, and a mesh for accelerators."""
    config.dtype = "bfloat16"
    config.remat = "blocks"
    config.mesh.zero1 = True
    config.data.num_workers = 8
    config.optim.mu_dtype = "bfloat16"
    config.scale_factor_batches = 8
    model = config.model
    model.objective = "eps"
    model.scale_factor = 0.18215
    model.schedule = section(
        beta_schedule="linear", linear_start=0.00085, linear_end=0.012, timesteps=1000
    )
    model.first_stage = section(path="runs/kl_f8/model", **FIRST_STAGES["kl_f8"])
    model.conditioner = section()
    model.unet = unet
    model.sampling = section(size=size, steps=50, guidance=guidance)


def smoke(config: Any) -> None:
    """Makes a run of a minute: a narrow UNet on the bundled first stage and images."""
    short(config)
    config.dtype = "float32"
    config.data.update(size=(64, 64), num_workers=0)
    config.optim.warmup = 0
    del config.model.scale_factor  # measured
    config.model.first_stage = section(path="pkg:assets/emoji")
    narrow = {
        "model_channels": 32,
        "channel_mult": (1, 2),
        "attention_resolutions": (2,),
        "num_res_blocks": 1,
    }
    config.model.unet.update(in_channels=8, out_channels=8, context_dim=64, num_heads=2, **narrow)
    config.model.sampling.update(size=(64, 64), steps=10)


def lora_of(
    config: ml_collections.ConfigDict, *, path: str, like: str, size: tuple[int, int]
) -> None:
    """Sets what the LoRA of a large frozen model needs on one accelerator.

    Args:
      config: A config of the task "lora".
      path: The model directory.
      like: The config of the model, for plans without it.
      size: Height and width in pixels.
    """
    config.ema = 0.0
    config.dtype = config.base_dtype = "bfloat16"
    config.remat = "blocks"
    config.save_every = config.eval_every = config.preview_every = 500
    config.data.update(size=size, flip=False, num_workers=4)
    config.optim.update(decay="cosine", final=0.02, clip=1.0, weight_decay=0.01)
    config.loss.caption_dropout = 0.05
    config.model.update(path=path, like=like)
