r"""Textual inversion of the demo: a word for a style that it has not seen, white lines on blue.

    python tools/make_style.py emoji64.zip --out blueprint64.zip
    ldm-train --config=emoji_inversion --workdir=runs/emoji_inversion
    ldm-sample --model=emoji --embedding=runs/emoji_inversion/model \
        --prompt="rocket, <blueprint> style"

Four vectors of 128 numbers are all that is trained: the word finds what the model can draw already,
where a LoRA (emoji_lora) teaches it what it cannot.
"""

import ml_collections

from ldm_jax.configs.common import base, short


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short run on the bundled images."""
    config = base("inversion")
    config.steps = 500
    config.save_every = config.eval_every = config.preview_every = 250
    config.batch_size = 16
    config.ema = 0.0
    config.data.update(path="blueprint64.zip", caption="{text}, <blueprint> style")
    config.data.update(split_column="hexcode", holdout=0.05)
    config.optim.update(lr=2e-2, warmup=20, decay="cosine", final=0.02, clip=1.0, b2=0.99)
    config.loss.update(caption_dropout=0.0, timestep_shift=3.0)
    config.preview_captions = tuple(
        f"{concept}, <blueprint> style" for concept in ("red apple", "dog face", "rocket", "key")
    )
    config.model.path = "emoji"
    config.adapter.update(word="<blueprint>", vectors=4, initial="noto")
    if variant == "smoke":
        short(config)
    elif variant:
        raise ValueError(f"emoji_inversion has no variant {variant!r}; choose smoke")
    return config
