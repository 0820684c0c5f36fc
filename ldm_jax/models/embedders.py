"""The small conditioning networks of the original: class labels and rescaled maps (Rombach et al. 2022)."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.nn.layers import Array, Dtype, dense, keep_rows, look_up
from ldm_jax.nn.resize import resize


class ClassEmbedder(nn.Module):
    """Labels int [b] in [0, n_classes) -> one context token each, [b, 1, embed_dim]."""

    embed_dim: int
    n_classes: int = 1000
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, labels: Array) -> Array:
        # PyTorch's default for embeddings.
        normal = nn.initializers.normal(1.0)
        embed = nn.Embed(
            self.n_classes,
            self.embed_dim,
            embedding_init=normal,
            dtype=self.dtype,
            name="embedding",
        )
        return keep_rows(look_up(embed, labels))[:, None]


class SpatialRescaler(nn.Module):
    """A map resized ``n_stages`` times by ``multiplier`` (see `ldm_jax.nn.resize`), then its channels mapped to ``out_channels`` if that is given.

    x [b, h, w, in_channels] -> [b, h', w', out_channels]; each stage leaves floor(size * multiplier). Fields carry the original's names.
    """

    n_stages: int = 1
    method: Literal["nearest", "bilinear", "bicubic", "area"] = "bilinear"
    multiplier: float = 0.5
    in_channels: int = 3
    out_channels: int | None = None
    bias: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(self.n_stages):
            x = resize(x, self.multiplier, self.method)
        if self.out_channels is None:
            return x
        return dense(
            self.out_channels, x, use_bias=self.bias, name="channel_mapper", dtype=self.dtype
        )(x)
