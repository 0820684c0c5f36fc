"""Linen layers that every network shares. Arrays are NHWC (or [batch, length, channels]).

Parameters are float32; ``dtype`` is what products are computed in. Normalisation statistics, softmax and timestep embeddings stay in float32.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.distributed.parallel import Target, compiled_for, for_one_cpu, target
from ldm_jax.kernels.convolution import convolve
from ldm_jax.kernels.vjp import own_gradient
from ldm_jax.nn import norms

Dtype = Any
Array = jax.Array
Initializer = Callable[..., Array]

# PyTorch's default for convolutions and linear layers: uniform(-1/sqrt(fan_in), 1/sqrt(fan_in)), whose variance is 1 / (3 fan_in).
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> Initializer:
    """PyTorch's default bias: uniform(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / np.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def init(module: nn.Module, *args: Any) -> Any:
    """``module.init(*args)``. What it computes is thrown away, so it is traced in its plain forms, not in those of a kernel."""
    with compiled_for(Target("")):
        return module.init(*args)


def shapes_of(make: Callable[..., Any], *args: Any) -> Any:
    """`jax.eval_shape` of what makes fresh parameters: their random numbers, a third of the time, are not traced."""
    token = _BLANK.set(True)
    try:
        return jax.eval_shape(
            lambda *args: make(*args), *args
        )  # a function of its own: nobody shall find this trace
    finally:
        _BLANK.reset(token)


_BLANK: ContextVar[bool] = ContextVar("blank", default=False)


class Quick(nn.Module):
    """A module whose parameters are compared with the shapes that they should have. Flax traces their initialisers for it, each time that a module is
    applied, which takes a third of tracing a network.
    """

    @nn.nowrap
    def param(self, name: str, init_fn: Any, *init_args: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if _BLANK.get() and init_args and self.is_initializing():
            self.put_variable("params", name, jnp.zeros(*init_args))
        if self.has_variable("params", name):
            value = self.get_variable("params", name)
            if init_args and np.shape(value) == init_args[0]:
                return value
        return super().param(name, init_fn, *init_args, **options)  # a new one, or Flax's error


class Conv(Quick, nn.Conv):
    """Flax's, traced quickly."""


class Dense(Quick, nn.Dense):
    """Flax's, traced quickly."""


def conv(
    features: int,
    kernel: int,
    like: Array,
    *,
    name: str,
    dtype: Dtype,
    stride: int = 1,
    padding: Any = None,
    zero=False,
    by: Callable[..., Array] = convolve,
) -> Conv:
    """A square convolution initialised as PyTorch does, padded to keep the size; ``zero`` starts it at zero.

    ``like`` is its input, whose channel count sets the bias range. ``by`` takes the arguments of ``jax.lax.conv_general_dilated``.
    """
    fan_in = like.shape[-1] * kernel * kernel
    return Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=kernel // 2 if padding is None else padding,
        dtype=dtype,
        kernel_init=nn.initializers.zeros if zero else torch_kernel_init,
        bias_init=nn.initializers.zeros if zero else torch_bias_init(fan_in),
        conv_general_dilated=by,
        name=name,
    )


def dense(
    features: int,
    like: Array,
    *,
    name: str,
    dtype: Dtype,
    use_bias: bool = True,
    zero: bool = False,
) -> Dense:
    """A linear layer (also every 1x1 convolution) initialised as PyTorch does; ``zero`` starts it at zero."""
    return Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.initializers.zeros if zero else torch_kernel_init,
        bias_init=nn.initializers.zeros if zero else torch_bias_init(like.shape[-1]),
        dot_general=product,
        name=name,
    )


def _product(x: Array, w: Array) -> Array:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def _product_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = kept
    rows, grads = (a.reshape(math.prod(a.shape[:-1]), a.shape[-1]) for a in (x, dy))
    dx = jax.lax.dot_general(dy, w, (((dy.ndim - 1,), (1,)), ((), ())))
    return dx, jax.lax.dot_general(rows, grads, (((0,), (0,)), ((), ())))


_product_in_rows = own_gradient(lambda x, w: (_product(x, w), (x, w)), _product_backward)


def product(x: Array, w: Array, dimension_numbers: Any, **options: Any) -> Array:
    """``jax.lax.dot_general`` of ``x`` [..., c] and ``w`` [c, features], for `flax.linen.Dense`. For a single CPU the weights' gradient is of all
    rows in one dimension (and without forward-mode derivatives): over several, XLA makes it of a transposed copy, in twice the time.
    """
    if x.ndim < 3 or any(value is not None for value in options.values()) or not for_one_cpu():
        return jax.lax.dot_general(x, w, dimension_numbers, **options)
    return _product_in_rows(x, w)


class GroupNorm(Quick):
    """Group normalisation over (height, width, channels of a group) (Wu & He 2018), optionally followed by SiLU.

    ``eps`` differs inside the original: 1e-5 in the UNet, 1e-6 in SpatialTransformer and the autoencoders.
    """

    eps: float
    groups: int = 32
    silu: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        if c % self.groups:
            raise ValueError(
                f"GroupNorm: {c} channels do not divide into {self.groups} groups; use a multiple of {self.groups}"
            )
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        return norms.group_norm(x, scale, bias, self.groups, self.eps, self.silu).astype(self.dtype)


