"""Whole checkpoints of the original: the table of a LatentDiffusion or a first stage.

The parameter tree has the parts of a model directory, "unet", "conditioner" and "first_stage", and
those of training: "logvar", "ema" and "losses".
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.convert.compvis import others
from ldm_jax.convert.compvis.encoders import open_clip_table
from ldm_jax.convert.compvis.names import CONDITIONER, EMA, FIRST_STAGE, UNET
from ldm_jax.convert.compvis.networks import param_shapes, table_of
from ldm_jax.convert.compvis.targets import (
    OPEN_CLIP,
    module_from_config,
    pick_params,
    unused_layers,
)
from ldm_jax.convert.tables import Duplicate, Entry, Table, Unused, under
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.errors import TargetError, did_you_mean
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.perceptual import LPIPS, VGG16_WIDTHS

# Sections without a network.
IDENTITIES = ("torch.nn.Identity", "ldm.models.autoencoder.IdentityFirstStage")
_UPSCALING = "ldm.modules.diffusionmodules.upscaling"
UNCONDITIONAL, IS_FIRST_STAGE = "__is_unconditional__", "__is_first_stage__"
# Prefixes inside conditioners, between their own prefix and the network.
INNER = {
    "ldm.modules.encoders.modules.BERTEmbedder": "transformer.",
    "ldm.modules.encoders.modules.TransformerEmbedder": "transformer.",
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": "transformer.text_model.",
    "ldm.modules.encoders.modules.TinyCLIP": "transformer.text_model.",
    OPEN_CLIP: "model.",
}
BUFFERS = """
    betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod
    posterior_variance posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2
"""
_SCHEDULE = "beta_schedule timesteps linear_start linear_end cosine_s v_posterior"
# Parameters of a LatentDiffusion about training, data, sampling or logging, not the networks.
_OTHER = """
    unet_config first_stage_config cond_stage_config first_stage_key cond_stage_key image_size
    channels log_every_t loss_type monitor use_ema num_timesteps_cond cond_stage_trainable
    concat_mode conditioning_key scale_factor cond_stage_forward clip_denoised original_elbo_weight
    l_simple_weight parameterization scheduler_config use_positional_encodings logvar_init ckpt_path
    ignore_keys load_only_unet finetune_keys concat_keys masked_image_key keep_finetune_dims
    c_concat_log_start c_concat_log_end depth_stage_config low_scale_config low_scale_key
    noise_level_key
"""


class Whole(NamedTuple):
    """A checkpoint in parts.

    Attributes:
      modules: The networks by part.
      table: The table of all arrays.
      shapes: The parameter tree that the table's paths lead into.
    """

    modules: dict[str, Any]
    table: Table
    shapes: dict[str, Any]


def schedule_buffers(params: Mapping[str, Any]) -> Table:
    """The noise schedule that a DDPM stores; it follows from its parameters and must agree."""
    if params.get("given_betas") is not None:
        raise TargetError("given_betas is not supported: give the parameters of the schedule")
    schedule = make_schedule(**{name: params[name] for name in _SCHEDULE.split() if name in params})

    def buffer(name: str) -> Unused:
        return Unused(name, lambda: np.asarray(getattr(schedule, name), np.float32), fixed=True)

    return [buffer(name) for name in BUFFERS.split()]


def ema_shadows(table: Iterable[Entry | Unused | Duplicate]) -> Table:
    """LitEma's averages of the UNet with this table, at "ema"; their names lose the dots."""

    def renamed(source: str) -> str:
        return EMA + source.removeprefix("model.").replace(".", "")

    shadows: Table = [
        Unused(f"{EMA}decay", lambda: np.array(0.9999, np.float32)),
        Unused(f"{EMA}num_updates", lambda: np.array(0, np.int32)),
    ]
    for entry in table:
        if isinstance(entry, Entry):
            shadows.append(entry._replace(source=renamed(entry.source), path=("ema", *entry.path)))
        elif isinstance(entry, Unused) and not entry.fixed:
            shadows.append(entry._replace(source=renamed(entry.source)))
    return shadows


# ---------------------------------------------------------------------------------- the first stage

# Arguments of a loss about its value, by class; pixelloss_weight has no effect in the original.
_LOSS_WEIGHTS = """
    disc_start pixelloss_weight disc_factor disc_weight perceptual_weight disc_conditional disc_loss
"""
_KL_WEIGHTS = f"{_LOSS_WEIGHTS} logvar_init kl_weight"
_VQ_WEIGHTS = f"{_LOSS_WEIGHTS} codebook_weight"
_DISCRIMINATOR = {
    "disc_num_layers": "n_layers",
    "disc_in_channels": "input_nc",
    "disc_ndf": "ndf",
    "use_actnorm": "use_actnorm",
}


