"""Text encoders: the BERT-style transformer that the original trains with the UNet."""

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.nn.attention import CrossAttention, FeedForward
from ldm_jax.nn.layers import Array, Dtype, dense, keep_rows, layer_norm, look_up


class TransformerEncoder(nn.Module):
    """Token embedding, learned positions, pre-norm transformer blocks, final norm (x-transformers, as the original uses it).

    tokens int [b, n] -> [b, n, dim]; n at most ``max_seq_len``. The head size does not depend on ``dim``. Without ``mask`` (boolean [b, n])
    padding tokens attend and are attended to, as the original has it. ``logits`` projects to the vocabulary instead; the original keeps that
    projection in its checkpoints without using it. ``embed_std`` is the standard deviation that embeddings start with: the original's 0.02 is small
    beside what the first layers add, so a short run hardly learns to tell words apart; 1 keeps them in view from the start.
    """

    dim: int
    depth: int
    vocab_size: int = 30522
    max_seq_len: int = 77
    heads: int = 8
    head_dim: int = 64
    dropout: float = 0.0
    ff_mult: int = 4
    ff_glu: bool = False
    with_logits: bool = False
    embed_std: float = 0.02
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Array, mask: Array | None = None, logits: bool = False, train: bool = False
    ) -> Array:
        n = tokens.shape[1]
        if n > self.max_seq_len:
            raise ValueError(
                f"TransformerEncoder: {n} tokens exceed max_seq_len {self.max_seq_len}"
            )
        normal = nn.initializers.normal(self.embed_std)
        table = nn.Embed(
            self.vocab_size, self.dim, embedding_init=normal, dtype=self.dtype, name="token_emb"
        )
        x = look_up(table, tokens)
        x = x + self.param("pos_emb", normal, (self.max_seq_len, self.dim)).astype(self.dtype)[:n]
        x = keep_rows(nn.Dropout(self.dropout, deterministic=not train)(x))
        pair = None if mask is None else mask[:, None, :, None] & mask[:, None, None, :]
        for i in range(self.depth):
            attn = CrossAttention(
                self.heads, self.head_dim, self.dropout, self.dtype, name=f"attn_{i}"
            )
            x = keep_rows(
                x + attn(layer_norm(f"attn_norm_{i}", self.dtype)(x), mask=pair, train=train)
            )
            ff = FeedForward(self.ff_mult, self.ff_glu, self.dropout, self.dtype, name=f"ff_{i}")
            x = keep_rows(x + ff(layer_norm(f"ff_norm_{i}", self.dtype)(x), train=train))
        x = layer_norm("norm", self.dtype)(x)
        if self.with_logits or logits:
            projected = dense(self.vocab_size, x, name="to_logits", dtype=self.dtype)(x)
            if logits:
                return projected
        return x
