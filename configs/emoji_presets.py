"""Fields that the demo-size diffusion models on 64x64 emoji share, and their smoke variant."""

from typing import Any

import ml_collections

from ldm_jax.configs.common import base, section, short

LATENT = (16, 16)  # of the demo's first stage: 64 / 4
CHANNELS = 8
CONTEXT = 128  # width of a context token

# Subgroups of emoji that look alike; a whole group such as food has too little in common.
KINDS = ("animal-bird", "cat-face", "country-flag", "face-smiling", "food-fruit", "heart")
KINDS += ("keycap", "person", "plant-flower", "time", "transport-ground", "zodiac")
# Of each of the nine groups, the subgroups that look alike.
GROUP_KINDS = (*KINDS[1:], "award-medal", "book-paper")  # birds vary too much
# Faces, which seven of the styles draw distinctly.
FACES = tuple(
    f"face-{how}" for how in ("affection", "concerned", "glasses", "hand", "hat", "negative")
)
FACES += tuple(
    f"face-{how}" for how in ("neutral-skeptical", "sleepy", "smiling", "tongue", "unwell")
)
FACE_STYLES = ("emojione", "fluent", "fluent 3d", "fluent flat", "noto", "noto blob", "twemoji")
# Kinds that stay recognisable as small objects in a scene.
PLAIN_KINDS = (
    "cat-face",
    "face-smiling",
    "food-fruit",
    "heart",
    "keycap",
    "plant-flower",
    "time",
    "zodiac",
)


def emoji_diffusion(
    conditioner: dict[str, Any], *, joined: int = 0, context: bool = False, guidance: float = 1.0
) -> ml_collections.ConfigDict:
    """Returns the config of a diffusion model on emoji64.zip.

    Args:
      conditioner: The fields of ``model.conditioner``.
      joined: Channels of a condition that is concatenated to the latents.
      context: Whether the condition is attended to.
      guidance: Default guidance scale; 1 trains without dropping conditions.
    """
    config = base("diffusion")
    config.steps = 1500
    config.save_every = config.eval_every = config.preview_every = 500
    config.batch_size = 16
    config.ema = 0.998
    # The demo already models emoji; only the condition is new. --config.init="": from scratch.
    config.update(init="emoji", init_strict=False)
    config.data.update(path="emoji64.zip", split_column="hexcode", holdout=0.05)
    config.optim.update(lr=5e-4, warmup=100, decay="cosine", final=0.02, clip=1.0, b2=0.99)
    config.loss.update(timestep_shift=3.0, caption_dropout=0.1 if guidance > 1 else 0.0)
    model = config.model
    model.objective = "v"
    model.schedule = section(
        beta_schedule="linear", linear_start=0.0015, linear_end=0.0195, timesteps=1000
    )
    model.first_stage = section(path="pkg:assets/emoji")
    model.conditioner = section(**conditioner)
    model.unet = emoji_unet(CHANNELS + joined, context)
    model.sampling = section(size=(64, 64), steps=50, guidance=guidance)
    return config


def emoji_unet(in_channels: int, context: bool) -> ml_collections.ConfigDict:
    """Returns the demo's UNet; without ``context`` its blocks have self-attention only."""
    unet = section(
        in_channels=in_channels,
        out_channels=CHANNELS,
        model_channels=48,
        channel_mult=(1, 3, 3),
        num_res_blocks=1,
        conv_resample=False,
        attention_resolutions=(2, 4),
        num_head_channels=48,
        use_spatial_transformer=True,
        transformer_depth=1,
        legacy=False,
        norm_groups=16,
    )
    if context:
        unet.context_dim = CONTEXT
    return unet


def smoke(config: ml_collections.ConfigDict, variant: str) -> ml_collections.ConfigDict:
    """Returns ``config``, made a short run of a smaller UNet if ``variant`` is "smoke"."""
    if variant == "smoke":
        short(config)
        config.init = ""
        config.model.unet.update(model_channels=32, channel_mult=(1, 2), attention_resolutions=(2,))
    elif variant:
        raise ValueError(f"there is no variant {variant!r}; choose smoke")
    return config