class _GanLoss(NamedTuple):
    """A loss with networks.

    Attributes:
      weights: Its arguments beside those of the discriminator.
      logvar: Whether it has a learned log variance.
    """

    weights: str
    logvar: bool = False


_KL_LOSS = _GanLoss(_KL_WEIGHTS, logvar=True)
_GAN_LOSSES = {
    "ldm.modules.losses.LPIPSWithDiscriminator": _KL_LOSS,
    "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator": _KL_LOSS,
    "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": _GanLoss(
        f"{_VQ_WEIGHTS} n_classes pixel_loss"
    ),
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": _GanLoss(_VQ_WEIGHTS),
}
_BARE_LOSSES = """
    torch.nn.Identity ldm.modules.losses.contperceptual.DummyLoss
    taming.modules.losses.vqperceptual.DummyLoss taming.modules.losses.DummyLoss
    taming.modules.losses.segmentation.BCELoss taming.modules.losses.segmentation.BCELossWithQuant
"""


def loss_parts(
    config: Mapping[str, Any] | None, prefix: str = "loss.", vgg: Sequence[int] = VGG16_WIDTHS
) -> Whole:
    """Returns the networks of a first stage's loss: "lpips", "discriminator", for KL "logvar" [].

    Args:
      config: The lossconfig.
      prefix: The prefix of the names.
      vgg: The widths of LPIPS' VGG, for tests.
    """
    target = None if config is None else config["target"]
    if target is None or target in _BARE_LOSSES.split():
        return Whole({}, [], {})
    if target not in _GAN_LOSSES:
        raise TargetError(f"the loss {target} is not supported{did_you_mean(target, _GAN_LOSSES)}")
    params = (config or {}).get("params") or {}
    loss = _GAN_LOSSES[target]
    fixed = {"perceptual_loss": "lpips"} if "pixel_loss" in loss.weights else {}
    fields = pick_params(
        target, params, same=" ".join(_DISCRIMINATOR), ignored=loss.weights, fixed=fixed
    )
    discriminator = PatchDiscriminator(
        **{_DISCRIMINATOR[name]: value for name, value in fields.items()}
    )
    parts: dict[str, tuple[Any, str]] = {
        "lpips": (LPIPS(tuple(vgg)), f"{prefix}perceptual_loss."),
        "discriminator": (discriminator, f"{prefix}discriminator."),
    }
    table = [
        entry
        for name, (module, at) in parts.items()
        for entry in under((name,), table_of(module, at))
    ]
    shapes: dict[str, Any] = {name: param_shapes(module) for name, (module, _) in parts.items()}
    if loss.logvar:
        table.append(Entry(f"{prefix}logvar", ("logvar",)))
        shapes["logvar"] = jax.ShapeDtypeStruct((), jnp.float32)
    return Whole({name: module for name, (module, _) in parts.items()}, table, shapes)


def first_stage(
    target: str,
    params: Mapping[str, Any],
    *,
    prefix: str = "",
    losses: bool = True,
    vgg: Sequence[int] = VGG16_WIDTHS,
) -> Whole:
    """Returns a first stage's checkpoint: "first_stage", and its loss at "losses"."""
    module = module_from_config(target, params)
    whole = Whole(
        {"first_stage": module},
        under(("first_stage",), table_of(module, prefix)),
        {"first_stage": param_shapes(module)},
    )
    loss = loss_parts(params.get("lossconfig") if losses else None, f"{prefix}loss.", vgg)
    if not loss.table:
        return whole
    return Whole(
        whole.modules | loss.modules,
        whole.table + under(("losses",), loss.table),
        whole.shapes | {"losses": loss.shapes},
    )


# --------------------------------------------------------------------------------- latent diffusion


