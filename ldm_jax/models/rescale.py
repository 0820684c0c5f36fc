"""Coders with a free scale factor, and a network over the latents of a frozen first stage.

LatentRescaler, MergedRescaleEncoder, MergedRescaleDecoder and FirstStagePostProcessor of the
original (Rombach et al. 2022, arXiv:2112.10752).
"""

from typing import Any

import flax.linen as nn
import jax

from ldm_jax.models.autoencoder import Autoencoder, AutoencoderKL, Decoder, Encoder
from ldm_jax.nn.attention import AttnBlock
from ldm_jax.nn.layers import Array, Conv, Dense, GroupNorm, Module, avg_pool
from ldm_jax.nn.resize import resize_to
from ldm_jax.nn.resnet import ResnetBlock


class LatentRescaler(Module):
    """Residual blocks, a nearest resize, attention, residual blocks.

    x [b, h, w, in_channels] -> [b, round(h factor), round(w factor), out_channels]; halves round to
    even.
    """

    factor: float
    in_channels: int
    mid_channels: int
    out_channels: int
    depth: int = 2

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        def blocks(x: Array, name: str) -> Array:
            for i in range(self.depth):
                x = self.layer(ResnetBlock)(self.mid_channels, name=f"{name}_{i}")(x, train)
            return x

        x = blocks(self.layer(Conv)(self.mid_channels, name="conv_in")(x), "res_block1")
        h, w = (round(n * self.factor) for n in x.shape[1:3])
        x = self.layer(AttnBlock)(name="attn")(resize_to(x, (h, w), "nearest"))
        return self.layer(Dense)(self.out_channels, name="conv_out")(blocks(x, "res_block2"))


class _Merged(Module):
    """The fields that both rescaling coders share; names are the original's."""

    ch: int
    out_ch: int
    resolution: int
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    ch_mult: tuple[int, ...] = (1, 2, 4, 8)
    dropout: float = 0.0
    resamp_with_conv: bool = True
    rescale_factor: float = 1.0
    rescale_module_depth: int = 1

    def coder(self, cls: type[Any], **fields: Any) -> Any:
        """The inner encoder or decoder; called inside ``setup``."""
        shared = "ch resolution num_res_blocks attn_resolutions ch_mult dropout resamp_with_conv"
        fields |= {name: getattr(self, name) for name in shared.split()}
        return self.layer(cls)(**fields)

    def rescale(self, channels: tuple[int, int, int]) -> LatentRescaler:
        """The rescaler from, over and to these channels; called inside ``setup``."""
        return self.layer(LatentRescaler)(self.rescale_factor, *channels, self.rescale_module_depth)


class MergedRescaleEncoder(_Merged, kw_only=True):
    """An encoder, then a rescaler: [b, H, W, in_channels] -> [b, h, w, out_ch]."""

    in_channels: int

    def setup(self) -> None:
        """Makes the submodules."""
        width = self.ch * self.ch_mult[-1]
        inner = {"in_channels": self.in_channels, "out_ch": 0, "double_z": False}
        self.encoder = self.coder(Encoder, z_channels=width, **inner)
        self.rescaler = self.rescale((width, width, self.out_ch))

    def __call__(self, x: Array, train: bool = False) -> Array:
        """Encodes pixels."""
        return self.rescaler(self.encoder(x, train), train)


class MergedRescaleDecoder(_Merged, kw_only=True):
    """A rescaler, then a decoder: [b, h, w, z_channels] -> [b, H, W, out_ch]."""

    z_channels: int

    def setup(self) -> None:
        """Makes the submodules."""
        width = self.z_channels * self.ch_mult[-1]
        self.decoder = self.coder(Decoder, z_channels=width, out_ch=self.out_ch, in_channels=0)
        self.rescaler = self.rescale((self.z_channels, width, width))

    def __call__(self, z: Array, train: bool = False) -> Array:
        """Decodes latents."""
        return self.decoder(self.rescaler(z, train), train)


class FirstStagePostProcessor(Module):
    """Residual blocks that each halve the latents of a frozen first stage, for conditioning.

    Pixels [b, H, W, 3] -> [b, h / 2^n, w / 2^n, n_channels ch_mult[-1]] of latents [b, h, w, c] and
    n levels; with ``reshape`` as tokens [b, h w / 4^n, ...], row by row.

    Attributes:
      pretrained: The first stage, whose parameters are not trained; a KL model gives its mode.
      n_channels: The first width; that of the first stage's encoder where it is None.
    """

    ch_mult: tuple[int, ...]
    in_channels: int
    pretrained: Autoencoder
    reshape: bool = False
    n_channels: int | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        first_stage = self.pretrained.clone(parent=self, name="pretrained_model")
        if self.is_initializing():
            first_stage(x)  # makes the parameters of the decoder, too
        code: Any = first_stage.encode(x)
        z = code.mode() if isinstance(first_stage, AutoencoderKL) else code
        h = jax.lax.stop_gradient(z)
        width = self.n_channels or self.pretrained.ch
        # Half as many groups as channels, unlike everywhere else.
        h = self.layer(GroupNorm)(1e-6, self.in_channels // 2, name="proj_norm")(h)
        h = nn.silu(self.layer(Conv)(width, name="proj")(h))
        for i, mult in enumerate(self.ch_mult):
            h = self.layer(ResnetBlock)(mult * width, self.dropout, name=f"model_{i}")(h, train)
            h = avg_pool(h)
        return h.reshape(len(h), -1, h.shape[-1]) if self.reshape else h
