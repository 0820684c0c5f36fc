"""The KL autoencoder (Esser et al. 2021; Rombach et al. 2022) and the diagonal Gaussian that is its posterior."""

from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from ldm_jax.nn.attention import apply_maybe, autoencoder_attention
from ldm_jax.nn.layers import Array, Dtype, GroupNorm, conv, init
from ldm_jax.nn.resnet import Downsample, ResnetBlock, Upsample


@flax.struct.dataclass
class DiagonalGaussian:
    """A Gaussian with diagonal covariance over arrays [b, h, w, c]; ``logvar`` is clamped to [-30, 20].

    ``deterministic`` is the original's switch: no spread, and zero divergence.
    """

    mean: Array
    logvar: Array
    deterministic: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def from_moments(cls, moments: Array, deterministic: bool = False) -> "DiagonalGaussian":
        """Splits moments [b, h, w, 2c] into mean and logvar, in float32."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0), deterministic)

    @property
    def var(self) -> Array:
        return jnp.zeros_like(self.mean) if self.deterministic else jnp.exp(self.logvar)

    @property
    def std(self) -> Array:
        return jnp.zeros_like(self.mean) if self.deterministic else jnp.exp(0.5 * self.logvar)

    def sample(self, noise: Array) -> Array:
        """Mean + std * noise, with standard normal ``noise`` of the mean's shape."""
        return self.mean + self.std * noise

    def mode(self) -> Array:
        return self.mean

    def kl(self, other: "DiagonalGaussian | None" = None) -> Array:
        """KL divergence [b] in nats to ``other`` (a standard normal when None), summed over height, width and channels."""
        if self.deterministic:
            return jnp.zeros(1)
        if other is None:
            terms = jnp.square(self.mean) + self.var - 1.0 - self.logvar
        else:
            terms = (
                jnp.square(self.mean - other.mean) / other.var
                + self.var / other.var
                - 1.0
                - self.logvar
                + other.logvar
            )
        return 0.5 * terms.sum((1, 2, 3))

    def nll(self, x: Array) -> Array:
        """Negative log-likelihood [b] of ``x`` in nats, summed over height, width and channels."""
        if self.deterministic:
            return jnp.zeros(1)
        return 0.5 * (
            jnp.log(2.0 * jnp.pi) + self.logvar + jnp.square(x - self.mean) / self.var
        ).sum((1, 2, 3))


def normal_kl(mean1: Array, logvar1: Array, mean2: Array, logvar2: Array) -> Array:
    """Elementwise KL divergence in nats between two Gaussians given by mean and log variance."""
    return 0.5 * (
        -1.0
        + logvar2
        - logvar1
        + jnp.exp(logvar1 - logvar2)
        + jnp.square(mean1 - mean2) * jnp.exp(-logvar2)
    )


class Coder(nn.Module):
    """The fields that encoder and decoder share; names and defaults are the original's ``ddconfig``.

    ``attn_resolutions`` are sizes in pixels, counted down from ``resolution`` whatever size the input really has. The middle block always has
    attention of the kind ``attn_type``. ``norm_groups`` is not the original's, which always has 32: on 32 channels that is instance normalisation,
    which takes every picture's overall colour away, so a network as narrow as that needs fewer groups.
    """

    ch: int
    out_ch: int
    in_channels: int
    resolution: int
    z_channels: int
    num_res_blocks: int
    ch_mult: tuple[int, ...] = (1, 2, 4, 8)
    attn_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0
    resamp_with_conv: bool = True
    attn_type: Literal["vanilla", "linear", "none"] = "vanilla"
    norm_groups: int = 32
    remat: bool = False
    dtype: Dtype = jnp.float32

    def res(self, features: int, name: str) -> ResnetBlock:
        block: Any = nn.remat(ResnetBlock, static_argnums=(2,)) if self.remat else ResnetBlock
        return block(
            features, self.dropout, norm_groups=self.norm_groups, dtype=self.dtype, name=name
        )

    def attends(self, level: int) -> bool:
        """Whether the blocks of a level have attention: the size is counted down (in the decoder back up) by whole halvings."""
        return self.resolution // 2**level in self.attn_resolutions

    def attn(self, channels: int, name: str) -> nn.Module | None:
        return autoencoder_attention(
            self.attn_type, channels, norm_groups=self.norm_groups, name=name, dtype=self.dtype
        )

    def middle(self, h: Array, train: bool) -> Array:
        c = h.shape[-1]
        h = self.res(c, "mid_block_1")(h, train)
        h = apply_maybe(self.attn(c, "mid_attn_1"), h)
        return self.res(c, "mid_block_2")(h, train)


class Encoder(Coder):
    """x [b, H, W, in_channels] -> [b, H / f, W / f, 2 z_channels] with f = 2^(levels - 1); z_channels when ``double_z`` is off."""

    double_z: bool = True

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        h = conv(self.ch, 3, x, name="conv_in", dtype=self.dtype)(x)
        for level, mult in enumerate(self.ch_mult):
            features = mult * self.ch
            for i in range(self.num_res_blocks):
                h = self.res(features, f"down_{level}_block_{i}")(h, train)
                if self.attends(level):
                    h = apply_maybe(self.attn(features, f"down_{level}_attn_{i}"), h)
            if level != len(self.ch_mult) - 1:
                h = Downsample(
                    self.resamp_with_conv, "right", self.dtype, name=f"down_{level}_downsample"
                )(h)
        h = self.middle(h, train)
        h = GroupNorm(1e-6, self.norm_groups, silu=True, dtype=self.dtype, name="norm_out")(h)
        return conv(
            self.z_channels * (2 if self.double_z else 1), 3, h, name="conv_out", dtype=self.dtype
        )(h)


