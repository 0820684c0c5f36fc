"""Attention: one product function, and the blocks of the original built on it."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.kernels.attention import attend, plain
from ldm_jax.nn.layers import Array, Dtype, GroupNorm, as_many, dense, geglu, gelu, layer_norm
from ldm_jax.nn.norms import apart


def attention(
    q: Array, k: Array, v: Array, *, scale: float | None = None, mask: Array | None = None
) -> Array:
    """softmax(scale q k^T) v (Vaswani et al. 2017). q [b, n, h, d], k [b, m, h, d], v [b, m, h, e] -> [b, n, h, e].

    ``scale`` defaults to 1/sqrt(d). ``mask`` is boolean, broadcastable to [b, h, n, m]; a row masked whole attends uniformly.
    The softmax is float32 whatever the inputs are. Without a mask it may be a kernel: see `ldm_jax.kernels.attention`.
    """
    by = q.shape[-1] ** -0.5 if scale is None else scale
    return attend(q, k, v, by) if mask is None else plain(q, k, v, by, mask)


def split_heads(x: Array, heads: int) -> Array:
    """[b, n, heads * d] -> [b, n, heads, d]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def merge_heads(x: Array) -> Array:
    """[b, n, heads, d] -> [b, n, heads * d]."""
    return x.reshape(*x.shape[:-2], -1)


class CrossAttention(nn.Module):
    """Multi-head attention of x [b, n, c] to context [b, m, k] (itself when None) -> [b, n, c]; q, k, v have no bias.

    Of a context [r b, m, k] each batch of b is attended to -> [r b, n, c].
    """

    heads: int
    head_dim: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, context: Array | None = None, mask: Array | None = None, train: bool = False
    ) -> Array:
        context = x if context is None else context
        inner = self.heads * self.head_dim
        q = split_heads(
            dense(inner, x, use_bias=False, name="to_q", dtype=self.dtype)(x), self.heads
        )
        k = split_heads(
            dense(inner, context, use_bias=False, name="to_k", dtype=self.dtype)(context),
            self.heads,
        )
        v = split_heads(
            dense(inner, context, use_bias=False, name="to_v", dtype=self.dtype)(context),
            self.heads,
        )
        y = merge_heads(attention(as_many(q, k), k, v, mask=mask))
        y = dense(x.shape[-1], y, name="to_out", dtype=self.dtype)(y)
        return nn.Dropout(self.dropout, deterministic=not train)(y)


class FeedForward(nn.Module):
    """c -> mult c -> c with GELU, or with GEGLU (Shazeer 2020)."""

    mult: int = 4
    glu: bool = True
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        c = x.shape[-1]
        h = dense(c * self.mult * (2 if self.glu else 1), x, name="proj_in", dtype=self.dtype)(x)
        h = geglu(h) if self.glu else gelu(h)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return dense(c, h, name="proj_out", dtype=self.dtype)(h)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each pre-normalised and residual. x [b, n, c], context [b, m, k] or None -> [b, n, c];
    of a context [r b, m, k] -> [r b, n, c].
    """

    heads: int
    head_dim: int
    dropout: float = 0.0
    gated_ff: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None, train: bool = False) -> Array:
        def attn(name: str) -> CrossAttention:
            return CrossAttention(self.heads, self.head_dim, self.dropout, self.dtype, name=name)

        x = x + attn("attn1")(layer_norm("norm1", self.dtype)(x), train=train)
        y = attn("attn2")(layer_norm("norm2", self.dtype)(x), context, train=train)
        x = as_many(x, y) + y
        ff = FeedForward(glu=self.gated_ff, dropout=self.dropout, dtype=self.dtype, name="ff")
        return x + ff(layer_norm("norm3", self.dtype)(x), train=train)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (Rombach et al. 2022). [b, h, w, c] -> [b, h, w, c]; of a context [r b, m, k] ->
    [r b, h, w, c].

    The last projection starts at zero, so that a new block is the identity.
    """

    heads: int
    head_dim: int
    depth: int = 1
    dropout: float = 0.0
    norm_groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None, train: bool = False) -> Array:
        b, h, w, c = x.shape
        y = apart(GroupNorm(1e-6, self.norm_groups, dtype=self.dtype, name="norm")(x)).reshape(
            b, h * w, c
        )
        y = dense(self.heads * self.head_dim, y, name="proj_in", dtype=self.dtype)(y)
        for i in range(self.depth):
            block = BasicTransformerBlock(
                self.heads, self.head_dim, self.dropout, dtype=self.dtype, name=f"blocks_{i}"
            )
            y = block(y, context, train)
        y = dense(c, y, zero=True, name="proj_out", dtype=self.dtype)(y)
        return as_many(x, y) + y.reshape(-1, h, w, c)


