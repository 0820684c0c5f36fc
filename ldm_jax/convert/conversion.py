"""Checkpoints of others as our models, and our models as theirs: what `ldm_jax.load` and ``python -m ldm_jax.convert`` call.

FORMATS lists what can be read, EXPORTS what can be written. Everything that a file holds is either a parameter here or reported as left out, with the
reason; anything else is an error that lists it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

import ldm_jax
from ldm_jax.convert.compvis.infer import Names, Original, infer, loss_config
from ldm_jax.convert.compvis.original import config_of, original_of, read_yaml, write_yaml
from ldm_jax.convert.compvis.whole import EMA, FIRST_STAGE, Whole, whole_from_config
from ldm_jax.convert.diffusers import from_diffusers, is_diffusers, to_diffusers
from ldm_jax.convert.reader.reader import Checkpoint, LazyTensor, open_checkpoint
from ldm_jax.convert.tables import Duplicate, Entry, Unused, as_ours, check, nest, to_theirs
from ldm_jax.convert.tables import Path as ParamPath
from ldm_jax.errors import CheckpointError, ReaderError, TargetError
from ldm_jax.io.checkpoint import load_model, save_model
from ldm_jax.models.build import DTYPES, build, check_params
from ldm_jax.models.perceptual import VGG16_WIDTHS


class Converted(NamedTuple):
    """A checkpoint as a model of ours.

    entries: for each parameter {"source", "path", "shape", "dtype", "sha256"}, the last three of what the file stores. left_out: {"source", "shape",
    "dtype", "why"}. assumed: a line for each thing that had to be guessed. about: whatever else the report is to hold.
    """

    config: dict[str, Any]
    params: dict[str, Any]
    entries: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    assumed: tuple[str, ...] = ()
    about: Mapping[str, Any] = MappingProxyType({})


class Format(NamedTuple):
    """A kind of checkpoint: whether a path is one, and how it is read (path, config=, ema=, dtype= as for `read_model`)."""

    recognises: Callable[[Path], bool]
    reads: Callable[..., Converted]


# ---------------------------------------------------------------------------------------------------------------- CompVis

# What some files hold beside the model, by the beginning of its names.
_BESIDE = {"safety_checker.": "of the checker of pictures, which is no part of the model"}
# How averages were made; files that were stripped of the averages may still hold these.
_COUNTERS = dict.fromkeys((f"{EMA}decay", f"{EMA}num_updates"), "of averages that are not there")
_ENDINGS = ("*.ckpt", "*.pt", "*.pth", "*.bin", "*.safetensors", "*.index.json")


def is_compvis(path: Path) -> bool:
    """A file, or a folder that holds one and is nothing else."""
    if path.is_file():
        return True
    return not (path / "config.json").exists() and any(
        any(path.glob(ending)) for ending in _ENDINGS
    )


def from_compvis(
    path: Path,
    *,
    config: str | Path | Original | None = None,
    ema: bool | None = None,
    dtype: str | None = None,
) -> Converted:
    """A latent diffusion model, Stable Diffusion v1, a first stage or a VQGAN from its .ckpt or .safetensors."""
    with open_checkpoint(path) as checkpoint:
        tensors, left_out = _apart(checkpoint.tensors)
        original = (
            config
            if isinstance(config, Original)
            else infer(tensors)
            if config is None
            else read_yaml(config)
        )
        averaged = any(name.startswith(EMA) for name in tensors)
        if ema and not averaged:
            raise TargetError(f"{path.name} holds no averages of its weights; leave --ema out")
        whole = whole_of(original, tensors, averaged)
        check(whole.table, tensors, shapes=whole.shapes, where=path.name)
        entries, flat = [], {}
        for entry in whole.table:
            if (tensor := tensors.get(entry.source)) is None:
                continue
            place, why = _place(entry, averaged and ema is not False)
            if place is None:
                left_out.append(_described(entry.source, tensor) | {"why": why})
                continue
            array = tensor.numpy()
            flat[place] = _cast(as_ours(entry, array), dtype)  # type: ignore[arg-type]
            entries.append(
                _described(entry.source, tensor)
                | {"path": "/".join(place), "sha256": sha256(array)}
            )
        scale = float(np.asarray(tensors["scale_factor"])) if "scale_factor" in tensors else None
        about = {
            "original": {"target": original.target, "params": original.params},
            "ema": averaged and ema is not False,
            "beside the weights": _beside(checkpoint),
            "inert classes": checkpoint.standins,
        }
        return Converted(
            config_of(original, whole.modules, scale),
            nest(flat),
            entries,
            left_out,
            original.assumed,
            about,
        )


def _apart(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], list[dict[str, Any]]]:
    """(the arrays of the model, descriptions of those that are none of it)."""
    averaged = any(name.startswith(EMA) and name not in _COUNTERS for name in tensors)
    beside = _BESIDE if averaged else _BESIDE | _COUNTERS
    whys = {
        name: next((why for start, why in beside.items() if name.startswith(start)), None)
        for name in tensors
    }
    left_out = [_described(name, tensors[name]) | {"why": why} for name, why in whys.items() if why]
    return {name: tensor for name, tensor in tensors.items() if not whys[name]}, left_out


def whole_of(original: Original, tensors: Mapping[str, Any], ema: bool = False) -> Whole:
    """The parts and the table of a state dict.

    The names tell with which losses a first stage was saved, whatever the YAML says: often without. Raises TargetError.
    """
    names, params, options = (
        Names({name: tuple(t.shape) for name, t in tensors.items()}),
        dict(original.params),
        {},
    )
    try:
        if "unet_config" in params:
            options = {"ema": ema}
            loss, vgg = loss_config(names, f"{FIRST_STAGE}loss.")
            stage = params["first_stage_config"]
            params["first_stage_config"] = {
                **stage,
                "params": {**(stage.get("params") or {}), "lossconfig": loss},
            }
        else:
            params["lossconfig"], vgg = loss_config(names)
        return whole_from_config(original.target, params, vgg=vgg or VGG16_WIDTHS, **options)
    except (TargetError, ReaderError):
        raise
    except Exception as error:  # whatever a section that is missing, or a size that is none, makes Flax or Python raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise TargetError(
            f"{original.target} cannot be built: {type(error).__name__}: {reason[:200]}"
        ) from None


def _place(entry: Entry | Unused | Duplicate, ema: bool) -> tuple[ParamPath | None, str]:
    """(where an entry goes, "") or (None, why it is left out); ``ema``: the averages take the place of the weights."""
    match entry:
        case Duplicate(of=of):
            return None, f"the same as {of}"
        case Unused(fixed=fixed):
            return (
                None,
                "follows from the configuration, with which it agrees"
                if fixed
                else "no computation needs it",
            )
        case Entry(path=("losses", *_)):
            return None, "of the loss that the first stage was trained with"
        case Entry(path=("scale_factor",)):
            return None, "stands in config.json"
        case Entry(path=("ema", *rest)):
            return (
                (tuple(rest), "")
                if ema
                else (None, "an average of the weights, which were taken themselves")
            )
        case Entry(path=("unet", *_)) if ema:
            return None, "its average over training (EMA) was taken"
    return entry.path, ""


def _beside(checkpoint: Checkpoint) -> dict[str, Any]:
    """What was saved beside the state dict: numbers and texts as they are, of all else that it was left out."""
    tree = checkpoint.tree if isinstance(checkpoint.tree, dict) else {}
    beside = {
        str(k): v
        for k, v in tree.items()
        if not isinstance(v, LazyTensor) and k not in ("state_dict", "model")
    }
    simple = int | float | str | None
    return {
        k: v if isinstance(v, simple) else "left out: of the original's training"
        for k, v in beside.items()
    }


def _described(name: str, tensor: LazyTensor) -> dict[str, Any]:
    return {"source": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype)}


def sha256(array: np.ndarray) -> str:
    """Of the bytes of an array in C order, little-endian as every format here stores them."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _cast(array: np.ndarray, dtype: str | None) -> np.ndarray:
    # numpy counts bfloat16 among its kind "V".
    return (
        array
        if dtype is None or array.dtype.kind not in "fV"
        else array.astype(DTYPES[dtype], copy=False)
    )


