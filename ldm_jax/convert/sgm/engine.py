"""sgm's DiffusionEngine: its table, and its YAML from and to our config."""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.convert.compvis.infer import Original
from ldm_jax.convert.compvis.names import CONDITIONER, EMBEDDERS, FIRST_STAGE, UNET
from ldm_jax.convert.compvis.networks import param_shapes, table_of
from ldm_jax.convert.compvis.original import fields_of, first_stage_of, first_stage_section
from ldm_jax.convert.compvis.targets import module_from_config, pick_params
from ldm_jax.convert.compvis.whole import IDENTITIES, Whole, ema_shadows, first_stage
from ldm_jax.convert.sgm.embedders import config_of_embedders, embedders_of, sections_of
from ldm_jax.convert.tables import under
from ldm_jax.errors import TargetError
from ldm_jax.models.build import build
from ldm_jax.models.perceptual import VGG16_WIDTHS

ENGINE = "sgm.models.diffusion.DiffusionEngine"
UNET_TARGET, KL_TARGET = (
    "sgm.modules.diffusionmodules.openaimodel.UNetModel",
    "sgm.models.autoencoder.AutoencoderKL",
)
_DENOISER = "sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser"
_SCALINGS = {
    f"sgm.modules.diffusionmodules.denoiser_scaling.{name}": objective
    for name, objective in (("EpsScaling", "eps"), ("VScaling", "v"))
}
_LEGACY = "sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization"
# Parameters of a DiffusionEngine about training, data, sampling or logging.
_OTHER = """
    optimizer_config scheduler_config loss_fn_config network_wrapper ckpt_path use_ema
    ema_decay_rate input_key log_keys no_cond_log compile_model en_and_decode_n_samples_a_time
    sampler_config
"""
_SIDE = 1024  # of the pictures in pixels


def diffusion_engine(
    params: Mapping[str, Any],
    *,
    buffers: bool = True,
    ema: bool = False,
    losses: bool = True,
    vgg: Sequence[int] = VGG16_WIDTHS,
) -> Whole:
    """Returns a DiffusionEngine's checkpoint: "unet", "first_stage" and "conditioner".

    Args:
      params: The parameters of the DiffusionEngine.
      buffers: It stores no noise schedule that a file must have.
      ema: Include the UNet's averages at "ema".
      losses: Include the networks of the first stage's loss.
      vgg: The widths of LPIPS' VGG, for tests.

    Raises:
      TargetError: Something in it is not supported.
    """
    _known(params)
    network = params["network_config"]
    unet = module_from_config(network["target"], network.get("params"))
    modules: dict[str, Any] = {"unet": unet}
    table, shapes = under(("unet",), table_of(unet, UNET)), {"unet": param_shapes(unet)}
    shadows = ema_shadows(table) if ema else []
    stage = params["first_stage_config"]
    if stage["target"] not in IDENTITIES:
        whole = first_stage(
            stage["target"], stage.get("params") or {}, prefix=FIRST_STAGE, losses=losses, vgg=vgg
        )
        modules, table, shapes = modules | whole.modules, table + whole.table, shapes | whole.shapes
    if params["conditioner_config"]["target"] not in IDENTITIES:
        embedders = embedders_of(params["conditioner_config"])
        modules["conditioner"] = embedders
        table += under(("conditioner",), embedders.table)
        shapes["conditioner"] = {n: param_shapes(tower) for n, tower in embedders.towers.items()}
    if ema:
        table, shapes = table + shadows, shapes | {"ema": {"unet": shapes["unet"]}}
    return Whole(modules, table, shapes)


def _known(params: Mapping[str, Any]) -> None:
    same = """
        scale_factor disable_first_stage_autocast denoiser_config network_config conditioner_config
        first_stage_config
    """
    pick_params("DiffusionEngine", params, same=same, ignored=_OTHER)


def without_missing(
    original: Original, tensors: Mapping[str, Any]
) -> tuple[Original, dict[str, str]]:
    """Returns the description without the parts that a file lacks, and {prefix: line} of those."""
    params, lacks = dict(original.params), {}
    if not any(name.startswith(FIRST_STAGE) for name in tensors):
        params["first_stage_config"] = {"target": IDENTITIES[-1]}
        lacks[FIRST_STAGE] = "no VAE (first_stage_model.*): give one with --vae PATH"
    if not any(name.startswith(EMBEDDERS) for name in tensors):
        params["conditioner_config"] = {"target": IDENTITIES[0]}
        lacks[CONDITIONER] = (
            "no text encoders (conditioner.embedders.*): give those of another SDXL with"
            " --text_encoder PATH"
        )
    return original._replace(params=params), lacks


