"""The PatchGAN discriminator (Isola et al. 2017, arXiv:1611.07004), with its two normalisations."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nn.layers import Array, Conv, Module


class BatchNorm(Module):
    """Batch normalisation over all but the last axis, as in PyTorch: x [b, h, w, c] -> the same.

    Training normalises by the biased variance of the batch, and moves the running variance towards
    the unbiased one; the collection "batch_stats" (mean, var [c], and count, the number of training
    passes) must then be mutable. ``axis_name`` takes the statistics over a mapped axis of devices.
    """

    momentum: float = 0.1
    eps: float = 1e-5
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        c = x.shape[-1]
        scale = self.param("scale", lambda key: 1.0 + 0.02 * jax.random.normal(key, (c,)))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,))
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)

        x = x.astype(jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            axes = tuple(range(x.ndim - 1))
            n = x.size // c
            mean = x.mean(axes)
            if self.axis_name is not None and not self.is_initializing():
                mean = jax.lax.pmean(mean, self.axis_name)
                n = n * jax.lax.psum(1, self.axis_name)
            var = jnp.square(x - mean).mean(axes)
            if self.axis_name is not None and not self.is_initializing():
                var = jax.lax.pmean(var, self.axis_name)
            if not self.is_initializing():
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (var * n / (n - 1) - running_var.value)
                # Not in place: it may be the caller's numpy array.
                count.value = count.value + 1
        return ((x - mean) * jax.lax.rsqrt(var + self.eps) * scale + bias).astype(self.dtype)


class ActNorm(Module):
    """scale * (x + loc) per channel, fitted to the first batch: x [b, h, w, c] -> the same.

    Kingma & Dhariwal 2018, arXiv:1807.03039. In training, while the flag ``initialized`` of
    "batch_stats" is 0 and both collections are mutable, loc and scale are set to whiten this batch
    (unbiased deviation, + 1e-6). `fit_actnorm` does this; a pass that may not write parameters uses
    the present ones. ``axis_name`` takes the batch over a mapped axis of devices.
    """

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        c = x.shape[-1]
        self.param("loc", nn.initializers.zeros, (c,))
        self.param("scale", nn.initializers.ones, (c,))
        initialized = self.variable("batch_stats", "initialized", jnp.zeros, (), jnp.uint8)
        x = x.astype(jnp.float32)
        if (
            train
            and not self.is_initializing()
            and self.is_mutable_collection("params")
            and self.is_mutable_collection("batch_stats")
        ):
            axes, n = tuple(range(x.ndim - 1)), x.size // c
            mean = x.mean(axes)
            if self.axis_name is not None:
                mean, n = jax.lax.pmean(mean, self.axis_name), n * jax.lax.psum(1, self.axis_name)
            var = jnp.square(x - mean).mean(axes)
            if self.axis_name is not None:
                var = jax.lax.pmean(var, self.axis_name)
            fitted = {"loc": -mean, "scale": 1 / (jnp.sqrt(var * n / (n - 1)) + 1e-6)}
            for name, value in fitted.items():
                old = self.get_variable("params", name)
                new = jnp.where(initialized.value == 0, jax.lax.stop_gradient(value), old)
                self.put_variable("params", name, new)
            initialized.value = jnp.ones_like(initialized.value)
        loc, scale = self.get_variable("params", "loc"), self.get_variable("params", "scale")
        return (scale * (x + loc)).astype(self.dtype)


class Place(NamedTuple):
    """One convolution: its index in the original's Sequential, and that of its normalisation."""

    conv: int
    norm: int | None
    features: int
    stride: int
    bias: bool


class PatchDiscriminator(Module):
    """Logits of patches, real against generated: [b, h, w, input_nc] -> float32 [b, h', w', 1].

    Pictures need sides of 24 at n_layers 2, see `patches`. Fields carry the original's names
    (NLayerDiscriminator). Needs the collections "params" and "batch_stats"; in training, with
    BatchNorm, the latter must be mutable, also in the generator's pass.
    """

    input_nc: int = 3
    ndf: int = 64
    n_layers: int = 3
    use_actnorm: bool = False
    axis_name: str | None = None

    def places(self) -> list[Place]:
        """The convolutions in order; inner ones are normalised, without bias under BatchNorm."""
        places = [Place(0, None, self.ndf, 2, True)]
        for i in range(1, self.n_layers + 1):
            features = self.ndf * min(2**i, 8)
            stride = 2 if i < self.n_layers else 1
            places.append(Place(3 * i - 1, 3 * i, features, stride, self.use_actnorm))
        return [*places, Place(3 * self.n_layers + 2, None, 1, 1, True)]

    def patches(self, side: int) -> int:
        """The number of logits along a side of pixels; below 1 the picture is too small."""
        for place in self.places():
            side = (side - 2) // place.stride + 1
        return side

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        places = self.places()
        for i, place in enumerate(places):
            x = self.layer(Conv)(
                place.features,
                4,
                place.stride,
                padding=1,
                use_bias=place.bias,
                kernel_init=nn.initializers.normal(0.02),
                name=f"conv_{i}",
            )(x)
            if place.norm is not None and self.use_actnorm:
                x = self.layer(ActNorm)(self.axis_name, name=f"norm_{i}")(x, train)
            elif place.norm is not None:
                x = BatchNorm(axis_name=self.axis_name, name=f"norm_{i}")(x, train)
            if i < len(places) - 1:
                x = nn.leaky_relu(x, 0.2)
        return x.astype(jnp.float32)


def fit_actnorm(model: PatchDiscriminator, variables: dict, x: Array) -> dict:
    """Fits the ActNorm layers to a first batch x [b, h, w, c], unless they are already."""
    _, written = model.apply(variables, x, train=True, mutable=["params", "batch_stats"])
    return {**variables, **written}
