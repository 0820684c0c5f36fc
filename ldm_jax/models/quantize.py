"""The codebooks of VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937) as in taming-transformers.

Each quantiser maps h [b, h, w, c] to codes and returns `Quantized`, whose gradient passes straight
through to h. Distances and losses are float32.
"""

from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.nn.layers import Array, Dense, Module


@flax.struct.dataclass
class Quantized:
    """The result of a quantiser.

    Attributes:
      z: The codes [b, h, w, c], with a straight-through gradient.
      loss: [], trains codebook and encoder.
      indices: int32 [b, h, w]; where ``sane_index_shape`` is off [b * h * w], of nearest codes
        with a ``remap`` [b * h * w, 1].
      perplexity: [], exp of the entropy of the codes' use over the batch; None for Gumbel.
    """

    z: Array
    loss: Array
    indices: Array
    perplexity: Array | None = None


def nearest_codes(x: Array, codebook: Array) -> Array:
    """Indices int32 [n] of the codes [k, c] nearest to x [n, c], the first of equally near ones."""
    # |x|^2 is the same for all codes, but without it rounding would differ from the original.
    products = jnp.matmul(x, codebook.T, precision="highest")
    distances = jnp.square(x).sum(1, keepdims=True) + jnp.square(codebook).sum(1) - 2.0 * products
    return distances.argmin(1).astype(jnp.int32)


def perplexity_of(indices: Array, n: int, axis_name: str | None = None) -> Array:
    """Exp of the entropy in nats of the frequencies of ``n`` codes in ``indices``."""
    share = share_of(indices, n)
    return perplexity(share if axis_name is None else jax.lax.pmean(share, axis_name))


def share_of(indices: Array, n: int) -> Array:
    """The frequency of each of ``n`` codes in ``indices``: float32 [n], with the sum 1."""
    return jnp.bincount(indices.reshape(-1), length=n) / indices.size


def perplexity(share: Array) -> Array:
    """Exp of the entropy of frequencies [n]: the equivalent number of equally used codes."""
    return jnp.exp(-jnp.sum(share * jnp.log(share + 1e-10)))


def straight_through(z: Array, codes: Array) -> Array:
    """``codes`` in the forward pass; in the backward pass their gradient is that of ``z``."""
    return z + jax.lax.stop_gradient(codes - z)


class Quantizer(Module):
    """Fields and index bookkeeping that the quantisers share; names are the original's.

    ``remap`` lists the codes in use: indices are then positions in that list, and a code outside of
    it becomes ``unknown_index``: an index, "extra" (one past the end of the list) or "random" (any
    position, from the rng "remap"). The codes themselves do not change.
    """

    n_embed: int
    embed_dim: int
    remap: tuple[int, ...] | None = None
    unknown_index: int | Literal["random", "extra"] = "random"
    sane_index_shape: bool = False

    @property
    def re_embed(self) -> int:
        """The number of values of an index."""
        if self.remap is None:
            return self.n_embed
        return len(self.remap) + (self.unknown_index == "extra")

    def remap_to_used(self, indices: Array, drawn: Array | None = None) -> Array:
        """Indices of codes [...] -> positions in ``remap``.

        Args:
          indices: Indices of codes.
          drawn: Where ``unknown_index`` is "random", the positions [...] that unknown codes become,
            else drawn from the rng "remap".
        """
        if self.remap is None:
            return indices
        match = indices[..., None] == jnp.asarray(self.remap, jnp.int32)
        if self.unknown_index == "random":
            unknown: Any = drawn
            if drawn is None:
                unknown = jax.random.randint(self.key("remap"), indices.shape, 0, self.re_embed)
        else:
            unknown = len(self.remap) if self.unknown_index == "extra" else self.unknown_index
        return jnp.where(match.any(-1), match.argmax(-1), unknown).astype(jnp.int32)

    def key(self, name: str) -> jax.Array:
        """A random key; initialisation keeps nothing that is drawn, so it needs no rng."""
        if self.has_rng(name) or not self.is_initializing():
            return self.make_rng(name)
        return jax.random.key(0)

    def unmap_to_all(self, indices: Array) -> Array:
        """Positions in ``remap`` [...] -> indices of codes; the extra one becomes the first."""
        if self.remap is None:
            return indices
        used = jnp.asarray(self.remap, jnp.int32)
        return used[jnp.where(indices >= len(self.remap), 0, indices)]

    def shaped(self, indices: Array, b: int, h: int, w: int, drawn: Array | None = None) -> Array:
        """Indices remapped, in the shape in which they are returned; see `remap_to_used`."""
        indices = self.remap_to_used(indices.reshape(b, h, w), drawn)
        return indices if self.sane_index_shape else indices.reshape(-1)


