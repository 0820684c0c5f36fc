"""Reads a LoRA file against a model, and merges it into the model's parameters."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.convert.compvis.networks import table_of
from ldm_jax.convert.diffusers.components import MODULES
from ldm_jax.convert.diffusers.tables import TABLES
from ldm_jax.convert.lora.deltas import ROLES, decomposed, delta
from ldm_jax.convert.reader.lazy import shown
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import Entry, Table, as_ours, flatten, nest
from ldm_jax.convert.tables import Path as ParamPath
from ldm_jax.errors import ConversionError, TargetError

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
      file: A .safetensors, .pt or .bin of kohya, LyCORIS, peft or diffusers.

    Raises:
      ReaderError: The file cannot be read.
      TargetError: It is no LoRA, or one for another base model.
      ConversionError: Layers that the model does not have.
    """
    file = Path(file)
    with open_checkpoint(file) as checkpoint:
        layers: dict[str, dict[str, np.ndarray]] = {}
        unknown = []
        for name, tensor in checkpoint.tensors.items():
            base, role = _split(name)
            if base is None:
                unknown.append(name)
            else:
                layers.setdefault(base, {})[role] = tensor.numpy().astype(np.float32)
        alphas = _Alphas(checkpoint.metadata)
    if not layers:
        raise TargetError(f"{file} is no LoRA: it has no arrays such as *.lora_down.weight")
    targets = _targets(config, params)
    found = []
    for base, arrays in layers.items():
        network, rest = _network(base)
        entry = None if network is None else targets.get(network, {}).get(rest)
        if entry is None:
            unknown += [f"{base}.{role}" for role in arrays]
            continue
        path, row = entry
        found.append(Layer(base, path, row, arrays, alphas.of(base)))
    if unknown:
        missing = {_network(base)[0] for base in layers} - {None} - targets.keys()
        if not found or missing:
            raise TargetError(
                f"{file} is a LoRA for another base model: this one has no"
                f" {shown(min(missing, key=str) if missing else unknown[0])}"
            )
        raise ConversionError(str(file), unexpected=unknown)
    return found


def merge_lora(
    config: Mapping[str, Any], params: Mapping[str, Any], file: str | Path, strength: float = 1.0
) -> dict[str, Any]:
    """Returns the parameters with a LoRA merged in; they keep their dtypes.

    Args:
      config: The config of the model.
      params: Its parameters by part.
      file: The LoRA file.
      strength: The factor of the update.

    Raises:
      As `read_lora`, and ConversionError where a layer does not fit.
    """
    leaves = flatten(params)
    misfits: list[Any] = []
    for layer in read_lora(config, params, file):
        old = np.asarray(leaves[layer.path])
        try:
            leaves[layer.path] = _merged(layer, old, strength)
        except ConversionError as error:
            misfits += error.misshapen or [(str(error), (), ())]
    if misfits:
        raise TargetError(
            f"{file} is a LoRA for another base model: {len(misfits)} layers have other shapes, as"
            f" {misfits[0][0]}: found {misfits[0][1]}, expected {misfits[0][2]}"
        )
    merged = nest(leaves)
    return {part: merged.get(part, {}) for part in params}


def _merged(layer: Layer, old: np.ndarray, strength: float) -> np.ndarray:
    entry = layer.entry._replace(part=(0, 1))
    weight = np.asarray(entry.op.to_theirs(old.astype(np.float32)))
    update = delta(layer.name, layer.arrays, weight.shape, layer.alpha)
    if "dora_scale" in layer.arrays:
        new = decomposed(weight, update, layer.arrays["dora_scale"], strength)
    else:
        new = weight + np.float32(strength) * update
    return as_ours(entry, new).astype(old.dtype)


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

    def of(self, base: str) -> float | None:
        """Returns the alpha of a layer, or None for its rank."""
        parts = [key[: -len(".lora_alpha")] for key in self.fields if key.endswith(".lora_alpha")]
        part = next((p for p in sorted(parts, key=len)[::-1] if base.startswith(p + "_")), None)
        if part is None:
            return None
        patterns = self.fields.get(f"{part}.alpha_pattern")
        rest = base.removeprefix(part + "_")
        for pattern, alpha in (patterns if isinstance(patterns, dict) else {}).items():
            if rest.endswith(pattern.replace(".", "_")) and isinstance(alpha, int | float):
                return float(alpha)
        alpha = self.fields[f"{part}.lora_alpha"]
        return float(alpha) if isinstance(alpha, int | float) else None


Targets = dict[str, dict[str, tuple[ParamPath, Entry]]]


def _targets(config: Mapping[str, Any], params: Mapping[str, Any]) -> Targets:
    """Returns {network: {layer name with underscores: (path of the parameter, entry)}}."""
    leaves, targets = flatten(params).keys(), {}
    for network, path, table in _tables(config):
        names = targets.setdefault(network, {})
        for entry in table:
            full = (*path, *getattr(entry, "path", ()))
            if isinstance(entry, Entry) and entry.source.endswith(".weight") and full in leaves:
                base = entry.source.removesuffix(".weight").replace(".", "_")
                names[base] = full, entry
                names.setdefault(base.removeprefix("text_model_"), names[base])
    return targets


def _tables(config: Mapping[str, Any]) -> Iterator[tuple[str, ParamPath, Table]]:
    """Yields (network, path of its parameters, a table that names its layers)."""
    if "unet" in config:
        unet = MODULES["unet"](dict(config))
        yield "unet", ("unet",), TABLES[type(unet)](unet)
        yield "unet", ("unet",), table_of(unet, "")
    section = config.get("conditioner", {})
    section = section.get("text", section)
    if section.get("kind") == "clip":
        text = MODULES["conditioner"]({"conditioner": section})
        yield "text", ("conditioner",), TABLES[type(text)](text)


def scaled(params: Any, strength: Any, layers: list[Layer]) -> Any:
    """Returns ``params`` with LoRA layers at a traced ``strength``, for sweeps in one program.

    Args:
      params: The parameters by part, as arrays of JAX.
      strength: float32 [].
      layers: Of `read_lora`, without DoRA, which is not linear in the strength.
    """
    leaves = flatten(params)
    for layer in layers:
        if "dora_scale" in layer.arrays:
            raise TargetError("a sweep of strengths does not support DoRA; merge it at each")
        old = leaves[layer.path]
        entry = layer.entry._replace(part=(0, 1))
        shape = entry.op.to_theirs(np.broadcast_to(np.float32(0), old.shape)).shape
        update = as_ours(entry, delta(layer.name, layer.arrays, shape, layer.alpha))
        new = old.astype(np.float32) + strength * jax.numpy.asarray(update)
        leaves[layer.path] = new.astype(old.dtype)
    merged = nest(leaves)
    return {part: merged.get(part, {}) for part in params}
