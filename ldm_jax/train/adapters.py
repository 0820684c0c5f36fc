"""Low-rank factors of the weights of a frozen model: LoRA (Hu et al. 2021, arXiv:2106.09685).

The factors of a kernel [..., c, d] are "down" [..., c, r] and "up" [r, d]; the model computes with
kernel + alpha / r (down up). They are at the kernel's path in a tree of their own. ``up`` starts
at zero, so that training begins at the frozen model.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import ConfigError
from ldm_jax.nn.layers import torch_kernel_init

Path = tuple[str, ...]


def adaptable(params: Any) -> dict[Path, Any]:
    """Returns {path: leaf} of the kernels of dense layers and convolutions."""
    found = {
        tuple(str(getattr(key, "key", key)) for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    return {p: leaf for p, leaf in found.items() if p[-1] == "kernel" and len(leaf.shape) in (2, 4)}


def find_targets(params: Any, patterns: Sequence[str]) -> tuple[Path, ...]:
    """Returns the paths of the kernels that regular expressions choose, sorted.

    Args:
      params: The parameters of the model, or their shapes.
      patterns: Searched in the path of a layer, such as
        "unet/middle_block_1/blocks_0/attn2/to_k".

    Raises:
      ConfigError: A pattern is no regular expression or finds nothing.
    """
    layers = {"/".join(path[:-1]): path for path in adaptable(params)}
    targets: set[Path] = set()
    for pattern in patterns:
        try:
            chosen = {path for name, path in layers.items() if re.search(pattern, name)}
        except re.error as error:
            raise ConfigError(f"adapter.targets: {pattern!r} is no pattern: {error}") from None
        if not chosen:
            raise ConfigError(
                f"adapter.targets: no layer fits {pattern!r}; layers are named such as "
                f"{_example(layers)}"
            )
        targets |= chosen
    if not targets:
        raise ConfigError("adapter.targets is empty: give at least one pattern")
    return tuple(sorted(targets))


def _example(layers: Sequence[str] | dict[str, Path]) -> str:
    """One layer of each part of the model, for messages."""
    first = {name.split("/")[0]: name for name in sorted(layers, reverse=True)}
    return ", ".join(sorted(first.values()))


def init_factors(params: Any, targets: Sequence[Path], rank: int, key: jax.Array) -> dict[str, Any]:
    """Returns fresh float32 factors: "down" as PyTorch initialises a linear layer, "up" zero.

    Args:
      params: The parameters of the model, or their shapes.
      targets: Of `find_targets`.
      rank: r.
      key: A random key.
    """
    kernels, tree = adaptable(params), {}
    for path, own in zip(targets, jax.random.split(key, len(targets)), strict=True):
        *_, c, d = kernels[path].shape
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        shape = (*kernels[path].shape[:-2], c, rank)
        node["down"] = torch_kernel_init(own, shape, jnp.float32)
        node["up"] = jnp.zeros((rank, d), jnp.float32)
    return tree


def with_factors(params: Any, factors: Any, scale: float) -> Any:
    """Returns the parameters with the products of the factors added, float32 where they are; pure.

    Args:
      params: The parameters of the model, of any floating-point type.
      factors: A tree of `init_factors`.
      scale: alpha / r.
    """
    if not isinstance(params, dict):
        update = jnp.tensordot(factors["down"], factors["up"], 1, precision="highest")
        return params.astype(jnp.float32) + scale * update
    return {
        name: with_factors(value, factors[name], scale) if name in factors else value
        for name, value in params.items()
    }


def in_storage_type(params: Any, dtype: Any) -> Any:
    """Returns the parameters with matrices, convolutions and tables in ``dtype``.

    Biases and scales, a small part of a model, keep their type.
    """

    def stored(leaf: Any) -> Any:
        if len(leaf.shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype)
        return np.asarray(leaf).astype(dtype)

    return jax.tree.map(stored, params)
