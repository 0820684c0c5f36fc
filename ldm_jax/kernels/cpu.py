"""Forms for one CPU. XLA's CPU compiler neither fuses nor keeps little memory in the plain ones.

Three of its habits explain most of what follows: it computes in the forward part of a program
whatever does not depend on the gradient, and keeps it; it copies a transposed left operand of a
product; it writes a reduced value down once and looks it up for every element.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from typing_extensions import override

from ldm_jax.kernels import reference
from ldm_jax.kernels.cpu_convolution import banded, by_products, is_banded, is_product
from ldm_jax.kernels.norms import group_norm_with_gradient, two_pass_statistics
from ldm_jax.kernels.reference import SAVED, Padding, WithAttention
from ldm_jax.kernels.vjp import own_gradient

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CpuKernels(WithAttention):
    """See the module. Over a mesh of several CPUs all but attention and GEGLU are plain."""

    @override
    def attention_form(self, q: Any, k: Any, v: Any) -> Callable[..., Array] | None:
        """The ranges in which each form is faster."""
        n, m, d = q.shape[1], k.shape[1], q.shape[-1]
        if min(n, m) >= 256 and n % 64 == m % 64 == 0 and d <= 128:
            return chunked
        return batched if n >= 256 > m and d <= 256 else None

    @override
    def group_norm(
        self, x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool
    ) -> Array:
        if self.mesh is not None:
            return super().group_norm(x, scale, bias, groups, eps, silu)
        return group_norm(x, scale, bias, groups, eps, silu, differentiable=self.differentiable)

    @override
    def layer_norm(self, x: Array, scale: Array, bias: Array, eps: float) -> Array:
        if self.mesh is not None:
            return super().layer_norm(x, scale, bias, eps)
        return layer_norm(x, scale, bias, eps, differentiable=self.differentiable)

    @override
    def conv(self, x: Array, w: Array, strides: tuple[int, int], padding: Padding) -> Array:
        if self.mesh is None and is_product(x, w, strides, padding):
            return by_products(x, w, padding, differentiable=self.differentiable)
        if self.mesh is None and is_banded(x, w, strides, padding):
            return banded(x, w, strides, padding, differentiable=self.differentiable)
        return super().conv(x, w, strides, padding)

    @override
    def dense(self, x: Array, w: Array) -> Array:
        if self.mesh is not None or x.ndim < 3:
            return super().dense(x, w)
        return dense(x, w, differentiable=self.differentiable)

    @override
    def gelu(self, x: Array) -> Array:
        return gelu(x)

    @override
    def geglu(self, x: Array) -> Array:
        return geglu(x, differentiable=self.differentiable)


# ---------------------------------------------------------------------------------------- attention
# Flash attention (Dao et al. 2022, arXiv:2205.14135): weights are computed block by block, and
# again in the backward pass; `batched` makes one block of all heads.

_CHUNK = 256  # rows of weights at a time, which stay in the cache


def _chunked_forward(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    def head(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        def rows(q: Array) -> tuple[Array, Array]:
            logits = q @ k.T * scale
            top = logits.max(-1, keepdims=True)
            weights = jnp.exp(logits - top)
            total = weights.sum(-1, keepdims=True)
            return weights @ v / total, (top + jnp.log(total))[:, 0]

        y, lse = jax.lax.map(rows, _chunks(q))
        return y.reshape(-1, v.shape[-1]), lse.reshape(-1)

    heads = _heads(q), _heads(k), _heads(v)
    like = heads[0] if q.shape[-1] == v.shape[-1] else jnp.zeros((*heads[0].shape[:2], v.shape[-1]))
    y, lse = _map_onto((like, heads[0][..., 0]), head, heads)
    y, lse = checkpoint_name(_unheads(y, v), SAVED), checkpoint_name(lse, SAVED)
    return y, (q, k, v, y, lse)


def _chunked_backward(
    scale: float, kept: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array]:
    """Only small products have a transposed left operand."""
    q, k, v, y, lse = kept
    delta = (_heads(dy) * _heads(y)).sum(-1)

    def head(
        q: Array, k: Array, v: Array, dy: Array, lse: Array, delta: Array
    ) -> tuple[Array, ...]:
        def columns(dq_t: Array, kv: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            k, v = kv
            weights = jnp.exp(k @ q.T * scale - lse)  # transposed: [keys, queries]
            dlogits = weights * (v @ dy.T - delta) * scale
            return dq_t + k.T @ dlogits, (dlogits @ q, weights @ dy)

        dq_t, (dk, dv) = jax.lax.scan(columns, jnp.zeros_like(q.T), (_chunks(k), _chunks(v)))
        return dq_t.T, dk.reshape(k.shape), dv.reshape(v.shape)

    heads = _heads(q), _heads(k), _heads(v)
    grads = _map_onto(heads, head, (*heads, _heads(dy), lse, delta))
    dq, dk, dv = (_unheads(grad, like) for grad, like in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


# Head after head, in chunks of queries forwards and of keys backwards, in float32.
chunked = own_gradient(_chunked_forward, _chunked_backward, (3,))


def batched(q: Array, k: Array, v: Array, scale: float, differentiable: bool = True) -> Array:
    """All heads at once in float32: for few keys, whose weights XLA computes row by row."""
    y = _batched(_heads(q) * scale, _heads(k), _heads(v), differentiable=differentiable)
    return _unheads(y, v)


def _batched_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    logits = q @ k.mT
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    y = checkpoint_name(weights @ v / total, SAVED)
    lse = checkpoint_name(top + jnp.log(total), SAVED)
    return y, (q, k, v, y, lse)


def _batched_backward(kept: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    """Sums over queries have the small operand on the left, transposed."""
    q, k, v, y, lse = kept
    delta = (dy * y).sum(-1, keepdims=True)
    # `+ 0 * delta` adds a false dependency on dy, so that XLA recomputes the logits in the
    # backward pass instead of keeping them.
    weights = jnp.exp((q + 0 * delta) @ k.mT - lse)
    dlogits = weights * (dy @ v.mT - delta)
    return dlogits @ k, (q.mT @ dlogits).mT, (dy.mT @ weights).mT


_batched = own_gradient(_batched_forward, _batched_backward)


def _heads(x: Array) -> Array:
    """[b, n, h, d] -> float32 [b * h, n, d]."""
    b, n, h, d = x.shape
    return x.swapaxes(1, 2).reshape(b * h, n, d).astype(jnp.float32)


def _unheads(x: Array, like: Array) -> Array:
    """[b * h, n, d] -> [b, n, h, d], with the dtype, b and h of ``like``."""
    b, _, h, _ = like.shape
    return x.reshape(b, h, *x.shape[1:]).swapaxes(1, 2).astype(like.dtype)


def _map_onto(
    places: tuple[Array, ...], function: Callable[..., tuple[Array, ...]], given: tuple[Array, ...]
) -> tuple[Array, ...]:
    """``function`` of each row of ``given``, written over the rows of ``places``.

    `jax.lax.map` begins with zeros, and XLA's CPU compiler makes those of all loops of a program at
    its start, where they stay in memory.
    """

    def one(i: Array, places: tuple[Array, ...]) -> tuple[Array, ...]:
        results = function(*(a[i] for a in given))
        return tuple(a.at[i].set(b) for a, b in zip(places, results, strict=True))

    return jax.lax.fori_loop(0, given[0].shape[0], one, places)


def _chunks(x: Array) -> Array:
    """[n, d] -> [n / c, c, d]."""
    return x.reshape(-1, math.gcd(len(x), _CHUNK), x.shape[-1])


# ------------------------------------------------------------------------------------ normalisation


def _level(a: Array) -> Array:
    """See `norms.level`. By a product, whose result XLA writes down for each channel.

    Of a mean it keeps one number for each group and looks that up for every element, which makes
    the loop of SiLU twice as slow.
    """
    even = jnp.full((a.shape[-1], a.shape[-1]), 1 / a.shape[-1], a.dtype)
    return jnp.matmul(a, even, precision=jax.lax.Precision.HIGHEST)


def _late(x: Array, dy: Array) -> Array:
    """``x`` with a false dependency on dy: what the backward pass needs is computed in it."""
    return x + 0 * dy


group_norm = group_norm_with_gradient(partial(two_pass_statistics, level=_level), _level, _late)


def _standardize(x: Array, eps: float) -> tuple[Array, Array]:
    """(x - mean) / deviation and 1 / deviation, float32."""
    mean = partial(jnp.mean, axis=-1, keepdims=True)
    x = x.astype(jnp.float32)
    x = x - mean(x)
    rsqrt = jax.lax.rsqrt(mean(jnp.square(x)) + eps)
    return x * rsqrt, rsqrt


def _layer_norm_forward(x: Array, scale: Array, bias: Array, eps: float) -> tuple[Array, Any]:
    return _standardize(x, eps)[0] * scale + bias, (x, scale)


def _layer_norm_backward(eps: float, kept: Any, dy: Array) -> tuple[Array, Array, Array]:
    given, scale = kept
    dy = dy.astype(jnp.float32)
    # Computed again: XLA would keep both statistics as arrays of the size of x.
    x, rsqrt = _standardize(_late(given.astype(jnp.float32), dy), eps)
    flat, along = ((a @ (scale / x.shape[-1]))[..., None] for a in (dy, dy * x))
    rows = tuple(range(x.ndim - 1))
    dx = rsqrt * (dy * scale - flat - x * along)
    return dx.astype(given.dtype), (dy * x).sum(rows), dy.sum(rows)


layer_norm = own_gradient(_layer_norm_forward, _layer_norm_backward, (3,))


# --------------------------------------------------------------------------- products, activations


def _dense_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """The weights' gradient has all rows in one dimension: over several XLA transposes a copy."""
    x, w = kept
    rows, grads = (a.reshape(math.prod(a.shape[:-1]), a.shape[-1]) for a in (x, dy))
    dx = jax.lax.dot_general(dy, w, (((dy.ndim - 1,), (1,)), ((), ())))
    return dx, jax.lax.dot_general(rows, grads, (((0,), (0,)), ((), ())))


dense = own_gradient(lambda x, w: (reference.dense(x, w), (x, w)), _dense_backward)


def gelu(x: Array) -> Array:
    """GELU from erf, as PyTorch computes it: the two series of erfc are slow on a CPU."""
    x32 = x.astype(jnp.float32)
    return (x32 * _normal_cdf(x32)).astype(x.dtype)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(x * np.float32(np.sqrt(0.5))))


def _geglu_forward(x: Array) -> tuple[Array, Array]:
    value, gate = jnp.split(x, 2, axis=-1)
    return value * gelu(gate), x


def _geglu_backward(x: Array, dy: Array) -> tuple[Array]:
    value, gate = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    gate = _late(gate, dy)
    cdf, pdf = _normal_cdf(gate), jnp.exp(-0.5 * gate * gate) * np.float32(1 / np.sqrt(2 * np.pi))
    grads = jnp.concatenate([dy * gate * cdf, dy * value * (cdf + gate * pdf)], axis=-1)
    return (grads.astype(x.dtype),)


geglu = own_gradient(_geglu_forward, _geglu_backward)
