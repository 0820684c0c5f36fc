"""The demo's first stage: a KL autoencoder with f = 4 on 64x64 emoji.

    ldm-train --config=emoji_kl --config.data.path=emoji64.zip --workdir=runs/emoji_kl

Reaches a PSNR of 28 dB on images of held-out concepts.
"""

import ml_collections

from ldm_jax.configs.common import base, section, short

FIRST_STAGE = {
    "kind": "kl",
    "embed_dim": 8,
    "z_channels": 8,
    "ch": 32,
    "ch_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (),
    "attn_type": "none",
    "norm_groups": 8,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    config = base("autoencoder")
    config.steps = 1800
    config.batch_size = 8
    config.ema = 0.995
    config.data.update(path="emoji64.zip", split_column="hexcode", holdout=0.05, flip=True)
    config.optim.update(lr=1e-3, warmup=100, decay="cosine", final=0.02, clip=0.0, b2=0.99)
    config.loss.update(kind="l1", kl_weight=3e-3)
    config.model.first_stage = section(**FIRST_STAGE)
    if variant == "smoke":
        short(config, steps=30)
    elif variant:
        raise ValueError(f"emoji_kl has no variant {variant!r}; choose smoke")
    return config