class Decoder(Coder):
    """z [b, h, w, z_channels] -> [b, h f, w f, out_ch] with f = 2^(levels - 1).

    ``give_pre_end`` stops before the last normalisation and convolution; ``tanh_out`` bounds the result.
    """

    give_pre_end: bool = False
    tanh_out: bool = False

    def attends(self, level: int) -> bool:
        last = len(self.ch_mult) - 1
        return self.resolution // 2**last * 2 ** (last - level) in self.attn_resolutions

    @nn.compact
    def __call__(self, z: Array, train: bool = False) -> Array:
        last = len(self.ch_mult) - 1
        h = conv(self.ch * self.ch_mult[last], 3, z, name="conv_in", dtype=self.dtype)(z)
        h = self.middle(h, train)
        for level in reversed(range(last + 1)):
            features = self.ch_mult[level] * self.ch
            for i in range(self.num_res_blocks + 1):
                h = self.res(features, f"up_{level}_block_{i}")(h, train)
                if self.attends(level):
                    h = apply_maybe(self.attn(features, f"up_{level}_attn_{i}"), h)
            if level != 0:
                h = Upsample(self.resamp_with_conv, self.dtype, name=f"up_{level}_upsample")(h)
        if self.give_pre_end:
            return h
        h = GroupNorm(1e-6, self.norm_groups, silu=True, dtype=self.dtype, name="norm_out")(h)
        h = conv(self.out_ch, 3, h, name="conv_out", dtype=self.dtype)(h)
        return jnp.tanh(h) if self.tanh_out else h


class Autoencoder(nn.Module):
    """The fields that the KL and the VQ autoencoder share: the original's ``ddconfig`` beside ``embed_dim``, the channels of a latent."""

    embed_dim: int
    ch: int
    out_ch: int
    in_channels: int
    resolution: int
    z_channels: int
    num_res_blocks: int
    ch_mult: tuple[int, ...] = (1, 2, 4, 8)
    attn_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0
    resamp_with_conv: bool = True
    attn_type: Literal["vanilla", "linear", "none"] = "vanilla"
    norm_groups: int = 32
    remat: bool = False
    tanh_out: bool = False
    dtype: Dtype = jnp.float32

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.ch_mult) - 1)

    def coder_fields(self) -> dict[str, Any]:
        """The fields that go to encoder and decoder alike."""
        return {
            f: getattr(self, f) for f in Coder.__dataclass_fields__ if f not in ("parent", "name")
        }


class AutoencoderKL(Autoencoder):
    """The KL autoencoder. Pixels are float in [-1, 1]; latents are [b, H / f, W / f, embed_dim] with f = 2^(levels - 1), unscaled.

    Methods: ``encode``, ``decode``; calling it reconstructs (and initialises).
    """

    def setup(self) -> None:
        shared = self.coder_fields()
        self.encoder = Encoder(**shared, double_z=True)
        self.decoder = Decoder(**shared, tanh_out=self.tanh_out)
        self.quant_conv = nn.Dense(2 * self.embed_dim, dtype=self.dtype)
        self.post_quant_conv = nn.Dense(self.z_channels, dtype=self.dtype)

    def encode(self, x: Array, train: bool = False) -> DiagonalGaussian:
        """X [b, H, W, in_channels] in [-1, 1] -> the posterior over latents [b, H / f, W / f, embed_dim]."""
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(x, train)))

    def decode(self, z: Array, train: bool = False) -> Array:
        """Z [b, h, w, embed_dim] -> pixels [b, h f, w f, out_ch], float32, about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z), train).astype(jnp.float32)

    def __call__(
        self, x: Array, noise: Array | None = None, train: bool = False
    ) -> tuple[Array, DiagonalGaussian]:
        """(reconstruction, posterior); from the posterior's sample with ``noise``, else from its mode."""
        posterior = self.encode(x, train)
        z = posterior.mode() if noise is None else posterior.sample(noise)
        return self.decode(z, train), posterior


def latent_shape(model: Autoencoder, height: int, width: int) -> tuple[int, int, int]:
    """(h, w, c) of the latent of a picture of ``height`` x ``width`` pixels."""
    f = model.downsampling
    return height // f, width // f, model.embed_dim


def init_variables(model: Autoencoder, key: jax.Array) -> dict[str, Any]:
    """All collections: float32 "params", and "codebook" where a codebook is averaged, not trained."""
    side = 2 * model.downsampling
    return dict(init(model, key, jnp.zeros((1, side, side, model.in_channels))))


def init_autoencoder(model: Autoencoder, key: jax.Array) -> dict:
    """Fresh float32 parameters."""
    return init_variables(model, key)["params"]
