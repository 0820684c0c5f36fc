r"""A KL first stage (f = 4) with the original's full loss, on 128x128 crops of photos.

    ldm-train --config=photos_kl_gan --config.data.path=photos.zip --workdir=runs/photos_kl_gan \
        --config.loss.vgg16=vgg16.safetensors --config.loss.lpips_heads=lpips_vgg.safetensors

The two weight files are not shipped: torchvision's VGG16 and LPIPS's linear heads, both
as safetensors. Without `loss.vgg16` the perceptual term is left out. About every fiftieth image is
held out, by name. docs/first_stages.md has commands, times and results of the `:small` variants.
"""

import ml_collections

from ldm_jax.configs.common import base, section, short


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant`` is "", "parity", "small", "small_parity" or "smoke".

    "parity" leaves out what the original does not have; "small" fits two CPU cores.
    """
    config = base("autoencoder")
    config.steps = 20_000
    config.batch_size = 16
    config.ema = 0.999
    config.data.update(path="photos.zip", size=(128, 128), crop="random", min_crop=0.4, flip=True)
    config.data.update(split_column="file_name", holdout=0.02)
    config.optim.update(lr=2e-4, warmup=500, b1=0.5, b2=0.9)
    config.loss.update(kind="l1", kl_weight=1e-6, perceptual_weight=1.0)
    # KL's reconstruction loss is a sum over pixels, so d_weight reaches thousands; the original
    # limits it to 1e4 * weight.
    config.adversary.update(weight=0.5, start=10_000, ramp=2000, cap=2000.0, alarm=4500.0)
    config.guard.update(rollbacks=3, rise=2.0)
    config.model.first_stage = first_stage(kind="kl")
    return vary(config, variant)


def vary(config: ml_collections.ConfigDict, variant: str) -> ml_collections.ConfigDict:
    """Returns ``config`` as one of the variants that the two photo configs share."""
    if variant not in ("", "parity", "small", "small_parity", "smoke"):
        raise ValueError(
            f"there is no variant {variant!r}; choose parity, small, small_parity or smoke"
        )
    if variant.startswith("small"):
        small(config)
    if variant.endswith("parity"):
        as_the_original(config)
    if variant == "smoke":
        smoke(config)
    return config


def first_stage(**fields) -> ml_collections.ConfigDict:
    """Returns the network that the KL and the VQ model share."""
    shared = {
        "embed_dim": 4,
        "z_channels": 4,
        "ch": 64,
        "ch_mult": (1, 2, 2),
        "num_res_blocks": 2,
        "resolution": 128,
    }
    return section(
        **shared, attn_resolutions=(), attn_type="none", in_channels=3, out_ch=3, **fields
    )


def as_the_original(config: ml_collections.ConfigDict) -> None:
    """Removes the guards and runs the autoencoder once for each optimiser."""
    config.updates = "parity"
    config.adversary.update(ramp=0, cap=0.0, alarm=0.0)
    config.guard.update(rollbacks=0, rise=0.0)
    config.loss.restart_codes = False


def small(config: ml_collections.ConfigDict) -> None:
    """Halves the width of both networks and trains on two images a step, for two CPU cores."""
    config.update(steps=800, batch_size=2, ema=0.995)
    config.update(log_every=20, save_every=200, eval_every=100, eval_batches=14, preview_every=200)
    config.data.holdout = 0.1
    config.optim.warmup = 50
    config.adversary.update(start=100, ramp=200, channels=32)
    config.model.first_stage.update(ch=32, num_res_blocks=1, norm_groups=8)


def smoke(config: ml_collections.ConfigDict) -> None:
    """Makes a run of a minute on the bundled emoji, without the perceptual term."""
    short(config, steps=8)
    config.data.size = (32, 32)
    config.adversary.update(start=4, ramp=2, layers=2, channels=8)
    config.model.first_stage.update(ch=32, num_res_blocks=1)
