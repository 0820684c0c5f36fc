"""Four-fold super-resolution, 64x64 to 256x256, the released bsr_sr.

The small image is concatenated to the noisy latents.

    ldm-train --config=super_resolution --config.data.path=IMAGES --workdir=runs/super_resolution

Reads its first stage from runs/vq_f4/model. Not trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.released import diffusion, finish


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
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
