"""The small conditioning networks of the original (Rombach et al. 2022, arXiv:2112.10752)."""

from typing import Literal

import flax.linen as nn

from ldm_jax.nn.layers import Array, Dense, Embed, Module
from ldm_jax.nn.resize import resize


class ClassEmbedder(Module):
    """Labels int [b] in [0, n_classes) -> one context token each, [b, 1, embed_dim]."""

    embed_dim: int
    n_classes: int = 1000

    @nn.compact
    def __call__(self, labels: Array) -> Array:
        normal = nn.initializers.normal(1.0)  # PyTorch's default
        embed = self.layer(Embed)(
            self.n_classes, self.embed_dim, embedding_init=normal, name="embedding"
        )
        return self.kernels.keep_rows(embed(labels))[:, None]


class SpatialRescaler(Module):
    """Resizes a map ``n_stages`` times by ``multiplier``, then maps its channels.

    x [b, h, w, in_channels] -> [b, h', w', out_channels]; each stage leaves
    floor(size * multiplier), see `ldm_jax.nn.resize`. Without ``out_channels`` the channels stay.
    Fields carry the original's names.
    """

    n_stages: int = 1
    method: Literal["nearest", "bilinear", "bicubic", "area"] = "bilinear"
    multiplier: float = 0.5
    in_channels: int = 3
    out_channels: int | None = None
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(self.n_stages):
            x = resize(x, self.multiplier, self.method)
        if self.out_channels is None:
            return x
        return self.layer(Dense)(self.out_channels, use_bias=self.bias, name="channel_mapper")(x)
