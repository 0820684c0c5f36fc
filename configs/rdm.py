"""Pictures of 768x768 from ready-made embeddings, CLIP's of a prompt and of retrieved neighbours (the released rdm768x768; Blattmann et al. 2022).

    python train.py --config=configs/rdm.py --config.data.path=TABLE.parquet --workdir=runs/rdm

takes the first stage kl_f16 from runs/kl_f16/model, and a column "vectors": for each picture a list of four or more of CLIP's vectors, 768 numbers of
length 1. Not trained here: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.released import diffusion, finish


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a short, narrow one on the pictures that ship with the package."""
    # The size of the released model; how many vectors it was trained with, and for how long, its files do not say.
    config = diffusion(
        "kl_f16",
        linear_end=0.015,
        batch=64,
        steps=500_000,
        lr=1e-4,
        size=768,
        model_channels=448,
        attention_resolutions=(4, 2, 1),
        channel_mult=(1, 2, 3, 4),
        num_head_channels=32,
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=768,
    )
    config.data.update(source="parquet", condition=section(column="vectors"))
    config.model.conditioner = section(kind="embeddings", dim=768, count=4)
    config.model.sampling.update(steps=50, guidance=5.0)
    if variant == "smoke":
        config.data.update(source="scenes", count=50, objects=3)
        config.model.conditioner.update(dim=7, count=1)  # a colour and a box for each object
        config.model.unet.context_dim = 7
    return finish(config, variant)
