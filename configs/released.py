"""Fields that the configs of the released models share.

Networks and hyperparameters are those of Rombach et al. 2022 and Esser et al. 2021.
"""

from typing import Any

import ml_collections

from ldm_jax.configs.common import base, section, short


def _coder(
    kind: str, channels: int, ch_mult: tuple[int, ...], attention: tuple[int, ...] = (), **more: Any
) -> dict:
    shared = {"ch": 128, "num_res_blocks": 2, "resolution": 256, "in_channels": 3, "out_ch": 3}
    return {
        "kind": kind,
        "embed_dim": channels,
        "z_channels": channels,
        "ch_mult": ch_mult,
        "attn_resolutions": attention,
        **shared,
        **more,
    }


# Released first stages by name; vqgan_f16 is that of taming-transformers on ImageNet.
FIRST_STAGES: dict[str, dict] = {
    "kl_f4": _coder("kl", 3, (1, 2, 4)),
    "kl_f8": _coder("kl", 4, (1, 2, 4, 4)),
    "kl_f16": _coder("kl", 16, (1, 1, 2, 2, 4), (16,)),
    "kl_f32": _coder("kl", 64, (1, 1, 2, 2, 4, 4), (16, 8)),
    "vq_f4": _coder("vq", 3, (1, 2, 4), n_embed=8192),
    "vq_f8": _coder("vq", 4, (1, 2, 2, 4), (32,), n_embed=16384),
    "vq_f16": _coder("vq", 8, (1, 1, 2, 2, 4), (16,), n_embed=16384),
    "vqgan_f16": _coder("vq", 256, (1, 1, 2, 2, 4), (16,), n_embed=1024),
}

# The UNet of the unconditional models on vq_f4: faces and bedrooms.
UNCONDITIONAL = {
    "model_channels": 224,
    "attention_resolutions": (8, 4, 2),
    "channel_mult": (1, 2, 3, 4),
    "num_head_channels": 32,
}


def first_stage(
    name: str, variant: str, *, weight: float, start: int, **adversary: Any
) -> ml_collections.ConfigDict:
    """Returns the training of a row of `FIRST_STAGES` on 256x256 crops.

    The losses are the released ones; the adversary's ramp and cap and the guard are ours
    (`configs/common.py` has the fields that switch them off).

    Args:
      name: A key of `FIRST_STAGES`.
      variant: "" or "smoke", a short run of a narrow network on the bundled images.
      weight: ``adversary.weight``.
      start: ``adversary.start``, in steps.
      **adversary: Further fields of ``adversary``.
    """
    config = base("autoencoder")
    config.steps = 500_000
    config.batch_size = 96  # the original's 12 on each of 8 devices
    config.data.update(path="pictures", size=(256, 256), crop="random", flip=True)
    config.optim.update(lr=4.5e-6, scale_lr=True, b1=0.5, b2=0.9)
    config.loss.update(
        kind="l1", perceptual_weight=1.0, vgg16="vgg16.safetensors", lpips_heads="lpips.safetensors"
    )
    # KL's reconstruction loss is a sum over pixels, so d_weight reaches thousands; the original's
    # limit of 1e4 * weight allows for that.
    limits = {"kl": {"cap": 0.0, "alarm": 4500.0}, "vq": {"cap": 10.0, "alarm": 100.0}}[
        FIRST_STAGES[name]["kind"]
    ]
    config.adversary.update(weight=weight, start=start, ramp=5000, **limits, **adversary)
    config.guard.update(rollbacks=3, rise=2.0)
    config.model.first_stage = section(**FIRST_STAGES[name])
    if variant == "smoke":
        short(config, steps=4)
        config.optim.update(lr=1e-4, scale_lr=False)
        config.data.size = (32, 32)
        config.loss.update(perceptual_weight=0.0, vgg16="", lpips_heads="")
        config.adversary.update(start=2, ramp=2, layers=1, channels=8)
        config.model.first_stage.update(ch=32, num_res_blocks=1, resolution=32)
        if "n_embed" in config.model.first_stage:
            config.model.first_stage.n_embed = 64
    elif variant:
        raise ValueError(f"{name} has no variant {variant!r}; choose smoke")
    return config


def diffusion(
    stage: str,
    *,
    linear_end: float,
    batch: int,
    steps: int,
    lr: float,
    size: int = 256,
    **unet: Any,
) -> ml_collections.ConfigDict:
    """Returns the training of a latent diffusion model.

    A config adds its conditioner to ``config.model.conditioner`` and calls `finish` last.

    Args:
      stage: A key of `FIRST_STAGES`; its model is read from runs/STAGE/model.
      linear_end: Last value of the linear beta schedule.
      batch: Batch size.
      steps: Number of training steps.
      lr: Learning rate.
      size: Height and width in pixels.
      **unet: Further fields of the UNet.
    """
    config = base("diffusion")
    config.steps, config.batch_size = steps, batch
    config.data.update(path="pictures", size=(size, size), flip=True)
    config.optim.update(lr=lr, weight_decay=0.01)
    channels = FIRST_STAGES[stage]["embed_dim"]
    model = config.model
    model.objective = "eps"
    model.schedule = section(
        beta_schedule="linear", linear_start=0.0015, linear_end=linear_end, timesteps=1000
    )
    model.first_stage = section(path=f"runs/{stage}/model", **FIRST_STAGES[stage])
    model.conditioner = section(kind="none")
    model.unet = section(
        **{"in_channels": channels, "out_channels": channels, "num_res_blocks": 2, **unet}
    )
    model.sampling = section(size=(size, size), steps=200, guidance=1.0)
    return config


def finish(config: ml_collections.ConfigDict, variant: str) -> ml_collections.ConfigDict:
    """Returns ``config``; as "smoke", on the demo's first stage with a narrow UNet."""
    if variant not in ("", "smoke"):
        raise ValueError(f"there is no variant {variant!r}; choose smoke")
    if variant:
        short(config, steps=4)
        config.optim.lr = 1e-4
        config.data.size = (64, 64)
        model, unet = config.model, config.model.unet
        more = unet.in_channels - unet.out_channels  # channels of a joined condition
        model.first_stage = section(path="pkg:assets/emoji")
        unet.update(
            in_channels=8 + more,
            out_channels=8,
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
        )
        unet.update(attention_resolutions=(2,), num_heads=2, num_head_channels=-1)
        model.sampling.update(size=(64, 64), steps=5)
    return config
