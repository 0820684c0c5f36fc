"""Scenes of emoji from labelled bounding boxes.

    ldm-train --config=emoji_layout --config.data.path=emoji64.zip --workdir=runs/emoji_layout

Starts from the demo's UNet and uses its first stage. docs/conditions.md shows results.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.emoji_presets import CONTEXT, PLAIN_KINDS, emoji_diffusion, smoke


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    # Three tokens for each of three boxes, with corners on a 17 x 17 grid (the edges of the
    # latents' pixels), and one token for "no box". The original has 92 tokens of 8192: 30 boxes on
    # a 90 x 90 grid, and the crop. Each corner is its own token, so a finer grid is learnt slower.
    conditioner = {
        "kind": "tokens",
        "dim": CONTEXT,
        "depth": 2,
        "heads": 4,
        "head_dim": 32,
        "embed_std": 1.0,
    }
    conditioner |= {"max_seq_len": 9, "vocab_size": 17 * 17 + 1}
    config = emoji_diffusion(conditioner, context=True, guidance=4.0)
    config.steps = 4500
    config.data.update(source="scenes", count=8000, objects=3, smallest=0.4, largest=0.7)
    config.data.update(column="subgroup", classes=PLAIN_KINDS, split_column="scene", holdout=0.02)
    config.data.background = 255  # the demo's first stage was trained on white backgrounds
    config.data.condition = section(column="boxes")
    # Without DDIM's noise clocks and hearts fray.
    config.model.sampling.update(eta=1.0, temperature=0.85)
    if variant == "smoke":
        config.data.count = 200
    return smoke(config, variant)
