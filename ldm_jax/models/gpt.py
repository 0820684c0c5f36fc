"""minGPT over codebook indices (taming-transformers, Esser et al. 2021, arXiv:2012.09841)."""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

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
    attn_dropout: float = 0.0

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
        scale = q.shape[-1] ** -0.5
        if train and self.attn_dropout:
            y = self.dropped_attention(q, k, v, scale, mask)
        else:
            y = self.kernels.attention(q, k, v, scale, mask)
        h = dense(c, "proj")(merge_heads(y))
        x = x + nn.Dropout(self.resid_dropout, deterministic=not train)(h)
        h = self.kernels.gelu(dense(4 * c, "mlp_in")(norm(name="ln2")(x)))
        h = dense(c, "mlp_out")(h)
        return x + nn.Dropout(self.resid_dropout, deterministic=not train)(h), (k, v)

    def dropped_attention(self, q: Array, k: Array, v: Array, scale: float, mask: Array) -> Array:
        """As `Kernels.attention`, with dropout of the weights, which no kernel exposes."""
        logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32) * scale
        weights = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1)
        weights = nn.Dropout(self.attn_dropout, deterministic=False)(weights)
        return jnp.einsum("bhnm,bmhe->bnhe", weights.astype(v.dtype), v)


class GPT(Module):
    """tokens int [b, n] -> logits float32 [b, n, vocab_size]; at most ``block_size`` positions.

    ``embeddings`` [b, m, n_embd] precede the tokens; the logits are then [b, m + n, vocab_size].
    With a ``cache`` (`GPT.empty_cache`) the call continues the sequence in it, and returns (logits,
    cache). ``at`` [] leaves the logits of one position alone, [b, 1, vocab_size]. The first
    ``n_unmasked`` positions see each other whole. ``embd_pdrop``, ``resid_pdrop`` and
    ``attn_pdrop`` need a "dropout" rng when ``train``. Fields carry the original's names.
    """

    vocab_size: int
    block_size: int
    n_layer: int = 12
    n_head: int = 8
    n_embd: int = 256
    n_unmasked: int = 0
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    attn_pdrop: float = 0.0

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        embeddings: Array | None = None,
        cache: Cache | None = None,
        train: bool = False,
        at: Array | None = None,
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
        whole = causal_mask(self.block_size, self.n_unmasked)
        mask = whole[:n, :n]
        if cache is not None:
            # Causality alone would not hide cached positions that are not written yet from the
            # first n_unmasked ones.
            written = jnp.arange(self.block_size) < start + n
            mask = jax.lax.dynamic_slice_in_dim(whole, start, n) & written
        seen = []
        for i in range(self.n_layer):
            past = None if cache is None else (cache.k[i], cache.v[i])
            block = self.layer(GPTBlock)(
                self.n_head, self.resid_pdrop, self.attn_pdrop, name=f"blocks_{i}"
            )
            x, kv = block(x, mask, past, start, train)
            seen.append(kv)
        x = x if at is None else jax.lax.dynamic_slice_in_dim(x, at, 1, axis=1)
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


# ---------------------------------------------------------------------------- choosing a token


def keep_top_k(logits: Array, k: int) -> Array:
    """Sets all logits [..., vocab] below the k-th largest to -inf; equal ones stay."""
    return jnp.where(logits < jax.lax.top_k(logits, k)[0][..., -1:], -jnp.inf, logits)


