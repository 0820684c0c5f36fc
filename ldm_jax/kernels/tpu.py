"""Forms for TPUs: two of attention, group statistics in one pass, doubling in a convolution."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from typing_extensions import override

from ldm_jax.kernels import reference
from ldm_jax.kernels.norms import group_norm_with_gradient, one_pass_statistics
from ldm_jax.kernels.reference import SAVED, WithAttention
from ldm_jax.kernels.vjp import own_gradient

Array = jax.Array

# The barrier: convolutions of few pictures have layouts of their own, in which the compiler would
# otherwise write d and d^2 down.
group_norm = group_norm_with_gradient(
    lambda x, groups, eps: one_pass_statistics(jax.lax.optimization_barrier(x), groups, eps)
)


@dataclasses.dataclass(frozen=True)
class TpuKernels(WithAttention):
    """See the module."""

    @override
    def attention_form(self, q: Any, k: Any, v: Any) -> Callable[..., Array] | None:
        """Splash where it accepts the arrays, and plain weights begin to cost memory."""
        n, m = q.shape[1], k.shape[1]
        long = min(n, m) >= 1024 and n % 128 == m % 128 == 0
        fits = q.shape[-1] <= 128 and q.dtype in (jnp.float32, jnp.bfloat16)
        return splash if long and fits else compact

    @override
    def is_partitioned(self, form: Callable[..., Array]) -> bool:
        """Compact attention is plain products."""
        return form is compact

    @override
    def group_norm(
        self, x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool
    ) -> Array:
        return group_norm(x, scale, bias, groups, eps, silu, differentiable=self.differentiable)

    @override
    def upsample_conv(self, x: Array, w: Array) -> Array:
        """Over many pixels for each weight, a 4x4 convolution over x with zeros between its pixels.

        A repeated pixel meets the sum of two weights. It takes 4/9 of the products, and the
        repeated pixels are not written down.
        """
        if 4 * x.shape[1] * x.shape[2] < 16 * x.shape[-1]:
            return super().upsample_conv(x, w)
        sums = w.astype(jnp.float32)
        for axis in (0, 1):
            before, after = (
                tuple(ends if i == axis else (0, 0) for i in range(4)) for ends in ((1, 0), (0, 1))
            )
            sums = jnp.pad(sums, before) + jnp.pad(sums, after)
        sums, around = sums.astype(w.dtype), ((2, 2), (2, 2))
        return reference.conv(self.keep_rows(x), sums, (1, 1), around, lhs_dilation=(2, 2))

    @override
    def materialize(self, x: Array) -> Array:
        """Neither layouts nor conversions to float32 move through it, nor through its gradient."""
        return jax.lax.optimization_barrier(x)


def _compact_forward(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    hold = jax.lax.optimization_barrier

    def logits(q: Array) -> Array:
        return jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32) * scale

    # Computed twice, each time in one pass: left free the compiler writes float32 logits down and
    # reads them several times.
    top = hold(logits(hold(q)).max(-1, keepdims=True))
    weights = jnp.exp(logits(q) - top)
    weights, total = hold((weights.astype(v.dtype), weights.sum(-1)))
    share = 1 / total.swapaxes(1, 2)[..., None]  # [b, n, h, 1]
    y = jnp.einsum("bhnm,bmhe->bnhe", weights, v, preferred_element_type=jnp.float32) * share
    y = y.astype(v.dtype)
    return y, (q, k, v, y, weights, share)


def _compact_backward(
    scale: float, kept: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array]:
    q, k, v, y, weights, share = kept
    delta = (dy.astype(jnp.float32) * y * share).sum(-1).swapaxes(1, 2)[..., None]  # [b, h, n, 1]
    dy = (dy * share).astype(dy.dtype)
    dweights = jnp.einsum("bnhe,bmhe->bhnm", dy, v, preferred_element_type=jnp.float32)
    dlogits = (weights * (dweights - delta) * scale).astype(q.dtype)
    dq, dk = jnp.einsum("bhnm,bmhd->bnhd", dlogits, k), jnp.einsum("bhnm,bnhd->bmhd", dlogits, q)
    return dq, dk, jnp.einsum("bhnm,bnhe->bmhe", weights, dy)


# The plain form with less memory traffic: it writes down, and keeps for the backward pass, weights
# in v's dtype that are not divided by their sum yet; the backward pass takes its sum over keys from
# the result (Dao et al. 2022, arXiv:2205.14135, section 3.1).
compact = own_gradient(_compact_forward, _compact_backward, (3,))


def splash(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    differentiable: bool = True,
    *,
    interpret: bool = False,
) -> Array:
    """JAX's Pallas kernel, which takes any head size. ``interpret`` runs it anywhere, slowly."""
    kernel = _splash_kernel(q.shape[1], k.shape[1], q.shape[2], q.dtype == jnp.bfloat16, interpret)
    q, k, v = (x.swapaxes(1, 2) for x in ((q * scale).astype(q.dtype), k, v))
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)


def _splash_kernel(n: int, m: int, h: int, half: bool, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    # Blocks that fit the 16 MiB which the compiler gives a kernel. One backward kernel makes all
    # gradients; it writes that of the queries once for each block of keys, to be summed, hence the
    # long ones. (In float32 long ones compile for minutes.)
    sizes = library.BlockSizes(
        block_q=math.gcd(n, 1024 if half else 512),
        block_kv=math.gcd(m, 1024 if half else 512),
        block_q_dkv=math.gcd(n, 256 if half else 512),
        block_kv_dkv=math.gcd(m, 4096 if half else 512),
        block_kv_dkv_compute=math.gcd(m, 1024 if half else 512),
        use_fused_bwd_kernel=True,
        # As the compiler lays these arrays by itself: heads of 40 would fill 31 % of a row, and
        # would be copied before the kernel.
        q_layout=library.QKVLayout.SEQ_MINOR,
        k_layout=library.QKVLayout.SEQ_MINOR,
        v_layout=library.QKVLayout.SEQ_MINOR,
    )
    mask = masks.MultiHeadMask([masks.FullMask((n, m))] * h)
    return library.make_splash_mha_single_device(
        mask=mask, block_sizes=sizes, residual_checkpoint_name=SAVED, interpret=interpret
    )
