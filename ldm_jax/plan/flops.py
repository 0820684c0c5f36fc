"""What a program computes and keeps, counted from its jaxpr: nothing is compiled or run, and no device is needed."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

PRODUCTS = ("convolution", "product", "attention")
KINDS = (*PRODUCTS, "other")
_TILE = 128  # side of a TPU's matrix unit

# What moves or names values computes nothing.
_MOVES = re.compile(
    "broadcast_in_dim|reshape|transpose|convert_element_type|(dynamic_)?slice|dynamic_update_slice|concatenate|pad|select_n|squeeze|rev|gather|copy"
    "|copy_p|stop_gradient|sharding_constraint|iota|optimization_barrier|bitcast_convert_type|device_put|name|split|pvary"
)


def inner(eqn: Any) -> list[Jaxpr]:
    """The jaxprs inside an equation: of a scan's body, a call, a rematerialised block ..."""
    values = [
        v
        for value in eqn.params.values()
        for v in (value if isinstance(value, tuple | list) else (value,))
    ]
    return [
        v.jaxpr if isinstance(v, ClosedJaxpr) else v
        for v in values
        if isinstance(v, ClosedJaxpr | Jaxpr)
    ]


def count_flops(jaxpr: Jaxpr, in_kernel: bool = False) -> Counter[str]:
    """FLOPs by kind: a multiply-add is two, loops count every turn.

    "attention" are the products with batch dimensions (queries with keys, weights with values) and those of kernels, "product" those without (dense
    layers, 1x1 convolutions), "other" is one for each element of what anything else computes or reduces. "padded", which is none of `KINDS`, are the
    products of Pallas kernels as a TPU's matrix unit does them: contracted and resulting columns in multiples of 128.
    """
    total: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        name, parts = eqn.primitive.name, inner(eqn)
        if name == "dot_general":
            total["attention" if in_kernel else _kind_of_dot(eqn)] += _dot(eqn)
            total["padded"] += in_kernel * _dot(eqn, _TILE)
        elif name == "conv_general_dilated":
            total["convolution"] += _conv(eqn)
        elif name.startswith(
            "dot_product_attention"
        ):  # cuDNN's: two products forwards, five backwards
            total["attention"] += _fused(eqn)
        elif name == "cond":
            total += max((count_flops(part, in_kernel) for part in parts), key=lambda c: c.total())
        elif parts:
            kernel = name == "pallas_call"
            times = (
                math.prod(eqn.params["grid_mapping"].grid)
                if kernel
                else eqn.params.get("length", 1)
            )
            for part in parts:
                counted = count_flops(part, in_kernel or kernel)
                total += Counter({kind: times * n for kind, n in counted.items()})
        elif not _MOVES.fullmatch(name):
            total["other"] += max((_floats(v.aval) for v in (*eqn.invars, *eqn.outvars)), default=0)
    return total


def _kind_of_dot(eqn: Any) -> str:
    _, (batch, _) = eqn.params["dimension_numbers"]
    return "attention" if batch else "product"


def _dot(eqn: Any, tile: int = 1) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs, (*rows, columns) = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return (
        2
        * math.prod(rows)
        * _ceil(columns, tile)
        * _ceil(math.prod(lhs[d] for d in contracted), tile)
    )


def _fused(eqn: Any) -> int:
    q, k = (v.aval.shape for v in eqn.invars[:2])  # [b, n, h, d], [b, m, h, d]
    return 2 * math.prod(q) * k[1] * (5 if "bwd" in eqn.primitive.name else 2)


def _ceil(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _conv(eqn: Any) -> int:
    """2 x results x taps x input channels of a group; zeros that a dilated input brings (a strided convolution's gradient) count nothing."""
    numbers, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
    _, channels, *space = numbers.rhs_spec
    taps = math.prod(kernel[d] for d in space) * kernel[channels]
    zeros = math.prod(eqn.params["lhs_dilation"]) * eqn.params["batch_group_count"]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * taps // zeros


def _floats(aval: Any) -> int:
    return (
        math.prod(aval.shape)
        if hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)
        else 0
    )


def nbytes(aval: Any) -> int:
    """Bytes of an array of this shape and type; 0 for what is not an array (a key, a token)."""
    if not hasattr(aval, "shape") or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize


def peak_bytes(jaxpr: Jaxpr) -> int:
    """The most bytes of intermediate results alive at once, in the order in which they are written down, without arguments.

    A compiler that fuses keeps less; what the backward pass needs of the forward one is the bulk of it either way.
    """
    last = {id(v): i for i, v in _uses(jaxpr)}
    last |= {id(v): len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, Literal)}
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


def _uses(jaxpr: Jaxpr) -> Iterator[tuple[int, Any]]:
    """(equation, variable) for every variable that an equation reads, in order."""
    for i, eqn in enumerate(jaxpr.eqns):
        yield from ((i, v) for v in eqn.invars if not isinstance(v, Literal))
