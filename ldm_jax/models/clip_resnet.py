"""The image tower of CLIP's "RN" models: a ResNet with attention pooling.

Radford et al. 2021, arXiv:2103.00020, section 2.4: three stem convolutions, average pooling in
front of every stride (He et al. 2019, arXiv:1812.01187; Zhang 2019, arXiv:1904.11486), and one
attention layer in place of the last average.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nn.attention import merge_heads, split_heads
from ldm_jax.nn.layers import Array, Conv, Dense, Module

NORMAL = nn.initializers.normal(0.02)


class FrozenBatchNorm(Module):
    """Batch normalisation by stored statistics, which are parameters here.

    Never by those of the batch: the tower is converted with its statistics, not trained.
    """

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        zeros, ones, shape = nn.initializers.zeros, nn.initializers.ones, x.shape[-1:]
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, var = self.param("mean", zeros, shape), self.param("var", ones, shape)
        scale = scale * jax.lax.rsqrt(var + self.eps)
        return x * scale.astype(self.dtype) + (bias - mean * scale).astype(self.dtype)


class Bottleneck(Module):
    """A residual block of three convolutions: [b, h, w, c] -> [b, h / stride, w / stride, 4 n]."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def conv_norm(x: Array, features: int, size: int, i: int | str) -> Array:
            conv = self.layer(Conv)(features, size, use_bias=False, name=f"conv{i}")
            return self.layer(FrozenBatchNorm)(name=f"norm{i}")(conv(x))

        y = nn.relu(conv_norm(x, self.features, 1, 1))
        y = nn.relu(conv_norm(y, self.features, 3, 2))
        y = conv_norm(_pool(y, self.stride), 4 * self.features, 1, 3)
        if self.stride > 1 or x.shape[-1] != 4 * self.features:
            x = conv_norm(_pool(x, self.stride), 4 * self.features, 1, "_skip")
        return nn.relu(y + x)


def _pool(x: Array, size: int) -> Array:
    return nn.avg_pool(x, (size, size), (size, size)) if size > 1 else x


class AttentionPool(Module):
    """Attention of the mean to all places: [b, h, w, c] -> [b, features]."""

    heads: int
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        x = x + self.param("position_embedding", NORMAL, (h * w + 1, c)).astype(self.dtype)

        def heads_of(x: Array, name: str) -> Array:
            return split_heads(self.layer(Dense)(c, name=name)(x), self.heads)

        q, k, v = heads_of(x[:, :1], "q"), heads_of(x, "k"), heads_of(x, "v")
        y = self.kernels.attention(q, k, v, q.shape[-1] ** -0.5, None)
        return self.layer(Dense)(self.features, name="projection")(merge_heads(y))[:, 0]


class ResNetStates(NamedTuple):
    """The results of the tower.

    last: [b, image_size / 32, image_size / 32, 32 width].
    pooled: [b, projection_dim].
    """

    last: Array
    pooled: Array


class CLIPResNet(Module):
    """Pixels [b, image_size, image_size, 3] of `clip_pixels` -> `ResNetStates`.

    The defaults are those of RN50. ``image_size`` is a multiple of 32.
    """

    layers: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    num_attention_heads: int = 32
    image_size: int = 224
    projection_dim: int = 1024

    @nn.compact
    def __call__(self, x: Array) -> ResNetStates:
        if x.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"CLIPResNet: pictures of {x.shape[1]}x{x.shape[2]} pixels, expected "
                f"{self.image_size}x{self.image_size}"
            )
        half = self.width // 2
        for i, (features, stride) in enumerate(((half, 2), (half, 1), (self.width, 1)), start=1):
            conv = self.layer(Conv)(features, 3, stride, use_bias=False, name=f"conv{i}")
            x = nn.relu(self.layer(FrozenBatchNorm)(name=f"norm{i}")(conv(x)))
        x = _pool(x, 2)
        for i, count in enumerate(self.layers):
            for j in range(count):
                stride = 2 if i and not j else 1
                block = self.layer(Bottleneck)
                x = block(self.width * 2**i, stride, name=f"layers_{i}_{j}")(x)
        pool = self.layer(AttentionPool)
        pooled = pool(self.num_attention_heads, self.projection_dim, name="pool")(x)
        return ResNetStates(x, pooled)
