"""Reads a LoRA file against a model, and merges it into the model's parameters."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.convert.lora.deltas import ROLES, decomposed, delta
from ldm_jax.convert.lora.names import tables_of
from ldm_jax.convert.lora.writing import KIND, kohya_arrays
from ldm_jax.convert.reader.lazy import shown
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import Entry, as_ours, flatten, nest
from ldm_jax.convert.tables import Path as ParamPath
from ldm_jax.errors import CheckpointError, ConversionError, ReaderError, TargetError
from ldm_jax.io.checkpoint import load_model, read_config
from ldm_jax.io.paths import local_copy

# Prefixes of layer names, dots as underscores -> the network. SDXL's two towers count from 1.
_NETWORKS = {
    "lora_unet_": "unet",
    "unet_": "unet",
    "lora_te1_": "text",
    "lora_te2_": "text 2",
    "lora_te_": "text",
    "text_encoder_2_": "text 2",
    "text_encoder_": "text",
}
_ENDING = re.compile(rf"\.({'|'.join(map(re.escape, sorted(ROLES, key=len, reverse=True)))})$")
# Older diffusers: attn1.processor.to_q_lora.down.weight.
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(up|down)\.weight$")


class Layer(NamedTuple):
    """One layer of a LoRA: its name, the parameter, and its arrays by role."""

    name: str
    path: ParamPath
    entry: Entry
    arrays: dict[str, np.ndarray]
    alpha: float | None


def read_lora(
    config: Mapping[str, Any], params: Mapping[str, Any], file: str | Path
) -> list[Layer]:
    """Reads a LoRA file and finds the parameter of each of its layers.

    Args:
      config: The config of the model.
      params: Its parameters; only their shapes are used.
      file: A .safetensors, .pt or .bin of kohya, LyCORIS, peft or diffusers, or the model
        directory of a LoRA that was trained here.

    Raises:
      ReaderError: The file cannot be read.
      TargetError: It is no LoRA, or one for another base model.
      ConversionError: Layers that the model does not have.
    """
    file = local_copy(file)
    named, metadata = _arrays_of(file)
    layers: dict[str, dict[str, np.ndarray]] = {}
    unknown = []
    for name, array in named.items():
        base, role = _split(name)
        if base is None:
            unknown.append(name)
        else:
            layers.setdefault(base, {})[role] = array.astype(np.float32)
    alphas = _Alphas(metadata)
    if not layers:
        raise TargetError(f"{file} is no LoRA: it has no arrays such as *.lora_down.weight")
    ConversionError.check(
        str(file),
        not_finite=[
            f"{base}.{role}"
            for base, arrays in layers.items()
            for role, array in arrays.items()
            if not np.isfinite(array).all()
        ],
    )
    targets = _targets(config, params)
    found = []
    for base, arrays in layers.items():
        network, rest = _network(base)
        # Files with the UNet alone may leave its prefix out.
        entry = targets.get(network or "unet", {}).get(rest)
        if entry is None:
            unknown += [f"{base}.{role}" for role in arrays]
            continue
        path, row = entry
        rank = arrays["down"].shape[:1] if "down" in arrays else ()
        found.append(Layer(base, path, row, arrays, alphas.of(base, *rank)))
    if unknown:
        missing = {_network(base)[0] for base in layers} - {None} - targets.keys()
        if not found or missing:
            raise TargetError(
                f"{file} is a LoRA for another base model: this one has no"
                f" {shown(min(missing, key=str) if missing else unknown[0])}"
            )
        raise ConversionError(str(file), unexpected=[shown(name, 200) for name in unknown])
    return found


def merge_lora(
    config: Mapping[str, Any], params: Mapping[str, Any], file: str | Path, strength: float = 1.0
) -> dict[str, Any]:
    """Returns the parameters with one LoRA merged in; see `merge_loras`."""
    return merge_loras(config, params, [(file, strength)])


def merge_loras(
    config: Mapping[str, Any], params: Mapping[str, Any], loras: Sequence[tuple[str | Path, float]]
) -> dict[str, Any]:
    """Returns the parameters with LoRA files merged in, one after the other.

    The sums are float32 and rounded once, to the dtypes of the parameters.

    Args:
      config: The config of the model.
      params: Its parameters by part.
      loras: (file, strength), where the strength is the factor of the update.

    Raises:
      ReaderError: A file cannot be read.
      TargetError: A file is no LoRA, or one for another base model.
      ConversionError: A file has layers that the model does not have.
    """
    leaves = flatten(params)
    updates: dict[ParamPath, list[tuple[str | Path, float, Layer]]] = {}
    for file, strength in loras:
        for layer in read_lora(config, params, file):
            updates.setdefault(layer.path, []).append((file, strength, layer))
    misfits: list[tuple[str | Path, Any]] = []
    for path, layers in updates.items():  # one weight at a time
        old = leaves[path]
        entry = layers[0][2].entry._replace(part=(0, 1))
        weight = np.asarray(entry.op.to_theirs(np.asarray(old).astype(np.float32)))
        for file, strength, layer in layers:
            try:
                weight = _updated(layer, weight, strength)
            except ConversionError as error:
                lines = error.misshapen or [(f"{layer.name}: {error}", (), weight.shape)]
                misfits += [(file, line) for line in lines]
        leaves[path] = as_ours(entry, weight).astype(old.dtype)
    if misfits:
        file, (name, found, expected) = misfits[0]
        raise TargetError(
            f"{file} is a LoRA for another base model: {len(misfits)} layers have other shapes, as"
            f" {shown(name)}: found {found}, expected {expected}"
        )
    tree = nest(leaves)
    return {part: tree.get(part, {}) for part in params}


def split_strengths(text: str) -> tuple[str, list[float]]:
    """Splits "FILE:0.8" into (FILE, [0.8]) and "FILE:0,0.5,1" into (FILE, [0, 0.5, 1]).

    Without numbers the strength is 1.

    Raises:
      TargetError: A strength is not finite.
    """
    file, colon, numbers = text.rpartition(":")
    try:
        strengths = [float(number) for number in numbers.split(",")]
    except ValueError:
        return text, [1.0]
    if not colon or not file:
        return text, [1.0]
    if not all(map(math.isfinite, strengths)):
        raise TargetError(f"{text}: the strength of a LoRA must be a finite number")
    return file, strengths


def pairs_of(
    loras: Iterable[str | Path | tuple[str | Path, float]],
) -> list[tuple[str | Path, float]]:
    """Returns (file, strength) of LoRA files each as "FILE", "FILE:STRENGTH" or (file, strength).

    Raises:
      TargetError: One has several strengths, or one that is not finite.
    """
    pairs: list[tuple[str | Path, float]] = []
    for lora in loras:
        if isinstance(lora, tuple):
            file, strengths = lora[0], [float(lora[1])]
        else:
            file, strengths = split_strengths(str(lora))
        if len(strengths) != 1:
            raise TargetError(f"{lora}: give one strength here")
        pairs.append((file, strengths[0]))
    return pairs


def _updated(layer: Layer, weight: np.ndarray, strength: float) -> np.ndarray:
    """Returns a weight in PyTorch's layout with a layer's update."""
    update = delta(layer.name, layer.arrays, weight.shape, layer.alpha)
    if "dora_scale" in layer.arrays:
        return decomposed(weight, update, layer.arrays["dora_scale"], strength)
    return weight + np.float32(strength) * update


def _arrays_of(file: Path) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """Returns ({name: array}, metadata) of a file or of a model directory.

    Arrays that are not of a LoRA stay unread: they are empty.
    """
    if (file / "config.json").is_file():
        try:
            config = read_config(file)
            return kohya_arrays(config, load_model(file)[1]) if config.get(
                "kind"
            ) == KIND else {}, {}
        except CheckpointError as error:
            raise ReaderError(str(error)) from None
    with open_checkpoint(file) as checkpoint:
        arrays = {
            name: np.zeros(0) if _split(name)[0] is None else tensor.numpy()
            for name, tensor in checkpoint.tensors.items()
        }
        return arrays, checkpoint.metadata


def _split(name: str) -> tuple[str | None, str]:
    """Returns (the layer with dots as underscores, the role of the array) or (None, "")."""
    if match := _PROCESSOR.search(name):
        inner = "to_out_0" if match[1] == "out" else f"to_{match[1]}"
        base, role = f"{name[: match.start()]}.{inner}", match[2]
    elif match := _ENDING.search(name):
        base, role = name[: match.start()], ROLES[match[1]]
    else:
        return None, ""
    return base.removeprefix("base_model.model.").replace(".", "_"), role


def _network(base: str) -> tuple[str | None, str]:
    for prefix, network in _NETWORKS.items():
        if base.startswith(prefix):
            return network, base.removeprefix(prefix)
    return None, base


class _Alphas:
    """The alphas that peft records in the header of a file instead of in arrays."""

    def __init__(self, metadata: Mapping[str, Any]):
        try:
            self.fields = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except (TypeError, ValueError, RecursionError):
            self.fields = {}
        if not isinstance(self.fields, dict):
            self.fields = {}

    def of(self, base: str, rank: int = 1) -> float | None:
        """Returns the alpha of a layer of a rank, or None for the rank itself."""
        parts = [key[: -len(".lora_alpha")] for key in self.fields if key.endswith(".lora_alpha")]
        part = next((p for p in sorted(parts, key=len)[::-1] if base.startswith(p + "_")), None)
        if part is None:
            return None
        patterns = self.fields.get(f"{part}.alpha_pattern")
        alpha, rest = self.fields[f"{part}.lora_alpha"], base.removeprefix(part + "_")
        for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
            if rest.endswith(pattern.replace(".", "_")):
                alpha = value
                break
        if not isinstance(alpha, int | float):
            return None
        # rsLoRA (arXiv 2312.03732) divides by the root of the rank.
        return alpha * rank**0.5 if self.fields.get(f"{part}.use_rslora") is True else float(alpha)


Targets = dict[str, dict[str, tuple[ParamPath, Entry]]]


def _targets(config: Mapping[str, Any], params: Mapping[str, Any]) -> Targets:
    """Returns {network: {layer name with underscores: (path of the parameter, entry)}}."""
    leaves, targets = flatten(params).keys(), {}
    for named in tables_of(config):
        names = targets.setdefault(named.network, {})
        for entry in named.table:
            full = (*named.path, *getattr(entry, "path", ()))
            if isinstance(entry, Entry) and entry.source.endswith(".weight") and full in leaves:
                base = entry.source.removesuffix(".weight").replace(".", "_")
                names[base] = full, entry
                names.setdefault(base.removeprefix("text_model_"), names[base])
    return targets
