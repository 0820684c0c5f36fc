"""Emoji of a class: nine groups (smileys, food, flags ...), or eight styles with --config.data.condition.column=style.

    python train.py --config=configs/emoji_class.py --config.data.path=emoji64.zip --workdir=runs/emoji_class

begins with the demo's UNet and takes its first stage. One more class than the data have is the null class, for guidance. 45 minutes on
one CPU core; the loss on held-out concepts ends at 0.333; what it makes: docs/condition_class.png.
"""

import ml_collections

from configs.common import section
from configs.emoji_presets import CONTEXT, emoji_diffusion, smoke


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a short one on the pictures that ship with the package."""
    # n_classes comes from the data: the sorted names in the column, and the null class.
    config = emoji_diffusion({"kind": "class", "embed_dim": CONTEXT}, context=True, guidance=3.0)
    config.steps = 3000
    config.data.condition = section(column="group")
    # With none of DDIM's noise objects fray; with half of it a group's pictures are nearly alike.
    config.model.sampling.update(eta=1.0, temperature=0.85)
    return smoke(config, variant)
