r"""A transformer over the codes of crops, which knows where in its picture a crop lies.

Esser et al. 2021 (arXiv:2012.09841), section 3.3: coordinates instead of a condition keep the whole
of a large picture together when a window slides over it.

    ldm-train --config=vqgan_transformer_coordinates --config.data.path=IMAGES \
        --config.model.first_stage.path=runs/vqgan_f16/model --workdir=runs/vqgan_coordinates
    ldm-sample --model=runs/vqgan_coordinates/model --size=512x512

Not trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.transformers import finish, transformer


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    if variant not in ("", "smoke"):
        raise ValueError(f"there is no variant {variant!r}; choose smoke")
    config = transformer(1024, 256, n_layer=24, n_head=16, n_embd=1024)
    config.data.update(crop="random", min_crop=0.5)
    config.model.conditioner = section(
        kind="coordinates", n_embed=1024, down_factor=16, size=(256, 256)
    )
    config = finish(config, variant)
    if variant == "smoke":
        config.model.conditioner.update(n_embed=64, down_factor=8, size=(64, 64))
    return config
