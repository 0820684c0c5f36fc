"""Counts what a jaxpr computes and keeps. Nothing is compiled or run, and no device is needed."""

import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

PRODUCTS = ("convolution", "product", "attention")
KINDS = (*PRODUCTS, "other")
_TILE = 128  # side of a TPU's matrix unit

# Primitives that move or name values and compute nothing.
_MOVES = re.compile(
    "broadcast_in_dim|reshape|transpose|convert_element_type|(dynamic_)?slice|dynamic_update_slice"
    "|concatenate|pad|select_n|squeeze|rev|gather|copy|copy_p|stop_gradient|sharding_constraint"
    "|iota|optimization_barrier|bitcast_convert_type|device_put|name|split|pvary"
)


def inner(eqn: Any) -> list[Jaxpr]:
    """The jaxprs of an equation: the body of a scan, a call, a rematerialised block."""
    values: list[Any] = []
    for value in eqn.params.values():
        values += value if isinstance(value, tuple | list) else (value,)
    found = [v for v in values if isinstance(v, ClosedJaxpr | Jaxpr)]
    return [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in found]


def count_flops(jaxpr: Jaxpr, *, loops: bool = True, in_kernel: bool = False) -> Counter[str]:
    """Counts FLOPs by kind; a multiply-add is two.

    Args:
      jaxpr: The program.
      loops: Count every iteration of a loop, not only one.
      in_kernel: The program is the body of a Pallas kernel.

    Returns:
      "attention": products with batch dimensions (queries with keys, weights with values) and
      those of kernels. "product": products without (dense layers, 1x1 convolutions).
      "convolution". "other": one for each element of what anything else computes or reduces.
      And "padded", which is none of `KINDS`: the products of Pallas kernels as a TPU's matrix unit
      does them, with contracted and resulting columns in multiples of 128.
    """
    total: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        name, parts = eqn.primitive.name, inner(eqn)
        if name == "dot_general":
            _, (batch, _) = eqn.params["dimension_numbers"]
            total["attention" if in_kernel or batch else "product"] += _dot(eqn)
            total["padded"] += in_kernel * _dot(eqn, _TILE)
        elif name == "conv_general_dilated":
            total["convolution"] += _conv(eqn)
        elif name.startswith("dot_product_attention"):
            # cuDNN's: two products in the forward pass, five in the backward pass.
            total["attention"] += (5 if "bwd" in name else 2) * _attention_product(eqn)
        elif name == "cond":
            counted = (count_flops(part, loops=loops, in_kernel=in_kernel) for part in parts)
            total += max(counted, key=lambda c: c.total())
        elif parts:
            kernel = name == "pallas_call"
            times = eqn.params.get("length", 1) if loops else 1
            if kernel:
                times = math.prod(eqn.params["grid_mapping"].grid)
            for part in parts:
                counted = count_flops(part, loops=loops, in_kernel=in_kernel or kernel)
                total += Counter({kind: times * n for kind, n in counted.items()})
        elif not _MOVES.fullmatch(name):
            total["other"] += max((_floats(v.aval) for v in (*eqn.invars, *eqn.outvars)), default=0)
    return total


def _attention_product(eqn: Any) -> int:
    q, k = (v.aval.shape for v in eqn.invars[:2])  # [b, n, h, d], [b, m, h, d]
    return 2 * math.prod(q) * k[1]


def _dot(eqn: Any, tile: int = 1) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs, (*rows, columns) = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    inner_size = math.prod(lhs[d] for d in contracted)
    return 2 * math.prod(rows) * _ceil(columns, tile) * _ceil(inner_size, tile)


def _ceil(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _conv(eqn: Any) -> int:
    """2 x results x taps x input channels of a group.

    The zeros of a dilated input (the gradient of a strided convolution) count nothing.
    """
    numbers, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
    _, channels, *space = numbers.rhs_spec
    taps = math.prod(kernel[d] for d in space) * kernel[channels]
    zeros = math.prod(eqn.params["lhs_dilation"]) * eqn.params["batch_group_count"]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * taps // zeros


def _floats(aval: Any) -> int:
    is_float = hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)
    return math.prod(aval.shape) if is_float else 0


def nbytes(aval: Any) -> int:
    """Bytes of an array of this shape and type; 0 for anything else (a key, a token)."""
    if not hasattr(aval, "shape") or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize


def peak_bytes(jaxpr: Jaxpr) -> int:
    """The most bytes of intermediate results alive at once, in program order, without arguments.

    A compiler that fuses keeps less. Either way most of it is what the backward pass needs of the
    forward pass.
    """
    last = {id(v): i for i, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn.invars)}
    last |= {id(v): len(jaxpr.eqns) for v in _variables(jaxpr.outvars)}
    dying: dict[int, int] = Counter()
    alive = most = 0
    for i, eqn in enumerate(jaxpr.eqns):
        made = sum(nbytes(v.aval) for v in eqn.outvars)
        within = max((peak_bytes(part) for part in inner(eqn)), default=0)
        most = max(most, alive + max(made, within))
        alive += made
        for v in eqn.outvars:
            dying[last.get(id(v), i)] += nbytes(v.aval)
        alive -= dying[i]
    return most


def _variables(values: Any) -> list[Any]:
    return [v for v in values if not isinstance(v, Literal)]
