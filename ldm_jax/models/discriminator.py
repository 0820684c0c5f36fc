"""The PatchGAN discriminator (Isola et al. 2017) of the autoencoders' adversarial loss, with its two normalisations."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.kernels.convolution import convolve
from ldm_jax.nn.layers import Array, Dtype, torch_bias_init


class BatchNorm(nn.Module):
    """Batch normalisation over all but the last axis, as PyTorch keeps it: x [b, h, w, c] -> same.

    Training normalises by the batch's biased variance, and moves the running variance towards the unbiased one; the
    collection "batch_stats" (mean, var [c], and count, the number of training passes) must then be mutable.
    ``axis_name`` takes the statistics over all devices of a pmap; under jit the batch is whole anyway.
    """

    momentum: float = 0.1
    eps: float = 1e-5
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

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
                count.value = count.value + 1  # not in place: it may be the caller's numpy array
        return ((x - mean) * jax.lax.rsqrt(var + self.eps) * scale + bias).astype(self.dtype)


class ActNorm(nn.Module):
    """scale * (x + loc) per channel (Kingma & Dhariwal 2018), fitted to the first batch: x [b, h, w, c] -> same.

    In training, while the flag ``initialized`` of "batch_stats" is 0 and both collections are mutable, loc and scale
    are set to whiten this batch (unbiased deviation, + 1e-6). `fit_actnorm` does this; a pass that may not write
    parameters uses them as they are. ``axis_name`` takes the batch over all devices of a pmap.
    """

    axis_name: str | None = None
    dtype: Dtype = jnp.float32

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
                self.put_variable(
                    "params",
                    name,
                    jnp.where(initialized.value == 0, jax.lax.stop_gradient(value), old),
                )
            initialized.value = jnp.ones_like(initialized.value)
        loc, scale = self.get_variable("params", "loc"), self.get_variable("params", "scale")
        return (scale * (x + loc)).astype(self.dtype)


class Place(NamedTuple):
    """One layer of the discriminator: its index in the original's Sequential, that of its normalisation, and what it
    is.
    """

    conv: int
    norm: int | None
    features: int
    stride: int
    bias: bool


class PatchDiscriminator(nn.Module):
    """Logits of patches, real against generated: [b, h, w, input_nc] -> float32 [b, h', w', 1]; sides of 24 and more at
    n_layers 2.

    Fields carry the original's names (NLayerDiscriminator). Needs the collections "params" and "batch_stats"; in
    training, with BatchNorm, the latter must be mutable, in the generator's pass as well.
    """

    input_nc: int = 3
    ndf: int = 64
    n_layers: int = 3
    use_actnorm: bool = False
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    def places(self) -> list[Place]:
        """The convolutions in order; only the inner ones are normalised, and BatchNorm makes their bias superfluous."""
        places = [Place(0, None, self.ndf, 2, True)]
        for i in range(1, self.n_layers + 1):
            features = self.ndf * min(2**i, 8)
            places.append(
                Place(3 * i - 1, 3 * i, features, 2 if i < self.n_layers else 1, self.use_actnorm)
            )
        return [*places, Place(3 * self.n_layers + 2, None, 1, 1, True)]

    def patches(self, side: int) -> int:
        """How many logits there are along a side of so many pixels; below 1 the picture is too small."""
        for place in self.places():
            side = (side - 2) // place.stride + 1
        return side

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        places = self.places()
        for i, place in enumerate(places):
            x = nn.Conv(
                place.features,
                (4, 4),
                strides=place.stride,
                padding=1,
                use_bias=place.bias,
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(0.02),
                bias_init=torch_bias_init(16 * x.shape[-1]),
                conv_general_dilated=convolve,
                name=f"conv_{i}",
            )(x)
            if place.norm is not None:
                norm = (
                    ActNorm(self.axis_name, self.dtype, name=f"norm_{i}")
                    if self.use_actnorm
                    else BatchNorm(axis_name=self.axis_name, name=f"norm_{i}")
                )
                x = norm(x, train)
            if i < len(places) - 1:
                x = nn.leaky_relu(x, 0.2)
        return x.astype(jnp.float32)


def fit_actnorm(model: PatchDiscriminator, variables: dict, x: Array) -> dict:
    """Variables whose ActNorm layers are fitted to the batch x [b, h, w, c], the first of training; unchanged once they
    are.
    """
    _, written = model.apply(variables, x, train=True, mutable=["params", "batch_stats"])
    return {**variables, **written}
