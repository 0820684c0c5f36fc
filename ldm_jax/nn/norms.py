"""Group and layer normalisation as functions, in float32. For a single CPU with a backward pass of their own, which keeps the input alone (and a
group's statistics); from the plain form XLA keeps three to five arrays of the input's size for each call.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.parallel import for_one_cpu

Array = jax.Array


def group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool) -> Array:
    """Group normalisation of ``x`` [b, ..., c] over what lies between and the channels of a group (Wu & He 2018), times ``scale`` [c] plus ``bias``
    [c], through SiLU if told so; float32."""
    form = _group_norm if for_one_cpu() else _plain_group_norm
    return form(x, scale, bias, groups, eps, silu)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """Layer normalisation of ``x`` [..., c] (Ba et al. 2016) times ``scale`` [c] plus ``bias`` [c]; float32. For a single CPU; others have Flax's."""
    return _layer_norm(x, scale, bias, eps)


def _told(x: Array, dy: Array) -> tuple[Array, Array]:
    """Both in float32, ``x`` as if it depended on ``dy``: else XLA, long before dy is there, would compute from x what the backward pass needs, and
    keep that."""
    dy = dy.astype(jnp.float32)
    return x.astype(jnp.float32) + 0 * dy, dy


# ------------------------------------------------------------------------------------------------------------------------ groups


def _group_mean(a: Array, groups: int) -> Array:
    """[b, ..., c] -> [b, 1..., c], the mean over a group. Channel by channel first: a reduction over (height, width, part of channels) at once is 3
    to 4 times slower on CPU."""
    b, *space, c = a.shape
    by_group = _channel_means(a, groups).mean(-1)
    return jnp.repeat(by_group, c // groups, axis=-1).reshape((b,) + (1,) * len(space) + (c,))


def _group_mean_by_product(a: Array, groups: int) -> Array:
    """`_group_mean`, whose result XLA's CPU compiler writes down by channel. Of the other it keeps a number for each group, and looks
    that up anew for every element, which makes SiLU's loop twice as slow."""
    b, *space, c = a.shape
    size = c // groups
    even = jnp.full((size, size), 1 / size, a.dtype)
    by_channel = jnp.matmul(_channel_means(a, groups), even, precision=jax.lax.Precision.HIGHEST)
    return by_channel.reshape((b,) + (1,) * len(space) + (c,))


def _channel_means(a: Array, groups: int) -> Array:
    """[b, ..., c] -> [b, groups, c / groups]."""
    return a.mean(tuple(range(1, a.ndim - 1))).reshape(a.shape[0], groups, -1)


def _group_statistics(x: Array, groups: int, eps: float, mean_of: Callable[..., Array]) -> tuple[Array, Array]:
    mean = mean_of(x, groups)
    # Two passes: E[x^2] - E[x]^2 cancels when a group's mean is far from zero.
    return mean, jax.lax.rsqrt(mean_of(jnp.square(x - mean), groups) + eps)


def _group_applied(x: Array, scale: Array, bias: Array, mean: Array, rsqrt: Array, silu: bool) -> Array:
    # One multiply-add per element: normalisation and affine folded into a per-channel gain and offset.
    gain = rsqrt * scale
    y = x * gain + (bias - mean * gain)
    return nn.silu(y) if silu else y


def _plain_group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool) -> Array:
    x = x.astype(jnp.float32)
    return _group_applied(x, scale, bias, *_group_statistics(x, groups, eps, _group_mean), silu)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool) -> Array:
    return _group_forward(x, scale, bias, groups, eps, silu)[0]


def _group_forward(x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool) -> tuple[Array, Any]:
    x32 = x.astype(jnp.float32)
    mean, rsqrt = _group_statistics(x32, groups, eps, _group_mean_by_product)
    return _group_applied(x32, scale, bias, mean, rsqrt, silu), (x, scale, bias, mean, rsqrt)


def _group_backward(groups: int, eps: float, silu: bool, kept: Any, dy: Array) -> tuple[Array, Array, Array]:
    given, scale, bias, mean, rsqrt = kept
    x, dy = _told(given, dy)
    x = (x - mean) * rsqrt
    if silu:
        y = x * scale + bias
        s = nn.sigmoid(y)
        dy = dy * s * (1 + y * (1 - s))
    space = tuple(range(1, x.ndim - 1))
    dscale, dbias = (a.sum(space, keepdims=True) for a in (dy * x, dy))
    size = x.size // (x.shape[0] * x.shape[-1])  # sums over space stand for their means from here on
    along, level = (_group_mean_by_product(a * scale / size, groups) for a in (dscale, dbias))
    dx = rsqrt * (dy * scale - level - x * along)
    rows = tuple(range(x.ndim - 1))
    return dx.astype(given.dtype), dscale.sum(rows), dbias.sum(rows)


_group_norm.defvjp(_group_forward, _group_backward)


# ------------------------------------------------------------------------------------------------------------------------- layers


def _standardised(x: Array, eps: float) -> tuple[Array, Array]:
    """(``x`` less its mean over its standard deviation, one over that), float32."""
    mean_of = partial(jnp.mean, axis=-1, keepdims=True)
    x = x.astype(jnp.float32)
    x = x - mean_of(x)
    rsqrt = jax.lax.rsqrt(mean_of(jnp.square(x)) + eps)
    return x * rsqrt, rsqrt


def _plain_layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    return _standardised(x, eps)[0] * scale + bias


def _layer_forward(x: Array, scale: Array, bias: Array, eps: float) -> tuple[Array, Any]:
    return _plain_layer_norm(x, scale, bias, eps), (x, scale)


def _layer_backward(eps: float, kept: Any, dy: Array) -> tuple[Array, Array, Array]:
    given, scale = kept
    x, dy = _told(given, dy)
    x, rsqrt = _standardised(x, eps)  # again: XLA would keep both statistics as large as x
    level, along = ((a @ (scale / x.shape[-1]))[..., None] for a in (dy, dy * x))  # means of what reaches x
    rows = tuple(range(x.ndim - 1))
    dx = rsqrt * (dy * scale - level - x * along)
    return dx.astype(given.dtype), (dy * x).sum(rows), dy.sum(rows)


_layer_norm: Any = jax.custom_vjp(_plain_layer_norm, nondiff_argnums=(3,))
_layer_norm.defvjp(_layer_forward, _layer_backward)
