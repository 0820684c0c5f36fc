r"""Emoji from CLIP's vectors of similar emoji (Blattmann et al. 2022, arXiv:2204.11824).

    ldm-train --config=emoji_rdm --config.data.path=emoji64.zip --workdir=runs/emoji_rdm
    ldm-sample --model runs/emoji_rdm/model --clip runs/emoji_clip/model --prompt "red apple" \
      --neighbors 4 --database runs/emoji_embeddings

Reads the CLIP model of `emoji_clip` and the database that `ldm-data embed` wrote with it. Starts
from the demo's UNet and uses its first stage.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.emoji_clip import DIM
from ldm_jax.configs.emoji_presets import emoji_diffusion, smoke


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short run on boxes of the bundled images."""
    conditioner = {"kind": "embeddings", "dim": DIM, "count": 4}
    config = emoji_diffusion(conditioner, context=True, guidance=3.0)
    config.model.unet.context_dim = DIM
    config.data.condition = section(database="runs/emoji_embeddings", clip="runs/emoji_clip/model")
    if variant == "smoke":
        # Without a trained CLIP: a colour and a box for each object of a scene.
        config.data.update(source="scenes", count=50, objects=3)
        config.data.update(split_column="scene", holdout=0.02)
        config.data.condition = section(column="vectors")
        config.model.conditioner.update(dim=7, count=1)
        config.model.unet.context_dim = 7
    return smoke(config, variant)
