"""Convolutions that take ways of their own on a CPU.

XLA's gradient of the weights takes two to four times as long as the convolution itself: over many pixels it is summed over bands here. Of few pixels
and many weights all three are products: XLA transposes the weights for the input's gradient, slowly, and fuses a chain of such convolutions into one
that takes several times as long as they do.

`convolve` stands where ``jax.lax.conv_general_dilated`` would (`flax.linen.Conv` has an argument for it).
"""

from collections.abc import Callable
from functools import partial, reduce
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.distributed.parallel import for_one_cpu, target
from ldm_jax.kernels.vjp import own_gradient

Array = jax.Array
Padding = tuple[tuple[int, int], ...]

# Measured on AMD cores: below so many pixels XLA's own gradient of the weights is as fast; the shifted copies of a band stay in the cache, be it rows
# of a large picture or several small ones.
_MANY, _BAND = 1024, 512
# Up to so many pixels of all pictures and from so many weights on, products are faster: more pixels, and their columns leave the cache. Where nothing
# is differentiated they gain nothing with few weights, and columns need memory.
_FEW, _HEAVY, _HEAVY_FORWARDS = 512, 2**17, 2**19


def convolve(x: Array, w: Array, strides: Any, padding: Any, **options: Any) -> Array:
    """``jax.lax.conv_general_dilated``; where `products_pay` or `banded_pays`, in ways of its own, and without forward-mode derivatives."""
    if products_pay(x, w, strides, padding, **options):
        return _products(x, w, tuple(map(tuple, padding)))
    if banded_pays(x, w, strides, padding, **options):
        return _banded(x, w, tuple(strides), tuple(map(tuple, padding)))
    return jax.lax.conv_general_dilated(x, w, strides, padding, **options)


def products_pay(x: Array, w: Array, strides: Any, padding: Any, **options: Any) -> bool:
    """Whether there are few pixels and many weights, without strides, of what `_ours` takes."""
    if (
        not _ours(x, w, padding, **options)
        or tuple(strides) != (1, 1)
        or not isinstance(x.shape[0], int)
    ):
        return False
    height, width = _size(x, w, strides, padding)
    return x.shape[0] * height * width <= _FEW and w.size >= _HEAVY


def banded_pays(x: Array, w: Array, strides: Any, padding: Any, **options: Any) -> bool:
    """Whether there are many pixels in all (in one picture, where the batch may have any size), of what `_ours` takes."""
    if not _ours(x, w, padding, **options):
        return False
    height, width = _size(x, w, strides, padding)
    return height * width * (x.shape[0] if isinstance(x.shape[0], int) else 1) >= _MANY


def _ours(x: Array, w: Array, padding: Any, **options: Any) -> bool:
    """Whether a program for one CPU is traced (or nobody said what for), in NHWC and float32, without groups or dilation, of more than a pixel."""
    if not for_one_cpu():
        return False
    usual = {
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "feature_group_count": 1,
        "precision": None,
    }
    if (
        isinstance(padding, str)
        or x.ndim != 4
        or any(options.get(key, usual[key]) != usual[key] for key in usual)
    ):
        return False
    return x.dtype == w.dtype == jnp.float32 and w.shape[0] > 1


def _size(x: Array, w: Array, strides: Any, padding: Any) -> list[int]:
    """Height and width of the result."""
    return [
        (size + sum(pad) - kernel) // stride + 1
        for size, pad, kernel, stride in zip(
            x.shape[1:3], padding, w.shape[:2], strides, strict=True
        )
    ]


def _plain(x: Array, w: Array, strides: tuple[int, ...], padding: Padding) -> Array:
    return jax.lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _forward(
    x: Array, w: Array, strides: tuple[int, ...], padding: Padding
) -> tuple[Array, tuple[Array, Array]]:
    return _plain(x, w, strides, padding), (x, w)


