"""The attention blocks of the original."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nn.layers import Array, Dense, GroupNorm, LayerNorm, Module, repeat_batch


def split_heads(x: Array, heads: int) -> Array:
    """[b, n, heads * d] -> [b, n, heads, d]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def merge_heads(x: Array) -> Array:
    """[b, n, heads, d] -> [b, n, heads * d]."""
    return x.reshape(*x.shape[:-2], -1)


class CrossAttention(Module):
    """Multi-head attention of x [b, n, c] to a context [b, m, k], itself when None -> [b, n, c].

    Queries, keys and values have no bias. A context [r b, m, k] holds r contexts for each row,
    whole batches in turn -> [r b, n, c].
    """

    heads: int
    head_dim: int
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Array, context: Array | None = None, mask: Array | None = None, train: bool = False
    ) -> Array:
        dense, inner = self.layer(Dense), self.heads * self.head_dim
        context = x if context is None else context
        q = split_heads(dense(inner, use_bias=False, name="to_q")(x), self.heads)
        k = split_heads(dense(inner, use_bias=False, name="to_k")(context), self.heads)
        v = split_heads(dense(inner, use_bias=False, name="to_v")(context), self.heads)
        y = self.kernels.attention(repeat_batch(q, k), k, v, self.head_dim**-0.5, mask)
        y = dense(x.shape[-1], name="to_out")(merge_heads(y))
        return nn.Dropout(self.dropout, deterministic=not train)(y)


class FeedForward(Module):
    """c -> mult c -> c with GELU, or with GEGLU (Shazeer 2020, arXiv:2002.05202)."""

    mult: int = 4
    glu: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        dense, c = self.layer(Dense), x.shape[-1]
        h = dense(c * self.mult * (2 if self.glu else 1), name="proj_in")(x)
        h = self.kernels.geglu(h) if self.glu else self.kernels.gelu(h)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return dense(c, name="proj_out")(h)


class BasicTransformerBlock(Module):
    """Self-attention, cross-attention, feed-forward, each pre-normalised and residual.

    x [b, n, c], context [r b, m, k] or None -> [r b, n, c]. With ``attend_to_context`` the first
    attention reads the context too (the original's ``disable_self_attn``).
    """

    heads: int
    head_dim: int
    dropout: float = 0.0
    gated_ff: bool = True
    attend_to_context: bool = False

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None, train: bool = False) -> Array:
        attention, norm = self.layer(CrossAttention), self.layer(LayerNorm)
        args = self.heads, self.head_dim, self.dropout
        first = context if self.attend_to_context else None
        y = attention(*args, name="attn1")(norm(name="norm1")(x), first, train=train)
        x = repeat_batch(x, y) + y
        y = attention(*args, name="attn2")(norm(name="norm2")(x), context, train=train)
        x = repeat_batch(x, y) + y
        ff = self.layer(FeedForward)(glu=self.gated_ff, dropout=self.dropout, name="ff")
        return x + ff(norm(name="norm3")(x), train=train)


class SpatialTransformer(Module):
    """Transformer blocks over the pixels of a feature map (Rombach et al. 2022, arXiv:2112.10752).

    x [b, h, w, c], context [r b, m, k] or None -> [r b, h, w, c]. The last projection starts at
    zero, so that a new block is the identity.
    """

    heads: int
    head_dim: int
    depth: int = 1
    dropout: float = 0.0
    norm_groups: int = 32
    attend_to_context: bool = False

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None, train: bool = False) -> Array:
        dense, (b, h, w, c) = self.layer(Dense), x.shape
        y = self.layer(GroupNorm)(1e-6, self.norm_groups, name="norm")(x)
        y = self.kernels.materialize(y).reshape(b, h * w, c)
        y = dense(self.heads * self.head_dim, name="proj_in")(y)
        block = self.layer(BasicTransformerBlock)
        args = self.heads, self.head_dim, self.dropout, True, self.attend_to_context
        for i in range(self.depth):
            y = block(*args, name=f"blocks_{i}")(y, context, train)
        y = dense(c, zero=True, name="proj_out")(y)
        return repeat_batch(x, y) + y.reshape(-1, h, w, c)


class AttentionBlock(Module):
    """Self-attention over pixels, one fused projection (Dhariwal & Nichol 2021, arXiv:2105.05233).

    ``new_order`` is the layout of the fused projection's output: q, k, v first and heads inside
    (True), or heads first with the q, k, v of each inside (False, the original's default). Both
    scale q and k by d^-1/4, which is one d^-1/2 here. [b, h, w, c] -> the same shape.
    """

    heads: int
    new_order: bool = False
    norm_groups: int = 32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense, (b, h, w, c) = self.layer(Dense), x.shape
        y = self.layer(GroupNorm)(1e-5, self.norm_groups, name="norm")(x).reshape(b, h * w, c)
        qkv = dense(3 * c, name="qkv")(y)
        if self.new_order:
            q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, 3, self.heads, -1), 2, 0)
        else:
            q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, self.heads, 3, -1), 3, 0)
        y = merge_heads(self.kernels.attention(q, k, v, q.shape[-1] ** -0.5))
        return x + dense(c, zero=True, name="proj_out")(y).reshape(b, h, w, c)


class AttnBlock(Module):
    """Single-head self-attention over pixels, as in the autoencoders. [b, h, w, c] -> the same."""

    norm_groups: int = 32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense, (b, h, w, c) = self.layer(Dense), x.shape
        y = self.layer(GroupNorm)(1e-6, self.norm_groups, name="norm")(x).reshape(b, h * w, c)
        q, k, v = (split_heads(dense(c, name=n)(y), 1) for n in ("q", "k", "v"))
        y = merge_heads(self.kernels.attention(q, k, v, c**-0.5))
        return x + dense(c, name="proj_out")(y).reshape(b, h, w, c)


class LinearAttention(Module):
    """Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236) as the original has it.

    k is softmaxed over positions, q is not scaled, nothing is residual. [b, h, w, c] -> the same.
    """

    heads: int = 4
    head_dim: int = 32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense, (b, h, w, c) = self.layer(Dense), x.shape
        inner = self.heads * self.head_dim
        qkv = dense(3 * inner, use_bias=False, name="to_qkv")(x.reshape(b, h * w, c))
        q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, 3, self.heads, self.head_dim), 2, 0)
        k = jax.nn.softmax(k.astype(jnp.float32), axis=1).astype(v.dtype)
        summary = jnp.einsum("bnhd,bnhe->bhde", k, v)
        y = merge_heads(jnp.einsum("bhde,bnhd->bnhe", summary, q))
        return dense(c, name="to_out")(y).reshape(b, h, w, c)
