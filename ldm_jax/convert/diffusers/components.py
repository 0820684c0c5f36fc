"""The classes of diffusers and transformers, the parts that they are, and the pipelines of them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from ldm_jax.conditioning import make_conditioner
from ldm_jax.convert.diffusers import configs, sdxl, second, unets
from ldm_jax.convert.diffusers.configs import Config
from ldm_jax.convert.reader.reader import MAX_JSON
from ldm_jax.errors import TargetError
from ldm_jax.models.autoencoder import Autoencoder
from ldm_jax.models.build import build_first_stage, construct
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.unet import UNet


class Component(NamedTuple):
    """A class of diffusers: the part that it is, and the part's section from its config.json."""

    part: str
    section: Callable[[Mapping[str, Any]], Config]


COMPONENTS = {
    "UNet2DConditionModel": Component("unet", unets.unet_condition_from),
    "UNet2DModel": Component("unet", unets.unet_2d_from),
    "AutoencoderKL": Component("first_stage", configs.kl_from),
    "VQModel": Component("first_stage", configs.vq_from),
    "LDMBertModel": Component("conditioner", configs.bert_from),
    "CLIPTextModel": Component("conditioner", configs.clip_from),
    "CLIPTextModelWithProjection": Component("conditioner", configs.clip_projected_from),
}


class Roles(NamedTuple):
    """The folders of a pipeline by part, its default guidance, and those of its text towers."""

    folders: Mapping[str, str]
    guidance: float = 1.0
    towers: Mapping[str, tuple[str, str]] = {}


_SD = {"unet": "unet", "first_stage": "vae", "conditioner": "text_encoder"}
_LDM = {"unet": "unet", "first_stage": "vqvae"}
_XL = {"unet": "unet", "first_stage": "vae"}
PIPELINES = {
    "StableDiffusionPipeline": Roles(_SD, 7.5),
    "StableDiffusionImg2ImgPipeline": Roles(_SD, 7.5),
    "StableDiffusionInpaintPipeline": Roles(_SD, 7.5),
    second.DEPTH: Roles(_SD, 7.5),
    second.UPSCALE: Roles(_SD, 9.0),
    **{name: Roles(_XL, 5.0, sdxl.FOLDERS) for name in sdxl.PIPELINES},
    "LDMTextToImagePipeline": Roles(_LDM | {"conditioner": "bert"}, 5.0),
    "LDMPipeline": Roles(_LDM),
    "LDMSuperResolutionPipeline": Roles(_LDM),
}
# Components that are no part of the model, and why they are left out.
LEFT_OUT = {
    "safety_checker": "judges pictures",
    "feature_extractor": "prepares pictures for the safety checker",
    "image_encoder": "of IP-Adapter, no part of the model",
    "requires_safety_checker": "how the pipeline is run",
    "tokenizer": "its vocabulary ships with ldm_jax; the rest is in config.json",
    "tokenizer_2": "its vocabulary ships with ldm_jax; the rest is in config.json",
    "force_zeros_for_empty_prompt": "stands in config.json",
    "requires_aesthetics_score": "stands in config.json",
    "add_watermarker": "how the pipeline is run",
    "watermarker": "marks pictures",
    "depth_estimator": "estimates depth maps, which are given instead",
    second.LOW_RES: "its schedule stands in config.json",
    "max_noise_level": "stands in config.json",
}


def class_of(config: Mapping[str, Any]) -> str:
    """Returns the class that a config.json names, as diffusers or transformers do."""
    architectures = config.get("architectures")
    return str(
        config.get("_class_name")
        or (architectures[0] if isinstance(architectures, list) and architectures else None)
    )


def read_json(file: Path) -> Config:
    """Reads the JSON object of a file; raises TargetError where there is none."""
    try:
        if file.stat().st_size > MAX_JSON:
            raise TargetError(
                f"{file} is larger than {MAX_JSON >> 20} MiB, too large for a configuration"
            )
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise TargetError(f"{file} is missing; copy the folder whole") from None
    except RecursionError:
        raise TargetError(f"{file} cannot be read: it is nested too deeply") from None
    except TargetError:
        raise
    except (OSError, ValueError) as error:
        raise TargetError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise TargetError(f"{file} holds no JSON object")
    return config


def _text_encoder(config: Config) -> Any:
    """Builds the network of a "conditioner" that is a text encoder."""
    conditioner: Any = make_conditioner(config["conditioner"], jnp.float32)
    return conditioner.module


# Part -> its module, from a config with its section.
MODULES: dict[str, Callable[[Config], Any]] = {
    "unet": lambda config: construct(UNet, "unet", config["unet"]),
    "first_stage": build_first_stage,
    "conditioner": _text_encoder,
}


def component_of(module: Any) -> Config:
    """Returns the config.json of a module."""
    match module:
        case UNet():
            return unets.unet_to(module)
        case Autoencoder():
            return configs.autoencoder_to(module)
        case CLIPText():
            return configs.clip_to(module)
    return configs.bert_to(module)
