"""Convolutions whose weights' gradient takes a way of its own on CPU, where XLA's takes two to four times as long as the convolution itself.

`convolve` stands where ``jax.lax.conv_general_dilated`` would (`flax.linen.Conv` has an argument for it).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.parallel import target

Array = jax.Array
Padding = tuple[tuple[int, int], ...]

# Measured with AVX-512: below so many pixels XLA's own gradient is as fast; a band's shifted copies stay in the cache; with few channels a product
# for each row of the kernel is too thin.
_PIXELS = 32 * 32
_BAND = 2048
_THIN = 32


def convolve(x: Array, w: Array, strides: Any, padding: Any, **options: Any) -> Array:
    """``jax.lax.conv_general_dilated``; where `banded_pays`, with `weight_gradient` in its backward pass, and without forward-mode derivatives."""
    if not banded_pays(x, w, strides, padding, **options):
        return jax.lax.conv_general_dilated(x, w, strides, padding, **options)
    return _banded(x, w, tuple(strides), tuple(map(tuple, padding)))


def banded_pays(x: Array, w: Array, strides: Any, padding: Any, **options: Any) -> bool:
    """Whether a program for one CPU is traced (or nobody said what for), of a large NHWC float32 convolution without groups or dilation."""
    told = target()
    if told is not None and (told.platform != "cpu" or told.mesh is not None):
        return False
    usual = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1, "precision": None}
    if isinstance(padding, str) or x.ndim != 4 or any(options.get(key, usual[key]) != usual[key] for key in usual):
        return False
    height, width = (
        (size + sum(pad) - kernel) // stride + 1
        for size, pad, kernel, stride in zip(x.shape[1:3], padding, w.shape[:2], strides, strict=True)
    )
    return x.dtype == w.dtype == jnp.float32 and w.shape[0] > 1 and height * width >= _PIXELS


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

    Summed over bands of rows: the band's pixels as they lie under each weight of the kernel, side by side, times dy's. The small operand is the
    transposed one.
    """
    (kh, kw), (sy, sx) = kernel, strides
    b, height, width, o = dy.shape
    c = x.shape[-1]
    rows = max(n for n in range(1, height + 1) if height % n == 0 and (n == 1 or n * width <= _BAND))
    bands = height // rows
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    groups = 1 if c <= _THIN else kh  # rows of the kernel are one product, or one each

    def add(i: Array, total: Array) -> Array:
        image, first = i // bands, i % bands * rows
        under = jax.lax.dynamic_slice(x, (image, first * sy, 0, 0), (1, (rows - 1) * sy + kh, *x.shape[2:]))[0]
        grad = jax.lax.dynamic_slice(dy, (image, first, 0, 0), (1, rows, width, o)).reshape(-1, o).T
        shifted = [under[:, j : j + (width - 1) * sx + 1 : sx] for j in range(kw)]
        parts = [part[a : a + (rows - 1) * sy + 1 : sy] for a in range(kh) for part in shifted]
        n = len(parts) // groups
        lines = [jnp.concatenate(parts[g * n : (g + 1) * n], -1).reshape(rows * width, -1) for g in range(groups)]
        return total + jnp.stack([grad @ line for line in lines])

    total = jax.lax.fori_loop(0, b * bands, add, jnp.zeros((groups, o, kh * kw * c // groups), x.dtype))
    return total.swapaxes(1, 2).reshape(kh, kw, c, o)
