"""The operations of the networks in plain JAX: the default, and what every faster form must equal.

A module of `ldm_jax.nn` or `ldm_jax.models` has a static field ``kernels`` and calls its operations
through it. The plain forms can be differentiated in any way and lower to the same program for every
platform. `ldm_jax.kernels.for_platform` returns a subclass with faster forms for one platform.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from typing_extensions import override

from ldm_jax.kernels import norms

Array = jax.Array
Padding = tuple[tuple[int, int], ...]

# The name of the values that a rematerialised block keeps: recomputing them would run a whole
# attention kernel again.
SAVED = "attention"


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Plain JAX forms of the operations that some platform computes in a way of its own.

    Attributes:
      mesh: The mesh over which `jax.jit` splits the rows of a batch (axes "data" and "fsdp") and
        the heads of attention ("tensor"); None for one device.
      cores: A mesh of CPU cores that divide the rows of each network call between them; see
        `ldm_jax.kernels.cores`.
      differentiable: False where no gradient is taken, so that hand-written ones are not traced.
    """

    mesh: Mesh | None = None
    cores: Mesh | None = None
    differentiable: bool = True

    # --------------------------------------------------------------------------------- operations

    def attention(
        self, q: Array, k: Array, v: Array, scale: float, mask: Array | None = None
    ) -> Array:
        """softmax(scale q k^T) v (Vaswani et al. 2017, arXiv:1706.03762) with a float32 softmax.

        Args:
          q: Queries [b, n, h, d].
          k: Keys [b, m, h, d].
          v: Values [b, m, h, e].
          scale: Factor of the logits.
          mask: Boolean, broadcastable to [b, h, n, m]; True where a query sees a key. A query that
            sees no key attends to all of them equally.

        Returns:
          [b, n, h, e] in v's dtype.
        """
        return attention(q, k, v, scale, mask)

    def group_norm(
        self, x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool
    ) -> Array:
        """Group normalisation (Wu & He 2018, arXiv:1803.08494) of x [b, ..., c], in float32.

        The statistics are those of each group of channels over all axes between. ``scale`` and
        ``bias`` are [c]; with ``silu`` the result goes through SiLU.
        """
        mean, rsqrt = norms.two_pass_statistics(x, groups, eps)
        return norms.normalize(x, mean, rsqrt, scale, bias, silu)

    def layer_norm(self, x: Array, scale: Array, bias: Array, eps: float) -> Array:
        """Layer normalisation (Ba et al. 2016, arXiv:1607.06450) of x [..., c], in float32."""
        x = x.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        variance = jnp.maximum(0.0, jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean))
        return (x - mean) * (jax.lax.rsqrt(variance + eps) * scale) + bias

    def conv(self, x: Array, w: Array, strides: tuple[int, int], padding: Padding) -> Array:
        """Convolution of x [b, h, w, c] with w [kh, kw, c, features]."""
        return conv(x, w, strides, padding)

    def upsample_conv(self, x: Array, w: Array) -> Array:
        """Nearest-neighbour doubling of x [b, h, w, c], then a 3x3 convolution padded by one."""
        return self.conv(self.keep_rows(upsample_nearest(x)), w, (1, 1), ((1, 1), (1, 1)))

    def dense(self, x: Array, w: Array) -> Array:
        """``x`` [..., c] times w [c, features]."""
        return dense(x, w)

    def gelu(self, x: Array) -> Array:
        """The exact GELU, x Phi(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
        return jax.nn.gelu(x, approximate=False)

    def geglu(self, x: Array) -> Array:
        """GEGLU (Shazeer 2020, arXiv:2002.05202): value * gelu(gate) of x [..., 2 c]."""
        value, gate = jnp.split(x, 2, axis=-1)
        return value * self.gelu(gate)

    def materialize(self, x: Array) -> Array:
        """``x``; a form may make it, and its gradient, arrays that no fusion crosses."""
        return x

    # ---------------------------------------------------------------------------- weights in memory

    def weight_formats(self, params: Any, sharding: Sharding) -> Any:
        """Where and how each array of ``params`` lies in memory, for `jax.device_put`."""
        return jax.tree.map(lambda _: sharding, params)

    # --------------------------------------------------------------------------- rows over a mesh

    def keep_rows(self, x: Array) -> Array:
        """Splits x [b, ...] over the mesh by rows alone.

        Left to itself the compiler may split activations by channel, as the weights are, and gather
        the whole batch on every device.
        """
        if self.mesh is None or x.shape[0] % _size(self.mesh, _row_axes(self.mesh)):
            return x
        rows = PartitionSpec(_row_axes(self.mesh))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, rows))

    def look_up(self, table: Array, tokens: Array) -> Array:
        """Rows of ``table`` [words, c] for ``tokens`` int [b, ...] -> [b, ..., c].

        Over a mesh each device looks up its own channels for all rows of the devices that share
        the table, so that the table's gradient stays split too: left to itself the compiler may
        gather the table, and sum gradients of all of it. `keep_rows` then splits the result by
        rows.
        """
        if self.mesh is None:
            return jnp.take(table, tokens, axis=0)

        def split(a: Array, *axes: str | None) -> Array:
            sharding = NamedSharding(self.mesh, PartitionSpec(*axes))  # type: ignore[arg-type]
            return jax.lax.with_sharding_constraint(a, sharding)

        shape, rest = self.mesh.shape, [None] * (tokens.ndim - 1)
        x = jnp.take(table, split(tokens, "data"), axis=0)
        channels = "fsdp" if x.shape[-1] % shape.get("fsdp", x.shape[-1] + 1) == 0 else None
        return split(x, "data", *rest, channels)

    def per_device(self, form: Callable[..., Array], q: Array, k: Array, v: Array) -> Array | None:
        """``form(q, k, v)`` on the rows of each device, and on its heads if the mesh splits those.

        Nothing is exchanged: the compiler cannot split a kernel, or a loop over heads, by itself.
        None where the mesh does not divide the rows.
        """
        if self.mesh is None:
            return form(q, k, v)
        axes = _row_axes(self.mesh)
        if q.shape[0] % _size(self.mesh, axes):
            return None
        heads = "tensor" if q.shape[2] % self.mesh.shape.get("tensor", 1) == 0 else None
        split = PartitionSpec(axes, None, heads if "tensor" in self.mesh.shape else None)
        # check_vma would want the library's kernel to declare along which axes its results vary.
        return jax.shard_map(
            form, mesh=self.mesh, in_specs=(split,) * 3, out_specs=split, check_vma=False
        )(q, k, v)


@dataclasses.dataclass(frozen=True)
class WithAttention(Kernels):
    """Kernels with a form of attention that is chosen by shapes and dtype."""

    def attention_form(self, q: Any, k: Any, v: Any) -> Callable[..., Array] | None:
        """The faster form for these arrays, or shapes, of one dtype; None for the plain one."""
        raise NotImplementedError

    def is_partitioned(self, form: Callable[..., Array]) -> bool:
        """Whether the compiler can split a form over a mesh by itself."""
        return False

    @override
    def attention(
        self, q: Array, k: Array, v: Array, scale: float, mask: Array | None = None
    ) -> Array:
        alike = q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1]
        form = self.attention_form(q, k, v) if mask is None and alike else None
        if form is None:
            return super().attention(q, k, v, scale, mask)

        def call(q: Array, k: Array, v: Array) -> Array:
            return form(q, k, v, scale, differentiable=self.differentiable)

        y = call(q, k, v) if self.is_partitioned(form) else self.per_device(call, q, k, v)
        return super().attention(q, k, v, scale) if y is None else y


def attention(q: Array, k: Array, v: Array, scale: float, mask: Array | None = None) -> Array:
    """See `Kernels.attention`."""
    if q.dtype == jnp.float32:
        # Fewer values to scale than logits, of which XLA's CPU compiler would also write an array.
        q, scale = q * scale, 1.0
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32) * scale
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhe->bnhe", weights, v)


def conv(x: Array, w: Array, strides: tuple[int, int], padding: Padding, **options: Any) -> Array:
    """See `Kernels.conv`; ``options`` are those of `jax.lax.conv_general_dilated`."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout, **options)


def dense(x: Array, w: Array) -> Array:
    """See `Kernels.dense`."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def upsample_nearest(x: Array) -> Array:
    """[b, h, w, c] -> [b, 2h, 2w, c], each pixel repeated."""
    b, h, w, c = x.shape
    y = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return y.reshape(b, 2 * h, 2 * w, c)


def _row_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size
