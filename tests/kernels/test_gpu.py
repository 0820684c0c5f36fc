"""GPU forms equal the reference, as far as a CPU can compute them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from ldm_jax.kernels import REFERENCE, for_platform
from ldm_jax.kernels.gpu import GpuKernels, cudnn

GPU = for_platform("gpu")


@pytest.mark.parametrize("shape", [(2, 16, 12, 64), (3, 7, 64), (2, 96), (1, 5, 3, 96)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_group_norm_is_that_of_the_reference(shape, offset):
    keys = jax.random.split(jax.random.key(0), 4)
    x = 3 * jax.random.normal(keys[0], shape) + offset
    x = x.at[:, ..., 0].mul(10)  # groups of unlike channels
    scale, bias = (jax.random.normal(key, shape[-1:]) for key in keys[1:3])
    weight = jax.random.normal(keys[3], shape)

    def loss(kernels):
        def run(x, scale, bias):
            y = kernels.group_norm(x, scale, bias, 32, 1e-5, True)
            return (y * weight).sum(), y

        return jax.grad(run, (0, 1, 2), has_aux=True)

    (got, y), (expected, reference) = (loss(k)(x, scale, bias) for k in (GPU, REFERENCE))
    tolerance = 1e-5 if offset == 0 else 3e-3  # two channels of a group are few for a mean
    for a, b in zip((y, *got), (reference, *expected), strict=True):
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def test_a_pixel_far_off_does_not_spoil_the_statistics():
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 64))
    x = x.at[0, 4, 4].set(1e4)  # one of the pixels about which the statistics are taken
    got, expected = (
        k.group_norm(x, jnp.ones(64), jnp.zeros(64), 32, 1e-5, False) for k in (GPU, REFERENCE)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_layer_norm_is_that_of_the_reference():
    x = jax.random.normal(jax.random.key(0), (2, 5, 64)) + 3
    scale, bias = jnp.linspace(0.5, 2, 64), jnp.linspace(-1, 1, 64)
    got, expected = (k.layer_norm(x, scale, bias, 1e-5) for k in (GPU, REFERENCE))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_gelu_of_16_bits_is_exact_to_their_precision():
    x = jnp.linspace(-8, 8, 4001).astype(jnp.bfloat16)
    exact = REFERENCE.gelu(x.astype(jnp.float32))
    got = GPU.gelu(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)
    np.testing.assert_array_equal(GPU.gelu(exact), REFERENCE.gelu(exact))


@pytest.mark.parametrize(
    ("capability", "dtype", "head", "keys", "form"),
    [
        (9.0, "bfloat16", 160, 256, cudnn),
        (9.0, "float16", 40, 77, cudnn),
        (8.0, "bfloat16", 160, 256, None),
        (8.0, "bfloat16", 128, 77, cudnn),
        (9.0, "float32", 40, 4096, None),
        (9.0, "bfloat16", 512, 4096, None),
    ],
)
def test_cudnn_has_the_heads_that_it_takes(capability, dtype, head, keys, form):
    q, k = (jax.ShapeDtypeStruct((2, n, 8, head), jnp.dtype(dtype)) for n in (256, keys))
    assert GpuKernels(capability=capability).attention_form(q, k, k) is form


def test_filters_lie_as_cudnn_reads_them():
    params = {"kernel": jnp.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5), "bias": jnp.ones(5)}
    here = SingleDeviceSharding(jax.devices()[0])
    placed = jax.device_put(params, GPU.weight_formats(params, here))
    assert placed["kernel"].format.layout.major_to_minor == (3, 0, 1, 2)
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    np.testing.assert_array_equal(jax.jit(lambda p: 2 * p["kernel"])(placed), 2 * params["kernel"])
    assert REFERENCE.weight_formats(params, here) == {"kernel": here, "bias": here}
