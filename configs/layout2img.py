r"""Bounding boxes to images at 256x256, the released layout2img-openimages256.

    ldm-train --config=layout2img --config.data.path=IMAGES --workdir=runs/layout2img \
        --config.data.annotations=INSTANCES.json

Reads its first stage from runs/vq_f4/model. Not trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.released import diffusion, finish


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    config = diffusion(
        "vq_f4",
        linear_end=0.0205,
        batch=64,
        steps=500_000,
        lr=1e-4,
        model_channels=128,
        attention_resolutions=(8, 4, 2),
        channel_mult=(1, 2, 3, 4),
        num_head_channels=32,
        use_spatial_transformer=True,
        transformer_depth=3,
        context_dim=512,
    )
    config.loss.update(kind="l1", caption_dropout=0.0)
    config.data.update(source="coco", annotations="instances.json", min_boxes=2, max_boxes=30)
    config.data.condition = section(column="boxes")
    config.model.conditioner = section(
        kind="tokens", dim=512, depth=16, max_seq_len=92, vocab_size=8192
    )
    if variant == "smoke":
        for name in ("annotations", "min_boxes", "max_boxes"):
            del config.data[name]
        config.data.update(source="scenes", count=50, objects=3)
        config.model.conditioner.update(depth=1, max_seq_len=9, vocab_size=1024)
        config.model.unet.transformer_depth = 1
    return finish(config, variant)
