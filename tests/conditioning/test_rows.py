"""Conditions from rows of a data set: masks, small pictures, label maps, boxes, classes."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from ldm_jax.conditioning import degrade
from ldm_jax.conditioning.class_label import ClassLabel, RowClass
from ldm_jax.conditioning.config import names_in_rows
from ldm_jax.conditioning.embeddings import RowVectors
from ldm_jax.conditioning.layout import Layout, RowLayout, boxes_of_tokens, layout_tokens
from ldm_jax.conditioning.masked import MASKS, RowMask
from ldm_jax.conditioning.semantic_map import RowLabelMap, read_labels
from ldm_jax.conditioning.small_picture import RowSmallPicture
from ldm_jax.data import ImageFolder, ImageTransform, Loader
from ldm_jax.data.transforms import Crop, View
from ldm_jax.errors import DataError, UnreadablePicture

pytestmark = pytest.mark.fast

PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
SPOTS = np.repeat(np.random.default_rng(0).integers(0, 256, (8, 8, 1)), 3, 2).astype(np.uint8)
PHOTO = np.asarray(Image.fromarray(SPOTS).resize((64, 64), Image.Resampling.BICUBIC))
VIEW = View(ImageTransform((24, 32)), Crop(0, 0, 24, 32, False), (24, 32))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", MASKS)
def test_every_mask_covers_a_part_of_every_picture(kind):
    shares = []
    for seed in range(60):
        h, w = (8, 8) if seed % 2 else (40, 24)
        mask = MASKS[kind](h, w, rng(seed))
        assert mask.shape == (h, w)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, MASKS[kind](h, w, rng(seed)))
        shares.append(mask.mean())
    assert min(shares) > 0
    assert max(shares) < 1
    assert np.ptp(shares) > 0.2 or kind == "half"
    if kind == "half":
        assert set(shares) == {0.5}


def test_outpainting_leaves_a_rectangle_and_halves_take_each_side():
    for seed in range(20):
        kept = ~MASKS["outpaint"](20, 30, rng(seed))
        rows, columns = kept.any(1), kept.any(0)
        np.testing.assert_array_equal(kept, rows[:, None] & columns)
    halves = {MASKS["half"](4, 6, rng(seed)).tobytes() for seed in range(40)}
    assert len(halves) == 4


def test_mask_condition_draws_among_its_kinds():
    condition = RowMask(kinds=("half", "boxes"))
    found = {condition({}, PICTURE, VIEW, rng(seed)).mean() for seed in range(20)}
    assert 0.5 in found
    assert len(found) > 3
    assert condition({}, PICTURE, VIEW, rng()).shape == (24, 32, 1)
    with pytest.raises(
        DataError, match=r"mask 'circle' does not exist .known: boxes, strokes, outpaint, half"
    ):
        RowMask(kinds=("circle",))


def test_masks_that_hide_too_much_are_drawn_again():
    few = RowMask(most=0.2)
    shares = [few({}, PICTURE, VIEW, rng(seed)).mean() for seed in range(40)]
    assert 0 < min(shares) < 0.1 < max(shares) <= 0.2
    drawn = [RowMask()({}, PICTURE, VIEW, rng(seed)) for seed in range(40)]
    for seed, mask in enumerate(drawn):
        assert (few({}, PICTURE, VIEW, rng(seed)) == mask).all() == (mask.mean() <= 0.2)
    with pytest.raises(
        DataError,
        match=r"none hides 0.2 of a picture of \(24, 32\) or less: raise data.condition.most",
    ):
        RowMask(("half",), most=0.2)({}, PICTURE, VIEW, rng())


@pytest.mark.parametrize("kind", degrade.DEGRADATIONS)
def test_degradations_make_small_pictures_of_the_same_scene(kind):
    small = [degrade.DEGRADATIONS[kind](PHOTO, (16, 16), rng(seed)) for seed in range(6)]
    assert all(s.shape == (16, 16, 3) and s.dtype == np.uint8 for s in small)
    np.testing.assert_array_equal(small[0], degrade.DEGRADATIONS[kind](PHOTO, (16, 16), rng(0)))
    clean = degrade.bicubic(PHOTO, (16, 16), rng()).astype(float)
    errors = [np.abs(s - clean).mean() for s in small]
    assert (max(errors) == 0) == (kind == "bicubic")
    assert max(errors) < 40
    assert np.abs(clean[::-1] - clean).mean() > 70  # another scene


def test_the_full_degradation_is_stronger_than_the_light_one():
    clean = degrade.bicubic(PHOTO, (16, 16), rng()).astype(float)
    light, full = (
        np.mean(
            [
                np.abs(degrade.DEGRADATIONS[k](PHOTO, (16, 16), rng(s)) - clean).mean()
                for s in range(12)
            ]
        )
        for k in ("bsr_light", "bsr")
    )
    assert 2 < light < 0.7 * full


def test_gaussian_blur_is_a_gaussian_blur():
    dot = np.zeros((21, 31, 3), np.float32)
    dot[10, 15] = 1
    seen = degrade.convolve(dot, degrade.gaussian_kernel((1.0, 2.0), 0.0))[:, :, 1]
    y, x = np.mgrid[-10:11, -15:16]
    # Variances along x, y.
    np.testing.assert_allclose([(seen * x**2).sum(), (seen * y**2).sum()], [1, 4], rtol=0.05)
    np.testing.assert_allclose(seen.sum(), 1, rtol=1e-5)
    turned = degrade.convolve(dot, degrade.gaussian_kernel((1.0, 2.0), np.pi / 2))[:, :, 1]
    np.testing.assert_allclose([(turned * x**2).sum(), (turned * y**2).sum()], [4, 1], rtol=0.05)
    flat = np.full((9, 7, 3), 100, np.float32)
    np.testing.assert_allclose(
        degrade.convolve(flat, degrade.gaussian_kernel((2.0, 2.0), 0.3)), flat, rtol=1e-5
    )


def test_a_small_picture_larger_than_its_picture_is_refused():
    with pytest.raises(DataError, match=r"raise data\.size"):
        RowSmallPicture((64, 64))({}, PICTURE, VIEW, rng())


def encode(labels: np.ndarray, mode: str | None = None) -> bytes:
    image, buffer = Image.fromarray(labels), io.BytesIO()
    if mode == "P":
        image = Image.fromarray(labels, "L").copy()
        image.putpalette([255 - i // 3 for i in range(768)])
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", [None, "P"])
def test_label_maps_keep_their_numbers(mode):
    labels = rng().integers(0, 7, (6, 9)).astype(np.uint8)
    np.testing.assert_array_equal(read_labels(encode(labels, mode)), labels)
    np.testing.assert_array_equal(
        read_labels(encode(labels.astype(np.uint16) * 100)), 100 * labels.astype(int)
    )


def test_images_that_are_no_label_maps_are_errors():
    for data, message in [
        (encode(PICTURE), r"shape \(24, 32, 3\)"),
        (b"x", "label map: not a picture"),
    ]:
        with pytest.raises(UnreadablePicture, match=message):
            read_labels(data)


def test_a_label_map_is_cut_as_its_picture_is(tmp_path):
    """An image of its own labels in grey, after random crop, flip and nearest-neighbour resize."""
    labels = np.repeat(np.repeat(rng().integers(0, 5, (5, 7)), 8, 0), 8, 1).astype(np.uint8)
    (tmp_path / "maps").mkdir()
    rows = []
    for i, small in enumerate([False, True]):  # the second map is half its picture's size
        Image.fromarray(np.repeat(labels[:, :, None] * 50, 3, 2)).save(tmp_path / f"{i}.png")
        Image.fromarray(labels[::2, ::2] if small else labels).save(tmp_path / "maps" / f"{i}.png")
        rows.append(f'{{"file_name": "{i}.png", "map": "maps/{i}.png"}}')
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    transform = ImageTransform((16, 16), "random", flip=True, resample="nearest", min_crop=0.5)
    source = ImageFolder(tmp_path, files=("map",))
    loader = Loader(source, transform, batch_size=32, condition=RowLabelMap("map", 5))
    batch = next(loader.iterate())
    assert batch["condition"].shape == (32, 16, 16)
    assert (
        batch["condition"] * 50 == batch["image"][:, :, :, 0]
    ).mean() > 0.97  # the half map's borders may lie a pixel off
    exact = batch["index"] == 0
    np.testing.assert_array_equal(batch["condition"][exact] * 50, batch["image"][exact][:, :, :, 0])
    assert pickle.loads(pickle.dumps(source))[0]["map"] == (tmp_path / "maps/0.png").read_bytes()
    with pytest.raises(DataError, match=r"has the label 4: model\.conditioner\.in_channels is 3"):
        next(Loader(source, transform, batch_size=2, condition=RowLabelMap("map", 3)).iterate())
    ignoring = next(
        Loader(
            source, transform, batch_size=2, condition=RowLabelMap("map", 3, ignore=(3, 4))
        ).iterate()
    )
    assert set(np.unique(ignoring["condition"])) <= {-1, 0, 1, 2}
    assert RowLabelMap("map", 5).draw(batch["image"], batch["condition"]).shape == (32, 16, 16, 3)
    # A damaged map is skipped and named, as a damaged picture is.
    (tmp_path / "maps/1.png").write_bytes(b"?")
    loader = Loader(source, transform, batch_size=8, condition=RowLabelMap("map", 5))
    assert set(next(loader.iterate())["index"]) == {0}
    assert "label map" in loader.broken["1.png"]
    (tmp_path / "maps/0.png").unlink()
    with pytest.raises(DataError, match=r"1 of 4 files .*first: maps/0.png"):
        ImageFolder(tmp_path, files=("map",))
    with pytest.raises(DataError, match=r"row 1 has no depth"):
        ImageFolder(tmp_path, files=("depth",))


def test_layout_tokens_are_those_of_the_original_s_builder():
    """By hand: 8192 tokens are a grid of side 90; 16 tokens one of side 4, as in its docstring."""
    assert layout_tokens([], length=3, vocabulary=16) == [15, 15, 15]
    quarter = (0.0, 0.0, 0.5, 0.5)
    # round(1.5) is 2.
    assert layout_tokens([(2, quarter)], length=6, vocabulary=16) == [2, 0, 10, 15, 15, 15]
    assert layout_tokens([(2, quarter), (3, quarter)], length=5, vocabulary=16) == [2, 0, 10, 0, 15]
    assert layout_tokens([(7, (1 / 3, 2 / 3, 1 / 3, 1 / 3))], length=3, vocabulary=16) == [7, 9, 14]
    tokens = layout_tokens([(5, (0.1, 0.2, 0.3, 0.4))], length=92, vocabulary=8192)
    assert tokens[:3] == [5, 18 * 90 + 9, 53 * 90 + 36]
    assert tokens[3:] == [8191] * 87 + [0, 8099]
    ((label, box),) = boxes_of_tokens(tokens, 8192)
    assert label == 5
    np.testing.assert_allclose(box, (0.1, 0.2, 0.3, 0.4), atol=1 / 89)


def test_boxes_follow_crop_and_mirror():
    row = {
        "boxes": [
            {"label": "b", "box": [0.0, 0.0, 0.25, 0.5]},
            {"label": "a", "box": [0.5, 0.25, 0.25, 0.5]},
        ]
    }
    condition = RowLayout("boxes", 6, 1 + 101**2, ("a", "b"))

    def seen(crop: Crop, condition=condition) -> dict[int, tuple]:
        view = View(ImageTransform((8, 8)), crop, (100, 200))
        return dict(boxes_of_tokens(condition(row, PICTURE, view, rng()), condition.vocabulary))

    def same(found: dict, expected: dict) -> None:
        assert found.keys() == expected.keys()
        for label, box in expected.items():
            np.testing.assert_allclose(found[label], box, atol=0.011)

    same(seen(Crop(0, 0, 100, 200, False)), {1: (0, 0, 0.25, 0.5), 0: (0.5, 0.25, 0.25, 0.5)})
    same(seen(Crop(0, 0, 100, 200, True)), {1: (0.75, 0, 0.25, 0.5), 0: (0.25, 0.25, 0.25, 0.5)})
    # The right half; the other box is outside.
    same(seen(Crop(0, 100, 100, 100, False)), {0: (0, 0.25, 0.5, 0.5)})
    same(seen(Crop(50, 100, 50, 100, True)), {0: (0.5, 0, 0.5, 0.5)})
    # Appends the crop; boxes stay relative to the whole image.
    with_crop = RowLayout("boxes", 8, 1 + 101**2, ("a", "b"))
    same(seen(Crop(0, 100, 100, 100, False), with_crop), {0: (0.5, 0.25, 0.25, 0.5)})
    assert with_crop(
        row, PICTURE, View(ImageTransform((8, 8)), Crop(0, 100, 100, 100, False), (100, 200)), rng()
    )[-2:].tolist() == [50, 100 * 101 + 100]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([{"label": "a", "box": [0, 0, 20, 20]}], "in parts of the picture"),
        ([{"label": "a", "box": [0, 0, 0.5]}], "is no box"),
        ([{"box": [0, 0, 0.5, 0.5]}], "is no box"),
        ([{"label": "c", "box": [0, 0, 0.5, 0.5]}], "label 'c' is not in model.classes"),
        ([{"label": 99, "box": [0, 0, 0.5, 0.5]}], "the vocabulary has room for 15"),
    ],
)
def test_wrong_boxes_are_named(boxes, message):
    with pytest.raises(DataError, match=message):
        RowLayout("boxes", 6, 16, ("a", "b"))({"boxes": boxes}, PICTURE, VIEW, rng())


def test_vectors_are_all_or_a_choice_in_their_order():
    rows = np.arange(8.0).reshape(4, 2)
    np.testing.assert_array_equal(
        RowVectors("v", 4, 2)({"v": rows.tolist()}, PICTURE, VIEW, rng()), rows
    )
    assert RowVectors("v", 1, 2)({"v": [3, 4]}, PICTURE, VIEW, rng()).tolist() == [[3, 4]]
    found = {
        tuple(RowVectors("v", 2, 2)({"v": rows}, PICTURE, VIEW, rng(seed))[:, 0])
        for seed in range(60)
    }
    assert found == {(0, 2), (0, 4), (0, 6), (2, 4), (2, 6), (4, 6)}
    file, row = io.BytesIO(), {}
    np.save(file, rows)
    row["v"] = file.getvalue()
    RowVectors("v", 4, 2).read(row)
    np.testing.assert_array_equal(row["v"], rows)
    with pytest.raises(UnreadablePicture, match=r"no \.npy file"):
        RowVectors("v", 4, 2).read({"v": pickle.dumps(rows)})


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1, 2]], r"a\.png has 1 vectors, model\.conditioner\.count is 2"),
        ([[1, 2, 3]] * 2, r"vectors of the shape \(2, 3\), not \(m, 2\)"),
        ([[1, 2], [1]], "no list of vectors"),
        ("red", "no list of vectors"),
        ([[1, float("nan")]] * 2, "a.png has vectors that are not finite"),
        ({"a": 1}, "no list of vectors"),
    ],
)
def test_wrong_vectors_are_named(vectors, message):
    with pytest.raises(DataError, match=message) as caught:
        RowVectors("v", 2, 2)({"v": vectors, "file_name": "a.png"}, PICTURE, VIEW, rng())
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="there is no column 'w'"):
        RowVectors("w", 2, 2).read({"v": vectors})


def test_classes_are_the_sorted_names_or_the_numbers_themselves():
    rows = [{"kind": k, "n": n} for k, n in [("dog", 3), ("cat", 1), ("dog", 0)]]
    names = names_in_rows(rows, "kind", ClassLabel)
    assert names == ("cat", "dog")
    assert [RowClass("kind", names)(row, PICTURE, VIEW, rng()) for row in rows] == [1, 0, 1]
    assert names_in_rows(rows, "n", ClassLabel) == ()
    assert [RowClass("n")(row, PICTURE, VIEW, rng()) for row in rows] == [3, 1, 0]
    assert names_in_rows(
        [{"b": [{"label": "z", "box": [0, 0, 1, 1]}]}, {"b": []}], "b", Layout
    ) == ("z",)
    with pytest.raises(DataError, match=r"'fish' is not in model\.classes"):
        RowClass("kind", names)({"kind": "fish"}, PICTURE, VIEW, rng())
    with pytest.raises(DataError, match="holds names and None"):
        names_in_rows([*rows, {"kind": None}], "kind", ClassLabel)
    with pytest.raises(DataError, match="no column 'style': there are kind, n"):
        names_in_rows(rows, "style", ClassLabel)


def test_conditions_are_drawn_by_the_sample_alone(tmp_path):
    """A step draws the same masks wherever reading started."""
    for i in range(5):
        Image.fromarray(PICTURE).save(tmp_path / f"{i}.png")

    def batch(start: int, step: int) -> dict:
        loader = Loader(
            ImageFolder(tmp_path),
            ImageTransform((16, 16), "random"),
            batch_size=4,
            condition=RowMask(),
        )
        stream = loader.iterate(start)
        return [next(stream) for _ in range(step - start + 1)][-1]

    a, b = batch(0, 2), batch(2, 2)
    np.testing.assert_array_equal(a["condition"], b["condition"])
    assert (batch(3, 3)["condition"] != a["condition"]).any()
    with pytest.raises(DataError, match="give an ImageTransform"):
        Loader(ImageFolder(tmp_path), lambda image, rng: image, batch_size=4, condition=RowMask())
