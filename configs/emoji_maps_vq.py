"""A VQ first stage of label maps: scenes of emoji, as VQSegmentationModel of taming-transformers.

Label 0 is the background, 1 to 8 are kinds of emoji in alphabetical order.

    ldm-train --config=emoji_maps_vq --config.data.path=emoji64.zip --workdir=runs/emoji_maps_vq
"""

import ml_collections

from ldm_jax.configs.common import base, section, short
from ldm_jax.configs.emoji_presets import PLAIN_KINDS

LABELS = 1 + len(PLAIN_KINDS)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    config = base("label_maps")
    config.steps = 2000
    config.batch_size = 8
    config.ema = 0.995
    config.data.update(path="emoji64.zip", source="scenes", count=8000, objects=3)
    config.data.update(smallest=0.4, largest=0.7, column="subgroup", classes=PLAIN_KINDS)
    config.data.update(split_column="scene", holdout=0.02)
    config.data.condition = section(column="map")
    config.optim.update(lr=5e-4, warmup=100, decay="cosine", final=0.02, b1=0.5, b2=0.9)
    config.loss.restart_codes = True
    config.model.conditioner.in_channels = LABELS
    config.model.first_stage = section(
        kind="vq",
        n_embed=256,
        embed_dim=4,
        z_channels=4,
        ch=32,
        ch_mult=(1, 2, 2),
        num_res_blocks=1,
        attn_resolutions=(),
        attn_type="none",
        norm_groups=8,
        resolution=64,
        in_channels=LABELS,
        out_ch=LABELS,
        n_labels=LABELS,
    )
    if variant == "smoke":
        short(config)
        config.data.count = 200
    elif variant:
        raise ValueError(f"there is no variant {variant!r}; choose smoke")
    return config
