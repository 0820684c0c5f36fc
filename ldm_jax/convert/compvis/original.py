"""The original's YAML and our model config, in both directions.

The config describes the networks; under "original" it keeps what has no place in it: class names,
where a condition enters, the size of training. `config_of` and `original_of` are inverse to each
other.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ldm_jax.convert.compvis import others
from ldm_jax.convert.compvis.infer import (
    DEPTH,
    INPAINTING,
    LATENT_DIFFUSION,
    UPSCALE,
    Original,
    upscaler_params,
)
from ldm_jax.convert.compvis.targets import OPEN_CLIP, VIT_H
from ldm_jax.convert.compvis.whole import (
    IDENTITIES,
    IS_FIRST_STAGE,
    UNCONDITIONAL,
    low_scale_params,
)
from ldm_jax.errors import TargetError
from ldm_jax.io.atomic import write_atomic
from ldm_jax.models.autoencoder import Autoencoder, AutoencoderKL
from ldm_jax.models.build import build, build_first_stage
from ldm_jax.models.vqgan import VQModel

_EMBEDDERS = "ldm.modules.encoders.modules"
_UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
_SCHEDULE = ("beta_schedule", "timesteps", "linear_start", "linear_end", "cosine_s", "v_posterior")
# Fields of an autoencoder that the original has beside its ddconfig.
_OUTER = (
    "embed_dim",
    "n_embed",
    "beta",
    "kl_weight",
    "remap",
    "unknown_index",
    "sane_index_shape",
    "n_labels",
)
_KEPT = ("cond_stage_key", "first_stage_key", "image_size")


# --------------------------------------------------------------------------------------------- YAML


def read_yaml(path: str | Path) -> Original:
    """Reads one of the original's YAML files; raises TargetError where it holds no model."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    except yaml.YAMLError as error:
        raise TargetError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    section = tree.get("model", tree) if isinstance(tree, dict) else None
    if not isinstance(section, dict) or not isinstance(section.get("target"), str):
        raise TargetError(f"{path} describes no model: it has neither model.target nor target")
    return Original(section["target"], _numbers(section.get("params") or {}))


def _numbers(value: Any) -> Any:
    """Turns 1e-4, a text in YAML 1.1, into the number that the original's reader takes it for."""
    match value:
        case dict():
            return {key: _numbers(item) for key, item in value.items()}
        case list():
            return [_numbers(item) for item in value]
        case str() if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
            return float(value)
        case str() if "${" in value:
            raise TargetError(f"the YAML refers to {value}; write the value itself")
    return value


def write_yaml(path: Path, original: Original) -> None:
    """Writes the YAML file from which the original builds the model."""
    model = {"model": {"target": original.target, "params": original.params}}
    write_atomic(path, yaml.safe_dump(model, sort_keys=False))


# ----------------------------------------------------------------------------- the original -> ours


