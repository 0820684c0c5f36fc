"""Forms for GPUs: cuDNN's attention, and group statistics in one pass."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from typing_extensions import override

from ldm_jax.kernels.norms import group_norm_with_gradient, one_pass_statistics
from ldm_jax.kernels.reference import WithAttention

Array = jax.Array

group_norm = group_norm_with_gradient(one_pass_statistics)


@dataclasses.dataclass(frozen=True)
class GpuKernels(WithAttention):
    """See the module."""

    @override
    def attention_form(self, q: Any, k: Any, v: Any) -> Callable[..., Array] | None:
        """What cuDNN accepts, where plain weights begin to cost memory."""
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        return cudnn if half and min(q.shape[1], k.shape[1]) >= 256 and q.shape[-1] <= 128 else None

    @override
    def group_norm(
        self, x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool
    ) -> Array:
        return group_norm(x, scale, bias, groups, eps, silu, differentiable=self.differentiable)


def cudnn(q: Array, k: Array, v: Array, scale: float, differentiable: bool = True) -> Array:
    """CuDNN's flash attention. Heads are padded with zeros to the multiple of 8 that it wants."""
    d = q.shape[-1]
    fill = ((0, 0), (0, 0), (0, 0), (0, -d % 8))
    q, k, v = (jnp.pad(x, fill) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")[..., :d]
