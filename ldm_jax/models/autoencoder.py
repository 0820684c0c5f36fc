"""The KL autoencoder (Rombach et al. 2022, arXiv:2112.10752) and its Gaussian posterior."""

from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from ldm_jax.kernels import REFERENCE
from ldm_jax.nn.attention import AttnBlock, LinearAttention
from ldm_jax.nn.layers import Array, Conv, Dense, GroupNorm, Module
from ldm_jax.nn.resnet import Downsample, ResnetBlock, Upsample

AttnType = Literal["vanilla", "linear", "none"]
lecun_normal = nn.initializers.lecun_normal()


@flax.struct.dataclass
class DiagonalGaussian:
    """A Gaussian with diagonal covariance over arrays [b, h, w, c]; ``logvar`` is in [-30, 20].

    ``deterministic`` is the original's switch: no variance, and zero divergence.
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
        """The variance [b, h, w, c]."""
        return jnp.zeros_like(self.mean) if self.deterministic else jnp.exp(self.logvar)

    @property
    def std(self) -> Array:
        """The standard deviation [b, h, w, c]."""
        return jnp.zeros_like(self.mean) if self.deterministic else jnp.exp(0.5 * self.logvar)

    def sample(self, noise: Array) -> Array:
        """Mean + std * noise, with standard normal ``noise`` of the mean's shape."""
        return self.mean + self.std * noise

    def mode(self) -> Array:
        """The mode, which is the mean."""
        return self.mean

    def kl(self, other: "DiagonalGaussian | None" = None) -> Array:
        """KL divergence [b] in nats, summed over pixels; to a standard normal without ``other``."""
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
        """Negative log-likelihood [b] of ``x`` in nats, summed over pixels."""
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


