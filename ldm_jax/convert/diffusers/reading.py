"""A folder of diffusers as (config, params) of a model directory here, with a list of what became of each of its arrays."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.convert.diffusers import configs
from ldm_jax.convert.diffusers.components import (
    BESIDE,
    COMPONENTS,
    MODULES,
    PIPELINES,
    class_of,
    read_json,
)
from ldm_jax.convert.diffusers.configs import Config
from ldm_jax.convert.diffusers.schedulers import schedule_from
from ldm_jax.convert.diffusers.tables import TABLES, join_qkv, modern, shapes_of
from ldm_jax.convert.diffusers.vocabulary import TOKENIZERS, check_vocabulary
from ldm_jax.convert.reader.lazy import LazyTensor
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import Entry, source_shapes, to_ours
from ldm_jax.errors import ConfigError, TargetError
from ldm_jax.models.build import DTYPES
from ldm_jax.models.unet import UNet

_INPAINTING = "StableDiffusionInpaintPipeline"


def is_diffusers(path: str | Path) -> bool:
    """Whether a path is a pipeline folder, or a folder with one component that is known here."""
    path = Path(path)
    if (path / "model_index.json").is_file():
        return True
    try:
        return class_of(read_json(path / "config.json")) in COMPONENTS
    except TargetError:
        return False


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


def from_diffusers(
    path: str | Path, *, config: Any = None, ema: bool | None = None, dtype: str | None = None
) -> Read:
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
        read = component._replace(
            config={"kind": part, part: section}, params={part: component.params}
        )
    return read._replace(
        config=json.loads(json.dumps(read.config))
    )  # tuples are lists in a config.json


def _component(
    folder: Path, dtype: str | None, only: str | None = None
) -> tuple[str, Config, Read]:
    """(our part, its section, its parameters) of a component folder, which has to be the part ``only``."""
    given = read_json(folder / "config.json")
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
        stored = {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}
            for name, tensor in found
        }
        taken: list[tuple[str, Any]] = [
            (name, _noting(name, tensor, dtype, digests)) for name, tensor in found
        ]
        params = to_ours(table, taken, shapes=shapes, where=str(folder))
    entries, left_out = [], []
    for entry in (entry for entry in table if entry.source in stored):
        about = {"source": f"{folder.name}/{entry.source}", **stored[entry.source]}
        if isinstance(entry, Entry):
            entries.append(
                about | {"path": "/".join((part, *entry.path)), "sha256": digests[entry.source]}
            )
        else:
            left_out.append(about | {"why": "no computation needs it"})
    params = join_qkv(module, params) if isinstance(module, UNet) else params
    return part, section, Read({}, params, entries, left_out)


def _noting(
    name: str, tensor: LazyTensor, dtype: str | None, digests: dict[str, str]
) -> LazyTensor:
    """The same tensor as ``dtype``, which notes the sha256 of what is stored when it is read."""

    def read() -> np.ndarray:
        array = tensor.numpy()
        digests[name] = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
        return array.astype(to, copy=False)

    # numpy counts bfloat16 among its kind "V".
    to = tensor.dtype if dtype is None or tensor.dtype.kind not in "fV" else np.dtype(DTYPES[dtype])
    return LazyTensor(tensor.shape, to, read)


def _pipeline(path: Path, dtype: str | None) -> Read:
    index = read_json(path / "model_index.json")
    name = class_of(index)
    if name not in PIPELINES:
        raise TargetError(
            f"{path}: the pipeline {name} is not supported (have {', '.join(PIPELINES)})"
        )
    roles = PIPELINES[name]
    there = {
        k
        for k, value in index.items()
        if not k.startswith("_") and value not in (None, [None, None])
    }
    used = {"scheduler", *roles.folders.values()}
    if unknown := sorted(there - used - BESIDE.keys()):
        raise TargetError(f"{path}: {name} with the component {unknown[0]} is not supported")
    if missing := sorted(used - there):
        raise TargetError(f"{path}: model_index.json lacks the component {missing[0]}")

    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    if name.startswith("StableDiffusion") and class_of(scheduler) in (
        "DDIMScheduler",
        "PNDMScheduler",
    ):
        # What the pipeline itself does with files older than these fields.
        scheduler |= {"steps_offset": 1} | (
            {"clip_sample": False} if class_of(scheduler) == "DDIMScheduler" else {}
        )
    with _understood(path / "scheduler"):
        noise, assumed = schedule_from(scheduler)
    config: Config = {"kind": "latent_diffusion", **noise, "conditioner": {"kind": "none"}}
    params: dict[str, Any] = {"conditioner": {}}
    entries, left_out = (
        [],
        [{"source": source, "why": BESIDE[source]} for source in sorted(there & BESIDE.keys())],
    )
    for part, folder in roles.folders.items():
        _, config[part], component = _component(path / folder, dtype, only=part)
        params[part] = component.params
        entries += component.entries
        left_out += component.left_out
    with _understood(path):
        stage = read_json(path / roles.folders["first_stage"] / "config.json")
        config["scale_factor"] = float(stage.get("scaling_factor", 0.18215))
        latents, pixels = side(path), 2 ** (len(config["first_stage"]["ch_mult"]) - 1)
    extra = config["unet"]["in_channels"] - config["first_stage"]["embed_dim"]
    if name == "LDMSuperResolutionPipeline":
        config["scale_factor"] = 1.0  # that pipeline does not scale
        config["conditioner"] = {
            "kind": "joined",
            "channels": extra,
            "of": "picture",
            "size": [latents, latents],
        }
    elif extra and (name, extra) != (_INPAINTING, config["first_stage"]["embed_dim"] + 1):
        raise TargetError(
            f"{path}: its UNet takes {extra} channels beside the latent's, which {name} does not give it"
        )
    if config["conditioner"]["kind"] in TOKENIZERS and (path / "tokenizer").is_dir():
        check_vocabulary(path / "tokenizer", config["conditioner"]["kind"])
    if extra and name == _INPAINTING:  # else the mask is a matter of sampling alone
        joined = {"channels": extra, "of": "masked_sd", "size": [latents, latents]}
        config["conditioner"] = {"kind": "hybrid", "text": config["conditioner"], "joined": joined}
    config["sampling"] |= {"size": [latents * pixels] * 2, "guidance": roles.guidance}
    return Read(config, params, entries, left_out, tuple(assumed))


def side(path: Path) -> int:
    """The side of the latents that a pipeline makes: its UNet's ``sample_size``, or 64."""
    return configs.side(read_json(path / "unet" / "config.json").get("sample_size") or 64)


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
