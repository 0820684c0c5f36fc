"""Merges models: LoRA files into one, two into a weighted mean, or the difference of two added."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.convert.conversion import check_new, read_any
from ldm_jax.convert.lora import merge_loras, pairs_of
from ldm_jax.convert.tables import flatten, nest
from ldm_jax.errors import TargetError
from ldm_jax.io.atomic import write_atomic
from ldm_jax.io.checkpoint import save_model
from ldm_jax.io.paths import as_path


def merge(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    weight: float = 0.5,
    loras: Sequence[str] = (),
) -> dict[str, str]:
    """Writes the model directory ``out`` of merged models and its report, merge.json.

    Two models a, b give (1 - weight) a + weight b, three give a + weight (b - c), in float32. Then
    the LoRA files are merged in.

    Args:
      models: One to three model directories or checkpoints of the same networks.
      out: The new model directory.
      weight: The weight of the second model.
      loras: LoRA files, each with an optional ":STRENGTH".

    Returns:
      {label: text} about what was merged.

    Raises:
      TargetError: The models differ in their networks, or there is nothing to merge.
    """
    if not 1 <= len(models) <= 3 or (len(models) == 1 and not loras):
        raise TargetError("give one to three models to merge, or one with --lora FILE")
    check_new(as_path(out))
    config, params = read_any(models[0])
    config, flat, lines = dict(config), flatten(params), {}
    if len(models) > 1:
        others = [_compatible(config, flat, model) for model in models[1:]]
        for path, first in flat.items():
            flat[path] = _mean(np.asarray(first), [other[path] for other in others], weight)
        kind = "weighted mean" if len(models) == 2 else "added difference"
        lines["merged"] = f"{kind} of {len(models)} models, weight {weight}: {len(flat)} arrays"
    merged = nest(flat)
    params = {part: merged.get(part, {}) for part in params}
    pairs = pairs_of(loras)
    params = merge_loras(config, params, pairs)
    lines |= {f"lora {i}": f"{file} at {s}" for i, (file, s) in enumerate(pairs, 1)}
    config.pop("format", None)
    save_model(out, config, params, dtype=None)
    report = {"models": [str(m) for m in models], "weight": weight, "loras": list(loras)}
    write_atomic(as_path(out) / "merge.json", json.dumps(report, indent=1) + "\n")
    return lines


def _compatible(config: dict[str, Any], flat: dict, model: str | Path) -> dict:
    other, params = read_any(model)
    leaves = flatten(params)
    if other.get("kind") != config.get("kind") or leaves.keys() != flat.keys():
        odd = sorted("/".join(path) for path in leaves.keys() ^ flat.keys())
        raise TargetError(
            f"{model} is another kind of model{f': they differ in {odd[0]}' if odd else ''}"
        )
    for path, leaf in leaves.items():
        if np.shape(leaf) != np.shape(flat[path]):
            raise TargetError(
                f"{model} is another kind of model: {'/'.join(path)} is {np.shape(leaf)}, not"
                f" {np.shape(flat[path])}"
            )
    return leaves


def _mean(first: np.ndarray, others: list[Any], weight: float) -> np.ndarray:
    if first.dtype.kind not in "fV":
        return first
    a, *rest = (np.asarray(x).astype(np.float32) for x in (first, *others))
    w = np.float32(weight)
    new = a + w * (rest[0] - a) if len(rest) == 1 else a + w * (rest[0] - rest[1])
    return new.astype(first.dtype)