def keep_top_p(logits: Array, p: Array | float) -> Array:
    """Keeps the likeliest tokens up to the first with which their probability exceeds ``p``.

    Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751) of logits [..., vocab]; others become
    -inf.
    """
    order = jnp.argsort(logits, axis=-1, descending=True)
    sorted_logits = jnp.take_along_axis(logits, order, axis=-1)
    before = jnp.cumsum(jax.nn.softmax(sorted_logits, axis=-1), axis=-1)
    before = jnp.concatenate([jnp.zeros_like(before[..., :1]), before[..., :-1]], axis=-1)
    kept = jnp.take_along_axis(before <= p, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def draw_tokens(logits: Array, u: Array) -> Array:
    """Draws tokens int32 [...] from logits [..., vocab] by the inverse of their distribution.

    Args:
      logits: Unnormalised log probabilities; a token of -inf is never drawn.
      u: Uniform numbers in [0, 1), [...].
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    cumulative = jnp.cumsum(probabilities, axis=-1)
    passed = (cumulative <= u[..., None] * cumulative[..., -1:]).sum(-1)
    # Rounding may carry u past the last token with a probability.
    places = jnp.arange(logits.shape[-1])
    last = jnp.where(probabilities > 0, places, 0).max(-1)
    return jnp.minimum(passed, last).astype(jnp.int32)


class Choice(NamedTuple):
    """How the next token is chosen of its logits: temperature, then top k, then top p.

    Attributes:
      temperature: Divides the logits.
      top_k: Number of the likeliest tokens that remain; None for all. Static.
      top_p: See `keep_top_p`; None for 1, without sorting.
      codes: Only tokens below this are chosen: a vocabulary may have more than the codes. Static.
    """

    temperature: Array | float = 1.0
    top_k: int | None = None
    top_p: Array | float | None = None
    codes: int | None = None

    def filtered(self, logits: Array) -> Array:
        """Returns logits [..., vocab] with those of the tokens that do not remain at -inf."""
        logits = logits / self.temperature
        if self.codes is not None:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < self.codes, logits, -jnp.inf)
        if self.top_k is not None:
            logits = keep_top_k(logits, min(self.top_k, logits.shape[-1]))
        return logits if self.top_p is None else keep_top_p(logits, self.top_p)

    def __call__(self, logits: Array, u: Array | None) -> Array:
        """Chooses tokens int32 [...]; ``u`` None takes the likeliest."""
        logits = self.filtered(logits)
        return logits.argmax(-1).astype(jnp.int32) if u is None else draw_tokens(logits, u)


# ----------------------------------------------------------------------------------- sequences


class Known(NamedTuple):
    """Tokens that are given instead of chosen.

    Attributes:
      tokens: int32 [b, steps].
      keep: bool [b, steps], True where a token is given.
    """

    tokens: Array
    keep: Array

    def at(self, index: Array, chosen: Array) -> Array:
        """Returns the tokens [b] of a step: given, or ``chosen``."""
        return jnp.where(self.keep[:, index], self.tokens[:, index], chosen)


class Generated(NamedTuple):
    """A continued sequence.

    Attributes:
      tokens: int32 [b, n + steps].
      finite: Whether all logits were finite numbers, bool [b].
    """

    tokens: Array
    finite: Array


def generate(
    model: GPT,
    params: dict,
    tokens: Array,
    steps: int,
    *,
    uniforms: Array | None = None,
    choice: Choice = Choice(),  # noqa: B008  (immutable)
    known: Known | None = None,
) -> Generated:
    """Continues ``tokens`` [b, n] by ``steps`` more, in one `jax.lax.scan` with a cache.

    A step costs one position, and the same for each: it attends to the whole cache.

    Args:
      model: The transformer; n + steps - 1 may not exceed its block_size.
      params: Its parameters.
      tokens: The beginning.
      steps: The number of tokens to add.
      uniforms: Uniform numbers in [0, 1), [b, steps]; None takes the likeliest tokens.
      choice: How a token is chosen.
      known: Tokens of some of the steps.
    """
    n = tokens.shape[1]
    if n + steps - 1 > model.block_size:
        raise ValueError(
            f"generate: {n} + {steps} - 1 positions exceed block_size {model.block_size}"
        )

    def choose(logits: Array, index: Array) -> Array:
        chosen = choice(logits, None if uniforms is None else uniforms[:, index])
        return chosen if known is None else known.at(index, chosen)

    def advance(tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        at = jnp.int32(tokens.shape[1] - 1)
        logits, cache = model.apply({"params": params}, tokens, cache=cache, at=at)  # type: ignore[misc]
        return logits[:, 0], cache

    def is_finite(logits: Array) -> Array:
        return jnp.isfinite(logits).all(-1)

    tokens = tokens.astype(jnp.int32)
    finite, done = jnp.ones(len(tokens), bool), 0
    # While the sequence lies within the first n_unmasked positions, every new token changes what
    # the others see: a cache would not be exact.
    while n + done < model.n_unmasked and done < steps:
        logits = cast(Array, model.apply({"params": params}, tokens, at=jnp.int32(n + done - 1)))
        finite &= is_finite(logits[:, 0])
        tokens = jnp.concatenate([tokens, choose(logits[:, 0], jnp.int32(done))[:, None]], axis=1)
        done += 1
    if done == steps:
        return Generated(tokens, finite)

    def body(state: tuple[Array, Cache, Array], index: Array) -> tuple[Any, Array]:
        token, cache, finite = state
        logits, cache = advance(token[:, None], cache)
        token = choose(logits, index)
        return (token, cache, finite & is_finite(logits)), token

    logits, cache = advance(tokens, model.empty_cache(len(tokens)))
    first = choose(logits, jnp.int32(done))
    state = first, cache, finite & is_finite(logits)
    (_, _, finite), rest = jax.lax.scan(body, state, jnp.arange(done + 1, steps))
    return Generated(jnp.concatenate([tokens, first[:, None], rest.T], axis=1), finite)


def one_pass(
    model: GPT,
    params: dict,
    condition: Array,
    start: Array,
    *,
    uniforms: Array | None = None,
    choice: Choice = Choice(),  # noqa: B008  (immutable)
) -> Array:
    """Chooses all tokens of a model that was trained on random ones (``pkeep`` 0) in one pass.

    As the original's, which takes the condition's tokens in the place of the picture's: there are
    as many of both.

    Args:
      model: The transformer.
      params: Its parameters.
      condition: Tokens [b, n].
      start: The first tokens of the picture [b, m]; they count only as input.
      uniforms: Uniform numbers in [0, 1), [b, 2 n - 1]; None takes the likeliest.
      choice: How a token is chosen.

    Returns:
      The picture's tokens, int32 [b, n].
    """
    tokens = jnp.concatenate([condition, start, condition[:, start.shape[1] : -1]], axis=1)
    logits = cast(Array, model.apply({"params": params}, tokens))
    return choice(logits, uniforms)[:, condition.shape[1] - 1 :]


# ------------------------------------------------------------------------------------- windows


class Cells(NamedTuple):
    """The order in which a picture's codes are chosen, and the window that each is chosen in.

    Attributes:
      place: (row, column) of the code in the picture, int32 [m, 2].
      inside: The same in the window.
      corner: (row, column) of the window's first code.
    """

    place: np.ndarray
    inside: np.ndarray
    corner: np.ndarray


def sliding_cells(
    size: tuple[int, int], window: tuple[int, int], first: int = 0, *, restart: bool = False
) -> Cells:
    """Returns windows that keep the code in their middle, except near the edges.

    Args:
      size: Codes (h, w) of the picture, at least those of the window.
      window: Codes (h, w) of the window.
      first: The number of codes, row by row, that are given.
      restart: Whether every row starts at the column of the first code, as in the original, which
        leaves out the codes on its left.
    """

    def inside(at: int, n: int, side: int) -> int:
        half = side // 2
        return at if at <= half else side - (n - at) if n - at < half else half

    (h, w), (top, left) = size, divmod(first, size[1])
    place = [(i, j) for i in range(top, h) for j in range(left if restart or i == top else 0, w)]
    spots = [(inside(i, h, window[0]), inside(j, w, window[1])) for i, j in place]
    arrays = np.asarray(place, np.int32), np.asarray(spots, np.int32)
    return Cells(*arrays, arrays[0] - arrays[1])


def generate_windows(
    model: GPT,
    params: dict,
    condition: Array,
    codes: Array,
    window: tuple[int, int],
    cells: Cells,
    *,
    uniforms: Array | None = None,
    choice: Choice = Choice(),  # noqa: B008  (immutable)
    known: Known | None = None,
) -> Generated:
    """Chooses the codes of a picture of any size, each from a window around it.

    Esser et al. 2021 (arXiv:2012.09841), section 3.3. One scan; a step runs the whole window, since
    positions move with it.

    Args:
      model: The transformer of windows.
      params: Its parameters.
      condition: Tokens [b, m] of every window, or a grid [b, h, w] of which windows are cut.
      codes: int32 [b, h, w]; those that are not among ``cells`` stay.
      window: Codes (h, w) of a window.
      cells: See `sliding_cells`.
      uniforms: Uniform numbers in [0, 1), [b, m]; None takes the likeliest codes.
      choice: How a code is chosen.
      known: Codes of some of the cells.

    Returns:
      Tokens int32 [b, h, w].
    """
    n = window[0] * window[1]

    def cut(grid: Array, corner: Array) -> Array:
        sizes = (len(grid), *window)
        return jax.lax.dynamic_slice(grid, (0, corner[0], corner[1]), sizes).reshape(-1, n)

    def body(state: tuple[Array, Array], cell: Any) -> tuple[tuple[Array, Array], None]:
        (codes, finite), (index, place, inside, corner) = state, cell
        tokens = condition if condition.ndim == 2 else cut(condition, corner)
        m = tokens.shape[1]
        tokens = jnp.concatenate([tokens, cut(codes, corner)], axis=1)[:, :-1]
        at = m - 1 + inside[0] * window[1] + inside[1]
        logits = cast(Array, model.apply({"params": params}, tokens, at=at))[:, 0]
        chosen = choice(logits, None if uniforms is None else uniforms[:, index])
        chosen = chosen if known is None else known.at(index, chosen)
        codes = codes.at[:, place[0], place[1]].set(chosen)
        return (codes, finite & jnp.isfinite(logits).all(-1)), None

    state = codes.astype(jnp.int32), jnp.ones(len(codes), bool)
    order = jnp.arange(len(cells.place))
    (codes, finite), _ = jax.lax.scan(body, state, (order, *map(jnp.asarray, cells)))
    return Generated(codes, finite)
