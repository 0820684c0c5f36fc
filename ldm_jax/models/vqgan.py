"""The VQ autoencoder (VQGAN, Esser et al. 2021, arXiv:2012.09841), also as a first stage."""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.models.autoencoder import Autoencoder
from ldm_jax.models.quantize import EMAQuantizer, GumbelQuantizer, Quantized, VectorQuantizer
from ldm_jax.nn.layers import Array


class VQModel(Autoencoder, kw_only=True):
    """The VQ autoencoder. Pixels are float in [-1, 1], codes [b, H / f, W / f, embed_dim].

    f = 2^(levels - 1). Fields are the original's ``ddconfig``, ``embed_dim`` and ``n_embed``, and
    those of the quantiser (`ldm_jax.models.quantize`). Calling it reconstructs (and initialises).

    Attributes:
      quantizer: "vq"; "gumbel", with ``kl_weight``, whose evaluation draws from the rng "gumbel";
      or
        "ema", whose state is in the collection "codebook".
      n_labels: For a model of label maps: the parameters then hold a colour for each label
        ("colorize" [n_labels, 3], not trained; see `to_rgb`).
      axis_name: The mapped axis of devices over which the EMA quantiser takes its statistics.
    """

    n_embed: int
    quantizer: Literal["vq", "gumbel", "ema"] = "vq"
    beta: float = 0.25
    kl_weight: float = 1e-8
    legacy: bool = True
    remap: tuple[int, ...] | None = None
    unknown_index: int | Literal["random", "extra"] = "random"
    sane_index_shape: bool = False
    n_labels: int | None = None
    axis_name: str | None = None

    def make_quantizer(self) -> VectorQuantizer | GumbelQuantizer | EMAQuantizer:
        """The quantiser alone, unbound."""
        shared: dict[str, Any] = {
            "n_embed": self.n_embed,
            "embed_dim": self.embed_dim,
            "remap": self.remap,
            "unknown_index": self.unknown_index,
            "sane_index_shape": self.sane_index_shape,
            "kernels": self.kernels,
            "parent": None,
        }
        match self.quantizer:
            case "vq":
                return VectorQuantizer(**shared, beta=self.beta, legacy=self.legacy)
            case "gumbel":
                return GumbelQuantizer(**shared, kl_weight=self.kl_weight)
            case "ema":
                return EMAQuantizer(**shared, beta=self.beta, axis_name=self.axis_name)
        raise ValueError(f"quantizer {self.quantizer!r} is not one of vq, gumbel, ema")

    def setup(self) -> None:
        """Makes the submodules and variables."""
        self.make_coders(1)
        self.quantize = self.make_quantizer()
        if self.n_labels is not None:
            self.colorize = self.param("colorize", nn.initializers.normal(1.0), (self.n_labels, 3))

    def prequant(self, x: Array, train: bool = False) -> Array:
        """``x`` [b, H, W, in_channels] -> encodings float32 [b, h, w, embed_dim]."""
        return self.quant_conv(self.encoder(x, train)).astype(jnp.float32)

    def quantized(
        self,
        h: Array,
        train: bool = False,
        gumbels: Array | None = None,
        temperature: float | Array | None = None,
    ) -> Quantized:
        """``h`` [b, h, w, embed_dim] -> codes; the options are those of the Gumbel quantiser."""
        match self.quantize:
            case VectorQuantizer():
                return self.quantize(h)
            case GumbelQuantizer():
                return self.quantize(h, gumbels, temperature, train=train)
        return self.quantize(h, train=train)

    def encode(self, x: Array, train: bool = False) -> Quantized:
        """``x`` [b, H, W, in_channels] -> codes, loss and indices."""
        return self.quantized(self.prequant(x, train), train)

    def decode(self, z: Array, train: bool = False) -> Array:
        """Codes [b, h, w, embed_dim] -> pixels [b, h f, w f, out_ch], float32, about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z), train).astype(jnp.float32)

    def codes(self, indices: Array) -> Array:
        """Indices [b, h, w] -> codes [b, h, w, embed_dim]."""
        return self.quantize.codes(indices)

    def decode_code(self, indices: Array) -> Array:
        """Indices [b, h, w] -> pixels [b, h f, w f, out_ch]."""
        return VQModel.decode(self, self.codes(indices))

    def to_rgb(self, x: Array) -> Array:
        """Label maps [b, h, w, n_labels], one-hot or scores -> pictures [b, h, w, 3] in [-1, 1]."""
        x = x.astype(jnp.float32) @ self.colorize
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0

    def reconstruct(
        self,
        x: Array,
        train: bool = False,
        gumbels: Array | None = None,
        temperature: float | Array | None = None,
    ) -> tuple[Array, Quantized, Array]:
        """(reconstruction, codes, encodings before quantisation); see `quantized`."""
        h = self.prequant(x, train)
        code = self.quantized(h, train, gumbels, temperature)
        return VQModel.decode(self, code.z, train), code, h

    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Quantized]:
        """(reconstruction, codes)."""
        y, code, _ = self.reconstruct(x, train)
        return y, code


class VQModelInterface(VQModel, kw_only=True):
    """The VQ autoencoder as a first stage: latents are not quantised, decoding quantises them.

    It needs no random numbers: a Gumbel quantiser takes the likeliest code.
    """

    def quantized(
        self,
        h: Array,
        train: bool = False,
        gumbels: Array | None = None,
        temperature: float | Array | None = None,
    ) -> Quantized:
        """As `VQModel.quantized`, but outside of training without noise unless that is given."""
        if gumbels is None and not train:
            gumbels = jnp.zeros(())
        return super().quantized(h, train, gumbels, temperature)

    def encode(self, x: Array, train: bool = False) -> Array:  # type: ignore[override]
        """``x`` [b, H, W, in_channels] -> unscaled latents [b, h, w, c], not quantised."""
        return self.prequant(x, train)

    def decode(self, z: Array, train: bool = False, quantize: bool = True) -> Array:
        """Latents [b, h, w, c], quantised first if ``quantize`` -> pixels [b, h f, w f, 3]."""
        return super().decode(self.quantized(z, train).z if quantize else z, train)
