"""The original's x_transformer: a pre-norm transformer encoder over tokens, with its options.

`ldm_jax.models.bert.TransformerEncoder` is the plain form, on which released models are
conditioned; it has the same parameters where no option is set.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nn.attention import FeedForward, merge_heads, split_heads
from ldm_jax.nn.layers import Array, Dense, Embed, LayerNorm, Module


class Encoded(NamedTuple):
    """What `TransformerWrapper` returns; a compiled program drops what is not used.

    Attributes:
      embeddings: [b, n, dim], after the last normalisation.
      logits: [b, n, num_tokens], of the vocabulary.
      mems: The inputs of each attention layer, [b, at most max_mem_len, dim], for the next segment.
      attention: The weights of each attention layer, [b, heads, n, m].
    """

    embeddings: Array
    logits: Array
    mems: tuple[Array, ...]
    attention: tuple[Array, ...]


class ScaleNorm(Module):
    """g x / (|x| / sqrt(c)) with one learned g (Nguyen & Salazar 2019, arXiv:1910.05895)."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        g = self.param("g", nn.initializers.ones, (1,))
        x = x.astype(jnp.float32)
        norm = jnp.linalg.norm(x, axis=-1, keepdims=True) * x.shape[-1] ** -0.5
        return (x / jnp.maximum(norm, self.eps) * g).astype(self.dtype)


class Attention(Module):
    """Attention whose logits and weights take part in the options of x_transformer.

    Attributes:
      talking_heads: Mixes the heads before and after the softmax (arXiv:2003.02436).
      sparse_topk: The number of largest logits that attention keeps (arXiv:1912.11637).
    """

    heads: int
    head_dim: int
    dropout: float = 0.0
    talking_heads: bool = False
    sparse_topk: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None = None,
        mem: Array | None = None,
        earlier: Array | None = None,
        train: bool = False,
    ) -> tuple[Array, Array, Array]:
        """Attends from x [b, n, c] to itself, behind ``mem`` [b, k, c] where given.

        Args:
          x: Normalised tokens.
          mask: Boolean [b, 1, n, k + n], False where attention is barred.
          mem: Inputs of an earlier segment.
          earlier: Logits of the previous layer, which are added.
          train: Whether weights are dropped.

        Returns:
          (result [b, n, c], logits, weights [b, heads, n, k + n]).
        """
        dense, inner = self.layer(Dense), self.heads * self.head_dim
        context = x if mem is None else jnp.concatenate([mem.astype(x.dtype), x], axis=1)
        q = split_heads(dense(inner, use_bias=False, name="to_q")(x), self.heads)
        k = split_heads(dense(inner, use_bias=False, name="to_k")(context), self.heads)
        v = split_heads(dense(inner, use_bias=False, name="to_v")(context), self.heads)
        logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
        logits = logits * self.head_dim**-0.5
        logits = logits if earlier is None else logits + earlier
        seen = logits
        if self.talking_heads:
            mixed = self.param("pre_softmax_proj", nn.initializers.normal(), (self.heads,) * 2)
            seen = jnp.einsum("bhnm,hk->bknm", seen, mixed)
        least = jnp.finfo(jnp.float32).min
        if mask is not None:
            seen = jnp.where(mask, seen, least)
        if self.sparse_topk is not None and self.sparse_topk < seen.shape[-1]:
            last = jax.lax.top_k(seen, self.sparse_topk)[0][..., -1:]
            seen = jnp.where(seen < last, least, seen)
        weights = jax.nn.softmax(seen, axis=-1)
        dropped = nn.Dropout(self.dropout, deterministic=not train)(weights)
        if self.talking_heads:
            mixed = self.param("post_softmax_proj", nn.initializers.normal(), (self.heads,) * 2)
            dropped = jnp.einsum("bhnm,hk->bknm", dropped, mixed)
        y = jnp.einsum("bhnm,bmhd->bnhd", dropped.astype(v.dtype), v)
        return dense(x.shape[-1], name="to_out")(merge_heads(y)), logits, weights


