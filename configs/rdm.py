"""Images of 768x768 from CLIP embeddings, the released rdm768x768.

The condition is the prompt's embedding and those of retrieved neighbours (Blattmann et al. 2022).

    ldm-train --config=rdm --config.data.path=TABLE.parquet --workdir=runs/rdm

Reads its first stage from runs/kl_f16/model. The column "vectors" holds four or more CLIP vectors
for each image, 768 numbers of unit length each. The variant :neighbors trains on a folder of
images, whose neighbours in a database of `ldm-data embed` are found on the way (docs/data.md). Not
trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.released import diffusion, finish


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant`` is "", "neighbors" or "smoke" (a short, narrow run)."""
    if variant not in ("", "neighbors", "smoke"):
        raise ValueError(f"rdm has no variant {variant!r}; choose neighbors or smoke")
    # The released files give the network, not the number of vectors or of training steps.
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
    if variant == "neighbors":
        config.data.source = "image_folder"
        config.data.condition = section(database="runs/embeddings", clip="runs/clip/model")
        return finish(config, "")
    if variant == "smoke":
        config.data.update(source="scenes", count=50, objects=3)
        config.model.conditioner.update(dim=7, count=1)  # a colour and a box for each object
        config.model.unet.context_dim = 7
    return finish(config, variant)