class LayerNorm(Quick, nn.LayerNorm):
    """Flax's, but for a single CPU by `norms.layer_norm`."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not for_one_cpu():
            return super().__call__(x)
        scale = self.param("scale", self.scale_init, x.shape[-1:])
        bias = self.param("bias", self.bias_init, x.shape[-1:])
        return norms.layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


_ROWS: ContextVar[jax.sharding.Sharding | None] = ContextVar("rows", default=None)


@contextlib.contextmanager
def rows_over(sharding: jax.sharding.Sharding | None) -> Iterator[None]:
    """While a step is traced inside: `keep_rows` holds activations to ``sharding``."""
    token = _ROWS.set(sharding)
    try:
        yield
    finally:
        _ROWS.reset(token)


def kept_rows() -> jax.sharding.Sharding | None:
    """What `rows_over` says where this is traced."""
    return _ROWS.get()


def keep_rows(x: Array) -> Array:
    """``x`` [b, ...], split over the mesh by rows alone.

    Left to itself the compiler may split activations by channel as the weights are, and gather the whole batch on every device.
    """
    sharding = kept_rows()
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def as_many(a: Array, rows: Array) -> Array:
    """``a`` [b, ...], once for each batch of b that ``rows`` [r b, ...] has, one after the other."""
    b, n = a.shape[0], rows.shape[0]  # which an export may leave open
    return a if b == n else jnp.concatenate([a] * int(n // b))


def look_up(table: nn.Embed, tokens: Array) -> Array:
    """``table`` of ``tokens`` int [b, ...]: [b, ..., c], split by channels as the mesh splits the table, until `keep_rows`.

    Each device looks up its channels, for all rows of the devices that share the table; so its gradient, too, is of its channels. Left to itself the
    compiler may gather the table instead, and sum gradients of all of it.
    """
    rows = kept_rows()
    if not isinstance(rows, NamedSharding):
        return table(tokens)
    x = table(
        jax.lax.with_sharding_constraint(tokens, NamedSharding(rows.mesh, PartitionSpec("data")))
    )
    channels = "fsdp" if x.shape[-1] % rows.mesh.shape["fsdp"] == 0 else None
    split = PartitionSpec("data", *[None] * (x.ndim - 2), channels)
    return jax.lax.with_sharding_constraint(x, NamedSharding(rows.mesh, split))


def layer_norm(name: str, dtype: Dtype) -> LayerNorm:
    """LayerNorm with PyTorch's epsilon (Flax's default is 1e-6)."""
    return LayerNorm(epsilon=1e-5, dtype=dtype, name=name)


def gelu(x: Array) -> Array:
    """The exact GELU x Phi(x) (Hendrycks & Gimpel 2016). On a CPU from erf as PyTorch computes it, elsewhere from erfc, whose two series are slow
    there alone, in x's own type: a TPU keeps less for the backward pass.
    """
    if not _for_cpu():
        return jax.nn.gelu(x, approximate=False)
    x32 = x.astype(jnp.float32)
    return (x32 * _normal_cdf(x32)).astype(x.dtype)


def _for_cpu() -> bool:
    """Whether a program for a CPU is traced, or nobody said what for."""
    told = target()
    return told is None or told.platform == "cpu"


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(x * np.float32(np.sqrt(0.5))))


def geglu(h: Array) -> Array:
    """[..., 2 c] -> [..., c]: value * gelu(gate), the value half first (Shazeer 2020). A CPU's backward pass keeps ``h`` alone."""
    return (_geglu if _for_cpu() else _plain_geglu)(h)


def _plain_geglu(h: Array) -> Array:
    value, gate = jnp.split(h, 2, axis=-1)
    return value * gelu(gate)


def _geglu_forward(h: Array) -> tuple[Array, Array]:
    return _plain_geglu(h), h


def _geglu_backward(h: Array, dy: Array) -> tuple[Array]:
    value, gate = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    gate = (
        gate + 0 * dy
    )  # XLA's CPU compiler, which heeds no optimization_barrier here, would compute cdf and pdf before dy is there, and keep them
    cdf, pdf = _normal_cdf(gate), jnp.exp(-0.5 * gate * gate) * np.float32(1 / np.sqrt(2 * np.pi))
    return (
        jnp.concatenate([dy * gate * cdf, dy * value * (cdf + gate * pdf)], axis=-1).astype(
            h.dtype
        ),
    )


_geglu = own_gradient(_geglu_forward, _geglu_backward)


def _exp(x: np.ndarray) -> np.ndarray:
    """Correctly rounded float32 exp: one ulp of a frequency times a timestep of 1000 is an error of 6e-5, and devices' exp differ by a few."""
    return np.exp(x.astype(np.float64)).astype(np.float32)


def timestep_embedding(t: Array, dim: int, max_period: float = 10000.0) -> Array:
    """Sinusoidal embedding [cos, sin] of timesteps ``t`` [b] -> float32 [b, dim], as the UNet uses it.

    Frequencies are max_period^(-i / half); an odd ``dim`` ends in a zero column.
    """
    half = dim // 2
    freqs = _exp(
        np.float32(-np.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    )
    args = t.astype(jnp.float32)[:, None] * freqs
    emb = jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=-1)
    return jnp.pad(emb, ((0, 0), (0, dim % 2)))


def ddpm_timestep_embedding(t: Array, dim: int) -> Array:
    """The older form [sin, cos] with frequencies 10000^(-i / (half - 1)) (Ho et al. 2020) -> float32 [b, dim]."""
    half = dim // 2
    freqs = _exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10000.0) / (half - 1)))
    args = t.astype(jnp.float32)[:, None] * freqs
    emb = jnp.concatenate([jnp.sin(args), jnp.cos(args)], axis=-1)
    return jnp.pad(emb, ((0, 0), (0, dim % 2)))


def upsample_nearest(x: Array) -> Array:
    """[b, h, w, c] -> [b, 2h, 2w, c], each pixel repeated."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(
        b, 2 * h, 2 * w, c
    )


def avg_pool(x: Array) -> Array:
    """[b, h, w, c] -> [b, h // 2, w // 2, c], the mean of each 2x2 square; an odd last row or column is dropped."""
    return nn.avg_pool(x, (2, 2), (2, 2))
