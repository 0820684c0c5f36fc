"""Statistics of group normalisation, and a hand-written gradient for it, in float32.

x is [b, ..., c]; statistics are [b, 1..., c], for each channel those of its group. The gradient
keeps x and the statistics alone for the backward pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.kernels.vjp import own_gradient

Array = jax.Array
Level = Callable[[Array], Array]  # [b, groups, n] -> the same shape, each value the group's mean


def level(a: Array) -> Array:
    """[b, groups, channels of a group] -> the same shape, each value the mean of its group."""
    return jnp.broadcast_to(a.mean(-1, keepdims=True), a.shape)


def group_mean(a: Array, groups: int, level: Level = level) -> Array:
    """[b, ..., c] -> [b, 1..., c], the mean over each group.

    Channel by channel first: a reduction over (height, width, part of the channels) at once is
    several times slower on a CPU.
    """
    by_channel = a.mean(tuple(range(1, a.ndim - 1))).reshape(a.shape[0], groups, -1)
    return level(by_channel).reshape(_per_channel(a))


def two_pass_statistics(
    x: Array, groups: int, eps: float, level: Level = level
) -> tuple[Array, Array]:
    """Mean and reciprocal standard deviation. E[x^2] - E[x]^2 would cancel far from zero."""
    x = x.astype(jnp.float32)
    mean = group_mean(x, groups, level)
    return mean, jax.lax.rsqrt(group_mean(jnp.square(x - mean), groups, level) + eps)


def one_pass_statistics(x: Array, groups: int, eps: float) -> tuple[Array, Array]:
    """The same from reading x once, where memory traffic limits the speed.

    Channel by channel about the mean of some eight image rows, which is near enough for
    E[d^2] - E[d]^2 not to cancel (Chan, Golub & LeVeque 1983, on shifted data), and then over the
    channels of a group.
    """
    over = tuple(range(1, x.ndim - 1))
    every = max(1, x.shape[1] // 8)
    rows = x[:, every // 2 :: every] if over else x
    near = rows.astype(jnp.float32).mean(over, keepdims=True)
    d = x.astype(jnp.float32) - near
    near, shift, square = (
        a.mean(over).reshape(x.shape[0], groups, -1) for a in (near, d, jnp.square(d))
    )
    means = near + shift
    mean = level(means)
    variance = level(square - jnp.square(shift) + jnp.square(means - mean))
    shape = _per_channel(x)
    return mean.reshape(shape), jax.lax.rsqrt(variance + eps).reshape(shape)


def normalize(x: Array, mean: Array, rsqrt: Array, scale: Array, bias: Array, silu: bool) -> Array:
    """(x - mean) rsqrt scale + bias, through SiLU if wanted; float32.

    One multiply-add for each element: all of it is folded into a gain and an offset per channel.
    """
    gain = rsqrt * scale
    y = x.astype(jnp.float32) * gain + (bias - mean * gain)
    return jax.nn.silu(y) if silu else y


def group_norm_with_gradient(
    statistics: Callable[[Array, int, float], tuple[Array, Array]],
    level: Level = level,
    late: Callable[[Array, Array], Array] = lambda x, dy: x,
) -> Callable[..., Array]:
    """Group normalisation by ``statistics`` with a hand-written gradient.

    Args:
      statistics: ``(x, groups, eps) -> (mean, rsqrt)``.
      level: How a group's mean is written to its channels in the backward pass.
      late: ``(x, dy) -> x``, both float32, as the backward pass reads x.

    Returns:
      ``f(x, scale, bias, groups, eps, silu, differentiable=True)``; see `Kernels.group_norm`.
    """

    def forward(
        x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool
    ) -> tuple[Array, Any]:
        mean, rsqrt = statistics(x, groups, eps)
        return normalize(x, mean, rsqrt, scale, bias, silu), (x, scale, bias, mean, rsqrt)

    def backward(
        groups: int, eps: float, silu: bool, kept: Any, dy: Array
    ) -> tuple[Array, Array, Array]:
        given, scale, bias, mean, rsqrt = kept
        dy = dy.astype(jnp.float32)
        x = (late(given.astype(jnp.float32), dy) - mean) * rsqrt
        if silu:
            y = x * scale + bias
            s = jax.nn.sigmoid(y)
            dy = dy * s * (1 + y * (1 - s))
        space = tuple(range(1, x.ndim - 1))
        dscale, dbias = (a.sum(space, keepdims=True) for a in (dy * x, dy))
        # Sums over space stand for their means from here on.
        size = x.size // (x.shape[0] * x.shape[-1])
        along, flat = (group_mean(a * scale / size, groups, level) for a in (dscale, dbias))
        dx = rsqrt * (dy * scale - flat - x * along)
        rows = tuple(range(x.ndim - 1))
        return dx.astype(given.dtype), dscale.sum(rows), dbias.sum(rows)

    return own_gradient(forward, backward, (3, 4, 5))


def _per_channel(x: Array) -> tuple[int, ...]:
    """[b, 1..., c] of x [b, ..., c]."""
    return (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
