"""Folders of diffusers: read into (config, params) of a model directory here, and written from them. Neither needs diffusers or PyTorch.

A pipeline folder has a ``model_index.json`` and a folder for each component; a component folder has a ``config.json`` and one checkpoint.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.conditioning import CONDITIONERS
from ldm_jax.convert.diffusers import configs
from ldm_jax.convert.diffusers.configs import Config
from ldm_jax.convert.diffusers.schedulers import schedule_from, schedule_to
from ldm_jax.convert.diffusers.tables import TABLES, join_qkv, modern, shapes_of, split_qkv
from ldm_jax.convert.diffusers.vocabulary import TOKENIZERS, check_vocabulary, save_tokenizer
from ldm_jax.convert.lazy import LazyTensor
from ldm_jax.convert.reader import open_checkpoint
from ldm_jax.convert.tables import Entry, source_shapes, to_ours, to_theirs
from ldm_jax.convert.targets import TargetError
from ldm_jax.latent import DTYPES, ConfigError, LatentDiffusion, build, build_first_stage, construct
from ldm_jax.models.autoencoder import Autoencoder
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.unet import UNet


class Component(NamedTuple):
    """A class of diffusers: the part of our config that it is, and that part's fields from its configuration."""

    part: str
    section: Callable[[Mapping[str, Any]], Config]


COMPONENTS = {
    "UNet2DConditionModel": Component("unet", configs.unet_condition_from),
    "UNet2DModel": Component("unet", configs.unet_2d_from),
    "AutoencoderKL": Component("first_stage", configs.kl_from),
    "VQModel": Component("first_stage", configs.vq_from),
    "LDMBertModel": Component("conditioner", configs.bert_from),
    "CLIPTextModel": Component("conditioner", configs.clip_from),
}


class Roles(NamedTuple):
    """The folders of a pipeline: our part -> its name there; ``guidance`` is what it is called with where nothing is said."""

    folders: Mapping[str, str]
    guidance: float = 1.0


_SD = {"unet": "unet", "first_stage": "vae", "conditioner": "text_encoder"}
_LDM = {"unet": "unet", "first_stage": "vqvae"}
PIPELINES = {
    "StableDiffusionPipeline": Roles(_SD, 7.5),
    "StableDiffusionImg2ImgPipeline": Roles(_SD, 7.5),
    "LDMTextToImagePipeline": Roles(_LDM | {"conditioner": "bert"}, 5.0),
    "LDMPipeline": Roles(_LDM),
    "LDMSuperResolutionPipeline": Roles(_LDM),
}
# What pipelines hold beside the model, and why it is left out.
BESIDE = {
    "safety_checker": "judges pictures, makes none",
    "feature_extractor": "prepares pictures for the safety checker",
    "image_encoder": "of IP-Adapter, no part of the model",
    "requires_safety_checker": "how the pipeline is run",
    "tokenizer": "compared with the one that ships with ldm_jax",
}


def is_diffusers(path: str | Path) -> bool:
    """Whether a path is a pipeline folder, or a folder with one component that is known here."""
    path = Path(path)
    if (path / "model_index.json").is_file():
        return True
    try:
        return class_of(json.loads((path / "config.json").read_text())) in COMPONENTS
    except (OSError, ValueError, AttributeError):
        return False


def class_of(config: Mapping[str, Any]) -> str:
    """The class that a config.json names, as diffusers or as transformers does."""
    return str(config.get("_class_name") or next(iter(config.get("architectures") or []), None))


def _read_json(file: Path) -> Config:
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise TargetError(f"{file} is missing; copy the folder whole") from None
    except (OSError, ValueError) as error:
        raise TargetError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise TargetError(f"{file} holds no JSON object")
    return config


def _text_encoder(config: Config) -> Any:
    """The network of a config's "conditioner", which is a text encoder."""
    fields = dict(config["conditioner"])
    return construct(CONDITIONERS[fields.pop("kind")], "conditioner", fields).module


# part -> its module, from a config that has its section
MODULES: dict[str, Callable[[Config], Any]] = {
    "unet": lambda config: construct(UNet, "unet", config["unet"]),
    "first_stage": build_first_stage,
    "conditioner": _text_encoder,
}


@contextmanager
def _understood(what: Path) -> Iterator[None]:
    """TargetError in place of whatever a field of the wrong kind (a text for a number, an empty list) makes Python raise."""
    try:
        yield
    except (TargetError, ConfigError):
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise TargetError(f"{what} is not understood: {reason}") from error


# -------------------------------------------------------------------------------------------------------------- reading


class Read(NamedTuple):
    """A folder as a model of ours.

    entries: for each parameter {"source", "path", "shape", "dtype", "sha256"}, the last three of what the file stores. left_out: {"source", "why"}.
    assumed: a line for each thing that is not here as it is there.
    """

    config: Config
    params: dict[str, Any]
    entries: list[Config]
    left_out: list[Config]
    assumed: tuple[str, ...] = ()


