"""A VQ first stage for the demo's images: f = 4, 512 codes; `:coarse` has f = 8 and 1024 codes.

The codebook is a moving average of the encodings; dead codes are restarted. The coarse variant
makes 64 codes of a picture instead of 256, which a transformer learns sooner.

    ldm-train --config=emoji_vq --config.data.path=emoji64.zip --workdir=runs/emoji_vq

Not trained in full yet. A diffusion config uses it with
--config.model.first_stage.path=runs/emoji_vq/model and 4 channels in its UNet.
"""

import ml_collections

from ldm_jax.configs.common import base, section, short


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant`` is "", "coarse" or "smoke", a short run."""
    config = base("autoencoder")
    config.steps = 4000
    config.batch_size = 8
    config.ema = 0.995
    config.data.update(path="emoji64.zip", split_column="hexcode", holdout=0.05, flip=True)
    config.optim.update(lr=5e-4, warmup=100, decay="cosine", final=0.02, b1=0.5, b2=0.9)
    config.loss.update(kind="l1", restart_codes=True)
    config.adversary.update(
        weight=0.2, start=2000, layers=2, channels=32, ramp=500, cap=10.0, alarm=100.0
    )
    config.guard.update(rollbacks=3, rise=2.0)
    config.model.first_stage = section(
        kind="vq",
        quantizer="ema",
        n_embed=512,
        embed_dim=4,
        z_channels=4,
        ch=32,
        ch_mult=(1, 2, 2),
        num_res_blocks=1,
        attn_resolutions=(),
        attn_type="none",
        norm_groups=8,
        resolution=64,
        in_channels=3,
        out_ch=3,
    )
    if variant == "coarse":
        config.model.first_stage.update(
            n_embed=1024, embed_dim=8, z_channels=8, ch_mult=(1, 2, 2, 3)
        )
    elif variant == "smoke":
        short(config)
        config.adversary.update(start=10, ramp=5, channels=8)
    elif variant:
        raise ValueError(f"emoji_vq has no variant {variant!r}; choose coarse or smoke")
    return config
