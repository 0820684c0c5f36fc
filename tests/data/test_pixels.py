"""Pictures of one to sixteen channels, of 8 bits, 16 bits and floating-point numbers."""

import io

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import ImageFolder, ImageTransform, Loader
from ldm_jax.data.buckets import make_buckets
from ldm_jax.data.decode import picture_size
from ldm_jax.data.pixels import PixelFormat, as_rgb, model_pixels, pixel_format
from ldm_jax.errors import DataError, UnreadablePicture

pytestmark = pytest.mark.fast
RNG = np.random.default_rng(0)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("dtype", "values", "low", "high"),
    [
        ("uint8", (), 0, 255),
        ("uint16", (), 0, 65535),
        ("uint16", (100, 4196), 100, 4196),
        ("float32", (-2, 6), -2, 6),
        ("float64", (0, 1), 0, 1),
        ("int16", (-500, 500), -500, 500),
    ],
)
def test_numbers_become_0_to_255_and_back(dtype, values, low, high):
    pixels = PixelFormat(5, values)
    array = (low + (high - low) * RNG.random((6, 4, 5))).astype(dtype)
    array[0, 0], array[0, 1] = low, high
    read = pixels(npy(array))
    assert (read.dtype, read.shape) == (np.float32, array.shape)
    np.testing.assert_allclose(read, (array.astype(float) - low) / (high - low) * 255, atol=1e-4)
    assert (read[0, 0] == 0).all()
    assert (read[0, 1] == 255).all()
    restored = pixels.restore(read, dtype)
    assert restored.dtype == dtype
    np.testing.assert_allclose(restored.astype(float), array, atol=2e-6 * (high - low))
    assert picture_size(npy(array)) == (6, 4)


def test_numbers_outside_the_range_are_clipped():
    read = PixelFormat(1, (0.0, 1.0))(npy(np.array([[-1.0, 0.5, 3.0]])))
    np.testing.assert_array_equal(read[0, :, 0], [0, 127.5, 255])


def test_pictures_of_pillow():
    wide = RNG.integers(0, 65536, (5, 7)).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        data = encode(Image.fromarray(wide), kind)
        np.testing.assert_array_equal(PixelFormat(1).read(data)[..., 0], wide)
    depth = RNG.random((5, 7)).astype(np.float32)
    data = encode(Image.fromarray(depth), "TIFF")
    np.testing.assert_array_equal(PixelFormat(1, (0, 1)).read(data)[..., 0], depth)
    four = RNG.integers(0, 256, (5, 7, 4)).astype(np.uint8)
    np.testing.assert_array_equal(PixelFormat(4)(encode(Image.fromarray(four))), four)
    two = np.ascontiguousarray(four[..., :2])
    np.testing.assert_array_equal(PixelFormat(2)(encode(Image.fromarray(two))), two)
    rgb = Image.fromarray(np.ascontiguousarray(four[..., :3]))
    np.testing.assert_array_equal(PixelFormat(1)(encode(rgb))[..., 0], np.asarray(rgb.convert("L")))
    assert (PixelFormat(4)(encode(rgb))[..., 3] == 255).all()


@pytest.mark.parametrize(
    ("pixels", "data", "message"),
    [
        (PixelFormat(5), npy(np.zeros((4, 4, 3), np.uint8)), "3 channels, and data.channels is 5"),
        (PixelFormat(2), encode(Image.new("RGB", (2, 2))), "3 channels, and data.channels is 2"),
        (PixelFormat(1, (0, 1)), npy(np.full((2, 2), np.nan)), "NaN"),
        (PixelFormat(1), npy(np.zeros((2, 2), np.uint8))[:-2], "no whole .npy"),
        (PixelFormat(1), npy(np.array([["a"]])), "is no picture"),
        (PixelFormat(1), npy(np.zeros((1, 1000), np.uint8)), "too narrow"),
        (PixelFormat(1), npy(np.array([object()], dtype=object)), "no whole .npy"),
    ],
)
def test_what_is_no_picture_of_the_format(pixels, data, message):
    with pytest.raises(UnreadablePicture, match=message):
        pixels(data)


def test_settings_are_checked():
    with pytest.raises(DataError, match="give 1 to 16"):
        pixel_format({"channels": 17})
    with pytest.raises(DataError, match="lowest and highest"):
        pixel_format({"values": (1, 1)})
    with pytest.raises(DataError, match=r"data.values is missing: pictures of float32"):
        PixelFormat(2)(npy(np.zeros((2, 2, 2), np.float32)))
    assert pixel_format({}).is_plain
    assert model_pixels({"first_stage": {"in_channels": 5}}) == PixelFormat(5)
    assert model_pixels({"pixels": {"channels": 1, "values": [0, 2]}}) == PixelFormat(1, (0, 2))


def test_a_loader_crops_resizes_and_buckets_arrays(tmp_path):
    arrays = [RNG.random((16, 16, 5)), RNG.random((12, 20, 5))]
    for i, array in enumerate(arrays):
        (tmp_path / f"{i}.npy").write_bytes(npy(array.astype(np.float32)))
    source, pixels = ImageFolder(tmp_path), PixelFormat(5, (0, 1))
    transform = ImageTransform((8, 8), crop="center", flip=True)
    loader = Loader(source, transform, pixels=pixels, batch_size=2)
    batch = next(loader.batches())
    assert (batch["image"].dtype, batch["image"].shape) == (np.float32, (2, 8, 8, 5))
    # Halving with an area average keeps the mean of each channel, and channels stay apart.
    halved = ImageTransform((8, 8), resample="box")(pixels(npy(arrays[0])), RNG)
    np.testing.assert_allclose(halved.mean((0, 1)), 255 * arrays[0].mean((0, 1)), rtol=1e-5)
    buckets = make_buckets({"size": (16, 16), "buckets": {"step": 4}})
    loader = Loader(source, transform, pixels=pixels, batch_size=1, buckets=buckets)
    shapes = {batch["image"].shape for batch in loader.batches()}
    assert shapes == {(1, 16, 16, 5), (1, 12, 20, 5)}


def test_pictures_to_look_at():
    array = np.arange(2 * 5, dtype=np.float32).reshape(1, 2, 5) * 10
    np.testing.assert_array_equal(as_rgb(array[..., :1])[0, 1], [50, 50, 50])
    np.testing.assert_array_equal(as_rgb(array[..., :2])[0, 1], [50, 60, 60])
    np.testing.assert_array_equal(as_rgb(array)[0, 1], [50, 60, 70])
    assert as_rgb(array).dtype == np.uint8