class TransformerWrapper(Module):
    """TransformerWrapper of x_transformer around an Encoder; fields carry the original's names.

    Attributes:
      dim: Channels inside the encoder; ``attn_dim_head`` does not depend on it.
      emb_dim: Channels of the embeddings, which a linear layer maps to ``dim``; None for ``dim``.
      num_memory_tokens: Learned tokens in front of the sequence, which are not returned.
      max_mem_len: Tokens of an earlier segment that are kept for the next one.
      tie_embedding: Logits are products with the token embeddings, without a layer of their own.
      use_pos_emb: Whether there are learned positions.
      residual_attn: Adds the logits of the previous attention layer (arXiv:2012.11747).
    """

    num_tokens: int
    max_seq_len: int
    dim: int
    depth: int
    heads: int = 8
    attn_dim_head: int = 64
    emb_dim: int | None = None
    num_memory_tokens: int = 0
    max_mem_len: int = 0
    tie_embedding: bool = False
    use_pos_emb: bool = True
    ff_mult: int = 4
    ff_glu: bool = False
    use_scalenorm: bool = False
    residual_attn: bool = False
    attn_talking_heads: bool = False
    attn_sparse_topk: int | None = None
    emb_dropout: float = 0.0
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        mask: Array | None = None,
        mems: tuple[Array, ...] = (),
        train: bool = False,
    ) -> Encoded:
        """Encodes tokens int [b, n], with n at most ``max_seq_len``.

        Args:
          tokens: The tokens.
          mask: Boolean [b, n], False for padding; all tokens attend without it.
          mems: Those that the earlier segment returned.
          train: Whether anything is dropped.

        Raises:
          ValueError: There are too many tokens, or both a mask and memories.
        """
        b, n = tokens.shape
        if n > self.max_seq_len:
            raise ValueError(
                f"TransformerWrapper: {n} tokens exceed max_seq_len {self.max_seq_len}"
            )
        if mask is not None and mems:
            raise ValueError("TransformerWrapper: memories of another segment take no mask")
        normal, width = nn.initializers.normal(0.02), self.emb_dim or self.dim
        embed = self.layer(Embed)(self.num_tokens, width, embedding_init=normal, name="token_emb")
        x = embed(tokens)
        if self.use_pos_emb:
            positions = self.param("pos_emb", normal, (self.max_seq_len, width), jnp.float32)
            x = x + positions.astype(self.dtype)[:n]
        x = nn.Dropout(self.emb_dropout, deterministic=not train)(x)
        if width != self.dim:
            x = self.layer(Dense)(self.dim, name="project_emb")(x)
        count = self.num_memory_tokens
        if count:
            shape = (count, self.dim)
            memory = self.param("memory_tokens", nn.initializers.normal(1.0), shape, jnp.float32)
            memory = jnp.broadcast_to(memory.astype(x.dtype), (b, *shape))
            x = jnp.concatenate([memory, x], axis=1)
            if mask is not None:
                mask = jnp.pad(mask, ((0, 0), (count, 0)), constant_values=True)
        pair = None if mask is None else mask[:, None, :, None] & mask[:, None, None, :]

        norm = self.layer(ScaleNorm if self.use_scalenorm else LayerNorm)
        attention = self.layer(Attention)
        logits, inputs, weights = None, [], []
        for i in range(self.depth):
            inputs.append(x)
            y, logits, weight = attention(
                self.heads,
                self.attn_dim_head,
                self.attn_dropout,
                self.attn_talking_heads,
                self.attn_sparse_topk,
                name=f"attn_{i}",
            )(
                norm(name=f"attn_norm_{i}")(x),
                pair,
                mems[i] if mems else None,
                logits if self.residual_attn else None,
                train,
            )
            weights.append(weight)
            x = x + y
            ff = self.layer(FeedForward)(self.ff_mult, self.ff_glu, self.ff_dropout, name=f"ff_{i}")
            x = x + ff(norm(name=f"ff_norm_{i}")(x), train=train)
        x = self.layer(LayerNorm)(name="norm")(x)[:, count:]
        if self.tie_embedding:
            scores = x @ embed.variables["params"]["embedding"].astype(x.dtype).T
        else:
            scores = self.layer(Dense)(self.num_tokens, name="to_logits")(x)
        return Encoded(x, scores, self.remembered(mems, inputs), tuple(weights))

    def remembered(self, mems: tuple[Array, ...], inputs: list[Array]) -> tuple[Array, ...]:
        """The last ``max_mem_len`` inputs of each layer, behind those of the earlier segment."""
        all_of = (
            [jnp.concatenate(pair, axis=1) for pair in zip(mems, inputs, strict=True)]
            if (mems)
            else inputs
        )
        return tuple(
            jax.lax.stop_gradient(x[:, max(x.shape[1] - self.max_mem_len, 0) :]) for x in all_of
        )