class AttentionBlock(nn.Module):
    """Self-attention over pixels from one fused qkv projection (Dhariwal & Nichol 2021). [b, h, w, c] -> same.

    ``new_order`` says how the fused projection's output is laid out: q, k, v first and heads inside (True), or heads first with each head's
    q, k, v inside (False, the original's default). Both scale q and k by d^-1/4, which this computes as one d^-1/2.
    """

    heads: int
    new_order: bool = False
    norm_groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        y = GroupNorm(1e-5, self.norm_groups, dtype=self.dtype, name="norm")(x).reshape(b, h * w, c)
        qkv = dense(3 * c, y, name="qkv", dtype=self.dtype)(y)
        if self.new_order:
            q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, 3, self.heads, -1), 2, 0)
        else:
            q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, self.heads, 3, -1), 3, 0)
        y = merge_heads(attention(q, k, v))
        y = dense(c, y, zero=True, name="proj_out", dtype=self.dtype)(y)
        return x + y.reshape(b, h, w, c)


class AttnBlock(nn.Module):
    """Single-head self-attention over pixels, as the autoencoders use it. [b, h, w, c] -> same."""

    norm_groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        y = GroupNorm(1e-6, self.norm_groups, dtype=self.dtype, name="norm")(x).reshape(b, h * w, c)
        q, k, v = (
            split_heads(dense(c, y, name=n, dtype=self.dtype)(y), 1) for n in ("q", "k", "v")
        )
        y = merge_heads(attention(q, k, v))
        return x + dense(c, y, name="proj_out", dtype=self.dtype)(y).reshape(b, h, w, c)


class LinearAttention(nn.Module):
    """Linear attention: k is softmaxed over positions, q is not scaled, nothing is residual (Katharopoulos et al. 2020, as the original has it)."""

    heads: int = 4
    head_dim: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        y = x.reshape(b, h * w, c)
        qkv = dense(
            3 * self.heads * self.head_dim, y, use_bias=False, name="to_qkv", dtype=self.dtype
        )(y)
        q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, 3, self.heads, self.head_dim), 2, 0)
        k = jax.nn.softmax(k.astype(jnp.float32), axis=1).astype(v.dtype)
        summary = jnp.einsum("bnhd,bnhe->bhde", k, v)
        y = merge_heads(jnp.einsum("bhde,bnhd->bnhe", summary, q))
        return dense(c, y, name="to_out", dtype=self.dtype)(y).reshape(b, h, w, c)


def autoencoder_attention(
    kind: str, channels: int, *, norm_groups: int, name: str, dtype: Dtype
) -> nn.Module | None:
    """The attention of one place in an autoencoder; None is the identity. ``kind`` is "vanilla", "linear" or "none"."""
    if kind == "vanilla":
        return AttnBlock(norm_groups, dtype=dtype, name=name)
    if kind == "linear":
        return LinearAttention(heads=1, head_dim=channels, dtype=dtype, name=name)
    if kind == "none":
        return None
    raise ValueError(f"attn_type {kind!r} is not one of vanilla, linear, none")


def apply_maybe(module: nn.Module | None, x: Array, *args: Sequence) -> Array:
    """``module(x, ...)``, or ``x`` where there is no module."""
    return x if module is None else module(x, *args)
