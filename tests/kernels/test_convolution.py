"""The CPU convolutions equal XLA's in values and gradients; where they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.kernels import Kernels, for_platform
from ldm_jax.kernels.cpu_convolution import is_banded, is_product
from ldm_jax.kernels.reference import conv
from ldm_jax.nn.layers import Conv

SAME = ((1, 1), (1, 1))
CPU = for_platform("cpu")


def arrays(
    b: int, height: int, width: int, c: int, o: int, kernel: int
) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (b, height, width, c), (kernel, kernel, c, o)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return x, w


@pytest.mark.parametrize(
    ("pays", "shape", "stride", "padding"),
    [
        (is_banded, (2, 32, 48, 8, 5, 3), 1, SAME),  # four bands a picture
        # Strided, with uneven padding.
        (is_banded, (1, 65, 67, 34, 3, 3), 2, ((0, 1), (0, 1))),
        # The discriminator: 35 output rows are divisible by 1, 5 and 7 only.
        (is_banded, (1, 71, 64, 3, 6, 4), 2, SAME),
        # One small image per band: 7 images do not pair.
        (is_banded, (7, 16, 16, 5, 7, 3), 1, SAME),
        (is_banded, (48, 16, 24, 5, 7, 3), 2, SAME),  # of five or less, of 96 pixels: four
        (is_banded, (16, 16, 16, 5, 7, 3), 1, SAME),  # of two
        (is_product, (2, 16, 16, 248, 240, 3), 1, SAME),  # products
        # An even kernel with uneven padding.
        (is_product, (1, 9, 8, 200, 240, 4), 1, ((1, 2), (2, 1))),
        (is_product, (3, 5, 4, 248, 240, 3), 1, ((0, 0), (0, 0))),  # without padding
    ],
    ids=[
        "four",
        "stride",
        "even kernel",
        "one",
        "of four",
        "of two",
        "products",
        "uneven products",
        "bare products",
    ],
)
def test_values_and_gradients_are_those_of_xla(pays, shape, stride, padding):
    x, w = arrays(*shape)
    strides = (stride, stride)
    assert [form for form in (is_banded, is_product) if form(x, w, strides, padding)] == [pays]

    def results(form, x, w):
        y, pull = jax.vjp(lambda x, w: form(x, w, strides, padding), x, w)
        return y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    expected = jax.jit(lambda x, w: results(conv, x, w))(x, w)
    got = jax.jit(lambda x, w: results(CPU.conv, x, w))(x, w)
    for name, a, b in zip(("values", "dx", "dw"), got, expected, strict=True):
        assert a.shape == b.shape
        assert float(jnp.abs(a - b).max()) < 3e-6 * float(jnp.abs(b).max()), name


def uses_bands(kernels: Kernels, side: int = 32, dtype: str = "float32", batch: int = 2) -> bool:
    """Whether the gradient of a layer's loss has the loop over bands."""
    x = jnp.ones((batch, side, side, 4), dtype)
    layer = Conv(4, dtype=jnp.dtype(dtype), kernels=kernels)
    params = layer.init(jax.random.key(0), x)
    text = jax.jit(jax.grad(lambda p: layer.apply(p, x).sum())).lower(params).as_text()
    return "while" in text


def test_the_bands_are_for_many_pixels_in_float32_on_one_cpu():
    assert uses_bands(CPU, batch=1)
    assert not uses_bands(Kernels())
    assert not uses_bands(CPU, side=31, batch=1)
    assert uses_bands(CPU, side=16, batch=4)
    assert not uses_bands(CPU, side=16, batch=3)
    assert not uses_bands(CPU, dtype="bfloat16")
    assert not uses_bands(for_platform("cpu", make_mesh(8)))
    assert not uses_bands(for_platform("tpu"))


def test_products_are_for_few_pixels_and_many_weights_in_float32_on_one_cpu():
    def uses_products(
        kernels: Kernels = CPU,
        batch: int = 2,
        c: int = 124,
        o: int = 120,
        dtype: str = "float32",
        backward: bool = True,
    ) -> bool:
        def run(x, w):
            return kernels.conv(x, w, (1, 1), SAME).astype("float32").sum()

        x, w = jnp.ones((batch, 16, 16, c), dtype), jnp.ones((3, 3, c, o), dtype)
        text = jax.jit(jax.grad(run, (0, 1)) if backward else run).lower(x, w).as_text()
        return "dot_general" in text

    assert uses_products()
    assert not uses_products(Kernels())
    assert not uses_products(batch=3)
    assert not uses_products(c=120)
    assert not uses_products(dtype="bfloat16")
    assert not uses_products(for_platform("cpu", make_mesh(8)))
    assert not uses_products(for_platform("tpu"))
    # Where nothing is differentiated, of more weights.
    for kernels in (CPU, for_platform("cpu", differentiable=False)):
        assert not uses_products(kernels, backward=False)
        assert uses_products(kernels, c=248, o=240, backward=False)
        assert not uses_products(kernels, c=248, o=240, batch=3, backward=False)
