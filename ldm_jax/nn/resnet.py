"""Residual blocks and resamplers of the UNet and of the autoencoders. Arrays are NHWC."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.kernels.reference import upsample_nearest
from ldm_jax.nn.layers import Array, Conv, Dense, GroupNorm, Module, avg_pool


class Upsample(Module):
    """Nearest-neighbour doubling, then a 3x3 convolution unless ``use_conv`` is off."""

    use_conv: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if not self.use_conv:
            return self.kernels.keep_rows(upsample_nearest(x))
        return self.layer(Conv)(x.shape[-1], upsample=True, name="conv")(x)


class Downsample(Module):
    """Halving by a strided 3x3 convolution, or by averaging when ``use_conv`` is off.

    ``padding`` "same" pads one pixel on all sides (the UNet's), "right" only below and on the right
    (the autoencoders').
    """

    use_conv: bool = True
    padding: Literal["same", "right"] = "same"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if not self.use_conv:
            return avg_pool(x)
        pad = ((1, 1), (1, 1)) if self.padding == "same" else ((0, 1), (0, 1))
        return self.layer(Conv)(x.shape[-1], stride=2, padding=pad, name="conv")(x)


class ResBlock(Module):
    """The UNet's residual block (Dhariwal & Nichol 2021, arXiv:2105.05233).

    x [b, h, w, c], emb [b, e] -> [b, h', w', features]. The timestep embedding is added, or with
    ``scale_shift`` scales and shifts the normalised features. ``resample`` "up" doubles and "down"
    halves height and width, between activation and convolution and on the skip. The last
    convolution starts at zero. ``conv_skip`` makes the skip 3x3 instead of 1x1.
    """

    features: int
    dropout: float = 0.0
    scale_shift: bool = False
    resample: Literal["none", "up", "down"] = "none"
    conv_skip: bool = False
    norm_groups: int = 32

    @nn.compact
    def __call__(self, x: Array, emb: Array, train: bool = False) -> Array:
        conv, dense, norm = self.layer(Conv), self.layer(Dense), self.layer(GroupNorm)
        resample = {"none": lambda a: a, "up": upsample_nearest, "down": avg_pool}[self.resample]
        h = resample(norm(1e-5, self.norm_groups, silu=True, name="in_norm")(x))
        x = resample(x)
        h = conv(self.features, name="in_conv")(h)

        width = 2 * self.features if self.scale_shift else self.features
        e = dense(width, name="emb")(nn.silu(emb))[:, None, None]
        if self.scale_shift:
            scale, shift = jnp.split(e, 2, axis=-1)
            h = norm(1e-5, self.norm_groups, name="out_norm")(h)
            h = nn.silu(h * (1 + scale) + shift)
        else:
            h = norm(1e-5, self.norm_groups, silu=True, name="out_norm")(h + e)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(self.features, zero=True, name="out_conv")(h)

        if x.shape[-1] != self.features:
            x = (conv if self.conv_skip else dense)(self.features, name="skip")(x)
        return x + h


class ResnetBlock(Module):
    """The autoencoders' residual block. [b, h, w, c] -> [b, h, w, features]."""

    features: int
    dropout: float = 0.0
    conv_skip: bool = False
    norm_groups: int = 32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        conv, dense, norm = self.layer(Conv), self.layer(Dense), self.layer(GroupNorm)
        h = norm(1e-6, self.norm_groups, silu=True, name="norm1")(x)
        h = conv(self.features, name="conv1")(h)
        h = norm(1e-6, self.norm_groups, silu=True, name="norm2")(h)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(self.features, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = (conv if self.conv_skip else dense)(self.features, name="skip")(x)
        return self.kernels.keep_rows(x + h)
