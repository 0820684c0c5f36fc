r"""Segmentation maps of 182 labels to images, the released semantic_synthesis256.

    ldm-train --config=semantic_synthesis --config.data.path=IMAGES \
        --workdir=runs/semantic_synthesis

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
        batch=48,
        steps=500_000,
        lr=4.8e-5,
        in_channels=3 + 3,
        model_channels=128,
        attention_resolutions=(32, 16, 8),
        channel_mult=(1, 4, 8),
        num_heads=8,
    )
    config.loss.update(kind="l1", caption_dropout=0.0)
    config.data.update(source="label_maps", condition=section(column="map"))
    config.model.conditioner = section(
        kind="rescale", size=(256, 256), n_stages=2, in_channels=182, out_channels=3
    )
    if variant == "smoke":
        config.data.update(source="scenes", count=50, objects=3)
        config.model.conditioner.update(size=(64, 64), in_channels=10)
    return finish(config, variant)