class Coder(Module):
    """The fields that encoder and decoder share: the original's ``ddconfig`` with its defaults.

    ``attn_resolutions`` are sizes in pixels, counted down from ``resolution`` whatever size the
    input has. The middle block always has attention of the kind ``attn_type``. ``norm_groups`` is
    not of the original, which always has 32: of 32 channels that is instance normalisation, which
    removes the overall colour of a picture, so that a network as narrow needs fewer groups.
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
    attn_type: AttnType = "vanilla"
    norm_groups: int = 32
    remat: bool = False

    def res(self, features: int, name: str) -> ResnetBlock:
        """A residual block; called inside ``__call__``."""
        block: Any = nn.remat(ResnetBlock, static_argnums=(2,)) if self.remat else ResnetBlock
        return self.layer(block)(features, self.dropout, norm_groups=self.norm_groups, name=name)

    def attends(self, level: int) -> bool:
        """Whether the blocks of a level have attention; sizes are counted by whole halvings."""
        return self.resolution // 2**level in self.attn_resolutions

    def attend(self, h: Array, name: str) -> Array:
        """The attention of one place, applied; called inside ``__call__``."""
        match self.attn_type:
            case "vanilla":
                return self.layer(AttnBlock)(self.norm_groups, name=name)(h)
            case "linear":
                return self.layer(LinearAttention)(1, h.shape[-1], name=name)(h)
            case "none":
                return h
        raise ValueError(f"attn_type {self.attn_type!r} is not one of vanilla, linear, none")

    def middle(self, h: Array, train: bool) -> Array:
        """The middle block; called inside ``__call__``."""
        c = h.shape[-1]
        h = self.res(c, "mid_block_1")(h, train)
        h = self.attend(h, "mid_attn_1")
        return self.res(c, "mid_block_2")(h, train)

    def head(self, h: Array, features: int) -> Array:
        """The last normalisation and convolution; called inside ``__call__``."""
        h = self.layer(GroupNorm)(1e-6, self.norm_groups, silu=True, name="norm_out")(h)
        return self.layer(Conv)(features, name="conv_out")(h)


class Encoder(Coder):
    """x [b, H, W, in_channels] -> [b, H / f, W / f, 2 z_channels] with f = 2^(levels - 1).

    z_channels when ``double_z`` is off.
    """

    double_z: bool = True

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        h = self.layer(Conv)(self.ch, name="conv_in")(x)
        for level, mult in enumerate(self.ch_mult):
            for i in range(self.num_res_blocks):
                h = self.res(mult * self.ch, f"down_{level}_block_{i}")(h, train)
                if self.attends(level):
                    h = self.attend(h, f"down_{level}_attn_{i}")
            if level != len(self.ch_mult) - 1:
                down = self.layer(Downsample)
                h = down(self.resamp_with_conv, "right", name=f"down_{level}_downsample")(h)
        return self.head(self.middle(h, train), self.z_channels * (2 if self.double_z else 1))


class Decoder(Coder):
    """z [b, h, w, z_channels] -> [b, h f, w f, out_ch] with f = 2^(levels - 1).

    ``give_pre_end`` stops before the last normalisation and convolution; ``tanh_out`` bounds the
    result.
    """

    give_pre_end: bool = False
    tanh_out: bool = False

    def attends(self, level: int) -> bool:
        """As in the encoder, counted back up from the smallest size."""
        last = len(self.ch_mult) - 1
        return self.resolution // 2**last * 2 ** (last - level) in self.attn_resolutions

    @nn.compact
    def __call__(self, z: Array, train: bool = False) -> Array:
        last = len(self.ch_mult) - 1
        h = self.layer(Conv)(self.ch * self.ch_mult[last], name="conv_in")(z)
        h = self.middle(h, train)
        for level in reversed(range(last + 1)):
            for i in range(self.num_res_blocks + 1):
                h = self.res(self.ch_mult[level] * self.ch, f"up_{level}_block_{i}")(h, train)
                if self.attends(level):
                    h = self.attend(h, f"up_{level}_attn_{i}")
            if level != 0:
                h = self.layer(Upsample)(self.resamp_with_conv, name=f"up_{level}_upsample")(h)
        if self.give_pre_end:
            return h
        h = self.head(h, self.out_ch)
        return jnp.tanh(h) if self.tanh_out else h


class Autoencoder(Module):
    """The fields of the KL and the VQ autoencoder: the original's ``ddconfig`` and ``embed_dim``.

    ``embed_dim`` are the channels of a latent.
    """

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
    attn_type: AttnType = "vanilla"
    norm_groups: int = 32
    remat: bool = False
    tanh_out: bool = False

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.ch_mult) - 1)

    def coder_fields(self) -> dict[str, Any]:
        """The fields that encoder and decoder share."""
        names = (f for f in Coder.__dataclass_fields__ if f not in ("parent", "name"))
        return {name: getattr(self, name) for name in names}

    def make_coders(self, moments: int) -> None:
        """Makes encoder and decoder, and 1x1 convolutions between; called in ``setup``.

        Args:
          moments: Arrays of latents that the encoder gives: 2 with a log variance.
        """
        fields, dense = self.coder_fields(), self.layer(Dense)
        init = {"kernel_init": lecun_normal, "bias_init": nn.initializers.zeros}
        self.encoder = Encoder(**fields, double_z=moments == 2)
        self.decoder = Decoder(**fields, tanh_out=self.tanh_out)
        self.quant_conv = dense(moments * self.embed_dim, **init)
        self.post_quant_conv = dense(self.z_channels, **init)


class AutoencoderKL(Autoencoder):
    """The KL autoencoder: pixels in [-1, 1] to unscaled latents [b, H / f, W / f, embed_dim].

    f = 2^(levels - 1). Methods: ``encode``, ``decode``; calling it reconstructs (and initialises).
    """

    def setup(self) -> None:
        """Makes the submodules."""
        self.make_coders(2)

    def encode(self, x: Array, train: bool = False) -> DiagonalGaussian:
        """``x`` [b, H, W, in_channels] -> the posterior over latents [b, h, w, c]."""
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(x, train)))

    def decode(self, z: Array, train: bool = False) -> Array:
        """``z`` [b, h, w, embed_dim] -> pixels [b, h f, w f, out_ch], float32, about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z), train).astype(jnp.float32)

    def __call__(
        self, x: Array, noise: Array | None = None, train: bool = False
    ) -> tuple[Array, DiagonalGaussian]:
        """(reconstruction, posterior); decodes a sample with ``noise``, else the mode."""
        posterior = self.encode(x, train)
        z = posterior.mode() if noise is None else posterior.sample(noise)
        return self.decode(z, train), posterior


def latent_shape(model: Autoencoder, height: int, width: int) -> tuple[int, int, int]:
    """(h, w, c) of the latent of a picture of ``height`` x ``width`` pixels."""
    f = model.downsampling
    return height // f, width // f, model.embed_dim


def init_variables(model: Autoencoder, key: jax.Array) -> dict[str, Any]:
    """All collections: float32 "params", and "codebook" if the codebook is a moving average."""
    side, plain = 2 * model.downsampling, model.clone(kernels=REFERENCE)
    return dict(plain.init(key, jnp.zeros((1, side, side, model.in_channels))))


def init_autoencoder(model: Autoencoder, key: jax.Array) -> dict:
    """Initial float32 parameters."""
    return init_variables(model, key)["params"]
