"""minGPT over codebook indices (taming-transformers, Esser et al. 2021, arXiv:2012.09841)."""

from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nn.attention import merge_heads, split_heads
from ldm_jax.nn.layers import Array, Dense, Embed, LayerNorm, Module

NORMAL = nn.initializers.normal(0.02)


class Cache(NamedTuple):
    """Keys and values [layers, b, block_size, heads, d] of the first ``length`` positions."""

    k: Array
    v: Array
    length: Array


def causal_mask(size: int, n_unmasked: int = 0) -> Array:
    """Boolean [size, size]: position i sees j if j <= i or both are of the first ``n_unmasked``."""
    i, j = jnp.arange(size)[:, None], jnp.arange(size)[None]
    return (j <= i) | ((i < n_unmasked) & (j < n_unmasked))


class GPTBlock(Module):
    """Causal self-attention and an MLP, each pre-normalised and residual.

    x [b, n, c], mask [n, keys] -> the same shape, with the keys and values. ``past`` holds (k, v)
    [b, block_size, heads, d] into which those of this call are written from position ``start``.
    """

    heads: int
    resid_dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, past: tuple[Array, Array] | None, start: Array, train: bool
    ) -> tuple[Array, tuple[Array, Array]]:
        c, norm = x.shape[-1], self.layer(LayerNorm)

        def dense(features: int, name: str) -> Dense:
            zeros = nn.initializers.zeros
            return self.layer(Dense)(features, kernel_init=NORMAL, bias_init=zeros, name=name)

        h = norm(name="ln1")(x)
        q, k, v = (split_heads(dense(c, name)(h), self.heads) for name in ("query", "key", "value"))
        if past is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 1)
                for old, new in zip(past, (k, v), strict=True)
            )
        y = self.kernels.attention(q, k, v, q.shape[-1] ** -0.5, mask)
        h = dense(c, "proj")(merge_heads(y))
        x = x + nn.Dropout(self.resid_dropout, deterministic=not train)(h)
        h = self.kernels.gelu(dense(4 * c, "mlp_in")(norm(name="ln2")(x)))
        h = dense(c, "mlp_out")(h)
        return x + nn.Dropout(self.resid_dropout, deterministic=not train)(h), (k, v)


class GPT(Module):
    """tokens int [b, n] -> logits float32 [b, n, vocab_size]; at most ``block_size`` positions.

    ``embeddings`` [b, m, n_embd] precede the tokens; the logits are then [b, m + n, vocab_size].
    With a ``cache`` (`GPT.empty_cache`) the call continues the sequence in it, and returns (logits,
    cache). The first ``n_unmasked`` positions see each other whole. ``embd_pdrop``, ``resid_pdrop``
    need a "dropout" rng when ``train``. Fields carry the original's names.
    """

    vocab_size: int
    block_size: int
    n_layer: int = 12
    n_head: int = 8
    n_embd: int = 256
    n_unmasked: int = 0
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        embeddings: Array | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> Array | tuple[Array, Cache]:
        embed = self.layer(Embed)(
            self.vocab_size, self.n_embd, embedding_init=NORMAL, name="tok_emb"
        )
        x = embed(tokens)
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
            block = self.layer(GPTBlock)(self.n_head, self.resid_pdrop, name=f"blocks_{i}")
            x, kv = block(x, mask, past, start, train)
            seen.append(kv)
        x = self.layer(LayerNorm)(name="ln_f")(x)
        head = self.layer(Dense)(self.vocab_size, use_bias=False, kernel_init=NORMAL, name="head")
        logits = head(x).astype(jnp.float32)
        if cache is None:
            return logits
        k, v = (jnp.stack(part) for part in zip(*seen, strict=True))
        return logits, Cache(k, v, start + n)

    def empty_cache(self, batch: int) -> Cache:
        """A cache without positions."""
        shape = (self.n_layer, batch, self.block_size, self.n_head, self.n_embd // self.n_head)
        return Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype), jnp.int32(0))


def keep_top_k(logits: Array, k: int) -> Array:
    """Sets all logits [..., vocab] below the k-th largest to -inf."""
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
    """Continues ``tokens`` [b, n] by ``steps`` more -> int32 [b, n + steps].

    They are sampled with ``key``; without it each is the likeliest. n + steps may not exceed
    block_size. One `jax.lax.scan`, so that a step costs one position.
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
