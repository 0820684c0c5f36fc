"""The downward half of the UNet with a pooling head, a classifier of noisy images.

Dhariwal & Nichol 2021, arXiv:2105.05233.
"""

from typing import Literal, get_args

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.models.unet import Block, Layout, Trunk, check_heads, downward
from ldm_jax.nn.attention import merge_heads, split_heads
from ldm_jax.nn.layers import Array, Dense, GroupNorm, Module

Pool = Literal["adaptive", "attention", "spatial", "spatial_v2"]


class AttentionPool2d(Module):
    """Pooling by attention from the mean over all pixels (Radford et al. 2021, arXiv:2103.00020).

    x [b, h, w, c] -> [b, features]. The fused projection always has the new order: q, k, v first,
    heads inside. "positions" is [1 + h * w, c], the mean's first: the size of the input is that of
    the initialisation.
    """

    head_dim: int
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense, (b, h, w, c) = self.layer(Dense), x.shape
        x = x.reshape(b, h * w, c)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        positions = self.param("positions", nn.initializers.normal(c**-0.5), (h * w + 1, c))
        x = x + positions.astype(x.dtype)
        qkv = dense(3 * c, name="qkv_proj")(x)
        q, k, v = (split_heads(part, c // self.head_dim) for part in jnp.split(qkv, 3, axis=-1))
        # Only the result at the mean's place is used.
        y = self.kernels.attention(q[:, :1], k, v, self.head_dim**-0.5)
        return dense(self.features, name="c_proj")(merge_heads(y)[:, 0])


class EncoderUNet(Trunk):
    """x [b, h, w, in_channels], t [b] -> float32 [b, out_channels].

    Fields carry the original's names (EncoderUNetModel). ``pool``: "adaptive" averages over pixels;
    "attention" is `AttentionPool2d`, which needs num_head_channels and pictures of ``image_size``;
    "spatial" reads the mean over pixels of every row and of the middle through two dense layers
    with ReLU, "spatial_v2" with a group normalisation and SiLU between them.
    """

    image_size: int = 32
    pool: Pool = "adaptive"

    @nn.compact
    def __call__(self, x: Array, t: Array, train: bool = False) -> Array:
        if self.pool not in get_args(Pool):
            known = ", ".join(get_args(Pool))
            raise ValueError(f"EncoderUNet: pool {self.pool!r} is not one of {known}")
        if self.pool == "attention" and self.num_head_channels == -1:
            raise ValueError("EncoderUNet: pool='attention' needs num_head_channels")
        plan, emb, means = encoder_layout(self), self.embed_time(t), []
        h = x.astype(self.dtype)
        for i, row in enumerate(plan.input):
            h = self.run(row, f"input_blocks_{i}", h, emb, None, train)
            means.append(h.mean((1, 2)))
        h = self.run(plan.middle, "middle_block", h, emb, None, train)
        means.append(h.mean((1, 2)))

        dense = self.layer(Dense)
        norm = self.layer(GroupNorm)(1e-5, self.norm_groups, silu=True, name="out_norm")
        if self.pool.startswith("spatial"):
            h = dense(2048, name="out_0")(jnp.concatenate(means, axis=-1))
            h = nn.relu(h) if self.pool == "spatial" else norm(h)
            out = dense(self.out_channels, name="out_1")(h)
        elif self.pool == "adaptive":
            out = dense(self.out_channels, zero=True, name="out_1")(norm(h).mean((1, 2)))
        else:
            pool = self.layer(AttentionPool2d)
            out = pool(self.num_head_channels, self.out_channels, name="attn_pool")(norm(h))
        return out.astype(jnp.float32)


def encoder_layout(net: EncoderUNet) -> Layout:
    """The blocks of the downward half, in the original's order; there is no output part."""
    check_heads(net)

    def attend(ch: int, level: int) -> Block:
        heads = net.num_heads if net.num_head_channels == -1 else ch // net.num_head_channels
        return Block("attn", ch, ch, heads, ch // heads)

    rows, middle = downward(net, attend)
    return Layout(rows, middle, [])
