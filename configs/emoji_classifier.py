"""A classifier of the kinds of emoji_class in noisy latents, which guides the demo's model.

    ldm-train --config=emoji_classifier --config.data.path=emoji64.zip --workdir=runs/classifier
    ldm-sample --classifier runs/classifier/model --classifier_scale 3 --class heart --prompt ""

The demo's own conditions are its captions; an empty one leaves the choice to the classifier.
"""

import ml_collections

from ldm_jax.configs.common import base, section, short
from ldm_jax.configs.emoji_presets import KINDS


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant`` is "" or "smoke" (a short run of a smaller classifier)."""
    config = base("classifier")
    config.steps = 3000
    config.save_every = config.eval_every = config.preview_every = 500
    config.batch_size = 32
    config.ema = 0.998
    config.data.update(path="emoji64.zip", split_column="hexcode", holdout=0.05)
    config.data.condition = section(column="subgroup")
    config.data.where = section(subgroup=KINDS)
    config.optim.update(lr=5e-4, warmup=100, decay="cosine", final=0.02, clip=1.0)
    config.optim.weight_decay = 0.01  # the original's
    config.model.path = "pkg:assets/emoji"
    if variant == "smoke":
        short(config)
        config.model.classifier.update(
            model_channels=32, channel_mult=(1, 2), attention_resolutions=(2,), norm_groups=16
        )
    elif variant:
        raise ValueError(f"there is no variant {variant!r}; choose smoke")
    return config
