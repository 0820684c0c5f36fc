"""VGG-16 and LPIPS: properties and readers of weights; tests/parity compares the values."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ldm_jax.models import perceptual
from ldm_jax.models.perceptual import LPIPS, VGG16Features

NARROW = (8, 8, 12, 16, 16)


def images(seed: int, shape: tuple[int, ...] = (2, 32, 32, 3)) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), shape, minval=-1, maxval=1)


def original_shapes(widths=NARROW) -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for name, (_, shape) in perceptual._vgg_names(widths, "features.{layer}").items()
    }


def lpips_shapes(widths) -> dict[str, tuple[int, ...]]:
    convs = perceptual._vgg_names(widths, "net.slice{block}.{layer}")
    shapes = {name: shape for name, (_, shape) in (convs | perceptual._head_names(widths)).items()}
    return {**shapes, "scaling_layer.shift": (1, 3, 1, 1), "scaling_layer.scale": (1, 3, 1, 1)}


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def params() -> dict:
    """Random LPIPS parameters of a narrow network, from NumPy to avoid compilation."""
    shapes = {k: v for k, v in lpips_shapes(NARROW).items() if not k.startswith("scaling_layer.")}
    fans = {k: np.prod(v[1:], initial=1) for k, v in shapes.items()}
    tensors = {k: v * np.sqrt(2 / fans[k]) for k, v in random_tensors(shapes).items()}
    return perceptual.lpips_params(
        {k: np.abs(v) if k.startswith("lin") else v for k, v in tensors.items()}, NARROW
    )


@pytest.fixture(scope="module")
def lpips(params):
    return jax.jit(lambda a, b: LPIPS(NARROW).apply({"params": params}, a, b))


# --- the network


def test_features_have_five_scales(params):
    module = VGG16Features(NARROW)
    maps = jax.jit(module.apply)({"params": params["vgg"]}, images(0, (2, 36, 48, 3)))
    assert [m.shape for m in maps] == [(2, 36 >> i, 48 >> i, w) for i, w in enumerate(NARROW)]
    assert all((m >= 0).all() and (m > 0).any() for m in maps)


@pytest.mark.fast
def test_the_full_network_has_the_published_size():
    params = jax.eval_shape(VGG16Features().init, jax.random.key(0), images(0, (1, 32, 32, 3)))
    # torchvision's vgg16().features.
    assert sum(x.size for x in jax.tree.leaves(params)) == 14_714_688


@pytest.mark.parametrize("side", [8, 9])
def test_pooling_is_linens_and_the_first_of_equals_takes_the_gradient(side):
    rng = np.random.default_rng(0)
    # Few values, so that many windows have ties.
    x = jnp.asarray(rng.integers(0, 3, (2, side, side, 4)), jnp.float32)

    def results(form):
        y, pull = jax.vjp(form, x)
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))[0]

    expected = results(lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)))
    for got, same in zip(results(perceptual.max_pool), expected, strict=True):
        np.testing.assert_array_equal(got, same)


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_pooling_hides_no_nan(place):
    assert np.isnan(perceptual.max_pool(jnp.ones((1, 2, 2, 1)).at[0, *place].set(jnp.nan))).all()


@pytest.mark.fast
def test_images_that_do_not_fit_raise():
    for shape in ((1, 32, 32, 4), (1, 15, 32, 3)):
        with pytest.raises(ValueError, match="takes images"):
            VGG16Features(NARROW).init(jax.random.key(0), jnp.zeros(shape))
    with pytest.raises(ValueError, match="differ"):
        LPIPS(NARROW).init(jax.random.key(0), images(0), images(0)[:1])
    with pytest.raises(ValueError, match="needs 5 entries"):
        VGG16Features((8, 8)).init(jax.random.key(0), images(0))


@pytest.mark.parametrize(
    ("preprocess", "expected"),
    [
        ("torchvision", [(1 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, -0.406 / 0.225]),
        ("caffe", [0 - 103.939, 127.5 - 116.779, 255 - 123.68]),  # BGR
    ],
)
def test_preprocessing_is_that_of_the_weights(preprocess, expected):
    pixel = jnp.array([[[[1.0, 0.0, -1.0]]]])  # red 255, green 127.5, blue 0
    np.testing.assert_allclose(
        perceptual._PREPROCESS[preprocess](pixel)[0, 0, 0], expected, rtol=1e-5
    )
    first = {n: np.zeros(s, np.float32) for n, s in original_shapes().items()}
    first["features.0.weight"][:3, :, 1, 1] = first["features.2.weight"][:3, :3, 1, 1] = np.eye(3)
    maps = VGG16Features(NARROW, preprocess).apply(
        {"params": perceptual.vgg16_params(first, NARROW)}, jnp.broadcast_to(pixel, (1, 16, 16, 3))
    )
    np.testing.assert_allclose(maps[0][0, 8, 8, :3], np.maximum(expected, 0), rtol=1e-5)


# --- the distance


def test_distance_is_a_distance_per_image(lpips):
    a, b = images(0), images(1)
    np.testing.assert_allclose(lpips(a, a), [0, 0], atol=1e-12)
    both = lpips(a, b)
    assert both.shape == (2,)
    assert (both > 0).all()
    np.testing.assert_allclose(lpips(b, a), both, rtol=1e-6)
    np.testing.assert_allclose(
        lpips(a, jnp.stack([b[0], a[1]])), [both[0], 0], rtol=1e-6, atol=1e-12
    )


def test_distance_grows_with_the_noise(lpips):
    a, noise = images(0), jax.random.normal(jax.random.key(2), (2, 32, 32, 3))
    distances = np.stack([lpips(a, a + s * noise) for s in (0.01, 0.05, 0.25)])
    assert (np.diff(distances, axis=0) > 0).all()


def test_bfloat16_is_close_and_the_distance_stays_float32(params):
    a, b = images(0, (1, 16, 16, 3)), images(1, (1, 16, 16, 3))
    full, half = (
        jax.jit(LPIPS(NARROW, dtype=d).apply)({"params": params}, a, b)
        for d in (jnp.float32, jnp.bfloat16)
    )
    assert half.dtype == jnp.float32
    assert not np.array_equal(half, full)
    np.testing.assert_allclose(half, full, rtol=0.05, atol=0.01)


def test_unit_length_is_finite_and_flat_where_all_channels_are_zero():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(perceptual.unit_length(x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    slopes = jax.grad(
        lambda x: jnp.sum(perceptual.unit_length(x) ** 2 + perceptual.unit_length(x)[:, :1])
    )(x)
    assert np.isfinite(slopes).all()
    assert slopes[1, 0] > 0


# --- weights


def test_misfitting_names_are_all_listed():
    tensors = random_tensors(original_shapes())
    del tensors["features.0.bias"]
    tensors["features.1.weight"] = tensors["features.2.bias"]
    tensors["features.28.weight"] = tensors["features.28.weight"][:, :, :1]
    with pytest.raises(
        ValueError, match=r"features\.0\.bias.*features\.1\.weight.*features\.28\.weight"
    ) as error:
        perceptual.vgg16_params(tensors, NARROW)
    assert "(16, 16, 1, 3)" in str(error.value)


def test_lpips_names_are_strict_and_constants_are_checked():
    tensors = {k: np.zeros(s) for k, s in lpips_shapes(NARROW).items()}
    with pytest.raises(ValueError, match=r"scaling_layer\.shift"):
        perceptual.lpips_params(tensors, NARROW)
    tensors = {k: v for k, v in tensors.items() if not k.startswith("scaling_layer")}
    del tensors["lin3.model.1.weight"]
    with pytest.raises(ValueError, match=r"missing \['lin3"):
        perceptual.lpips_params(tensors, NARROW)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (None, "torchvision"),
        ({"preprocess": "caffe"}, "caffe"),
        ({"preprocess": "RGB 0..255 -> BGR, minus mean (103.939,116.779,123.68); OIHW"}, "caffe"),
    ],
)
def test_files_are_read_with_their_preprocessing(tmp_path, monkeypatch, metadata, expected):
    vgg = random_tensors(original_shapes())
    heads = {
        f"lin{i}.model.1.weight": np.full((1, w, 1, 1), i, np.float32) for i, w in enumerate(NARROW)
    }
    save_file({**vgg, "classifier.0.bias": np.zeros(3)}, tmp_path / "vgg.safetensors", metadata)
    save_file(heads, tmp_path / "heads.safetensors")
    monkeypatch.setenv("LDM_JAX_LPIPS", str(tmp_path / "heads.safetensors"))
    module, params = perceptual.load_lpips(tmp_path / "vgg.safetensors", widths=NARROW)
    assert module == LPIPS(NARROW, expected)
    template = jax.eval_shape(LPIPS(NARROW).init, jax.random.key(0), images(0), images(0))["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), template
    )
    np.testing.assert_array_equal(
        params["vgg"]["conv3_2"]["kernel"][0, 2, 5, 7], vgg["features.12.weight"][7, 5, 0, 2]
    )
    np.testing.assert_array_equal(params["lin3"]["kernel"], np.full((16, 1), 3))
    module, alone = perceptual.load_vgg16(tmp_path / "vgg.safetensors", NARROW)
    assert module == VGG16Features(NARROW, expected)
    jax.tree.map(np.testing.assert_array_equal, alone, params["vgg"])


def test_absent_files_and_unknown_preprocessing_are_errors(tmp_path, monkeypatch):
    monkeypatch.delenv("LDM_JAX_VGG16", raising=False)
    with pytest.raises(FileNotFoundError, match="LDM_JAX_VGG16"):
        perceptual.load_vgg16()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        perceptual.load_lpips(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown preprocessing 'upside down'"):
        perceptual._preprocess_of({"preprocess": "upside down"})


@pytest.mark.skipif(not os.environ.get("LDM_JAX_VGG16"), reason="LDM_JAX_VGG16 names no weights")
def test_published_weights_see_structure():
    module, params = perceptual.load_vgg16()
    stripes = jnp.broadcast_to(
        jnp.where(jnp.arange(32) // 4 % 2, 1.0, -1.0)[:, None, None], (32, 32, 3)
    )
    batch = jnp.stack([stripes, jnp.roll(stripes, 4, axis=0), stripes.transpose(1, 0, 2)])
    deep = perceptual.unit_length(module.apply({"params": params}, batch)[3].mean(axis=(1, 2)))
    # Shifted stripes are nearer than rotated ones.
    assert deep[0] @ deep[1] > deep[0] @ deep[2] + 0.05
