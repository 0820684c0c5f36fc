"""Class-conditional ImageNet at 256x256, the released cin256-v2.

From Rombach et al. 2022, table 14. The extra class 1000 is the null class for guidance.

    ldm-train --config=cin256 --config.data.path=IMAGENET --workdir=runs/cin256

Reads its first stage from runs/vq_f4/model. Not trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.released import diffusion, finish


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    config = diffusion(
        "vq_f4",
        linear_end=0.0195,
        batch=1200,
        steps=178_000,
        lr=1e-4,
        model_channels=192,
        attention_resolutions=(8, 4, 2),
        channel_mult=(1, 2, 3, 5),
        num_heads=1,
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=512,
    )
    config.data.update(source="class_folders", condition=section(column="label"))
    config.model.conditioner = section(kind="class", embed_dim=512, n_classes=1001)
    config.model.sampling.guidance = 3.0
    if variant == "smoke":
        config.data.update(source="image_folder", condition=section(column="group"))
        del config.model.conditioner.n_classes  # those of the data
    return finish(config, variant)