def to_compvis(config: Mapping[str, Any], params: Mapping[str, Any], out: Path) -> None:
    """Writes ``out`` (.safetensors) under the original's names, and beside it the .yaml that the original builds the model from.

    Both load there strictly. Raises TargetError for what the original cannot hold.
    """
    described = _new(out.with_suffix(".yaml"))
    original, tree = (
        original_of(config),
        {part: params.get(part, {}) for part in ("unet", "conditioner", "first_stage", "logvar")},
    )
    if "logvar" in params:
        original.params["learn_logvar"] = True
    if original.params.get("scale_by_std"):
        tree["scale_factor"] = np.float32(config["scale_factor"])
    section = config.get("conditioner", {})
    if (
        section.get("text", section).get("kind") in ("bert", "tokens")
        and "to_logits" not in tree["conditioner"]
    ):
        # The original holds the projection that nothing calls.
        vocabulary, dim = tree["conditioner"]["token_emb"]["embedding"].shape
        zeros = {
            "kernel": np.zeros((dim, vocabulary), np.float32),
            "bias": np.zeros(vocabulary, np.float32),
        }
        tree["conditioner"] = {**tree["conditioner"], "to_logits": zeros}
    whole = whole_from_config(original.target, original.params)
    parts = {part: leaves for part, leaves in tree.items() if part in whole.shapes}
    arrays = to_theirs(whole.table, parts, where=str(out))
    partial = out.with_name(f".{out.name}.partial")
    save_file(arrays, partial, metadata={"format": "pt"})
    os.replace(partial, out)
    write_yaml(described, original)


