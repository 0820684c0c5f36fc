"""Emoji of a class whose embedding is added to the timestep's: the original's "adm".

    ldm-train --config=emoji_adm --config.data.path=emoji64.zip --workdir=runs/emoji_adm

Twelve kinds as in emoji_class, without attention to the class. One class more than the data have is
the null class for guidance; --config.loss.caption_dropout=0 trains without it, as the original.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.emoji_presets import KINDS, emoji_diffusion, smoke


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant`` is "" or "smoke" (a short run)."""
    # The number of classes comes from the data: the column's sorted values, and the null class.
    config = emoji_diffusion({"kind": "class_vector"}, guidance=3.0)
    config.steps = 2500
    config.data.condition = section(column="subgroup")
    config.data.where = section(subgroup=KINDS)
    config.model.sampling.update(eta=1.0, temperature=0.85)
    return smoke(config, variant)