def _backward(
    strides: tuple[int, ...], padding: Padding, kept: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = kept
    form = partial(_plain, strides=strides, padding=padding)
    (dx,) = jax.linear_transpose(lambda x: form(x, w), x)(dy)

    def by_xla(x: Array, dy: Array) -> Array:
        return jax.linear_transpose(lambda w: form(x, w), w)(dy)[0]

    by_bands = partial(weight_gradient, kernel=w.shape[:2], strides=strides, padding=padding)
    return dx, _on_cpu(by_bands, by_xla, x, dy)


_banded = own_gradient(_forward, _backward, (2, 3))


def _on_cpu(ours: Callable[..., Any], plain: Callable[..., Any], *args: Array) -> Any:
    """``ours``, or where nobody said what the program is for, ``plain`` elsewhere."""
    if target() is not None:
        return ours(*args)
    return jax.lax.platform_dependent(*args, cpu=ours, default=plain)


def weight_gradient(
    x: Array, dy: Array, kernel: tuple[int, ...], strides: tuple[int, ...], padding: Padding
) -> Array:
    """The gradient [kh, kw, c, o] of the weights of a convolution of ``x`` [b, h, w, c], given that of its result, ``dy`` [b, h', w', o].

    Summed over bands: the band's pixels as they lie under each weight of the kernel, several weights' side by side, times dy's. The small operand is
    the transposed one.
    """
    (kh, kw), (sy, sx) = kernel, strides
    b, height, width, o = dy.shape
    c = x.shape[-1]
    rows = _divisor(height, _BAND // width)
    images = _divisor(b, _BAND // (height * width)) if rows == height else 1
    bands = height // rows
    # XLA would cut every band of x long before dy is there, and keep them, were it not told that x depends on dy.
    x = jnp.pad(x + 0 * dy.ravel()[0], ((0, 0), *padding, (0, 0)))

    size = (images, (rows - 1) * sy + 1, (width - 1) * sx + 1, c)  # of what lies under one weight

    def add(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        total, columns = state
        image, first = i // bands * images, i % bands * rows
        for k, (a, j) in enumerate(product(range(kh), range(kw))):
            under = jax.lax.dynamic_slice(x, (image, first * sy + a, j, 0), size)[:, ::sy, ::sx]
            # Written where it belongs, it is copied once; joined to the others, twice.
            columns = jax.lax.dynamic_update_slice(columns, under.reshape(-1, c), (0, k * c))
        grad = (
            jax.lax.dynamic_slice(dy, (image, first, 0, 0), (images, rows, width, o))
            .reshape(-1, o)
            .T
        )
        return total + grad @ columns, columns

    state = (
        jnp.zeros((o, kh * kw * c), x.dtype),
        jnp.zeros((images * rows * width, kh * kw * c), x.dtype),
    )
    turns = b // images * bands
    total, _ = add(jnp.int32(0), state) if turns == 1 else jax.lax.fori_loop(0, turns, add, state)
    return total.T.reshape(kh, kw, c, o)


def _as_product(x: Array, w: Array, padding: Padding) -> Array:
    o = w.shape[-1]
    columns = _columns(x, w.shape[:2], padding)
    return (columns.reshape(-1, w.size // o) @ w.reshape(-1, o)).reshape(*columns.shape[:3], o)


def _columns(x: Array, kernel: tuple[int, ...], padding: Padding) -> Array:
    """[b, h', w', kh * kw * c]: what lies under each weight of the kernel, side by side."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    (kh, kw), (height, width) = kernel, x.shape[1:3]
    under = [
        x[:, i : i + height - kh + 1, j : j + width - kw + 1] for i in range(kh) for j in range(kw)
    ]
    return jnp.concatenate(under, -1)


def _forwards(x: Array, w: Array, padding: Padding) -> Array:
    return _on_cpu(
        partial(_as_product, padding=padding),
        partial(_plain, strides=(1, 1), padding=padding),
        x,
        w,
    )


def _products_forward(x: Array, w: Array, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return _forwards(x, w, padding), (x, w)


def _products_backward(
    padding: Padding, kept: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    def ours(x: Array, w: Array, dy: Array) -> tuple[Array, Array]:
        kh, kw, c, o = w.shape
        b, height, width, _ = dy.shape
        rows = dy.reshape(-1, o)
        parts = jax.lax.dot_general(rows, w.reshape(-1, o), (((1,), (1,)), ((), ())))
        parts = parts.reshape(b, height, width, kh, kw, c)
        shifted = [
            jnp.pad(parts[:, :, :, i, j], ((0, 0), (i, kh - 1 - i), (j, kw - 1 - j), (0, 0)))
            for i in range(kh)
            for j in range(kw)
        ]
        back = reduce(jnp.add, shifted)
        (top, _), (left, _) = padding
        dx = back[:, top : top + x.shape[1], left : left + x.shape[2]]
        columns = _columns(
            x + 0 * dy.ravel()[0], w.shape[:2], padding
        )  # not before dy is there: see `weight_gradient`
        dw = jax.lax.dot_general(columns.reshape(len(rows), -1), rows, (((0,), (0,)), ((), ())))
        return dx, dw.reshape(w.shape)

    def plain(x: Array, w: Array, dy: Array) -> tuple[Array, Array]:
        return jax.vjp(partial(_plain, strides=(1, 1), padding=padding), x, w)[1](dy)

    return _on_cpu(ours, plain, *kept, dy)


def _where_nothing_is_differentiated(x: Array, w: Array, padding: Padding) -> Array:
    return _forwards(x, w, padding) if w.size >= _HEAVY_FORWARDS else _plain(x, w, (1, 1), padding)


_products = own_gradient(
    _products_forward, _products_backward, (2,), primal=_where_nothing_is_differentiated
)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of ``n`` up to ``most``, at least 1."""
    return max(k for k in range(1, n + 1) if n % k == 0 and (k == 1 or k <= most))
