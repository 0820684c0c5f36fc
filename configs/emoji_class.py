"""Emoji of a class: twelve kinds (birds, fruits, hearts, clocks ...); nine groups, or faces in seven styles, as the variants :group and :style.

    python -m ldm_jax.data encode configs/emoji_class.py --config.data.path=emoji64.zip --out=runs/class_cache
    python train.py --config=configs/emoji_class.py --config.data.path=emoji64.zip --config.data.cache=runs/class_cache --workdir=runs/emoji_class

begins with the demo's UNet and takes its first stage; the cache may be left out. One more class than the data have is the null class, for guidance.
Both take 17 minutes on one CPU core; the loss on held-out concepts ends at 0.331; what it makes: docs/condition_class.png.
:group ends at 0.340, docs/condition_group.png (11 minutes on two cores); :style at 0.304, docs/condition_style.png (17 on one).
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
    """``variant`` "" is the full run by kind, "group" one by group, "style" one of faces by style; "smoke" a short one on the pictures that ship."""
    if variant not in ("", "group", "style", "smoke"):
        raise ValueError(f"there is no variant {variant!r}; there are group, style and smoke")
    # n_classes comes from the data: the sorted names in the column, and the null class.
    config = emoji_diffusion({"kind": "class", "embed_dim": CONTEXT}, context=True, guidance=3.0)
    config.steps = 2500
    config.data.condition = section(column=variant if variant in ("group", "style") else "subgroup")
    # With none of DDIM's noise objects fray; with half of it a group's pictures are nearly alike.
    config.model.sampling.update(eta=1.0, temperature=0.85)
    if variant == "group":
        config.data.where = section(subgroup=GROUP_KINDS)
        return config
    if variant == "style":
        config.data.where = section(subgroup=FACES, style=FACE_STYLES)
        # More makes mouths purple or green: the styles are plain without it.
        config.model.sampling.guidance = 1.5
        return config
    config.data.where = section(subgroup=KINDS)
    return smoke(config, variant)
