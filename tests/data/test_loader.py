"""Conversion to RGB, transforms, captions, and the loader's stream of batches."""

import contextlib
import io
import itertools
import logging
import multiprocessing

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import ImageFolder, ImageTransform, Loader, caption_template, decode_image, to_rgb
from ldm_jax.errors import DataError, UnreadablePicture

RNG = np.random.default_rng(0)
BROKEN = {"04.png": "empty file", "05.png": "not a picture", "09.png": "truncated"}


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve good 10x14 pictures in a folder."""
    path = tmp_path_factory.mktemp("good")
    for i in range(12):
        (path / f"{i:02d}.png").write_bytes(encode(Image.fromarray(noise(10, 14, 3) // 2 + i)))
    return ImageFolder(path)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, pictures):
    """The same twelve, three of them unreadable."""
    path = tmp_path_factory.mktemp("damaged")
    good = {row["file_name"]: pictures[i]["image"] for i, row in enumerate(pictures.rows)}
    bad = {"04.png": b"", "05.png": b"this is a text", "09.png": good["09.png"][:-60]}
    for name, data in (good | bad).items():
        (path / name).write_bytes(data)
    return ImageFolder(path)


def loader(source, **options) -> Loader:
    transform = options.pop("transform", ImageTransform((8, 8), crop="random", flip=True))
    return Loader(
        source, transform, **{"batch_size": 5, "seed": 7, "columns": ("file_name",), **options}
    )


def take(source, count: int, start: int = 0, **options) -> list[dict]:
    with contextlib.closing(loader(source, **options).iterate(start)) as batches:
        return list(itertools.islice(batches, count))


def assert_equal(a: list[dict], b: list[dict]):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


@pytest.mark.fast
def test_transparency_lies_on_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (200, 0, 0, 255)
    rgba[0, 1] = (0, 0, 0, 128)
    expected = [[[200, 0, 0], [127, 127, 127]], [[255, 255, 255]] * 2]
    image = Image.fromarray(rgba)
    np.testing.assert_array_equal(decode_image(encode(image)), expected)
    np.testing.assert_array_equal(to_rgb(rgba), expected)
    np.testing.assert_array_equal(decode_image(encode(image, "WEBP", lossless=True)), expected)
    palette = Image.new("P", (1, 1), 3)
    palette.putpalette(bytes(range(30)))
    np.testing.assert_array_equal(decode_image(encode(palette)), [[[9, 10, 11]]])
    np.testing.assert_array_equal(
        decode_image(encode(palette, transparency=3)), [[[255, 255, 255]]]
    )
    np.testing.assert_array_equal(
        decode_image(encode(Image.new("LA", (1, 1), (7, 0)))), [[[255, 255, 255]]]
    )


@pytest.mark.fast
def test_grey_and_16_bit():
    grey = noise(3, 4)
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(grey))), expected)
    wide = grey.astype(np.uint16) * 257
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(wide))), expected)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(wide), "TIFF")), expected)
    np.testing.assert_array_equal(
        decode_image(encode(Image.fromarray(wide.astype(np.int32)), "TIFF")), expected
    )
    for array in (grey, wide, grey[:, :, None]):
        np.testing.assert_array_equal(to_rgb(array), expected)
    with pytest.raises(UnreadablePicture, match="floating-point"):
        decode_image(encode(Image.new("F", (2, 2)), "TIFF"))
    with pytest.raises(UnreadablePicture, match="float64"):
        to_rgb(np.zeros((2, 2, 3)))


@pytest.mark.fast
def test_cmyk_and_exif_orientation():
    red = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red.shape == (8, 8, 3)
    assert np.abs(red[4, 4].astype(int) - (255, 0, 0)).max() < 12
    picture = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held turned: upright is a quarter turn clockwise
    turned = decode_image(encode(Image.fromarray(picture), "PNG", exif=exif))
    np.testing.assert_array_equal(turned, np.rot90(picture, -1))
    damaged = encode(
        Image.fromarray(picture), "WEBP", lossless=True, exif=b"Exif\0\0 no exif at all"
    )
    np.testing.assert_array_equal(decode_image(damaged), picture)


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_unreadable_bytes(kind):
    data = encode(Image.fromarray(noise(40, 40, 3)), kind)
    assert decode_image(data).shape == (40, 40, 3)
    for broken in (b"", b"text", data[: len(data) // 2], data[:20]):
        with pytest.raises(UnreadablePicture) as caught:
            decode_image(broken)
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)  # no object addresses


@pytest.mark.fast
@pytest.mark.parametrize("crop", ["center", "random", "none"])
def test_target_size_is_not_resampled(crop):
    image = noise(8, 8, 3)
    np.testing.assert_array_equal(ImageTransform((8, 8), crop=crop)(image, RNG), image)


@pytest.mark.fast
def test_crops_keep_pixels_and_stay_inside():
    image = noise(8, 20, 3)
    np.testing.assert_array_equal(ImageTransform((8, 8))(image, RNG), image[:, 6:14])
    windows = {image[:, x : x + 8].tobytes() for x in range(13)}
    seen = {ImageTransform((8, 8), crop="random")(image, RNG).tobytes() for _ in range(300)}
    assert seen == windows
    flipped = {ImageTransform((8, 8), flip=True)(image, RNG).tobytes() for _ in range(20)}
    assert flipped == {image[:, 6:14].tobytes(), image[:, 6:14][:, ::-1].tobytes()}


@pytest.mark.fast
def test_short_side_fits_and_aspect_ratio_stays():
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = 255  # the central square
    assert ImageTransform((16, 16), resample="box")(wide, RNG).min() == 255
    stretched = ImageTransform((16, 16), crop="none", resample="box")(wide, RNG)
    assert stretched[:, 0].max() == 0
    assert ImageTransform((24, 12))(noise(7, 5, 3), RNG).shape == (24, 12, 3)
    assert ImageTransform((12, 12), crop="random", min_crop=0.5)(noise(1, 30, 3), RNG).shape == (
        12,
        12,
        3,
    )


@pytest.mark.fast
def test_min_crop_zooms_and_deterministic_drops_all_randomness():
    ramp = np.repeat(np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, 0), 3, 2)
    zoom = ImageTransform((64, 64), crop="random", flip=True, min_crop=0.25)
    spans = [np.ptp(zoom(ramp, RNG)) for _ in range(50)]
    assert min(spans) < 30
    assert max(spans) > 50
    np.testing.assert_array_equal(zoom.deterministic()(ramp, RNG), ramp)


@pytest.mark.fast
@pytest.mark.parametrize(
    "options",
    [{"size": (8,)}, {"size": (8, 0)}, {"crop": "left"}, {"resample": "area"}, {"min_crop": 0.0}],
)
def test_transform_settings_are_checked(options):
    with pytest.raises(DataError, match=next(iter(options))):
        ImageTransform(**{"size": (8, 8), **options})


@pytest.mark.fast
def test_caption_template():
    row = {"text": "dolphin", "style": "noto", "tags": ["flipper", "sea"], "image": b""}
    assert caption_template("{text}, {style} style ({tags}; {tags[0]})", row) == (
        "dolphin, noto style (flipper, sea; flipper)"
    )
    with pytest.raises(DataError, match="no column 'colour': there are text, style, tags"):
        caption_template("{colour} {text}", row)
    for malformed in ("{text", "{}", "{tags[9]}", "{text.nothing}"):
        with pytest.raises(DataError, match="does not fit"):
            caption_template(malformed, row)


@pytest.mark.fast
def test_every_epoch_is_another_permutation(pictures):
    # 60 rows: five epochs of 12 pictures, batches of 5 straddle their borders.
    batches = take(pictures, 12)
    assert batches[0]["image"].shape == (5, 8, 8, 3)
    assert batches[0]["image"].dtype == np.uint8
    assert batches[0]["index"].dtype == np.int64
    assert batches[0]["file_name"] == [f"{i:02d}.png" for i in batches[0]["index"]]
    epochs = np.concatenate([b["index"] for b in batches]).reshape(5, 12)
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    ordered = np.concatenate([b["index"] for b in take(pictures, 5, shuffle=False)])
    np.testing.assert_array_equal(ordered, np.arange(25) % 12)


@pytest.mark.fast
def test_augmentation_differs_between_epochs_and_seeds(pictures):
    batches = take(pictures, 12, batch_size=12)
    views = {b["image"][list(b["index"]).index(3)].tobytes() for b in batches}
    assert len(views) > 4
    assert not np.array_equal(take(pictures, 1)[0]["index"], take(pictures, 1, seed=8)[0]["index"])


@pytest.mark.fast
def test_restart_continues_exactly(pictures):
    whole = take(pictures, 9)
    assert_equal(whole[6:], take(pictures, 3, start=6))
    assert_equal(whole, take(pictures, 9, read_threads=1, prefetch=1))


@pytest.mark.fast
def test_processes_share_each_global_batch(pictures):
    whole = take(pictures, 4, batch_size=6)
    parts = [take(pictures, 4, batch_size=6, process_index=p, process_count=3) for p in range(3)]
    for step, batch in enumerate(whole):
        for key in batch:
            joined = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(joined, batch[key])


@pytest.mark.fast
def test_data_shorter_than_a_batch_repeat(pictures):
    batch = take(pictures, 1, batch_size=30)[0]
    assert set(np.bincount(batch["index"], minlength=12)) <= {2, 3}


@pytest.mark.fast
def test_broken_pictures_are_replaced_and_named_once(damaged, pictures, caplog):
    reader = loader(damaged)
    with caplog.at_level(logging.WARNING), contextlib.closing(reader.iterate()) as stream:
        batches = list(itertools.islice(stream, 12))
    wanted = np.concatenate([b["index"] for b in take(pictures, 12)])
    got = np.concatenate([b["index"] for b in batches])
    stand_in = {4: 6, 5: 6, 9: 10}
    np.testing.assert_array_equal(got, [stand_in.get(i, i) for i in wanted])
    assert reader.broken.keys() == BROKEN.keys()
    assert all(why in reader.broken[name] for name, why in BROKEN.items())
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("ldm_jax")]
    assert len(messages) == 3
    assert [m.rsplit(": ", 1)[1] for m in messages] == ["1 so far", "2 so far", "3 so far"]


@pytest.mark.fast
def test_no_readable_picture(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"text")
    with pytest.raises(
        DataError, match=r"no readable picture in .* \(tried 3; first: .\.png: not a picture"
    ) as caught:
        take(ImageFolder(tmp_path), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.processes
def test_workers_give_the_same_stream_and_pass_errors_on(damaged):
    assert_equal(take(damaged, 7, start=3, num_workers=2), take(damaged, 7, start=3))
    assert not multiprocessing.active_children()
    reader = loader(damaged, num_workers=1, caption="{nothing}")
    with pytest.raises(DataError, match="there is no column 'nothing'") as caught:
        next(reader.iterate())
    assert "\n" not in str(caught.value)


@pytest.mark.fast
def test_finite_pass(damaged, pictures):
    reader = loader(damaged, caption="{file_name}")
    batches = list(reader.batches())
    assert [len(b["index"]) for b in batches] == [5, 5, 5]
    valid = np.concatenate([b["valid"] for b in batches])
    index = np.concatenate([b["index"] for b in batches])
    names = np.concatenate([b["caption"] for b in batches])
    assert index[valid].tolist() == [0, 1, 2, 3, 6, 7, 8, 10, 11]
    assert names[valid].tolist() == [f"{i:02d}.png" for i in index[valid]]
    image = decode_image(pictures[3]["image"])
    np.testing.assert_array_equal(batches[0]["image"][3], ImageTransform((8, 8))(image, RNG))
    assert len(list(reader.batches(2))) == 2
    assert list(reader.batches(0)) == []
    assert len(list(loader(pictures, drop_remainder=True).batches())) == 2
    assert [
        b["valid"].tolist()
        for b in loader(pictures, batch_size=8, process_count=2, process_index=1).batches()
    ] == [
        [True] * 4,
        [False] * 4,
    ]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "process_count": 2}, "batch_size 5 must be a positive multiple"),
        ({"process_index": 1}, "process_index 1 must lie in"),
        ({"seed": -1}, "seed is -1"),
        ({"columns": ("caption",)}, "column 'caption' is not available"),
    ],
)
def test_loader_settings_are_checked(pictures, options, message):
    with pytest.raises(DataError, match=message):
        loader(pictures, **options)


@pytest.mark.fast
def test_missing_columns_are_named(pictures):
    with pytest.raises(DataError, match="no column 'style': there are file_name, text"):
        take(pictures, 1, columns=("style",))
    assert take(pictures, 1, caption=None)[0]["caption"] == [""] * 5
