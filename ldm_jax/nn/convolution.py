"""Convolutions whose weights' gradient takes a way of its own on CPU, where XLA's takes two to four times as long as the convolution itself.

`convolve` stands where ``jax.lax.conv_general_dilated`` would (`flax.linen.Conv` has an argument for it).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.parallel import for_one_cpu, target

Array = jax.Array
Padding = tuple[tuple[int, int], ...]

# Measured with AVX-512: below so many pixels, of a picture or of all, XLA's own gradient is as fast; the shifted copies of a band stay in the
# cache, be it rows of a large picture or several small ones; with few channels a product for each weight of the kernel, or even each of its rows, is
# too thin.
_LARGE, _MANY = 1024, 4096
_BAND, _SMALL_BAND = 2048, 1024
_THIN, _THICK = 32, 128


def convolve(x: Array, w: Array, strides: Any, padding: Any, **options: Any) -> Array:
    """``jax.lax.conv_general_dilated``; where `banded_pays`, with `weight_gradient` in its backward pass, and without forward-mode derivatives."""
    if not banded_pays(x, w, strides, padding, **options):
        return jax.lax.conv_general_dilated(x, w, strides, padding, **options)
    return _banded(x, w, tuple(strides), tuple(map(tuple, padding)))


def banded_pays(x: Array, w: Array, strides: Any, padding: Any, **options: Any) -> bool:
    """Whether a program for one CPU is traced (or nobody said what for), of many pixels in NHWC and float32, without groups or
    dilation."""
    if not for_one_cpu():
        return False
    usual = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1, "precision": None}
    if isinstance(padding, str) or x.ndim != 4 or any(options.get(key, usual[key]) != usual[key] for key in usual):
        return False
    height, width = (
        (size + sum(pad) - kernel) // stride + 1
        for size, pad, kernel, stride in zip(x.shape[1:3], padding, w.shape[:2], strides, strict=True)
    )
    pixels = height * width
    enough = pixels >= _LARGE or (isinstance(x.shape[0], int) and x.shape[0] * pixels >= _MANY)  # else of any batch
    return x.dtype == w.dtype == jnp.float32 and w.shape[0] > 1 and enough


def _plain(x: Array, w: Array, strides: tuple[int, ...], padding: Padding) -> Array:
    return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


_banded: Any = jax.custom_vjp(_plain, nondiff_argnums=(2, 3))


def _forward(x: Array, w: Array, strides: tuple[int, ...], padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return _plain(x, w, strides, padding), (x, w)


def _backward(strides: tuple[int, ...], padding: Padding, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = kept
    form = partial(_plain, strides=strides, padding=padding)
    (dx,) = jax.linear_transpose(lambda x: form(x, w), x)(dy)

    def by_xla(x: Array, dy: Array) -> Array:
        return jax.linear_transpose(lambda w: form(x, w), w)(dy)[0]

    by_bands = partial(weight_gradient, kernel=w.shape[:2], strides=strides, padding=padding)
    if target() is not None:
        return dx, by_bands(x, dy)
    return dx, jax.lax.platform_dependent(x, dy, cpu=by_bands, default=by_xla)


_banded.defvjp(_forward, _backward)


def weight_gradient(x: Array, dy: Array, kernel: tuple[int, ...], strides: tuple[int, ...], padding: Padding) -> Array:
    """The gradient [kh, kw, c, o] of the weights of a convolution of ``x`` [b, h, w, c], given that of its result, ``dy`` [b, h', w', o].

    Summed over bands: the band's pixels as they lie under each weight of the kernel, several weights' side by side, times dy's. The small operand is
    the transposed one.
    """
    (kh, kw), (sy, sx) = kernel, strides
    b, height, width, o = dy.shape
    c = x.shape[-1]
    large = height * width >= _LARGE
    rows = _divisor(height, _BAND // width) if large else height
    images = 1 if large else _divisor(b, _SMALL_BAND // (height * width))
    products = (1 if c <= _THIN else kh) if large and c < _THICK else kh * kw
    bands = height // rows
    # XLA would cut every band of x long before dy is there, and keep them, were it not told that x depends on dy.
    x = jnp.pad(x + 0 * dy.ravel()[0], ((0, 0), *padding, (0, 0)))

    def add(i: Array, total: Array) -> Array:
        image, first = i // bands * images, i % bands * rows
        under = jax.lax.dynamic_slice(x, (image, first * sy, 0, 0), (images, (rows - 1) * sy + kh, *x.shape[2:]))
        grad = jax.lax.dynamic_slice(dy, (image, first, 0, 0), (images, rows, width, o)).reshape(-1, o).T
        shifted = [under[:, :, j : j + (width - 1) * sx + 1 : sx] for j in range(kw)]
        parts = [part[:, a : a + (rows - 1) * sy + 1 : sy] for a in range(kh) for part in shifted]
        n = len(parts) // products
        lines = [jnp.concatenate(parts[g * n : (g + 1) * n], -1).reshape(grad.shape[1], -1) for g in range(products)]
        return total + jnp.stack([grad @ line for line in lines])

    total = jnp.zeros((products, o, kh * kw * c // products), x.dtype)
    turns = b // images * bands
    total = add(jnp.int32(0), total) if turns == 1 else jax.lax.fori_loop(0, turns, add, total)
    return total.swapaxes(1, 2).reshape(kh, kw, c, o)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of ``n`` up to ``most``, at least 1."""
    return max(k for k in range(1, n + 1) if n % k == 0 and (k == 1 or k <= most))