class VectorQuantizer(Quantizer):
    """Nearest codes of a learned codebook (VectorQuantizer and VectorQuantizer2 of the original).

    The loss is a codebook term (moves codes) and a commitment term (moves the encoder). ``beta``
    weighs the codebook term, as in the original and the training of its published models; where
    ``legacy`` is off it weighs the commitment term, as in the paper.
    """

    beta: float = 0.25
    legacy: bool = True

    def setup(self) -> None:
        """Makes the submodules and variables."""
        bound = 1.0 / self.n_embed
        self.embedding = self.param(
            "embedding",
            lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound),
            (self.n_embed, self.embed_dim),
        )

    def __call__(self, h: Array, drawn: Array | None = None) -> Quantized:
        """``h`` [b, h, w, embed_dim] -> its nearest codes; ``drawn`` is that of `remap_to_used`."""
        b, height, width, c = h.shape
        h = h.astype(jnp.float32)
        indices = nearest_codes(h.reshape(-1, c), self.embedding)
        codes = jnp.take(self.embedding, indices, axis=0).reshape(h.shape)
        commitment = jnp.square(jax.lax.stop_gradient(codes) - h).mean()
        codebook = jnp.square(codes - jax.lax.stop_gradient(h)).mean()
        loss = (
            commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        )
        use = perplexity_of(indices, self.n_embed)
        z = straight_through(h, codes).astype(self.dtype)
        indices = self.shaped(indices, b, height, width, drawn)
        if self.remap is not None and not self.sane_index_shape:
            indices = indices[:, None]
        return Quantized(z, loss, indices, use)

    def codes(self, indices: Array) -> Array:
        """Returned indices [...] -> codes [..., embed_dim]."""
        return jnp.take(self.embedding, self.unmap_to_all(indices), axis=0)


class GumbelQuantizer(Quantizer):
    """Codes drawn by the Gumbel softmax trick over logits (Jang et al. 2017, arXiv:1611.01144).

    The original's GumbelQuantize. Training with ``straight_through`` off gives the soft mixture of
    codes; otherwise one code forward and the gradient of the mixture backward. Noise is added in
    evaluation as well, as in the original. The loss is ``kl_weight`` KL(softmax(logits) | uniform).
    ``num_hiddens`` are the channels of the input, ``embed_dim`` where it is None.
    """

    kl_weight: float = 5e-4
    temp_init: float = 1.0
    straight_through: bool = True
    num_hiddens: int | None = None

    @nn.compact
    def __call__(
        self,
        h: Array,
        gumbels: Array | None = None,
        temperature: float | Array | None = None,
        train: bool = False,
    ) -> Quantized:
        """Draws a code for each place of h [b, h, w, c].

        Args:
          h: Encodings.
          gumbels: Standard Gumbel noise [b, h, w, codes in use], else drawn from the rng "gumbel".
          temperature: That of the softmax, which training may lower; ``temp_init`` by default.
          train: Whether mixtures are allowed.
        """
        b, height, width, c = h.shape
        if c != (self.num_hiddens or self.embed_dim):
            raise ValueError(
                f"GumbelQuantizer: {c} channels, expected {self.num_hiddens or self.embed_dim}"
            )
        logits = self.layer(Dense)(self.n_embed, name="proj")(h).astype(jnp.float32)
        embed = self.param("embed", nn.initializers.normal(1.0), (self.n_embed, self.embed_dim))
        used = np.arange(self.n_embed) if self.remap is None else np.asarray(self.remap)
        logits = logits[..., used]
        if gumbels is None:
            gumbels = jax.random.gumbel(self.key("gumbel"), logits.shape)
        temperature = self.temp_init if temperature is None else temperature
        weights = jax.nn.softmax((logits + gumbels) / temperature, axis=-1)
        place = weights.argmax(-1)
        if self.straight_through or not train:
            weights = straight_through(weights, jax.nn.one_hot(place, len(used)))
        z = jnp.einsum("bhwn,nd->bhwd", weights, jnp.asarray(embed)[used], precision="highest")
        z = z.astype(self.dtype)
        q = jax.nn.softmax(logits, axis=-1)
        loss = self.kl_weight * jnp.sum(q * jnp.log(q * self.n_embed + 1e-10), axis=-1).mean()
        # All codes are in use: nothing is drawn.
        indices = self.remap_to_used(jnp.asarray(used, jnp.int32)[place], place)
        return Quantized(z, loss, indices.reshape(b, height, width))

    def codes(self, indices: Array) -> Array:
        """Returned indices [...] -> codes [..., embed_dim]."""
        return jnp.take(self.get_variable("params", "embed"), self.unmap_to_all(indices), axis=0)