def config_of_engine(original: Original, modules: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of the model that ``original`` describes.

    Raises:
      TargetError: It cannot be run here.
    """
    params = original.params
    objective, schedule = _denoiser(params["denoiser_config"])
    stage, embedders = modules.get("first_stage"), modules.get("conditioner")
    section: dict[str, Any] = {"kind": "identity"} if stage is None else first_stage_section(stage)
    if params.get("disable_first_stage_autocast") and stage is not None:
        section["force_upcast"] = True
    return {
        "kind": "latent_diffusion",
        "objective": objective,
        "scale_factor": float(params.get("scale_factor", 1.0)),
        "schedule": schedule,
        "first_stage": section,
        "conditioner": {"kind": "none"} if embedders is None else sections_of(embedders),
        "unet": fields_of(modules["unet"]),
        "sampling": {
            "size": [_SIDE, _SIDE],
            "guidance": 5.0,
            "sampler": "euler",
            "grid": "trailing",
        },
        "original": {
            "target": original.target,
            "first_stage": params["first_stage_config"]["target"],
            "conditioner": params["conditioner_config"]["target"],
            "conditioning_key": "crossattn",
        },
    }


def _denoiser(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns (objective, schedule) of a ``denoiser_config``."""
    where, params = str(config.get("target")), config.get("params") or {}
    if where != _DENOISER:
        raise TargetError(f"the denoiser {where} is not supported, only {_DENOISER}")
    same = "num_idx scaling_config discretization_config"
    fixed = {"do_append_zero": False, "quantize_c_noise": True, "flip": True}
    # weighting_config is of the loss, in versions that have it here.
    given = pick_params(where, params, same=same, ignored="weighting_config", fixed=fixed)
    scaling, table = given["scaling_config"]["target"], given["discretization_config"]
    if scaling not in _SCALINGS:
        raise TargetError(f"the scaling {scaling} is not supported (have {', '.join(_SCALINGS)})")
    if table["target"] != _LEGACY:
        raise TargetError(f"the discretization {table['target']} is not supported, only {_LEGACY}")
    same = "linear_start linear_end num_timesteps"
    ends = pick_params(_LEGACY, table.get("params") or {}, same=same)
    count = ends.get("num_timesteps", 1000)
    if given.get("num_idx", count) != count:
        raise TargetError(f"{where}: num_idx={given['num_idx']} must be {count}, all timesteps")
    return _SCALINGS[scaling], {
        "beta_schedule": "linear",
        "timesteps": count,
        "linear_start": ends.get("linear_start", 0.00085),
        "linear_end": ends.get("linear_end", 0.012),
    }


def original_of_engine(config: Mapping[str, Any]) -> Original:
    """Returns the DiffusionEngine of a model; TargetError names what it cannot hold."""
    schedule = dict(config["schedule"])
    if schedule.pop("zero_terminal_snr", False):
        raise TargetError("the original cannot hold a schedule with zero terminal SNR")
    if (kind := schedule.get("beta_schedule", "linear")) != "linear":
        raise TargetError(f"the original cannot hold beta_schedule={kind!r}, only 'linear'")
    scalings = {objective: target for target, objective in _SCALINGS.items()}
    if config["objective"] not in scalings:
        raise TargetError(f"the original cannot hold a model that predicts {config['objective']}")
    model: Any = build(config, None, None)
    conditioner = model.conditioner
    pads = {"clip_l": (None, 49407), "clip_g": (0,)}
    for name, tower in conditioner.towers.items():
        if tower.pad_token_id not in pads[name]:
            raise TargetError(
                f"the original cannot hold a text encoder with pad_token_id={tower.pad_token_id!r}"
            )
        if tower.added_tokens:
            raise TargetError("the original cannot hold added tokens")
    count = schedule.get("timesteps", 1000)
    usual = {"linear_start": 0.00085, "linear_end": 0.012}
    ends = {"linear_start": 1e-4, "linear_end": 2e-2} | schedule
    ends = {name: ends[name] for name in usual if ends[name] != usual[name]}
    ends |= {} if count == 1000 else {"num_timesteps": count}
    stage, inside = first_stage_of(model.first_stage.module, None)
    unet = fields_of(model.unet, leave=("use_spatial_transformer", "legacy"))
    params: dict[str, Any] = {
        "scale_factor": config.get("scale_factor", 1.0),
        "disable_first_stage_autocast": bool(config["first_stage"].get("force_upcast", False)),
        "denoiser_config": {
            "target": _DENOISER,
            "params": {
                "num_idx": count,
                "scaling_config": {"target": scalings[config["objective"]]},
                "discretization_config": {"target": _LEGACY, **({"params": ends} if ends else {})},
            },
        },
        "network_config": {
            "target": UNET_TARGET,
            "params": {"attention_resolutions": [], **unet},
        },
        "conditioner_config": config_of_embedders(
            {name: tower.module for name, tower in conditioner.towers.items()},
            {name: getattr(conditioner, f"{name}_layer") for name in conditioner.towers},
            conditioner.vector,
            conditioner.size_dim,
        ),
        "first_stage_config": {
            "target": KL_TARGET if stage.endswith("AutoencoderKL") else stage,
            "params": inside,
        },
    }
    return Original(ENGINE, params)


def describe_engine(original: Original) -> dict[str, str]:
    """Returns {label: text} of a description, for ``ldm-convert inspect``."""
    params = original.params
    unet, stage = (params[f"{part}_config"].get("params") for part in ("network", "first_stage"))
    lines = {"UNet": ", ".join(f"{name} {unet[name]}" for name in _SHOWN if name in unet)}
    embedders = params["conditioner_config"].get("params", {}).get("emb_models", [])
    texts = []
    for embedder in embedders:
        key = embedder.get("input_key", "")
        texts.append(f"{embedder['target'].split('.')[-1]} of {key}" if key else embedder["target"])
    lines["condition"] = ", ".join(texts) or "none in this file"
    objective, _ = _denoiser(params["denoiser_config"])
    lines["predicts"] = objective
    if stage:
        inner = stage.get("ddconfig", stage)
        known = ("ch", "ch_mult", "num_res_blocks", "z_channels")
        lines["first stage"] = ", ".join(f"{name} {inner[name]}" for name in known if name in inner)
    return lines


_SHOWN = (
    *("model_channels", "channel_mult", "num_res_blocks", "transformer_depth"),
    *("attention_resolutions", "in_channels", "context_dim", "adm_in_channels"),
)
