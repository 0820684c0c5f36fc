"""Four times as large, 64x64 to 256x256: the small picture is joined to the noisy latents (the released bsr_sr).

    python train.py --config=configs/super_resolution.py --config.data.path=PICTURES --workdir=runs/super_resolution

takes the first stage vq_f4 from runs/vq_f4/model. Not trained here: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.released import diffusion, finish


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a short, narrow one on the pictures that ship with the package."""
    config = diffusion(
        "vq_f4",
        linear_end=0.0155,
        batch=64,
        steps=860_000,
        lr=6.4e-5,
        in_channels=3 + 3,
        model_channels=160,
        attention_resolutions=(16, 8),
        channel_mult=(1, 2, 2, 4),
        num_head_channels=32,
    )
    config.loss.caption_dropout = 0.0
    config.data.condition = section(kinds=("bsr",))  # Zhang et al. 2021
    config.model.conditioner = section(kind="joined", of="picture", channels=3, size=(64, 64))
    if variant == "smoke":
        config.model.conditioner.size = (16, 16)
    return finish(config, variant)
