"""Emoji of a class: twelve kinds (birds, fruits, hearts, clocks ...); nine broad groups or eight styles as the variants :group and :style.

    python -m ldm_jax.data encode configs/emoji_class.py --config.data.path=emoji64.zip --out=runs/class_cache
    python train.py --config=configs/emoji_class.py --config.data.path=emoji64.zip --config.data.cache=runs/class_cache --workdir=runs/emoji_class

begins with the demo's UNet and takes its first stage; the cache may be left out. One more class than the data have is the null class, for guidance.
Both take 17 minutes on one CPU core; the loss on held-out concepts ends at 0.331; what it makes: docs/condition_class.png.
"""

import ml_collections

from configs.common import section
from configs.emoji_presets import CONTEXT, KINDS, emoji_diffusion, smoke


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run, "group" and "style" the same by those columns of all pictures; "smoke" a short one on those that ship."""
    # n_classes comes from the data: the sorted names in the column, and the null class.
    config = emoji_diffusion({"kind": "class", "embed_dim": CONTEXT}, context=True, guidance=3.0)
    config.steps = 2500
    config.data.condition = section(column=variant if variant in ("group", "style") else "subgroup")
    # With none of DDIM's noise objects fray; with half of it a group's pictures are nearly alike.
    config.model.sampling.update(eta=1.0, temperature=0.85)
    if variant in ("group", "style"):
        return config
    config.data.where = section(subgroup=KINDS)
    return smoke(config, variant)