def fields_of(module: Any, leave: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the fields of a module that differ from their defaults, tuples as lists."""
    leave = ("parent", "name", "dtype", "remat", *leave)
    fields = {
        f.name: getattr(module, f.name)
        for f in dataclasses.fields(module)
        if f.name not in leave and getattr(module, f.name) != f.default
    }
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
    }


def config_of(
    original: Original, modules: Mapping[str, Any], scale_factor: float | None = None
) -> dict[str, Any]:
    """Returns the config of the model that ``original`` describes.

    Args:
      original: The description.
      modules: The networks of its `Whole`.
      scale_factor: The stored factor, where the original measures it.

    Raises:
      TargetError: It cannot be run here.
    """
    if (own := others.of_target(original.target)) is not None:
        return own.config_of(original, modules)
    if "unet" not in modules:
        return {
            "kind": "first_stage",
            "first_stage": first_stage_section(modules["first_stage"]),
            "original": {"target": original.target},
        }
    params = original.params
    if (objective := params.get("parameterization", "eps")) not in ("eps", "x0", "v"):
        raise TargetError(f"parameterization {objective!r} is not supported (have eps, x0, v)")
    stage = modules.get("first_stage")
    factor = getattr(stage, "downsampling", 1)
    size = params.get("image_size", 256 // factor)  # of the latents
    height, width = size if isinstance(size, list | tuple) else (size, size)
    conditioner = _conditioner_section(original, modules, (height, width))
    text = conditioner.get("text", conditioner)
    return {
        "kind": "latent_diffusion",
        "objective": objective,
        "scale_factor": float(
            params.get("scale_factor", 1.0) if scale_factor is None else scale_factor
        ),
        "schedule": {name: params[name] for name in _SCHEDULE if name in params},
        "first_stage": {"kind": "identity"} if stage is None else first_stage_section(stage),
        "conditioner": conditioner,
        "unet": fields_of(modules["unet"]),
        "sampling": {
            "size": [height * factor, width * factor],
            "guidance": _GUIDANCE.get(text["kind"], 1.0),
        },
        "original": _remembered(original),
    }


def first_stage_section(module: Autoencoder) -> dict[str, Any]:
    """Returns the "first_stage" of a model config; TargetError where it cannot hold the module."""
    kind = "kl" if isinstance(module, AutoencoderKL) else "vq"
    if isinstance(module, VQModel) and module.quantizer == "ema":
        raise TargetError(
            "a codebook of moving averages (EMAVQ) has no place in a model directory yet"
        )
    return {"kind": kind, **fields_of(module)}


# Class of conditioner -> (kind here, where it enters the UNet).
_KINDS = {
    f"{_EMBEDDERS}.BERTEmbedder": ("bert", "crossattn"),
    f"{_EMBEDDERS}.TransformerEmbedder": ("tokens", "crossattn"),
    f"{_EMBEDDERS}.FrozenCLIPEmbedder": ("clip", "crossattn"),
    f"{_EMBEDDERS}.TinyCLIP": ("clip", "crossattn"),
    OPEN_CLIP: ("clip", "crossattn"),
    f"{_EMBEDDERS}.ClassEmbedder": ("class", "crossattn"),
    f"{_EMBEDDERS}.SpatialRescaler": ("rescale", "concat"),
}


def _conditioner_section(
    original: Original, modules: Mapping[str, Any], size: tuple[int, int]
) -> dict[str, Any]:
    params, unet = original.params, modules["unet"]
    module, section, dim = (
        modules.get("conditioner"),
        params.get("cond_stage_config"),
        unet.context_dim,
    )
    if module is None:
        given, key = isinstance(section, Mapping), conditioning_key(params)
        if given and key == "crossattn" and dim:
            return {"kind": "embeddings", "dim": dim}
        if given and key == "adm" and isinstance(unet.num_classes, int):
            # Such a model is trained without a null class.
            return {"kind": "class_vector", "n_classes": unet.num_classes, "null_class": False}
        joined = {
            "kind": "joined",
            "channels": unet.in_channels - unet.out_channels,
            "size": list(size),
        }
        if (
            section == IS_FIRST_STAGE
            and key == "concat"
            and joined["channels"] == unet.out_channels + 1
        ):
            return {**joined, "of": "masked"}  # as in scripts/inpaint.py
        if given and key == "concat" and joined["channels"] == 3:
            return {**joined, "of": "picture"}  # a small picture to be enlarged
        return {"kind": "none"}
    assert section is not None
    if section["target"] not in _KINDS:
        raise TargetError(
            f"{section['target']} is not supported as a conditioner (have {', '.join(_KINDS)})"
        )
    kind, way = _KINDS[section["target"]]
    key = conditioning_key(params)
    if key not in (way, "hybrid") and (original.target, key) != (UPSCALE, "hybrid-adm"):
        raise TargetError(
            f"{section['target']} as conditioning_key {key} is not supported, only {way} and hybrid"
        )
    if kind == "bert" and not (section.get("params") or {}).get("use_tokenizer", True):
        kind = "tokens"
    fields = fields_of(module)
    if kind == "rescale":  # the size of maps in pixels, which only an empty map needs
        fields["size"] = [round(side / module.multiplier**module.n_stages) for side in size]
    section_here = {"kind": kind, **fields}
    if section["target"] == OPEN_CLIP:
        section_here["pad_token_id"] = 0  # open_clip pads so
    factor = getattr(modules.get("first_stage"), "downsampling", 1)
    if original.target == DEPTH and kind == "clip":
        if (extra := unet.in_channels - unet.out_channels) != 1:
            raise TargetError(f"{DEPTH} joins {extra} channels, not the one of a depth map")
        return {"kind": "depth", "text": section_here, "size": list(size), "factor": factor}
    if original.target == UPSCALE and kind == "clip":
        noise = low_scale_params(params)
        return {"kind": "upscale", "text": section_here, "size": list(size), **noise}
    # Only LatentInpaintDiffusion says what is joined to the latents.
    order = tuple(params.get("concat_keys") or _CONCAT_KEYS)
    if (
        key == "hybrid"
        and way == "crossattn"
        and (original.target, order) == (INPAINTING, _CONCAT_KEYS)
    ):
        joined = {
            "channels": unet.in_channels - unet.out_channels,
            "of": "masked_sd",
            "size": list(size),
        }
        if kind in ("bert", "clip") and joined["channels"] == unet.out_channels + 1:
            return {"kind": "hybrid", "text": section_here, "joined": joined}
    return section_here


_CONCAT_KEYS = ("mask", "masked_image")  # of LatentInpaintDiffusion


def conditioning_key(params: Mapping[str, Any]) -> str | None:
    """Returns where the condition of a LatentDiffusion enters, as its constructor decides."""
    if params.get("cond_stage_config", UNCONDITIONAL) == UNCONDITIONAL:
        return None
    return params.get("conditioning_key") or (
        "concat" if params.get("concat_mode", True) else "crossattn"
    )


# The guidance of the original's sampling scripts.
_GUIDANCE = {"bert": 5.0, "clip": 7.5, "class": 3.0, "embeddings": 5.0}


def _remembered(original: Original) -> dict[str, Any]:
    params = original.params
    conditioner = params.get("cond_stage_config", UNCONDITIONAL)
    return {
        "target": original.target,
        "first_stage": params["first_stage_config"]["target"],
        "conditioner": conditioner["target"] if isinstance(conditioner, Mapping) else conditioner,
        "conditioning_key": conditioning_key(params),
        **{name: params[name] for name in (*_KEPT, "scale_by_std") if params.get(name) is not None},
    }


# ----------------------------------------------------------------------------- ours -> the original


def original_of(config: Mapping[str, Any]) -> Original:
    """Returns the original's description of a model; TargetError names what it cannot hold."""
    kept = config.get("original", {})
    if (own := others.of_config(config)) is not None:
        return own.original_of(config)
    if config.get("kind") == "first_stage":
        return Original(*first_stage_of(build_first_stage(config), kept.get("target"), alone=True))
    if config.get("kind") != "latent_diffusion":
        raise TargetError(f"a {config.get('kind')} has no counterpart in the original")
    text = config["conditioner"].get("text", config["conditioner"])
    second = text["kind"] == "clip" and text.get("hidden_act") == "gelu"  # Stable Diffusion 2.x
    if config["objective"] not in ("eps", "x0", *(["v"] if second else [])):
        raise TargetError(
            f"the original cannot hold a model that predicts {config['objective']}, only eps and x0"
        )
    model = build(config, None, None)
    schedule = dict(config["schedule"])
    if schedule.pop("zero_terminal_snr", False):
        raise TargetError("the original cannot hold a schedule with zero terminal SNR")
    section = dict(config["conditioner"])
    kind = section["kind"]
    if kind == "hybrid" and section["joined"].get("of") != "masked_sd":
        raise TargetError(
            "the original cannot hold text with joined channels other than 'masked_sd'"
        )
    if kind == "joined" and (of := section.get("of")) in ("masked_sd", "masked_filled"):
        raise TargetError(f"the original cannot hold {of!r} without a text")
    module = getattr(model.conditioner, "module", None)
    target = kept.get("conditioner") or (
        IS_FIRST_STAGE if kind == "joined" and section.get("of") == "masked" else None
    )
    conditioner = _CONDITIONERS[section.get("text", section)["kind"]](module, target)
    ways = {"none": None, "rescale": "concat", "joined": "concat", "hybrid": "hybrid"}
    ways |= {"class_vector": "adm", "depth": "hybrid", "upscale": "hybrid-adm"}
    way = ways.get(kind, "crossattn")
    stage, inside = first_stage_of(model.first_stage.module, kept.get("first_stage"))
    params: dict[str, Any] = {
        **schedule,
        "parameterization": config["objective"],
        "conditioning_key": kept.get("conditioning_key", way),
        "image_size": config.get("sampling", {}).get("size", [256])[0]
        // model.first_stage.downsampling,
        "channels": model.first_stage.channels,
        "use_ema": False,
        **(
            {"scale_by_std": True}
            if kept.get("scale_by_std")
            else {"scale_factor": config.get("scale_factor", 1.0)}
        ),
        **{name: kept[name] for name in _KEPT if name in kept},
        # The original has no default for the first two.
        "unet_config": {
            "target": _UNET,
            "params": {"image_size": 32, "attention_resolutions": [], **fields_of(model.unet)},
        },
        "first_stage_config": {"target": stage, "params": inside},
        "cond_stage_config": conditioner,
    }
    if kind == "depth":
        params["depth_stage_config"] = {
            "target": "ldm.modules.midas.api.MiDaSInference",
            "params": {"model_type": "dpt_hybrid"},
        }
    if kind == "upscale":
        more = upscaler_params(model.first_stage.downsampling)
        noise = more["low_scale_config"]["params"]
        noise["max_noise_level"] = section.get("max_noise_level", 350)
        names = ("beta_schedule", "timesteps", "linear_start", "linear_end")
        noise["noise_schedule_config"] = {n: section[n] for n in names if n in section}
        params |= {name: more[name] for name in ("low_scale_key", "low_scale_config")}
    target = {"hybrid": INPAINTING, "depth": DEPTH, "upscale": UPSCALE}.get(kind, LATENT_DIFFUSION)
    return Original(kept.get("target", target), params)


def first_stage_of(
    module: Autoencoder | None, target: str | None, alone: bool = False
) -> tuple[str, dict[str, Any]]:
    """Returns (target, params) of a first stage; ``target`` None is the usual one."""
    if module is None:
        return target or IDENTITIES[-1], {}
    vq = "VQModel" if alone else "VQModelInterface"
    usual = f"ldm.models.autoencoder.{'AutoencoderKL' if isinstance(module, AutoencoderKL) else vq}"
    if isinstance(module, VQModel) and module.quantizer == "gumbel":
        usual = "taming.models.vqgan.GumbelVQ"
    fields = fields_of(module, leave=("quantizer",))
    params = {name: fields.pop(name) for name in _OUTER if name in fields}
    attention = fields.pop("attn_type", "vanilla")
    ddconfig = {
        "double_z": isinstance(module, AutoencoderKL),
        "dropout": 0.0,
        "attn_resolutions": [],
        **fields,
    }
    if attention != "vanilla":
        ddconfig["attn_type"] = attention
    params |= {"ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}
    return target or usual, params


def _bert(module: Any, target: str | None, tokenizer: bool = True) -> dict[str, Any]:
    fields = fields_of(module, leave=("with_logits", "embed_std", "dropout"))
    params = {
        "n_embed": fields.pop("dim"),
        "n_layer": fields.pop("depth"),
        "vocab_size": module.vocab_size,
        **fields,
    }
    target = target or f"{_EMBEDDERS}.BERTEmbedder"
    return {
        "target": target,
        "params": params | ({} if tokenizer or "BERT" not in target else {"use_tokenizer": False}),
    }


def _clip(module: Any, target: str | None) -> dict[str, Any]:
    fields = fields_of(module)
    if fields.pop("hidden_act", None) == "gelu":
        fields["num_hidden_layers"] = module.num_hidden_layers + 1  # stored and not run
        sizes = {name: value for name, value in fields.items() if VIT_H.get(name) != value}
        return {"target": OPEN_CLIP, "params": {"freeze": True, "layer": "penultimate", **sizes}}
    return {
        "target": target or f"{_EMBEDDERS}.{'TinyCLIP' if fields else 'FrozenCLIPEmbedder'}",
        "params": fields,
    }


def _same(name: str) -> Callable[[Any, str | None], dict[str, Any]]:
    return lambda module, target: {
        "target": target or f"{_EMBEDDERS}.{name}",
        "params": fields_of(module),
    }


def _identity(module: Any, target: str | None) -> Any:
    return target if target == IS_FIRST_STAGE else {"target": target or IDENTITIES[0]}


def _unconditional(module: Any, target: str | None) -> Any:
    return {"target": target} if target in IDENTITIES else target or UNCONDITIONAL


# Kind of conditioner -> function of (module, original target) to cond_stage_config.
_CONDITIONERS: dict[str, Callable[[Any, str | None], Any]] = {
    "bert": _bert,
    "tokens": lambda module, target: _bert(module, target, tokenizer=False),
    "clip": _clip,
    "class": _same("ClassEmbedder"),
    "class_vector": _identity,
    "rescale": _same("SpatialRescaler"),
    "embeddings": _identity,
    "joined": _identity,
    "none": _unconditional,
}