# ---------------------------------------------------------------------------------------------------------- both ways

# What can be read; the first that recognises a path reads it.
FORMATS: dict[str, Format] = {
    "diffusers": Format(
        is_diffusers, lambda path, **options: Converted(*from_diffusers(path, **options))
    ),
    "compvis": Format(is_compvis, from_compvis),
}
# What can be written: (config, params, the new file or folder).
EXPORTS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], Path], None]] = {
    "compvis": to_compvis,
    "diffusers": to_diffusers,
}


def is_foreign(path: Path) -> bool:
    """Whether a path is a checkpoint to convert, and no model directory."""
    return any(format.recognises(path) for format in FORMATS.values())


def read_model(
    path: str | Path,
    *,
    config: str | Path | Original | None = None,
    ema: bool | None = None,
    dtype: str | None = None,
) -> Converted:
    """A checkpoint as a model of ours, in memory; nothing is written.

    ``config``: the original's YAML, or what it says (None: told by names and shapes). ``ema``: take the averaged weights (None: where the file has
    them). ``dtype``: of floating-point parameters (None: as stored). Raises ReaderError, TargetError or ConversionError.
    """
    path = Path(path)
    for format in FORMATS.values():
        if format.recognises(path):
            return format.reads(path, config=config, ema=ema, dtype=dtype)
    raise TargetError(
        f"{path} is no checkpoint: there is {'nothing to convert in it' if path.exists() else 'no such file'}"
    )


def convert(
    source: str | Path,
    out: str | Path,
    *,
    config: str | Path | Original | None = None,
    ema: bool | None = None,
    dtype: str | None = None,
    report: str | Path | None = None,
) -> Converted:
    """Converts ``source`` to the model directory ``out`` and writes the report (``out``/conversion.json by default); see `read_model` for the rest.

    Nothing is written over: CheckpointError where something is there.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; give a new folder or remove it first")
    if report is not None:
        _new(Path(report))
    converted = read_model(source, config=config, ema=ema, dtype=dtype)
    if converted.config["kind"] == "latent_diffusion":
        check_params(build(converted.config, converted.params, converted.params.get("first_stage")))
    save_model(out, converted.config, converted.params, dtype=None)
    text = json.dumps(
        report_of(Path(source), converted, dtype), indent=1, default=str
    )  # YAML knows dates
    Path(report or out / "conversion.json").write_text(text + "\n", encoding="utf-8")
    return converted


def report_of(source: Path, converted: Converted, dtype: str | None) -> dict[str, Any]:
    """The report of a conversion, as JSON holds it."""
    return {
        "source": source.name,
        "ldm_jax": ldm_jax.__version__,
        "dtype": dtype or "as stored",
        "assumed": list(converted.assumed),
        **converted.about,
        "entries": converted.entries,
        "left_out": converted.left_out,
    }


def export(model: str | Path, to: str, out: str | Path) -> None:
    """Writes a model directory in the layout ``to``; CheckpointError where something is there already."""
    if to not in EXPORTS:
        raise TargetError(f"cannot write {to!r} (have {', '.join(EXPORTS)})")
    config, params = load_model(model)
    EXPORTS[to](config, jax.tree.map(np.asarray, params), _new(Path(out)))


def _new(path: Path) -> Path:
    """``path`` if nothing is there."""
    if path.exists():
        raise CheckpointError(f"{path} is already there; give a new name or remove it first")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path} cannot be written: {path.absolute().parent} is no folder")
    return path
