"""Emoji of a class: twelve kinds (birds, fruits, hearts, clocks ...).

The variants :group and :style have nine groups, and faces in seven styles.

    ldm-train --config=emoji_class --config.data.path=emoji64.zip --workdir=runs/emoji_class

Starts from the demo's UNet and uses its first stage. One class more than the data have is the null
class for guidance. docs/conditions.md shows results of all three variants.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.emoji_presets import (
    CONTEXT,
    FACE_STYLES,
    FACES,
    GROUP_KINDS,
    KINDS,
    emoji_diffusion,
    smoke,
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant`` is "", "group", "style" or "smoke" (a short run)."""
    if variant not in ("", "group", "style", "smoke"):
        raise ValueError(f"emoji_class has no variant {variant!r}; choose group, style or smoke")
    # n_classes comes from the data: the column's sorted values, and the null class.
    config = emoji_diffusion({"kind": "class", "embed_dim": CONTEXT}, context=True, guidance=3.0)
    config.steps = 2500
    config.data.condition = section(column=variant if variant in ("group", "style") else "subgroup")
    # Without DDIM's noise objects fray; at half of it the samples of a group are nearly identical.
    config.model.sampling.update(eta=1.0, temperature=0.85)
    if variant == "group":
        config.data.where = section(subgroup=GROUP_KINDS)
        return config
    if variant == "style":
        config.data.where = section(subgroup=FACES, style=FACE_STYLES)
        # A higher scale colours mouths purple or green, and the styles are clear without it.
        config.model.sampling.guidance = 1.5
        return config
    config.data.where = section(subgroup=KINDS)
    return smoke(config, variant)
