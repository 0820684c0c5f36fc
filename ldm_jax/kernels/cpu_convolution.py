"""Convolutions in float32 for one CPU, where XLA's are slow.

XLA's gradient of the weights takes several times as long as the convolution itself: over many
pixels it is summed over bands of the picture here. Of few pixels and many weights all three passes
are products: XLA transposes the weights for the input's gradient, and fuses a chain of such
convolutions into one that takes several times as long as they do.
"""

from functools import reduce
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.kernels import reference
from ldm_jax.kernels.reference import Padding
from ldm_jax.kernels.vjp import own_gradient

Array = jax.Array

# Below MANY pixels XLA's gradient of the weights is as fast. The shifted copies of a band of BAND
# pixels stay in the cache, be it rows of a large picture or several small ones.
_MANY, _BAND = 1024, 512
# Up to FEW pixels of all pictures and from HEAVY weights on products are faster; the columns of
# more pixels leave the cache. Without a gradient they gain nothing below HEAVY_FORWARDS weights.
_FEW, _HEAVY, _HEAVY_FORWARDS = 512, 2**17, 2**19


def is_product(x: Array, w: Array, strides: tuple[int, int], padding: Padding) -> bool:
    """Whether `by_products` is faster: few pixels in the whole batch and many weights."""
    if not _is_float_image(x, w) or strides != (1, 1) or not isinstance(x.shape[0], int):
        return False
    height, width = _output_size(x, w, strides, padding)
    return x.shape[0] * height * width <= _FEW and w.size >= _HEAVY


def is_banded(x: Array, w: Array, strides: tuple[int, int], padding: Padding) -> bool:
    """Whether `banded` is faster: many pixels, in one picture if the batch size is symbolic."""
    if not _is_float_image(x, w):
        return False
    height, width = _output_size(x, w, strides, padding)
    return height * width * (x.shape[0] if isinstance(x.shape[0], int) else 1) >= _MANY


def _is_float_image(x: Array, w: Array) -> bool:
    return x.ndim == 4 and x.dtype == w.dtype == jnp.float32 and w.shape[0] > 1


def _output_size(x: Array, w: Array, strides: tuple[int, int], padding: Padding) -> list[int]:
    sizes = zip(x.shape[1:3], padding, w.shape[:2], strides, strict=True)
    return [(size + sum(pad) - kernel) // stride + 1 for size, pad, kernel, stride in sizes]


# -------------------------------------------------------------------------------------------- bands


def _banded_forward(
    x: Array, w: Array, strides: tuple[int, int], padding: Padding
) -> tuple[Array, tuple[Array, Array]]:
    return reference.conv(x, w, strides, padding), (x, w)


def _banded_backward(
    strides: tuple[int, int], padding: Padding, kept: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = kept
    (dx,) = jax.linear_transpose(lambda x: reference.conv(x, w, strides, padding), x)(dy)
    return dx, weight_gradient(x, dy, w.shape[:2], strides, padding)


banded = own_gradient(_banded_forward, _banded_backward, (2, 3))


def weight_gradient(
    x: Array, dy: Array, kernel: tuple[int, ...], strides: tuple[int, int], padding: Padding
) -> Array:
    """The gradient [kh, kw, c, o] of the weights of a convolution of x [b, h, w, c].

    ``dy`` [b, h', w', o] is the gradient of its result. Summed over bands: the band's pixels as
    they lie under each weight of the kernel, several weights' side by side, times those of dy. The
    small operand is the transposed one.
    """
    (kh, kw), (sy, sx) = kernel, strides
    b, height, width, o = dy.shape
    c = x.shape[-1]
    rows = _divisor(height, _BAND // width)
    images = _divisor(b, _BAND // (height * width)) if rows == height else 1
    bands = height // rows
    # The false dependency on dy: XLA would otherwise cut the bands in the forward pass.
    x = jnp.pad(x + 0 * dy.ravel()[0], ((0, 0), *padding, (0, 0)))
    under_one_weight = (images, (rows - 1) * sy + 1, (width - 1) * sx + 1, c)

    def add(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        total, columns = state
        image, first = i // bands * images, i % bands * rows
        for n, (row, column) in enumerate(product(range(kh), range(kw))):
            start = (image, first * sy + row, column, 0)
            under = jax.lax.dynamic_slice(x, start, under_one_weight)[:, ::sy, ::sx]
            # Written to its place it is copied once; concatenated with the others, twice.
            columns = jax.lax.dynamic_update_slice(columns, under.reshape(-1, c), (0, n * c))
        grad = jax.lax.dynamic_slice(dy, (image, first, 0, 0), (images, rows, width, o))
        return total + grad.reshape(-1, o).T @ columns, columns

    state = (
        jnp.zeros((o, kh * kw * c), x.dtype),
        jnp.zeros((images * rows * width, kh * kw * c), x.dtype),
    )
    turns = b // images * bands
    total, _ = add(jnp.int32(0), state) if turns == 1 else jax.lax.fori_loop(0, turns, add, state)
    return total.T.reshape(kh, kw, c, o)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of ``n`` up to ``most``, at least 1."""
    return max(k for k in range(1, n + 1) if n % k == 0 and (k == 1 or k <= most))


# ----------------------------------------------------------------------------------------- products


def _columns(x: Array, kernel: tuple[int, ...], padding: Padding) -> Array:
    """[b, h', w', kh * kw * c]: the pixels under each weight of the kernel, side by side."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    (kh, kw), (height, width) = kernel, x.shape[1:3]
    under = [
        x[:, i : i + height - kh + 1, j : j + width - kw + 1] for i in range(kh) for j in range(kw)
    ]
    return jnp.concatenate(under, -1)


def _product(x: Array, w: Array, padding: Padding) -> Array:
    o = w.shape[-1]
    columns = _columns(x, w.shape[:2], padding)
    return (columns.reshape(-1, w.size // o) @ w.reshape(-1, o)).reshape(*columns.shape[:3], o)


def _product_forward(x: Array, w: Array, padding: Padding) -> tuple[Array, Any]:
    return _product(x, w, padding), (x, w)


def _product_backward(padding: Padding, kept: Any, dy: Array) -> tuple[Array, Array]:
    x, w = kept
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
    (top, _), (left, _) = padding
    dx = reduce(jnp.add, shifted)[:, top : top + x.shape[1], left : left + x.shape[2]]
    # The false dependency on dy, as in `weight_gradient`.
    columns = _columns(x + 0 * dy.ravel()[0], w.shape[:2], padding)
    dw = jax.lax.dot_general(columns.reshape(len(rows), -1), rows, (((0,), (0,)), ((), ())))
    return dx, dw.reshape(w.shape)


def _product_or_plain(x: Array, w: Array, padding: Padding) -> Array:
    """The form without a gradient: columns of few weights cost memory and gain nothing."""
    heavy = w.size >= _HEAVY_FORWARDS
    return _product(x, w, padding) if heavy else reference.conv(x, w, (1, 1), padding)


by_products = own_gradient(_product_forward, _product_backward, (2,), primal=_product_or_plain)
