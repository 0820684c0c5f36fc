"""Linen layers that every network shares. Arrays are NHWC, or [batch, length, channels].

Parameters are float32; ``dtype`` is that of the products. Normalisation statistics, softmax and
timestep embeddings stay in float32. ``kernels`` says how operations are computed.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.kernels import REFERENCE, Kernels

Dtype = Any
Array = jax.Array
Initializer = Callable[..., Array]
T = TypeVar("T")


def cached_trace(init: Initializer) -> Initializer:
    """An initialiser that is traced once for each shape: many parameters share theirs."""
    return jax.jit(init, static_argnums=(1, 2))


# PyTorch's default for convolutions and linear layers: uniform(-1 / sqrt(fan_in), 1 /
# sqrt(fan_in)), whose variance is 1 / (3 fan_in).
torch_kernel_init = cached_trace(nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))


def torch_bias_init(fan_in: int) -> Initializer:
    """PyTorch's default bias: uniform(-1 / sqrt(fan_in), 1 / sqrt(fan_in))."""
    bound = 1 / np.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


class Module(nn.Module, kw_only=True):
    """A Linen module with a ``dtype`` and ``kernels``, which `layer` hands to its submodules."""

    dtype: Dtype = jnp.float32
    kernels: Kernels = REFERENCE

    @nn.nowrap
    def layer(self, cls: Callable[..., T]) -> Callable[..., T]:
        """``cls`` with this module's dtype and kernels."""
        return partial(cls, dtype=self.dtype, kernels=self.kernels)

    @nn.nowrap
    def param(self, name: str, init_fn: Any, *init_args: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As Flax's, but without tracing the initialiser of a parameter that has its shape.

        Flax traces it for every parameter at each call, a third of the tracing of a network.
        """
        if self.has_variable("params", name):
            value = self.get_variable("params", name)
            if init_args and np.shape(value) == init_args[0]:
                return value
        return super().param(name, init_fn, *init_args, **options)  # a new one, or Flax's error


def with_kernels(tree: T, kernels: Kernels) -> T:
    """A copy of a module, or of a dataclass that holds modules, which computes with ``kernels``.

    Values of its fields may have a method ``with_kernels`` of their own.
    """

    def changed_value(value: Any) -> Any:
        own = getattr(value, "with_kernels", None)
        return with_kernels(value, kernels) if own is None else own(kernels)

    if isinstance(tree, nn.Module):
        return tree.clone(kernels=kernels) if isinstance(tree, Module) else tree
    if not dataclasses.is_dataclass(tree) or isinstance(tree, type):
        return tree
    values = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    new = {name: changed_value(value) for name, value in values.items()}
    changed = {name: value for name, value in new.items() if value is not values[name]}
    return dataclasses.replace(tree, **changed) if changed else tree


class Dense(Module):
    """A linear layer, also every 1x1 convolution: x [..., c] -> [..., features].

    Initialised as PyTorch does, or at zero with ``zero``.
    """

    features: int
    use_bias: bool = True
    zero: bool = False
    kernel_init: Initializer = torch_kernel_init
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, zeros = x.shape[-1], nn.initializers.zeros
        init = zeros if self.zero else self.kernel_init
        kernel = self.param("kernel", init, (c, self.features), jnp.float32)
        y = self.kernels.dense(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return y
        init = zeros if self.zero else self.bias_init or torch_bias_init(c)
        bias = self.param("bias", init, (self.features,), jnp.float32)
        return y + bias.astype(self.dtype)


class Conv(Module):
    """A square convolution, padded to keep the size: x [b, h, w, c] -> [b, h', w', features].

    Initialised as PyTorch does, or at zero with ``zero``. ``padding`` is that of all sides, or
    ((top, bottom), (left, right)). With ``upsample`` every pixel is doubled along both axes before
    a 3x3 convolution.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: int | tuple[tuple[int, int], tuple[int, int]] | None = None
    use_bias: bool = True
    zero: bool = False
    upsample: bool = False
    kernel_init: Initializer = torch_kernel_init

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, n, zeros = x.shape[-1], self.size, nn.initializers.zeros
        init = zeros if self.zero else self.kernel_init
        kernel = self.param("kernel", init, (n, n, c, self.features), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.upsample:
            y = self.kernels.upsample_conv(x, kernel)
        else:
            pad = n // 2 if self.padding is None else self.padding
            pad = ((pad, pad), (pad, pad)) if isinstance(pad, int) else pad
            y = self.kernels.conv(x, kernel, (self.stride, self.stride), pad)
        if not self.use_bias:
            return y
        init = zeros if self.zero else torch_bias_init(c * n * n)
        return y + self.param("bias", init, (self.features,), jnp.float32).astype(self.dtype)


class Embed(Module):
    """A table of ``num_embeddings`` vectors: int [b, ...] -> [b, ..., features]."""

    num_embeddings: int
    features: int
    embedding_init: Initializer = nn.linear.default_embed_init

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        shape = self.num_embeddings, self.features
        table = self.param("embedding", self.embedding_init, shape, jnp.float32)
        return self.kernels.look_up(table.astype(self.dtype), tokens)


class GroupNorm(Module):
    """Group normalisation (Wu & He 2018, arXiv:1803.08494), optionally followed by SiLU.

    ``eps`` differs inside the original: 1e-5 in the UNet, 1e-6 in SpatialTransformer and the
    autoencoders.
    """

    eps: float
    groups: int = 32
    silu: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        if c % self.groups:
            raise ValueError(
                f"GroupNorm: {c} channels do not divide into {self.groups} groups; "
                f"use a multiple of {self.groups}"
            )
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        y = self.kernels.group_norm(x, scale, bias, self.groups, self.eps, self.silu)
        return y.astype(self.dtype)


class LayerNorm(Module):
    """Layer normalisation (Ba et al. 2016, arXiv:1607.06450) with PyTorch's epsilon."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return self.kernels.layer_norm(x, scale, bias, self.eps).astype(self.dtype)


def repeat_batch(a: Array, like: Array) -> Array:
    """``a`` [b, ...] repeated to the r b rows of ``like`` [r b, ...], whole batches in turn."""
    b, n = a.shape[0], like.shape[0]  # which an export may leave open
    return a if b == n else jnp.concatenate([a] * int(n // b))


def _exp(x: np.ndarray) -> np.ndarray:
    """Correctly rounded float32 exp: devices differ by a few ulp, each 6e-5 at timestep 1000."""
    return np.exp(x.astype(np.float64)).astype(np.float32)


def timestep_embedding(t: Array, dim: int, max_period: float = 10000.0) -> Array:
    """Sinusoidal embedding [cos, sin] of timesteps t [b] -> float32 [b, dim], as in the UNet.

    Frequencies are max_period^(-i / half); an odd ``dim`` ends in a zero column.
    """
    half = dim // 2
    exponents = np.float32(-np.log(max_period)) * np.arange(half, dtype=np.float32)
    args = t.astype(jnp.float32)[:, None] * _exp(exponents / np.float32(half))
    emb = jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=-1)
    return jnp.pad(emb, ((0, 0), (0, dim % 2)))


def ddpm_timestep_embedding(t: Array, dim: int) -> Array:
    """The older form [sin, cos] with frequencies 10000^(-i / (half - 1)), float32 [b, dim].

    Ho et al. 2020, arXiv:2006.11239.
    """
    half = dim // 2
    freqs = _exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10000.0) / (half - 1)))
    args = t.astype(jnp.float32)[:, None] * freqs
    emb = jnp.concatenate([jnp.sin(args), jnp.cos(args)], axis=-1)
    return jnp.pad(emb, ((0, 0), (0, dim % 2)))


def avg_pool(x: Array) -> Array:
    """[b, h, w, c] -> [b, h // 2, w // 2, c]; an odd last row or column is dropped."""
    return nn.avg_pool(x, (2, 2), (2, 2))
