"""A model here as a folder that diffusers loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from ldm_jax.convert.diffusers import sdxl, second
from ldm_jax.convert.diffusers.components import MODULES, PIPELINES, component_of
from ldm_jax.convert.diffusers.configs import Config
from ldm_jax.convert.diffusers.schedulers import schedule_to
from ldm_jax.convert.diffusers.tables import TABLES, split_qkv
from ldm_jax.convert.diffusers.vocabulary import TOKENIZERS, save_tokenizer
from ldm_jax.convert.tables import to_theirs
from ldm_jax.errors import TargetError
from ldm_jax.io.atomic import atomic_path
from ldm_jax.models.build import build
from ldm_jax.models.ldm import LatentDiffusion
from ldm_jax.models.unet import UNet


def to_diffusers(config: Mapping[str, Any], params: Mapping[str, Any], out: str | Path) -> None:
    """Writes a pipeline folder, or a component folder for a model that is one part.

    The folder is written whole or not at all.

    Raises:
      TargetError: diffusers cannot hold the model, or the folder is not empty.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TargetError(f"{out} is not empty; give a new folder or remove it first")
    with atomic_path(out) as partial:
        partial.mkdir()
        if config["kind"] == "latent_diffusion":
            _write_pipeline(config, params, partial)
        elif config["kind"] in MODULES:
            _write_component(MODULES[config["kind"]](dict(config)), params[config["kind"]], partial)
        else:
            raise TargetError(f"a model of kind {config['kind']!r} has no form in diffusers")


def _write_component(module: Any, params: Mapping[str, Any], folder: Path, **more: Any) -> None:
    config = component_of(module) | more  # before anything is written
    arrays = to_theirs(
        TABLES[type(module)](module),
        split_qkv(module, params) if isinstance(module, UNet) else params,
    )
    folder.mkdir(exist_ok=True)
    name = "diffusion_pytorch_model" if "_class_name" in config else "model"
    save_file(arrays, folder / f"{name}.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)


def _write_json(file: Path, content: Config) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")


def _write_pipeline(config: Mapping[str, Any], params: Mapping[str, Any], folder: Path) -> None:
    kind, section = config["conditioner"]["kind"], config["conditioner"]
    pipelines = {
        "clip": "StableDiffusionPipeline",
        "bert": "LDMTextToImagePipeline",
        "none": "LDMPipeline",
        "joined": "LDMSuperResolutionPipeline",
        "hybrid": "StableDiffusionInpaintPipeline",
        "sdxl": sdxl.TEXT,
        **second.KINDS,
    }
    if kind not in pipelines or config["first_stage"]["kind"] == "identity":
        raise TargetError(
            f"diffusers has no pipeline for conditioner {kind!r} with first stage"
            f" {config['first_stage']['kind']!r} (conditioners: {', '.join(pipelines)})"
        )
    name, scheduler = pipelines[kind], schedule_to(config)
    model: LatentDiffusion = build(config, None, None)
    conditioner: Any = model.conditioner
    entries: Config = {}
    if kind == "sdxl":
        name, entries = sdxl.index_of(conditioner)
    if name in second.BESIDE:
        entries, low_res = second.BESIDE[name].write(conditioner)
        if low_res is not None:
            _write_json(second.scheduler_file(folder), low_res)
    unet, stage = component_of(model.unet), model.first_stage.module
    assert stage is not None
    scale = float(config.get("scale_factor", 1.0))
    if kind == "joined" and (config["conditioner"].get("of", "picture"), scale) != ("picture", 1.0):
        raise TargetError(
            f"{name} joins a picture and has scale_factor 1, which this model does not"
        )
    if kind == "hybrid" and (section["text"]["kind"], section["joined"].get("of")) != (
        "clip",
        "masked_sd",
    ):
        raise TargetError(f"{name} reads 'clip' and joins 'masked_sd', which this model does not")
    if (kind in ("none", "joined")) != (unet["_class_name"] == "UNet2DModel"):
        raise TargetError(
            f"{name} cannot hold a {unet['_class_name']}: with {kind!r} it has other attention"
        )
    text = section.get("text", section)["kind"]
    if text in ("clip", "sdxl") and config["first_stage"]["kind"] != "kl":
        raise TargetError(f"{name} cannot hold a VQ first stage, only 'kl'")
    folders, factor = PIPELINES[name].folders, stage.downsampling
    height, width = (
        side // factor for side in config.get("sampling", {}).get("size", [64 * factor] * 2)
    )
    sides = height if height == width else [height, width]
    more = {"addition_time_embed_dim": conditioner.size_dim} if kind == "sdxl" else {}
    _write_component(model.unet, params["unet"], folder / "unet", sample_size=sides, **more)
    more = {"scaling_factor": scale}
    if (upcast := config["first_stage"].get("force_upcast")) or kind == "sdxl":
        more["force_upcast"] = bool(upcast)
    _write_component(stage, params["first_stage"], folder / folders["first_stage"], **more)
    for tower, (encoder, tokenizer) in PIPELINES[name].towers.items():
        if tower in conditioner.towers:
            text_tower = conditioner.towers[tower]
            arrays = params["conditioner"][tower]
            _write_component(text_tower.module, arrays, folder / encoder)
            save_tokenizer(folder / tokenizer, text_tower)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    first_stage = component_of(stage)["_class_name"]
    index: Config = {
        "_class_name": name,
        "unet": ["diffusers", unet["_class_name"]],
        folders["first_stage"]: ["diffusers", first_stage],
    }
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if text in TOKENIZERS:
        module = getattr(model.conditioner, "module")  # noqa: B009 - those have one
        _write_component(module, params["conditioner"], folder / folders["conditioner"])
        save_tokenizer(folder / "tokenizer", getattr(model.conditioner, "text", model.conditioner))
    if text == "clip":
        index |= {
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
        }
        if name not in second.BESIDE:
            parts = ("safety_checker", "feature_extractor", "image_encoder")
            index |= {part: [None, None] for part in parts}
            index["requires_safety_checker"] = False
        if kind == "hybrid":  # without a version diffusers assumes one before 0.5.1
            index["_diffusers_version"] = "0.42.1"
    elif text == "bert":
        index |= {
            "bert": ["latent_diffusion", "LDMBertModel"],
            "tokenizer": ["transformers", "BertTokenizer"],
        }
    _write_json(folder / "model_index.json", index | entries)
