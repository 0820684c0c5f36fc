"""Scenes of emoji from boxes, each with one of eight kinds of emoji as its label: fruits, hearts, clocks ...

    python train.py --config=configs/emoji_layout.py --config.data.path=emoji64.zip --workdir=runs/emoji_layout

begins with the demo's UNet and takes its first stage. 39 minutes on one CPU core beside other work; the loss on held-out scenes ends at 0.157; of 24
samples of six of them 94 % of what is painted lies in the boxes, and 74 % of the boxes are painted: docs/condition_layout.png.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.emoji_presets import CONTEXT, PLAIN_KINDS, emoji_diffusion, smoke


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a short one on the pictures that ship with the package."""
    # Three tokens for each of three boxes, corners on a grid of 17 x 17, the edges of the latents' pixels, and a token for no box (the original's 92
    # tokens of 8192: 30 boxes, 90 x 90, and the crop). A finer grid is learnt more slowly: every corner is a word of its own.
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
    config.data.background = 255  # the demo's first stage has seen white ones alone
    config.data.condition = section(column="boxes")
    config.model.sampling.update(
        eta=1.0, temperature=0.85
    )  # with none of DDIM's noise clocks and hearts fray
    if variant == "smoke":
        config.data.count = 200
    return smoke(config, variant)
