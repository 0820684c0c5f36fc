"""minGPT as taming-transformers uses it over codebook indices (Esser et al. 2021), with a cache to sample from."""

from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nn.attention import attention, merge_heads, split_heads
from ldm_jax.nn.layers import Array, Dtype, gelu, layer_norm


class Cache(NamedTuple):
    """Keys and values of the positions seen so far: k, v [layers, b, block_size, heads, d], and how many positions that
    is.
    """

    k: Array
    v: Array
    length: Array


def causal_mask(size: int, n_unmasked: int = 0) -> Array:
    """Boolean [size, size]: whether position i sees position j, which it does when j <= i or both are among the first
    ``n_unmasked``.
    """
    i, j = jnp.arange(size)[:, None], jnp.arange(size)[None]
    return (j <= i) | ((i < n_unmasked) & (j < n_unmasked))


class GPTBlock(nn.Module):
    """Causal self-attention and an MLP, each pre-normalised and residual. x [b, n, c] -> same, with the keys and values
    it attended to.

    ``past`` holds (k, v) [b, block_size, heads, d] into which this call's are written from position ``start``; ``mask``
    is [n, keys].
    """

    heads: int
    resid_dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, past: tuple[Array, Array] | None, start: Array, train: bool
    ) -> tuple[Array, tuple[Array, Array]]:
        c = x.shape[-1]

        def linear(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features, kernel_init=nn.initializers.normal(0.02), dtype=self.dtype, name=name
            )

        h = layer_norm("ln1", self.dtype)(x)
        q, k, v = (
            split_heads(linear(c, name)(h), self.heads) for name in ("query", "key", "value")
        )
        if past is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 1)
                for old, new in zip(past, (k, v), strict=True)
            )
        h = linear(c, "proj")(merge_heads(attention(q, k, v, mask=mask)))
        x = x + nn.Dropout(self.resid_dropout, deterministic=not train)(h)
        h = linear(c, "mlp_out")(gelu(linear(4 * c, "mlp_in")(layer_norm("ln2", self.dtype)(x))))
        return x + nn.Dropout(self.resid_dropout, deterministic=not train)(h), (k, v)


class GPT(nn.Module):
    """tokens int [b, n], after ``embeddings`` [b, m, n_embd] if given -> logits float32 [b, m + n, vocab_size]; at most
    ``block_size`` positions.

    Fields carry the original's names. With a ``cache`` (`GPT.empty_cache`) the call continues the sequence in it, and
    returns (logits, cache). The first ``n_unmasked`` positions see each other whole. ``embd_pdrop``, ``resid_pdrop``
    need a "dropout" rng when ``train``.
    """

    vocab_size: int
    block_size: int
    n_layer: int = 12
    n_head: int = 8
    n_embd: int = 256
    n_unmasked: int = 0
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        embeddings: Array | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> Array | tuple[Array, Cache]:
        normal = nn.initializers.normal(0.02)
        x = nn.Embed(
            self.vocab_size, self.n_embd, embedding_init=normal, dtype=self.dtype, name="tok_emb"
        )(tokens)
        if embeddings is not None:
            x = jnp.concatenate([embeddings.astype(x.dtype), x], axis=1)
        n = x.shape[1]
        if n > self.block_size:
            raise ValueError(f"GPT: {n} positions exceed block_size {self.block_size}")
        start = jnp.int32(0) if cache is None else cache.length
        pos_emb = self.param("pos_emb", nn.initializers.zeros, (self.block_size, self.n_embd))
        x = x + jax.lax.dynamic_slice_in_dim(pos_emb, start, n).astype(self.dtype)
        x = nn.Dropout(self.embd_pdrop, deterministic=not train)(x)
        # Cached positions that are not written yet lie after every query, so causality hides them.
        whole = causal_mask(self.block_size, self.n_unmasked)
        mask = whole[:n, :n] if cache is None else jax.lax.dynamic_slice_in_dim(whole, start, n)
        seen = []
        for i in range(self.n_layer):
            past = None if cache is None else (cache.k[i], cache.v[i])
            x, kv = GPTBlock(self.n_head, self.resid_pdrop, self.dtype, name=f"blocks_{i}")(
                x, mask, past, start, train
            )
            seen.append(kv)
        x = layer_norm("ln_f", self.dtype)(x)
        logits = nn.Dense(
            self.vocab_size, use_bias=False, kernel_init=normal, dtype=self.dtype, name="head"
        )(x).astype(jnp.float32)
        if cache is None:
            return logits
        k, v = (jnp.stack(part) for part in zip(*seen, strict=True))
        return logits, Cache(k, v, start + n)

    def empty_cache(self, batch: int) -> Cache:
        """A cache of no positions."""
        shape = (self.n_layer, batch, self.block_size, self.n_head, self.n_embd // self.n_head)
        return Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype), jnp.int32(0))


def keep_top_k(logits: Array, k: int) -> Array:
    """Logits [..., vocab] with all below the k-th largest set to -inf."""
    return jnp.where(logits < jax.lax.top_k(logits, k)[0][..., -1:], -jnp.inf, logits)


def generate(
    model: GPT,
    params: dict,
    tokens: Array,
    steps: int,
    *,
    key: jax.Array | None = None,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
) -> Array:
    """``tokens`` [b, n] continued by ``steps`` more, int32 [b, n + steps]: sampled with ``key``, the likeliest each
    time without.

    n + steps may not exceed block_size. One `jax.lax.scan`, so that a step costs one position.
    """
    b, n = tokens.shape
    if n + steps > model.block_size:
        raise ValueError(f"generate: {n} + {steps} positions exceed block_size {model.block_size}")

    def choose(logits: Array, index: Array) -> Array:
        logits = logits[:, -1] / temperature
        logits = logits if top_k is None else keep_top_k(logits, top_k)
        if key is None:
            return logits.argmax(-1).astype(jnp.int32)
        return jax.random.categorical(jax.random.fold_in(key, index), logits).astype(jnp.int32)

    def advance(tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        return cast(tuple[Array, Cache], model.apply({"params": params}, tokens, cache=cache))

    def body(state: tuple[Array, Cache], index: Array) -> tuple[tuple[Array, Cache], Array]:
        token, cache = state
        logits, cache = advance(token[:, None], cache)
        token = choose(logits, index)
        return (token, cache), token

    logits, cache = advance(tokens, model.empty_cache(b))
    first = choose(logits, jnp.int32(0))
    _, rest = jax.lax.scan(body, (first, cache), jnp.arange(1, steps))
    return jnp.concatenate(
        [tokens.astype(jnp.int32), first[:, None], rest.T.astype(jnp.int32)], axis=1
    )
