"""Unconditional churches: LSUN at 256x256 on the KL-f8 first stage.

From Rombach et al. 2022, table 12.

    ldm-train --config=lsun_churches --config.data.path=IMAGES --workdir=runs/lsun_churches

Not trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.released import diffusion, finish


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    config = diffusion(
        "kl_f8",
        linear_end=0.0155,
        batch=96,
        steps=500_000,
        lr=5e-5,
        model_channels=192,
        attention_resolutions=(1, 2, 4, 8),
        channel_mult=(1, 2, 2, 4, 4),
        num_heads=8,
        use_scale_shift_norm=True,
        resblock_updown=True,
    )
    config.loss.kind = "l1"
    config.optim.warmup = 10_000
    return finish(config, variant)
