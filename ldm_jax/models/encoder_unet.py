"""The downward half of the UNet with a pooling head: a classifier of noisy images (Dhariwal & Nichol 2021)."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.models.unet import Block, Layout, Trunk, check_heads, downward
from ldm_jax.nn.attention import attention, merge_heads, split_heads
from ldm_jax.nn.layers import Array, Dtype, GroupNorm, dense


class AttentionPool2d(nn.Module):
    """Pooling by attention from the mean over all pixels (Radford et al. 2021): x [b, h, w, c] -> [b, features].

    The fused projection is in the new order always: q, k, v first, heads inside. ``positions`` is [1 + h * w, c], the mean's first; other sizes than
    the one that it was initialised with raise ValueError.
    """

    head_dim: int
    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        positions = self.param("positions", nn.initializers.normal(c**-0.5), (h * w + 1, c))
        x = x + positions.astype(x.dtype)
        qkv = dense(3 * c, x, name="qkv_proj", dtype=self.dtype)(x)
        q, k, v = (split_heads(part, c // self.head_dim) for part in jnp.split(qkv, 3, axis=-1))
        # Only the mean's place is read, so only it asks.
        pooled = merge_heads(attention(q[:, :1], k, v))[:, 0]
        return dense(self.features, pooled, name="c_proj", dtype=self.dtype)(pooled)


class EncoderUNet(Trunk):
    """x [b, h, w, in_channels], t [b] -> [b, out_channels], float32.

    Fields carry the original's names (EncoderUNetModel). ``pool``: "adaptive" averages over pixels; "attention" is `AttentionPool2d`, which needs
    num_head_channels and pictures of ``image_size``; "spatial" reads the mean over pixels of every row and of the middle through two dense layers
    with ReLU, "spatial_v2" with a group normalisation and SiLU between them.
    """

    image_size: int = 32
    pool: Literal["adaptive", "attention", "spatial", "spatial_v2"] = "adaptive"

    @nn.compact
    def __call__(self, x: Array, t: Array, train: bool = False) -> Array:
        if self.pool not in ("adaptive", "attention", "spatial", "spatial_v2"):
            raise ValueError(
                f"EncoderUNet: pool {self.pool!r} is not one of adaptive, attention, spatial, spatial_v2"
            )
        plan, emb, means = encoder_layout(self), self.embed_time(t), []
        h = x.astype(self.dtype)
        for i, row in enumerate(plan.input):
            h = self.run(row, f"input_blocks_{i}", h, emb, None, train)
            means.append(h.mean((1, 2)))
        h = self.run(plan.middle, "middle_block", h, emb, None, train)
        means.append(h.mean((1, 2)))

        if self.pool.startswith("spatial"):
            h = jnp.concatenate(means, axis=-1)
            h = dense(2048, h, name="out_0", dtype=self.dtype)(h)
            norm = GroupNorm(1e-5, self.norm_groups, silu=True, dtype=self.dtype, name="out_norm")
            h = nn.relu(h) if self.pool == "spatial" else norm(h)
            return dense(self.out_channels, h, name="out_1", dtype=self.dtype)(h).astype(
                jnp.float32
            )
        h = GroupNorm(1e-5, self.norm_groups, silu=True, dtype=self.dtype, name="out_norm")(h)
        if self.pool == "adaptive":
            h = h.mean((1, 2))
            return dense(self.out_channels, h, zero=True, name="out_1", dtype=self.dtype)(h).astype(
                jnp.float32
            )
        if self.num_head_channels == -1:
            raise ValueError("EncoderUNet: pool='attention' needs num_head_channels")
        pool = AttentionPool2d(
            self.num_head_channels, self.out_channels, self.dtype, name="attn_pool"
        )
        return pool(h).astype(jnp.float32)


def encoder_layout(net: EncoderUNet) -> Layout:
    """The blocks of the downward half, in the original's order; there is no output part."""
    check_heads(net)

    def attend(ch: int) -> Block:
        heads = net.num_heads if net.num_head_channels == -1 else ch // net.num_head_channels
        return Block("attn", ch, ch, heads, ch // heads)

    rows, middle = downward(net, attend)
    return Layout(rows, middle, [])
