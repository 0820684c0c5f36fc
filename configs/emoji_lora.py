r"""A LoRA of the demo: a style that it has not seen, white lines on blue.

    python tools/make_style.py emoji64.zip --out blueprint64.zip
    ldm-train --config=emoji_lora --workdir=runs/emoji_lora
    ldm-sample --model=emoji --lora=runs/emoji_lora/model --prompt="rocket, blueprint style"

Rank 8 in every attention layer is 1.1 % of the demo's parameters.
"""

import ml_collections

from ldm_jax.configs.common import base, short


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short run on the bundled images."""
    config = base("lora")
    config.steps = 1500
    config.save_every = config.eval_every = config.preview_every = 500
    config.batch_size = 16
    config.ema = 0.99
    config.data.update(path="blueprint64.zip", caption="{text}, {style} style")
    config.data.update(split_column="hexcode", holdout=0.05)
    config.optim.update(
        lr=2e-3, warmup=50, decay="cosine", final=0.02, clip=1.0, b2=0.99, weight_decay=0.0
    )
    config.loss.update(caption_dropout=0.1, timestep_shift=3.0)
    config.preview_captions = tuple(
        f"{concept}, blueprint style" for concept in ("red apple", "dog face", "rocket", "key")
    )
    config.model.path = "emoji"
    config.adapter.update(rank=8, alpha=8.0)
    if variant == "smoke":
        short(config)
    elif variant:
        raise ValueError(f"emoji_lora has no variant {variant!r}; choose smoke")
    return config
