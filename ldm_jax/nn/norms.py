"""Group and layer normalisation as functions, in float32, each with a backward pass of its own, which keeps the input alone (and a group's
statistics); from a plain form XLA's CPU compiler keeps three to five arrays of the input's size for each call. Which form of the statistics a program
gets depends on what it is compiled for.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.distributed.parallel import for_one_cpu, for_tpu
from ldm_jax.kernels.vjp import own_gradient

Array = jax.Array


def apart(x: Array) -> Array:
    """``x``; in a TPU's program as an array of its own, and so is its gradient: the compiler moves neither layouts nor conversions to float32 through
    it.
    """
    return jax.lax.optimization_barrier(x) if for_tpu() else x


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """Layer normalisation of ``x`` [..., c] (Ba et al. 2016) times ``scale`` [c] plus ``bias`` [c]; float32. For a single CPU; others have Flax's."""
    return _layer_norm(x, scale, bias, eps)


def _told(x: Array, dy: Array) -> tuple[Array, Array]:
    """Both in float32; on a CPU ``x`` as if it depended on ``dy``: else XLA, long before dy is there, would compute from x what the backward pass
    needs, and keep that.
    """
    dy = dy.astype(jnp.float32)
    x = x.astype(jnp.float32)
    return (x + 0 * dy if for_one_cpu() else x), dy


# ------------------------------------------------------------------------------------------------------------------------ groups


def group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool) -> Array:
    """Group normalisation of ``x`` [b, ..., c] over what lies between and the channels of a group (Wu & He 2018), times ``scale`` [c] plus ``bias``
    [c], through SiLU if told so; float32.
    """
    return _group_norm(x, scale, bias, groups, eps, silu)


def _group_mean(a: Array, groups: int) -> Array:
    """[b, ..., c] -> [b, 1..., c], the mean over a group. Channel by channel first: a reduction over (height, width, part of channels) at once is 3
    to 4 times slower on CPU.
    """
    by_channel = a.mean(tuple(range(1, a.ndim - 1))).reshape(a.shape[0], groups, -1)
    return _level(by_channel).reshape(_beside(a))


def _level(a: Array) -> Array:
    """[b, groups, channels of a group] -> the same, each with the mean of its group. On a CPU by a product, whose result XLA writes down by channel:
    of a mean it keeps a number for each group, and looks that up anew for every element, which makes SiLU's loop twice as slow.
    """
    if not for_one_cpu():
        return jnp.broadcast_to(a.mean(-1, keepdims=True), a.shape)
    even = jnp.full((a.shape[-1], a.shape[-1]), 1 / a.shape[-1], a.dtype)
    return jnp.matmul(a, even, precision=jax.lax.Precision.HIGHEST)


def _beside(x: Array) -> tuple[int, ...]:
    """[b, 1..., c], the shape of what x [b, ..., c] has for each channel of a picture."""
    return (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])


def _statistics(x: Array, groups: int, eps: float) -> tuple[Array, Array]:
    """A group's mean and one over its standard deviation, float32 [b, 1..., c]."""
    x = x.astype(jnp.float32)
    mean = _group_mean(x, groups)
    # Two passes: E[x^2] - E[x]^2 cancels when a group's mean is far from zero.
    return mean, jax.lax.rsqrt(_group_mean(jnp.square(x - mean), groups) + eps)


def _statistics_in_one_pass(x: Array, groups: int, eps: float) -> tuple[Array, Array]:
    """The same from reading ``x`` once, for accelerators and meshes; memory limits an accelerator here.

    Channel by channel about the mean of some eight rows, which is near enough for E[d^2] - E[d]^2 not to cancel (Chan, Golub & LeVeque 1983, on
    shifted data), and then over the channels of a group.
    """
    over = tuple(range(1, x.ndim - 1))
    # Convolutions of few pictures have layouts of their own, in which a TPU's compiler would write d and d^2 down.
    x = apart(x)
    every = max(1, x.shape[1] // 8)
    rows = x[:, every // 2 :: every] if over else x
    near = rows.astype(jnp.float32).mean(over, keepdims=True)
    d = x.astype(jnp.float32) - near
    near, shift, square = (
        a.mean(over).reshape(x.shape[0], groups, -1) for a in (near, d, jnp.square(d))
    )
    means = near + shift
    mean = _level(means)
    variance = _level(square - jnp.square(shift) + jnp.square(means - mean))
    return mean.reshape(_beside(x)), jax.lax.rsqrt(variance + eps).reshape(_beside(x))


def _group_forward(
    x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool
) -> tuple[Array, Any]:
    mean, rsqrt = (_statistics if for_one_cpu() else _statistics_in_one_pass)(x, groups, eps)
    # One multiply-add per element: normalisation and affine folded into a per-channel gain and offset.
    gain = rsqrt * scale
    y = x.astype(jnp.float32) * gain + (bias - mean * gain)
    return nn.silu(y) if silu else y, (x, scale, bias, mean, rsqrt)


def _group_backward(
    groups: int, eps: float, silu: bool, kept: Any, dy: Array
) -> tuple[Array, Array, Array]:
    given, scale, bias, mean, rsqrt = kept
    x, dy = _told(given, dy)
    x = (x - mean) * rsqrt
    if silu:
        y = x * scale + bias
        s = nn.sigmoid(y)
        dy = dy * s * (1 + y * (1 - s))
    space = tuple(range(1, x.ndim - 1))
    dscale, dbias = (a.sum(space, keepdims=True) for a in (dy * x, dy))
    size = x.size // (
        x.shape[0] * x.shape[-1]
    )  # sums over space stand for their means from here on
    along, level = (_group_mean(a * scale / size, groups) for a in (dscale, dbias))
    dx = rsqrt * (dy * scale - level - x * along)
    rows = tuple(range(x.ndim - 1))
    return dx.astype(given.dtype), dscale.sum(rows), dbias.sum(rows)


_group_norm = own_gradient(_group_forward, _group_backward, (3, 4, 5))


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
    level, along = (
        (a @ (scale / x.shape[-1]))[..., None] for a in (dy, dy * x)
    )  # means of what reaches x
    rows = tuple(range(x.ndim - 1))
    dx = rsqrt * (dy * scale - level - x * along)
    return dx.astype(given.dtype), (dy * x).sum(rows), dy.sum(rows)


_layer_norm = own_gradient(_layer_forward, _layer_backward, (3,))
