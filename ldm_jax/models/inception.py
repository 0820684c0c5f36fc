"""InceptionV3 as TensorFlow's 2015-12-05 graph has it: the network whose features define FID.

Szegedy et al. 2015 (arXiv:1512.00567). Layers carry the names of the published PyTorch port
(pt_inception-2015-12-05). It differs from torchvision's network in three places: average pools
leave the padding out of their mean, the last block pools with a maximum, and it has 1008 classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class ConvBN(nn.Module):
    """Convolution without bias, batch normalisation with stored statistics, ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(
            self.features,
            self.kernel,
            strides=self.stride,
            padding=self.padding,
            use_bias=False,
            name="conv",
        )(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


def _chain(x: jax.Array, **layers: tuple[int, tuple[int, int]]) -> jax.Array:
    """Applies a `ConvBN` of each (features, kernel), named by its keyword."""
    for name, (features, kernel) in layers.items():
        x = ConvBN(features, kernel, name=name)(x)
    return x


def _average(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _maximum(x: jax.Array, stride: int = 2, padding: str = "VALID") -> jax.Array:
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


class InceptionA(nn.Module):
    """Mixed_5b to Mixed_5d: [b, 35, 35, c] -> [b, 35, 35, 224 + pool_features]."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        branches = [
            _chain(x, branch1x1=(64, (1, 1))),
            _chain(x, branch5x5_1=(48, (1, 1)), branch5x5_2=(64, (5, 5))),
            _chain(
                x,
                branch3x3dbl_1=(64, (1, 1)),
                branch3x3dbl_2=(96, (3, 3)),
                branch3x3dbl_3=(96, (3, 3)),
            ),
            _chain(_average(x), branch_pool=(self.pool_features, (1, 1))),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionB(nn.Module):
    """Mixed_6a: [b, 35, 35, 288] -> [b, 17, 17, 768]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        double = _chain(x, branch3x3dbl_1=(64, (1, 1)), branch3x3dbl_2=(96, (3, 3)))
        branches = [
            ConvBN(384, (3, 3), 2, "VALID", name="branch3x3")(x),
            ConvBN(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(double),
            _maximum(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionC(nn.Module):
    """Mixed_6b to Mixed_6e: [b, 17, 17, 768] -> [b, 17, 17, 768]; ``width`` of the 7x7 branches."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.width
        branches = [
            _chain(x, branch1x1=(192, (1, 1))),
            _chain(
                x,
                branch7x7_1=(w, (1, 1)),
                branch7x7_2=(w, (1, 7)),
                branch7x7_3=(192, (7, 1)),
            ),
            _chain(
                x,
                branch7x7dbl_1=(w, (1, 1)),
                branch7x7dbl_2=(w, (7, 1)),
                branch7x7dbl_3=(w, (1, 7)),
                branch7x7dbl_4=(w, (7, 1)),
                branch7x7dbl_5=(192, (1, 7)),
            ),
            _chain(_average(x), branch_pool=(192, (1, 1))),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionD(nn.Module):
    """Mixed_7a: [b, 17, 17, 768] -> [b, 8, 8, 1280]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _chain(x, branch3x3_1=(192, (1, 1)))
        seven = _chain(
            x,
            branch7x7x3_1=(192, (1, 1)),
            branch7x7x3_2=(192, (1, 7)),
            branch7x7x3_3=(192, (7, 1)),
        )
        branches = [
            ConvBN(320, (3, 3), 2, "VALID", name="branch3x3_2")(three),
            ConvBN(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(seven),
            _maximum(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionE(nn.Module):
    """Mixed_7b and Mixed_7c: [b, 8, 8, c] -> [b, 8, 8, 2048]. ``max_pool``: the last one's pool."""

    max_pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _chain(x, branch3x3_1=(384, (1, 1)))
        double = _chain(x, branch3x3dbl_1=(448, (1, 1)), branch3x3dbl_2=(384, (3, 3)))
        pooled = _maximum(x, 1, "SAME") if self.max_pool else _average(x)
        branches = [
            _chain(x, branch1x1=(320, (1, 1))),
            _chain(three, branch3x3_2a=(384, (1, 3))),
            _chain(three, branch3x3_2b=(384, (3, 1))),
            _chain(double, branch3x3dbl_3a=(384, (1, 3))),
            _chain(double, branch3x3dbl_3b=(384, (3, 1))),
            _chain(pooled, branch_pool=(192, (1, 1))),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3(nn.Module):
    """InceptionV3 of FID: normalised pixels [b, 299, 299, 3] -> features by name.

    "64", "192", "768", "2048": spatial means after the first and second max pool, Mixed_6e and
    Mixed_7c. "spatial": [b, 2023], the first 7 channels of Mixed_6d (17 x 17), of which sFID
    (Nash et al. 2021, arXiv:2103.03841) takes the moments. "logits_unbiased" [b, 1008]: the
    classifier without its bias, as the Inception Score uses it; "logits": with it.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        features = {}
        x = ConvBN(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = ConvBN(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = ConvBN(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _maximum(x)
        features["64"] = x.mean((1, 2))
        x = ConvBN(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = ConvBN(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = _maximum(x)
        features["192"] = x.mean((1, 2))
        x = InceptionA(32, name="Mixed_5b")(x)
        x = InceptionA(64, name="Mixed_5c")(x)
        x = InceptionA(64, name="Mixed_5d")(x)
        x = InceptionB(name="Mixed_6a")(x)
        x = InceptionC(128, name="Mixed_6b")(x)
        x = InceptionC(160, name="Mixed_6c")(x)
        x = InceptionC(160, name="Mixed_6d")(x)
        features["spatial"] = x[..., :7].reshape(len(x), -1)
        x = InceptionC(192, name="Mixed_6e")(x)
        features["768"] = x.mean((1, 2))
        x = InceptionD(name="Mixed_7a")(x)
        x = InceptionE(max_pool=False, name="Mixed_7b")(x)
        x = InceptionE(max_pool=True, name="Mixed_7c")(x)
        features["2048"] = x = x.mean((1, 2))
        features["logits_unbiased"] = x = nn.Dense(1008, use_bias=False, name="fc")(x)
        bias = self.param("fc_bias", nn.initializers.zeros, (1008,))
        return features | {"logits": x + bias}
