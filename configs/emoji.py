r"""The demo: text to 64x64 emoji.

A UNet on 16x16x8 latents with a small BERT-style text encoder, trained from scratch.

    ldm-data encode emoji --config.data.path=emoji64.zip --out=runs/emoji_cache
    ldm-train --config=emoji --config.data.path=emoji64.zip --config.data.cache=runs/emoji_cache \
        --workdir=runs/emoji

Reads its first stage from runs/emoji_kl/model (emoji_kl). How the shipped model was trained stands
in ldm_jax/assets/emoji/README.md.
"""

import ml_collections

from ldm_jax.configs.common import base, section, short
from ldm_jax.configs.emoji_kl import FIRST_STAGE
from ldm_jax.configs.emoji_presets import CHANNELS, CONTEXT, emoji_unet


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    config = base("diffusion")
    config.steps = 60_000
    config.batch_size = 16
    config.ema = 0.9995
    styles = ("noto", "twemoji", "fluent 3d", "fluent flat")
    concepts = ("red apple", "dog face", "grinning face", "rocket")
    config.preview_captions = tuple(
        f"{concept}, {style} style" for concept in concepts for style in styles
    )
    config.data.update(path="emoji64.zip", caption="{text}, {style} style")
    config.data.update(
        split_column="hexcode", holdout=0.05, pair_columns=("hexcode", "style"), pair_holdout=0.05
    )
    config.optim.update(
        lr=8e-4, warmup=100, decay="cosine", final=0.02, clip=1.0, b2=0.99, weight_decay=0.0
    )
    config.loss.update(caption_dropout=0.1, timestep_shift=3.0)

    model = config.model
    model.objective = "v"
    model.schedule = section(
        beta_schedule="linear", linear_start=0.0015, linear_end=0.0195, timesteps=1000
    )
    # The architecture is given too, so that a plan needs no trained first stage.
    model.first_stage = section(path="runs/emoji_kl/model", **FIRST_STAGE)
    model.conditioner = section(
        kind="bert", dim=CONTEXT, depth=2, max_seq_len=24, heads=4, head_dim=32, embed_std=1.0
    )
    model.unet = emoji_unet(CHANNELS, context=True)
    model.sampling = section(size=(64, 64), steps=50, guidance=4.0)
    model.data = section(
        caption="{text}, {style} style",
        split=section(column="hexcode", holdout=0.05, seed=0),
        pairs=section(columns=("hexcode", "style"), holdout=0.05, seed=0),
    )
    if variant == "smoke":
        short(config, steps=30)
        model.first_stage.path = "pkg:assets/emoji"
        model.unet.update(
            model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,)
        )
    elif variant:
        raise ValueError(f"emoji has no variant {variant!r}; choose smoke")
    return config