class EMAQuantizer(Quantizer):
    """Nearest codes of a codebook of moving averages (van den Oord et al. 2017, appendix A.1).

    The codebook is state, not parameters: the collection "codebook" holds embedding, embed_avg
    [n_embed, embed_dim] and cluster_size [n_embed]. Training updates it, for which it must be
    mutable; the codes returned are those from before the update. Under jit the statistics are those
    of the whole batch; on a mapped axis of devices ``axis_name`` sums them. The loss is the
    commitment alone.
    """

    beta: float = 0.25
    decay: float = 0.99
    eps: float = 1e-5
    axis_name: str | None = None

    def setup(self) -> None:
        """Makes the submodules and variables."""
        shape = (self.n_embed, self.embed_dim)
        self.embedding = self.variable(
            "codebook", "embedding", lambda: jax.random.normal(self.make_rng("params"), shape)
        )
        self.embed_avg = self.variable("codebook", "embed_avg", lambda: self.embedding.value)
        self.cluster_size = self.variable("codebook", "cluster_size", jnp.zeros, (self.n_embed,))

    def __call__(self, h: Array, train: bool = False) -> Quantized:
        """``h`` [b, h, w, embed_dim] -> its nearest codes."""
        b, height, width, c = h.shape
        h = h.astype(jnp.float32)
        flat = jax.lax.stop_gradient(h).reshape(-1, c)
        axis_name = None if self.is_initializing() else self.axis_name
        indices = nearest_codes(flat, self.embedding.value)
        codes = jnp.take(self.embedding.value, indices, axis=0).reshape(h.shape)
        if train and not self.is_initializing():
            self.update(flat, indices)
        loss = self.beta * jnp.square(codes - h).mean()
        use = perplexity_of(indices, self.n_embed, axis_name)
        z = straight_through(h, codes).astype(self.dtype)
        return Quantized(z, loss, self.shaped(indices, b, height, width), use)

    def update(self, flat: Array, indices: Array) -> None:
        """Moves the averages and the codes towards the encodings [n, c] nearest to each code."""
        members = jnp.bincount(indices, length=self.n_embed).astype(jnp.float32)
        sums = jax.ops.segment_sum(flat, indices, self.n_embed)
        if self.axis_name is not None:
            members, sums = jax.lax.psum((members, sums), self.axis_name)
        self.cluster_size.value = self.decay * self.cluster_size.value + (1 - self.decay) * members
        self.embed_avg.value = self.decay * self.embed_avg.value + (1 - self.decay) * sums
        # Laplace smoothing avoids a division by zero for codes without members.
        n = self.cluster_size.value.sum()
        smoothed = (self.cluster_size.value + self.eps) / (n + self.n_embed * self.eps) * n
        self.embedding.value = self.embed_avg.value / smoothed[:, None]

    def codes(self, indices: Array) -> Array:
        """Returned indices [...] -> codes [..., embed_dim]."""
        return jnp.take(self.embedding.value, self.unmap_to_all(indices), axis=0)


QUANTIZERS = {"vq": VectorQuantizer, "gumbel": GumbelQuantizer, "ema": EMAQuantizer}