def from_diffusers(path: str | Path, *, config: Any = None, ema: bool | None = None, dtype: str | None = None) -> Read:
    """A pipeline folder as {"kind": "latent_diffusion"}, a lone component as "first_stage", "unet" or "conditioner" with that section.

    Parameters are numpy arrays as stored, or of ``dtype`` where that is given; one tensor is read at a time. ``config`` and ``ema`` are for other
    kinds of checkpoints. Raises TargetError, ConversionError or ReaderError.
    """
    path = Path(path)
    if config is not None:
        raise TargetError(f"{path} describes itself: leave the YAML out")
    if ema:
        raise TargetError(f"{path} holds no averages beside its weights: leave ema out")
    if (path / "model_index.json").is_file():
        read = _pipeline(path, dtype)
    else:
        part, section, component = _component(path, dtype)
        read = component._replace(config={"kind": part, part: section}, params={part: component.params})
    return read._replace(config=json.loads(json.dumps(read.config)))  # tuples are lists in a config.json


def _component(folder: Path, dtype: str | None, only: str | None = None) -> tuple[str, Config, Read]:
    """(our part, its section, its parameters) of a component folder, which has to be the part ``only``."""
    given = _read_json(folder / "config.json")
    name = class_of(given)
    if name not in COMPONENTS or only not in (None, COMPONENTS[name].part):
        known = [known for known, component in COMPONENTS.items() if only in (None, component.part)]
        raise TargetError(f"{folder}: {name} is not supported here (have {', '.join(known)})")
    part = COMPONENTS[name].part
    with _understood(folder / "config.json"):
        section = COMPONENTS[name].section(given)
        module = MODULES[part]({part: section})
        table, shapes = TABLES[type(module)](module), shapes_of(module)
    digests: dict[str, str] = {}
    with open_checkpoint(folder) as checkpoint:
        found = modern(checkpoint.tensors, source_shapes(table, shapes))
        stored = {name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)} for name, tensor in found}
        taken = [(name, _noting(name, tensor, dtype, digests)) for name, tensor in found]
        params = to_ours(table, taken, shapes=shapes, where=str(folder))
    entries, left_out = [], []
    for entry in (entry for entry in table if entry.source in stored):
        about = {"source": f"{folder.name}/{entry.source}", **stored[entry.source]}
        if isinstance(entry, Entry):
            entries.append(about | {"path": "/".join((part, *entry.path)), "sha256": digests[entry.source]})
        else:
            left_out.append(about | {"why": "no computation needs it"})
    params = join_qkv(module, params) if isinstance(module, UNet) else params
    return part, section, Read({}, params, entries, left_out)


def _noting(name: str, tensor: LazyTensor, dtype: str | None, digests: dict[str, str]) -> LazyTensor:
    """The same tensor as ``dtype``, which notes the sha256 of what is stored when it is read."""

    def read() -> np.ndarray:
        array = tensor.numpy()
        digests[name] = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
        return array.astype(to, copy=False)

    # numpy counts bfloat16 among its kind "V".
    to = tensor.dtype if dtype is None or tensor.dtype.kind not in "fV" else np.dtype(DTYPES[dtype])
    return LazyTensor(tensor.shape, to, read)


def _pipeline(path: Path, dtype: str | None) -> Read:
    index = _read_json(path / "model_index.json")
    name = class_of(index)
    if name not in PIPELINES:
        raise TargetError(f"{path}: the pipeline {name} is not supported (have {', '.join(PIPELINES)})")
    roles = PIPELINES[name]
    there = {k for k, value in index.items() if not k.startswith("_") and value not in (None, [None, None])}
    used = {"scheduler", *roles.folders.values()}
    if unknown := sorted(there - used - BESIDE.keys()):
        raise TargetError(f"{path}: {name} with the component {unknown[0]} is not supported")
    if missing := sorted(used - there):
        raise TargetError(f"{path}: model_index.json lacks the component {missing[0]}")

    scheduler = _read_json(path / "scheduler" / "scheduler_config.json")
    if name.startswith("StableDiffusion") and class_of(scheduler) in ("DDIMScheduler", "PNDMScheduler"):
        # What the pipeline itself does with files older than these fields.
        scheduler |= {"steps_offset": 1} | ({"clip_sample": False} if class_of(scheduler) == "DDIMScheduler" else {})
    with _understood(path / "scheduler"):
        noise, assumed = schedule_from(scheduler)
    config: Config = {"kind": "latent_diffusion", **noise, "conditioner": {"kind": "none"}}
    params: dict[str, Any] = {"conditioner": {}}
    entries, left_out = [], [{"source": source, "why": BESIDE[source]} for source in sorted(there & BESIDE.keys())]
    for part, folder in roles.folders.items():
        _, config[part], component = _component(path / folder, dtype, only=part)
        params[part] = component.params
        entries += component.entries
        left_out += component.left_out
    with _understood(path):
        stage = _read_json(path / roles.folders["first_stage"] / "config.json")
        config["scale_factor"] = float(stage.get("scaling_factor", 0.18215))
        latents, pixels = side(path), 2 ** (len(config["first_stage"]["ch_mult"]) - 1)
    extra = config["unet"]["in_channels"] - config["first_stage"]["embed_dim"]
    if name == "LDMSuperResolutionPipeline":
        config["scale_factor"] = 1.0  # that pipeline does not scale
        config["conditioner"] = {"kind": "rescale", "n_stages": 0, "in_channels": extra, "size": [latents, latents]}
    elif extra:
        raise TargetError(f"{path}: its UNet takes {extra} channels beside the latent's, which {name} does not give it")
    if config["conditioner"]["kind"] in TOKENIZERS and (path / "tokenizer").is_dir():
        check_vocabulary(path / "tokenizer", config["conditioner"]["kind"])
    config["sampling"] |= {"size": [latents * pixels] * 2, "guidance": roles.guidance}
    return Read(config, params, entries, left_out, tuple(assumed))


