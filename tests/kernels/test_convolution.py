"""Convolutions with a weights' gradient of their own: against XLA's in values and gradients, and where they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.distributed.parallel import Target, compiled_for, make_mesh
from ldm_jax.kernels.convolution import banded_pays, convolve, products_pay
from ldm_jax.nn.layers import conv

SAME = ((1, 1), (1, 1))
NHWC = ("NHWC", "HWIO", "NHWC")


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
        (banded_pays, (2, 32, 48, 8, 5, 3), 1, SAME),  # four bands a picture
        (
            banded_pays,
            (1, 65, 67, 34, 3, 3),
            2,
            ((0, 1), (0, 1)),
        ),  # a downsampling, unevenly padded
        (
            banded_pays,
            (1, 71, 64, 3, 6, 4),
            2,
            SAME,
        ),  # the discriminator's; no band divides 35 rows but 5, 7 and one
        (
            banded_pays,
            (7, 16, 16, 5, 7, 3),
            1,
            SAME,
        ),  # bands of one small picture: no two divide seven
        (banded_pays, (48, 16, 24, 5, 7, 3), 2, SAME),  # of five or less, of 96 pixels: four
        (banded_pays, (16, 16, 16, 5, 7, 3), 1, SAME),  # of two
        (products_pay, (2, 16, 16, 248, 240, 3), 1, SAME),  # products
        (
            products_pay,
            (1, 9, 8, 200, 240, 4),
            1,
            ((1, 2), (2, 1)),
        ),  # of an even kernel, unevenly padded
        (products_pay, (3, 5, 4, 248, 240, 3), 1, ((0, 0), (0, 0))),  # without padding
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
    assert [
        form for form in (banded_pays, products_pay) if form(x, w, (stride, stride), padding)
    ] == [pays]

    def results(form, x, w):
        y, pull = jax.vjp(lambda x, w: form(x, w, (stride, stride), padding), x, w)
        return y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    def by_xla(x, w, strides, padding):
        return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=NHWC)

    expected = jax.jit(lambda x, w: results(by_xla, x, w))(x, w)
    for told in (None, Target("cpu")):
        with compiled_for(told):
            got = jax.jit(lambda x, w: results(convolve, x, w))(x, w)
        for name, a, b in zip(("values", "dx", "dw"), got, expected, strict=True):
            assert a.shape == b.shape
            assert float(jnp.abs(a - b).max()) < 3e-6 * float(jnp.abs(b).max()), name


def uses_bands(told: Target | None, side: int = 32, dtype: str = "float32", batch: int = 2) -> bool:
    """Whether the gradient of a layer's loss has the loop over bands, for a program of ``told``."""
    x = jnp.ones((batch, side, side, 4), dtype)
    layer = conv(4, 3, x, name="conv", dtype=jnp.dtype(dtype))
    params = layer.init(jax.random.key(0), x)
    with compiled_for(told):
        # A function of its own: jit remembers what it traced.
        text = jax.jit(jax.grad(lambda p: layer.apply(p, x).sum())).lower(params).as_text()
    return "while" in text


def test_the_bands_are_for_many_pixels_in_float32_on_one_cpu():
    assert uses_bands(Target("cpu"), batch=1)
    assert uses_bands(None)
    assert not uses_bands(Target("cpu"), side=31, batch=1)
    assert uses_bands(Target("cpu"), side=16, batch=4)
    assert not uses_bands(Target("cpu"), side=16, batch=3)
    assert not uses_bands(Target("cpu"), dtype="bfloat16")
    assert not uses_bands(Target("cpu", make_mesh(8)))
    assert not uses_bands(Target("tpu"))


def test_products_are_for_few_pixels_and_many_weights_in_float32_on_one_cpu():
    def uses_products(
        told: Target | None,
        batch: int = 2,
        c: int = 124,
        o: int = 120,
        dtype: str = "float32",
        backward: bool = True,
    ) -> bool:
        def run(x, w):
            return convolve(x, w, (1, 1), SAME, dimension_numbers=NHWC).astype("float32").sum()

        x, w = jnp.ones((batch, 16, 16, c), dtype), jnp.ones((3, 3, c, o), dtype)
        with compiled_for(told):
            text = jax.jit(jax.grad(run, (0, 1)) if backward else run).lower(x, w).as_text()
        return "dot_general" in text

    assert uses_products(Target("cpu"))
    assert uses_products(None)
    assert not uses_products(Target("cpu"), batch=3)
    assert not uses_products(Target("cpu"), c=120)
    assert not uses_products(Target("cpu"), dtype="bfloat16")
    assert not uses_products(Target("cpu", make_mesh(8)))
    assert not uses_products(Target("tpu"))
    # Where nothing is differentiated, of more weights.
    assert not uses_products(Target("cpu"), backward=False)
    assert uses_products(Target("cpu"), c=248, o=240, backward=False)
    assert not uses_products(Target("cpu"), c=248, o=240, batch=3, backward=False)