def latent_diffusion(
    params: Mapping[str, Any],
    *,
    buffers: bool = True,
    ema: bool = False,
    losses: bool = True,
    vgg: Sequence[int] = VGG16_WIDTHS,
) -> Whole:
    """Returns a LatentDiffusion's checkpoint: "unet", "first_stage" and "conditioner".

    Args:
      params: The parameters of the LatentDiffusion.
      buffers: Include the noise schedule and, where it is stored, "scale_factor" [].
      ema: Include the UNet's averages at "ema".
      losses: Include the networks of the first stage's loss.
      vgg: As for `loss_parts`.

    Raises:
      TargetError: Something in it is not supported.
    """
    pick_params(
        "LatentDiffusion",
        params,
        same=f"{_SCHEDULE} learn_logvar scale_by_std given_betas",
        ignored=_OTHER,
    )
    unet = module_from_config(params["unet_config"]["target"], params["unet_config"].get("params"))
    modules: dict[str, Any] = {"unet": unet}
    table = under(("unet",), table_of(unet, UNET))
    shapes: dict[str, Any] = {"unet": param_shapes(unet)}
    shadows = ema_shadows(table) if ema else []

    config = params["first_stage_config"]
    if config["target"] not in IDENTITIES:
        stage = first_stage(
            config["target"], config.get("params") or {}, prefix=FIRST_STAGE, losses=losses, vgg=vgg
        )
        modules, table, shapes = modules | stage.modules, table + stage.table, shapes | stage.shapes

    conditioner = params.get("cond_stage_config", UNCONDITIONAL)
    if conditioner == IS_FIRST_STAGE:
        names = [entry.source for entry in table if entry.source.startswith(FIRST_STAGE)]
        table += [Duplicate(CONDITIONER + name.removeprefix(FIRST_STAGE), name) for name in names]
    elif conditioner not in (None, UNCONDITIONAL) and conditioner["target"] not in IDENTITIES:
        module = module_from_config(conditioner["target"], conditioner.get("params"))
        modules["conditioner"] = module
        prefix = CONDITIONER + INNER.get(conditioner["target"], "")
        if conditioner["target"] == OPEN_CLIP:
            inner = open_clip_table(module, prefix, unused_layers(conditioner.get("params") or {}))
        else:
            inner = table_of(module, prefix)
        table += under(("conditioner",), inner)
        shapes["conditioner"] = param_shapes(module)

    if buffers:
        table += schedule_buffers(params)
        if params.get("scale_by_std"):
            table.append(Entry("scale_factor", ("scale_factor",)))
            shapes["scale_factor"] = jax.ShapeDtypeStruct((), jnp.float32)
    if params.get("learn_logvar"):
        table.append(Entry("logvar", ("logvar",)))
        shapes["logvar"] = jax.ShapeDtypeStruct((params.get("timesteps", 1000),), jnp.float32)
    if ema:
        table += shadows
        shapes["ema"] = {"unet": shapes["unet"]}
    return Whole(modules, table, shapes)


_LOW_SCALE = """
    betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod
"""


def low_scale_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the noise of an upscaler's small picture, the fields of the conditioner "upscale".

    Raises:
      TargetError: It is made in another way.
    """
    config = params.get("low_scale_config") or {}
    target = f"{_UPSCALING}.ImageConcatWithNoiseAugmentation"
    if config.get("target") != target:
        raise TargetError(
            f"the low_scale_config {config.get('target')} is not supported, only {target}"
        )
    given = config.get("params") or {}
    fields = pick_params(
        target, given, same="max_noise_level", ignored="noise_schedule_config to_cuda"
    )
    same = "beta_schedule timesteps linear_start linear_end"
    schedule = pick_params(
        target, given.get("noise_schedule_config") or {}, same=same, fixed={"cosine_s": 8e-3}
    )
    return {"max_noise_level": 1000, **fields, **schedule}


def latent_upscale(params: Mapping[str, Any], **options: Any) -> Whole:
    """Returns a LatentUpscaleDiffusion's checkpoint: that of `latent_diffusion` and a schedule."""
    fields = low_scale_params(params)
    fields.pop("max_noise_level")
    schedule = make_schedule(**fields)

    def buffer(name: str) -> Unused:
        value = lambda: np.asarray(getattr(schedule, name), np.float32)  # noqa: E731
        return Unused(f"low_scale_model.{name}", value, fixed=True)

    whole = latent_diffusion(params, **options)
    return whole._replace(table=whole.table + [buffer(name) for name in _LOW_SCALE.split()])


WHOLE: dict[str, Callable[..., Whole]] = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": latent_diffusion,
    # Stable Diffusion's inpainting: the same parts with more input channels.
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion": latent_diffusion,
    # With a depth map, and without the network that estimates it.
    "ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion": latent_diffusion,
    "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion": latent_upscale,
}


def whole_from_config(target: str, params: Mapping[str, Any], **options: Any) -> Whole:
    """Returns the checkpoint of a YAML's ``target`` and ``params``; options as of the two above."""
    if target in WHOLE:
        return WHOLE[target](params, **options)
    if (own := others.of_target(target)) is not None:
        return own.whole(params, **options)
    return first_stage(target, params, **options)
