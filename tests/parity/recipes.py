"""Weights that a case describes by a seed and a rule instead of storing them (`param_recipe`)."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Shape = tuple[int, ...]


def _plain(name: str, n: np.ndarray) -> np.ndarray:
    if n.ndim == 0:
        return 0.1 * n
    if n.ndim == 1:
        if name.endswith("running_var"):
            return 1 + 0.2 * np.abs(n)
        return 1 + 0.1 * n if name.endswith("weight") else 0.1 * n
    if n.ndim == 2 and "emb" in name:
        return 0.5 * n
    return n / np.sqrt(np.prod(n.shape[1:]))


def _inception(name: str, n: np.ndarray) -> np.ndarray:
    if n.ndim == 4:
        return n * np.sqrt(2 / np.prod(n.shape[1:]))
    if n.ndim == 2:
        return n / np.sqrt(n.shape[1])
    if name.endswith("running_var"):
        return 1 + 0.2 * np.abs(n)
    return 1 + 0.1 * n if name.endswith("bn.weight") else 0.1 * n


# A phrase of the rule's text -> the rule.
RULES: dict[str, Callable[[str, np.ndarray], np.ndarray]] = {
    "2-d with 'emb' in the name: 0.5*n": _plain,
    "4-d: n*sqrt(2/prod(shape[1:])); 2-d: n/sqrt(shape[1])": _inception,
}


def recipe_weights(spec: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The weights of a manifest entry with `param_recipe` and `param_shapes`; {} without them.

    Two roundings make them representable: to float32, then to float16.
    """
    recipe = spec.get("param_recipe")
    rule = next((r for text, r in RULES.items() if recipe and text in recipe["rule"]), None)
    if recipe is None or rule is None:
        return {}
    fixed, weights = recipe.get("fixed", {}), {}
    for name, shape in spec["param_shapes"].items():
        if name.endswith("num_batches_tracked"):
            weights[name] = np.zeros(shape, np.int64)
            continue
        random = np.random.RandomState((zlib.crc32(name.encode()) ^ recipe["seed"]) & 0x7FFFFFFF)
        value = rule(name, np.asarray(random.standard_normal(tuple(shape))))
        value = np.asarray(fixed.get(name, value), np.float32)
        weights[name] = value if name in fixed else value.astype(np.float16).astype(np.float32)
    return weights