def side(path: Path) -> int:
    """The side of the latents that a pipeline makes: its UNet's ``sample_size``, or 64."""
    return configs.side(_read_json(path / "unet" / "config.json").get("sample_size") or 64)


# -------------------------------------------------------------------------------------------------------------- writing


def to_diffusers(config: Mapping[str, Any], params: Mapping[str, Any], out: str | Path) -> None:
    """Writes what a model directory holds as a folder that diffusers loads: a pipeline, or the one component that a config of another kind is.

    The folder is written whole or not at all. Raises TargetError where diffusers has no word for something, or where the folder is not empty.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TargetError(f"{out} is not empty; give a new folder or remove it first")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if config["kind"] == "latent_diffusion":
            _write_pipeline(config, params, partial)
        elif config["kind"] in MODULES:
            _write_component(MODULES[config["kind"]](dict(config)), params[config["kind"]], partial)
        else:
            raise TargetError(f"a model of kind {config['kind']!r} has no form in diffusers")
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def component_of(module: Any) -> Config:
    """The config.json of a module of ours."""
    match module:
        case UNet():
            return configs.unet_to(module)
        case Autoencoder():
            return configs.autoencoder_to(module)
        case CLIPText():
            return configs.clip_to(module)
    return configs.bert_to(module)


def _write_component(module: Any, params: Mapping[str, Any], folder: Path, **more: Any) -> None:
    from safetensors.numpy import save_file

    config = component_of(module) | more  # before anything is written
    arrays = to_theirs(TABLES[type(module)](module), split_qkv(module, params) if isinstance(module, UNet) else params)
    folder.mkdir(exist_ok=True)
    name = "diffusion_pytorch_model" if "_class_name" in config else "model"
    save_file(arrays, folder / f"{name}.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)


def _write_json(file: Path, content: Config) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")


def _write_pipeline(config: Mapping[str, Any], params: Mapping[str, Any], folder: Path) -> None:
    kind = config["conditioner"]["kind"]
    pipelines = {"clip": "StableDiffusionPipeline", "bert": "LDMTextToImagePipeline", "none": "LDMPipeline"}
    if kind not in pipelines or config["first_stage"]["kind"] == "identity":
        raise TargetError(
            f"diffusers has no pipeline for conditioner {kind!r} with first stage {config['first_stage']['kind']!r}"
            f" (conditioners: {', '.join(pipelines)})"
        )
    name, scheduler = pipelines[kind], schedule_to(config)
    model: LatentDiffusion = build(config, None, None)
    unet, stage = component_of(model.unet), model.first_stage.module
    assert stage is not None
    if (kind == "none") != (unet["_class_name"] == "UNet2DModel"):
        raise TargetError(
            f"{name} cannot hold a {unet['_class_name']}: with {kind!r} the UNet has other attention there"
        )
    if kind == "clip" and config["first_stage"]["kind"] != "kl":
        raise TargetError(f"{name} cannot hold a VQ first stage, only 'kl'")
    folders, factor = PIPELINES[name].folders, stage.downsampling
    size = min(config.get("sampling", {}).get("size") or [64 * factor])
    _write_component(model.unet, params["unet"], folder / "unet", sample_size=size // factor)
    scale = float(config.get("scale_factor", 1.0))
    _write_component(stage, params["first_stage"], folder / folders["first_stage"], scaling_factor=scale)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    first_stage = component_of(stage)["_class_name"]
    index: Config = {
        "_class_name": name,
        "unet": ["diffusers", unet["_class_name"]],
        folders["first_stage"]: ["diffusers", first_stage],
    }
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if kind != "none":
        module = getattr(model.conditioner, "module")  # noqa: B009 - those two have one
        _write_component(module, params["conditioner"], folder / folders["conditioner"])
        save_tokenizer(folder / "tokenizer", kind, module)
    if kind == "clip":
        index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
        index |= {part: [None, None] for part in ("safety_checker", "feature_extractor", "image_encoder")}
        index["requires_safety_checker"] = False
    elif kind == "bert":
        index |= {"bert": ["latent_diffusion", "LDMBertModel"], "tokenizer": ["transformers", "BertTokenizer"]}
    _write_json(folder / "model_index.json", index)
