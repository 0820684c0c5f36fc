"""EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946; the Lite form has ReLU6 and no squeeze)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Stage(NamedTuple):
    """Blocks of one width: the first has ``stride``, all have the same kernel and expansion."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    features: int


LITE0 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def _conv(features: int, kernel: int, name: str, stride: int = 1) -> nn.Conv:
    return nn.Conv(
        features, (kernel, kernel), strides=stride, padding="SAME", use_bias=False, name=name
    )


def _norm(name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name=name)


class DepthwiseConv(nn.Module):
    """Convolution of each channel by its own kernel, padded as TensorFlow's SAME.

    It is the sum of kernel^2 shifted products, which XLA fuses: on a CPU its grouped convolution
    takes many times as long.
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, s, (b, h, w, c) = self.kernel, self.stride, x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (k, k, 1, c))
        padding = jax.lax.padtype_to_pads((h, w), (k, k), (s, s), "SAME")
        x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
        height, width = -(-h // s), -(-w // s)

        def shifted(i: int, j: int) -> jax.Array:
            end = (b, i + s * (height - 1) + 1, j + s * (width - 1) + 1, c)
            return jax.lax.slice(x, (0, i, j, 0), end, (1, s, s, 1))

        taps = [shifted(i, j) * kernel[i, j, 0] for i in range(k) for j in range(k)]
        return sum(taps[1:], taps[0])


class MBConv(nn.Module):
    """Inverted bottleneck (Sandler et al. 2018, arXiv:1801.04381): expand, depthwise, project."""

    features: int
    kernel: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h, wide = x, x.shape[-1] * self.expansion
        if self.expansion != 1:
            h = nn.relu6(_norm("bn0")(_conv(wide, 1, "expand_conv")(h)))
        h = DepthwiseConv(self.kernel, self.stride, name="depthwise_conv")(h)
        h = nn.relu6(_norm("bn1")(h))
        h = _norm("bn2")(_conv(self.features, 1, "project_conv")(h))
        return x + h if x.shape == h.shape else h


class EfficientNetLite0(nn.Module):
    """Normalised pixels [b, 224, 224, 3] -> {"1280": pooled features, "logits": [b, 1000]}."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        x = nn.relu6(_norm("bn0")(_conv(32, 3, "conv_stem", stride=2)(x)))
        blocks = [
            (stage.features, stage.kernel, stage.stride if i == 0 else 1, stage.expansion)
            for stage in LITE0
            for i in range(stage.blocks)
        ]
        for i, block in enumerate(blocks):
            x = MBConv(*block, name=f"blocks_{i}")(x)
        x = nn.relu6(_norm("bn1")(_conv(1280, 1, "conv_head")(x)))
        x = jnp.mean(x, (1, 2))
        return {"1280": x, "logits": nn.Dense(1000, name="fc")(x)}
