r"""Stable Diffusion XL base: fine-tuning of a converted model at 1024x1024 pixels.

    ldm-convert sd_xl_base_1.0.safetensors --out runs/sdxl_base
    ldm-data encode sdxl --config.data.path=IMAGES --out=CACHE
    ldm-train --config=sdxl --config.data.path=IMAGES --config.data.cache=CACHE \
        --config.init=runs/sdxl_base --workdir=runs/sdxl

The UNet starts from the weights of runs/sdxl_base; the text towers and the first stage are taken
from there and stay as they are. Sizes and crops of the pictures are part of the condition. Without
``config.init`` the UNet is trained from scratch. Not trained by this project: needs accelerators.
"""

import ml_collections

from ldm_jax.configs.common import base, section
from ldm_jax.configs.presets import smoke, text_to_image

_TOWER = {"kind": "clip", "vocab_size": 49408, "max_position_embeddings": 77}
CLIP_L = _TOWER | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_G = _TOWER | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
# Sections of towers in the smoke variant.
_NARROW = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    config = base("diffusion")
    config.steps = 20_000
    config.batch_size = 64
    config.data.update(size=(1024, 1024), flip=False)
    config.optim.update(lr=1e-5, warmup=1000, weight_decay=0.01)
    unet = section(
        in_channels=4,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4),
        num_res_blocks=2,
        attention_resolutions=(4, 2),
        num_heads=-1,
        num_head_channels=64,
        num_classes="sequential",
        adm_in_channels=2816,
        use_spatial_transformer=True,
        use_linear_in_transformer=True,
        transformer_depth=(1, 2, 10),
        context_dim=2048,
        legacy=False,
    )
    text_to_image(config, unet, size=(1024, 1024), guidance=5.0)
    model = config.model
    model.scale_factor = 0.13025
    model.first_stage.path = "runs/sdxl_base"
    model.first_stage.force_upcast = True
    model.conditioner = section(
        kind="sdxl",
        clip_l=dict(CLIP_L),
        clip_g=dict(CLIP_G),
        size_dim=256,
        frozen=True,
        path="runs/sdxl_base",
    )
    model.sampling.update(sampler="euler", grid="trailing")
    if variant == "smoke":
        smoke(config)
        # The towers' weights are not bundled, so small ones are trained.
        model.conditioner = section(
            kind="sdxl",
            clip_l=CLIP_L | _NARROW | {"hidden_size": 32},
            clip_g=CLIP_G | _NARROW | {"hidden_size": 32, "projection_dim": 32},
            size_dim=8,
            frozen=False,
            path="",
        )
        model.unet.update(num_head_channels=-1, transformer_depth=(1, 2), adm_in_channels=80)
    elif variant:
        raise ValueError(f"sdxl has no variant {variant!r}; choose smoke")
    return config
