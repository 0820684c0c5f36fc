"""ControlNet: a copy of the UNet's encoder that reads a picture.

Zhang et al. 2023, arXiv:2302.05543. Its results are the ``controls`` of `ldm_jax.models.unet.UNet`.
"""

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.models.unet import Layout, UNet, layout
from ldm_jax.nn.layers import Array, Conv

# Channels and strides of the convolutions that bring the picture to the size of the latents.
HINT = ((16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2))


class ControlNet(UNet):
    """``x`` [b, h, w, in_channels], hint [b, 8 h, 8 w, hint_channels], t [b] -> features.

    The fields are those of the UNet that it controls; ``out_channels`` is not used. The hint is in
    [0, 1]. Each feature goes through a 1x1 convolution that starts at zero; they are those of the
    input rows, in their order, and of the middle.

    Attributes:
      hint_channels: Channels of the hint.
      bgr: Whether the channels of the hint are reversed first.
      global_pool: Whether each feature is its mean over height and width.
    """

    hint_channels: int = 3
    bgr: bool = False
    global_pool: bool = False

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Array,
        hint: Array,
        t: Array,
        context: Array | None = None,
        y: Array | None = None,
        train: bool = False,
    ) -> tuple[Array, ...]:
        conv, plan, emb = self.layer(Conv), layout(self), self.embed_time(t)
        if y is not None:
            emb = emb + self.embed_vector(y)
        guide = (hint[..., ::-1] if self.bgr else hint).astype(self.dtype)
        for i, (features, stride) in enumerate(HINT):
            guide = nn.silu(conv(features, stride=stride, padding=1, name=f"hint_{i}")(guide))
        guide = conv(self.model_channels, zero=True, name=f"hint_{len(HINT)}")(guide)

        def zero_conv(h: Array, name: str) -> Array:
            feature = conv(h.shape[-1], 1, zero=True, name=name)(h)
            if not self.global_pool:
                return feature
            return jnp.broadcast_to(feature.mean((1, 2), keepdims=True), feature.shape)

        h, results = x.astype(self.dtype), []
        for i, row in enumerate(plan.input):
            h = self.run(row, f"input_blocks_{i}", h, emb, context, train)
            h = h + guide if i == 0 else h
            results.append(zero_conv(h, f"zero_convs_{i}"))
        h = self.run(plan.middle, "middle_block", h, emb, context, train)
        return (*results, zero_conv(h, "middle_block_out"))


def encoder(net: UNet) -> Layout:
    """The blocks that a ControlNet has of a UNet: its input rows and its middle."""
    plan = layout(net)
    return Layout(plan.input, plan.middle, [])
