"""Residual blocks and resamplers of the UNet and of the autoencoders. Arrays are NHWC."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.distributed.parallel import for_tpu
from ldm_jax.kernels.convolution import convolve
from ldm_jax.nn.layers import (
    Array,
    Dtype,
    GroupNorm,
    avg_pool,
    conv,
    dense,
    keep_rows,
    upsample_nearest,
)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution unless ``use_conv`` is off."""

    use_conv: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if not self.use_conv:
            return keep_rows(upsample_nearest(x))
        return conv(x.shape[-1], 3, x, name="conv", dtype=self.dtype, by=convolve_doubled)(x)


def convolve_doubled(x: Array, w: Array, strides: Any, padding: Any, **options: Any) -> Array:
    """A 3x3 convolution, padded by one, of ``x`` [b, h, w, c] with every pixel repeated along both axes -> [b, 2h, 2w, features].

    For TPUs, over many pixels for each weight, as one of 4x4 over x with zeros between its pixels: a repeated pixel meets the sum of two weights. It
    has 4/9 of the products, and the repeated pixels are not written down.
    """
    if not for_tpu() or 4 * x.shape[1] * x.shape[2] < 16 * x.shape[-1]:
        return convolve(keep_rows(upsample_nearest(x)), w, strides, padding, **options)
    sums = w.astype(jnp.float32)
    for axis in (0, 1):
        before, after = (
            tuple(ends if i == axis else (0, 0) for i in range(4)) for ends in ((1, 0), (0, 1))
        )
        sums = jnp.pad(sums, before) + jnp.pad(sums, after)
    options["lhs_dilation"] = (2, 2)
    return jax.lax.conv_general_dilated(
        keep_rows(x), sums.astype(w.dtype), (1, 1), ((2, 2), (2, 2)), **options
    )


class Downsample(nn.Module):
    """Halving by a strided 3x3 convolution, or by averaging when ``use_conv`` is off.

    ``padding`` "same" pads one pixel all round (the UNet's), "right" only below and right (the autoencoders').
    """

    use_conv: bool = True
    padding: Literal["same", "right"] = "same"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if not self.use_conv:
            return avg_pool(x)
        pad = ((1, 1), (1, 1)) if self.padding == "same" else ((0, 1), (0, 1))
        return conv(x.shape[-1], 3, x, stride=2, padding=pad, name="conv", dtype=self.dtype)(x)


class ResBlock(nn.Module):
    """The UNet's residual block, told the timestep by addition or by scale and shift (Dhariwal & Nichol 2021).

    x [b, h, w, c], emb [b, e] -> [b, h', w', features], where ``resample`` "up" doubles and "down" halves height and width: inside, between
    activation and convolution, and on the skip. The last convolution starts at zero. ``conv_skip`` makes the skip 3x3 instead of 1x1.
    """

    features: int
    dropout: float = 0.0
    scale_shift: bool = False
    resample: Literal["none", "up", "down"] = "none"
    conv_skip: bool = False
    norm_groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, emb: Array, train: bool = False) -> Array:
        resample = {"none": lambda a: a, "up": upsample_nearest, "down": avg_pool}[self.resample]
        h = resample(
            GroupNorm(1e-5, self.norm_groups, silu=True, dtype=self.dtype, name="in_norm")(x)
        )
        x = resample(x)
        h = conv(self.features, 3, h, name="in_conv", dtype=self.dtype)(h)

        emb = nn.silu(emb)
        width = 2 * self.features if self.scale_shift else self.features
        e = dense(width, emb, name="emb", dtype=self.dtype)(emb)[:, None, None]
        if self.scale_shift:
            scale, shift = jnp.split(e, 2, axis=-1)
            h = nn.silu(
                GroupNorm(1e-5, self.norm_groups, dtype=self.dtype, name="out_norm")(h)
                * (1 + scale)
                + shift
            )
        else:
            h = GroupNorm(1e-5, self.norm_groups, silu=True, dtype=self.dtype, name="out_norm")(
                h + e
            )
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(self.features, 3, h, zero=True, name="out_conv", dtype=self.dtype)(h)

        if x.shape[-1] != self.features:
            if self.conv_skip:
                x = conv(self.features, 3, x, name="skip", dtype=self.dtype)(x)
            else:
                x = dense(self.features, x, name="skip", dtype=self.dtype)(x)
        return x + h


class ResnetBlock(nn.Module):
    """The autoencoders' residual block. [b, h, w, c] -> [b, h, w, features]."""

    features: int
    dropout: float = 0.0
    conv_skip: bool = False
    norm_groups: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        h = GroupNorm(1e-6, self.norm_groups, silu=True, dtype=self.dtype, name="norm1")(x)
        h = conv(self.features, 3, h, name="conv1", dtype=self.dtype)(h)
        h = GroupNorm(1e-6, self.norm_groups, silu=True, dtype=self.dtype, name="norm2")(h)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(self.features, 3, h, name="conv2", dtype=self.dtype)(h)
        if x.shape[-1] != self.features:
            if self.conv_skip:
                x = conv(self.features, 3, x, name="skip", dtype=self.dtype)(x)
            else:
                x = dense(self.features, x, name="skip", dtype=self.dtype)(x)
        return keep_rows(x + h)
