"""Scenes of emoji from segmentation maps.

Label 0 is the background, 1 to 8 are kinds of emoji in alphabetical order.

    ldm-train --config=emoji_semantic --config.data.path=emoji64.zip --workdir=runs/emoji_semantic

Starts from the demo's UNet and uses its first stage. docs/conditions.md shows results.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.emoji_presets import PLAIN_KINDS, emoji_diffusion, smoke


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    # One-hot 64x64 labels are halved twice and mapped to 9 channels (the original maps to 3).
    conditioner = {
        "kind": "rescale",
        "size": (64, 64),
        "n_stages": 2,
        "in_channels": 9,
        "out_channels": 9,
    }
    config = emoji_diffusion(conditioner, joined=9)
    config.steps = 3500
    config.data.update(source="scenes", count=8000, objects=3, smallest=0.4, largest=0.7)
    config.data.update(column="subgroup", classes=PLAIN_KINDS, split_column="scene", holdout=0.02)
    config.data.background = 255  # the demo's first stage was trained on white backgrounds
    config.data.condition = section(column="map")
    # Without DDIM's noise shapes fray; at half of it they stay empty.
    config.model.sampling.update(eta=1.0, temperature=0.85)
    if variant == "smoke":
        config.data.count = 200
    return smoke(config, variant)
