"""A small CLIP on 64x64 emoji and their captions, for databases of embeddings.

    ldm-train --config=emoji_clip --config.data.path=emoji64.zip --workdir=runs/emoji_clip
    ldm-data embed emoji_clip --config.data.path=emoji64.zip --clip=runs/emoji_clip/model --out=DIR

`emoji_rdm` trains on the neighbours in that database. Neither has been trained to the end yet.
"""

import ml_collections

from ldm_jax.configs.common import base, section, short

DIM = 64  # of the space that texts and pictures share
TOWER = {"num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": DIM}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short run on the bundled images."""
    config = base("contrastive")
    config.steps = 2000
    config.save_every = config.eval_every = config.preview_every = 250
    config.batch_size = 128
    config.ema = 0.99
    config.data.update(path="emoji64.zip", split_column="hexcode", holdout=0.05)
    config.data.caption = "{text}, {style} style"
    config.optim.update(lr=1e-3, warmup=100, decay="cosine", final=0.02, clip=1.0, b2=0.98)
    config.optim.weight_decay = 0.1
    config.model.conditioner = section(
        kind="clip", hidden_size=128, intermediate_size=512, max_position_embeddings=24, **TOWER
    )
    config.model.vision = section(
        kind="vit", hidden_size=128, intermediate_size=512, image_size=64, patch_size=16, **TOWER
    )
    if variant == "smoke":
        short(config)
    elif variant:
        raise ValueError(f"emoji_clip has no variant {variant!r}; choose smoke")
    return config
