"""Inpainting at 256x256, the released inpainting_big.

The latents of the masked image and the mask are concatenated to the noisy latents.

    ldm-train --config=inpainting --config.data.path=IMAGES --workdir=runs/inpainting

Reads its first stage from runs/vq_f4/model. Not trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.released import diffusion, finish


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    config = diffusion(
        "vq_f4",
        linear_end=0.0205,
        batch=64,
        steps=500_000,
        lr=1e-4,
        in_channels=3 + 3 + 1,
        model_channels=256,
        attention_resolutions=(8, 4, 2),
        channel_mult=(1, 2, 3, 4),
        num_heads=8,
        resblock_updown=True,
    )
    config.loss.update(kind="l1", caption_dropout=0.0)
    config.data.condition = section(kinds=("boxes", "strokes", "outpaint"))
    config.model.conditioner = section(kind="joined", of="masked", channels=3 + 1, size=(64, 64))
    if variant == "smoke":
        config.model.unet.in_channels = 3 + 8 + 1  # the demo's latents have 8 channels
        config.model.conditioner.update(channels=8 + 1, size=(16, 16))
    return finish(config, variant)
