"""Unconditional churches, LSUN at 256x256, on the KL first stage f = 8 (Rombach et al. 2022, table 12).

    python train.py --config=configs/lsun_churches.py --config.data.path=PICTURES --workdir=runs/lsun_churches

Not trained here: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.released import diffusion, finish


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a short, narrow one on the pictures that ship with the package."""
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
