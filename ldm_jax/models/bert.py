"""The BERT-style text encoder that the original trains with the UNet."""

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.nn.attention import CrossAttention, FeedForward
from ldm_jax.nn.layers import Array, Dense, Embed, LayerNorm, Module


class TransformerEncoder(Module):
    """Pre-norm transformer over tokens with learned positions (x-transformers, as the original).

    tokens int [b, n] -> [b, n, dim], with n at most ``max_seq_len``. Without ``mask`` (boolean
    [b, n]) padding tokens attend and are attended to, as in the original.

    Attributes:
      dim: Channels of a token. The head size does not depend on it.
      with_logits: Holds the projection to the vocabulary, which the original keeps in its
        checkpoints without using it.
      embed_std: Initial standard deviation of the embeddings. The original's 0.02 is small beside
        what the first layers add, so that a short training hardly tells words apart; 1 is not.
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

    @nn.compact
    def __call__(
        self, tokens: Array, mask: Array | None = None, logits: bool = False, train: bool = False
    ) -> Array:
        """With ``logits`` the result is [b, n, vocab_size]."""
        n, keep_rows, norm = tokens.shape[1], self.kernels.keep_rows, self.layer(LayerNorm)
        if n > self.max_seq_len:
            raise ValueError(
                f"TransformerEncoder: {n} tokens exceed max_seq_len {self.max_seq_len}"
            )
        normal = nn.initializers.normal(self.embed_std)
        embed = self.layer(Embed)(
            self.vocab_size, self.dim, embedding_init=normal, name="token_emb"
        )
        positions = self.param("pos_emb", normal, (self.max_seq_len, self.dim), jnp.float32)
        x = embed(tokens) + positions.astype(self.dtype)[:n]
        x = keep_rows(nn.Dropout(self.dropout, deterministic=not train)(x))
        pair = None if mask is None else mask[:, None, :, None] & mask[:, None, None, :]
        attention, feed_forward = self.layer(CrossAttention), self.layer(FeedForward)
        for i in range(self.depth):
            attn = attention(self.heads, self.head_dim, self.dropout, name=f"attn_{i}")
            x = keep_rows(x + attn(norm(name=f"attn_norm_{i}")(x), mask=pair, train=train))
            ff = feed_forward(self.ff_mult, self.ff_glu, self.dropout, name=f"ff_{i}")
            x = keep_rows(x + ff(norm(name=f"ff_norm_{i}")(x), train=train))
        x = norm(name="norm")(x)
        if not (self.with_logits or logits):
            return x
        projected = self.layer(Dense)(self.vocab_size, name="to_logits")(x)
        return projected if logits else x
