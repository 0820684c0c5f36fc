"""Forms for GPUs: cuDNN's attention, group statistics without a float32 copy, GELU by erf."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, Sharding
from typing_extensions import override

from ldm_jax.kernels.norms import group_norm_with_gradient
from ldm_jax.kernels.reference import WithAttention

Array = jax.Array

_HOPPER = 9.0


def statistics(x: Array, groups: int, eps: float) -> tuple[Array, Array]:
    """A group's mean and reciprocal standard deviation from reading x [b, ..., c] once.

    About the mean of up to four of a group's values, so that E[d^2] - E[d]^2 hardly cancels (Chan,
    Golub & LeVeque 1983, on shifted data): those values count in the variance too, which bounds the
    loss even where they lie far off. The columns of an image are summed before its rows: of a
    reduction over both at once XLA's GPU compiler writes d in float32, and reduces it with few
    thread blocks.
    """
    b, *space, c = x.shape

    def per_channel(a: Array) -> Array:
        """[b, groups] -> [b, 1..., c]."""
        a = jnp.broadcast_to(a[..., None], (b, groups, c // groups))
        return a.reshape(b, *(1 for _ in space), c)

    def by_rows(a: Array) -> Array:
        """[b, ..., c] -> [b, rows, c], the mean over the columns."""
        for axis in range(a.ndim - 2, 1, -1):
            a = a.mean(axis)
        return a.reshape(b, -1, c)

    # Sums of slices, not a reduction, which would be a kernel of its own.
    corners = itertools.product(*({n // 4, 3 * n // 4} for n in space))
    values = [x[:, *corner, :: c // groups].astype(jnp.float32) for corner in corners]
    near = sum(values[1:], values[0]) / len(values)
    d = x.astype(jnp.float32) - per_channel(near)
    moments = jnp.stack([by_rows(d), by_rows(jnp.square(d))])
    shift, square = moments.reshape(2, b, -1, groups, c // groups).mean((2, 4))
    variance = jnp.maximum(square - jnp.square(shift), 0.0)
    return per_channel(near + shift), per_channel(jax.lax.rsqrt(variance + eps))


group_norm = group_norm_with_gradient(statistics)


@dataclasses.dataclass(frozen=True)
class GpuKernels(WithAttention):
    """See the module.

    Attributes:
      capability: The GPUs' CUDA compute capability.
    """

    capability: float = 8.0

    @override
    def attention_form(self, q: Any, k: Any, v: Any) -> Callable[..., Array] | None:
        """CuDNN's flash attention where it takes the heads: up to 256 channels on Hopper."""
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        largest = 256 if self.capability >= _HOPPER else 128
        return cudnn if half and q.shape[-1] <= largest else None

    @override
    def layer_norm(self, x: Array, scale: Array, bias: Array, eps: float) -> Array:
        """In two passes over a row, which the compiler makes one kernel of."""
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        rsqrt = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
        return x * rsqrt * scale + bias

    @override
    def group_norm(
        self, x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool
    ) -> Array:
        """With the statistics of `statistics` and a hand-written gradient."""
        return group_norm(x, scale, bias, groups, eps, silu, differentiable=self.differentiable)

    @override
    def gelu(self, x: Array) -> Array:
        """By erf, which costs a fifth of erfc; 1 + erf loses no digit that a 16-bit result has.

        In float32 it would lose those of the tail, below -3.
        """
        if jnp.finfo(x.dtype).bits > 16:
            return super().gelu(x)
        y = x.astype(jnp.float32)
        return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)

    @override
    def weight_formats(self, params: Any, sharding: Sharding) -> Any:
        """Filters [kh, kw, c, features] lie in memory as cuDNN reads them: features, kh, kw, c."""

        def placed(leaf: Any) -> Any:
            return Format(Layout((3, 0, 1, 2)), sharding) if jnp.ndim(leaf) == 4 else sharding

        return jax.tree.map(placed, params)


def compute_capability(mesh: Any) -> float:
    """Of a mesh's GPUs, or of this machine's; an A100's where there is none."""
    devices = mesh.devices.flat if isinstance(mesh, Mesh) else _local_gpus()
    return float(next((getattr(d, "compute_capability", "8.0") for d in devices), "8.0"))


def _local_gpus() -> list[Any]:
    return jax.local_devices() if jax.default_backend() == "gpu" else []


def cudnn(q: Array, k: Array, v: Array, scale: float, differentiable: bool = True) -> Array:
    """CuDNN's flash attention.

    Heads are padded with zeros to the multiple of 8 that it wants, and so are keys where a gradient
    is taken, which masks the padding.
    """
    d, m = q.shape[-1], k.shape[1]
    more = -m % 8 if differentiable else 0
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, -d % 8)))
    k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, -d % 8))) for x in (k, v))
    lengths = jnp.full(k.shape[:1], m, jnp.int32) if more else None
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
    )[..., :d]
