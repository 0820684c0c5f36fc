r"""A transformer over the codes of vqgan_f16: pictures without a condition, or of a class.

Esser et al. 2021 (arXiv:2012.09841), tables 5 and 8: 256x256 pictures of 16x16 codes. The variants
:class has the 1000 classes of ImageNet; :emoji and :emoji_class are small, on emoji_vq:coarse.

    ldm-train --config=vqgan_transformer:class --config.data.path=IMAGES \
        --config.model.first_stage.path=runs/vqgan_f16/model --workdir=runs/vqgan_transformer

The first two are not trained by this project: they need accelerators.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.emoji_presets import KINDS
from ldm_jax.configs.transformers import emoji, finish, transformer


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant`` is "", "class", "emoji", "emoji_class" or "smoke"."""
    if variant in ("emoji", "emoji_class"):
        config = emoji()
        if variant == "emoji_class":
            config.data.condition = section(column="subgroup")
            config.data.where = section(subgroup=KINDS)
            config.model.conditioner = section(kind="label")
        return config
    if variant not in ("", "class", "smoke"):
        raise ValueError(
            f"vqgan_transformer has no variant {variant!r}; choose class, emoji, emoji_class or "
            "smoke"
        )
    config = transformer(1024, 1, n_layer=24, n_head=16, n_embd=1024)
    config.model.conditioner = section(kind="start", token=0)
    if variant == "class":
        config.model.transformer.update(n_layer=48, n_head=24, n_embd=1536)
        config.model.conditioner = section(kind="label", n_classes=1000)
        config.data.condition = section(column="label")
        config.model.sampling.update(top_k=250, top_p=1.0)
    return finish(config, variant)
