"""Aspect-ratio buckets: sizes, the order of batches, and what a loader makes of them."""

import contextlib
import io
import itertools
import pickle
import types

import numpy as np
import pytest
from PIL import Image

from ldm_jax.conditioning.sdxl import RowSizes
from ldm_jax.data import ImageFolder, ImageTransform, Loader
from ldm_jax.data.buckets import Buckets, assign, batch_sizes, lost_share, make_buckets
from ldm_jax.data.order import Grouped
from ldm_jax.errors import DataError

pytestmark = pytest.mark.fast

# Height, width -> number of pictures.
SHAPES = {(16, 16): 5, (24, 40): 7, (12, 20): 2, (40, 24): 3, (17, 16): 1}
FIELDS = {"step": 4}  # of areas of 16 x 16: the sizes 16 x 16, 12 x 20, 20 x 12, 8 x 32, 32 x 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eighteen pictures of five shapes, the last of which is cut off after its header."""
    path, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    shapes = [shape for shape, count in SHAPES.items() for _ in range(count)]
    for i, shape in enumerate(shapes):
        buffer = io.BytesIO()
        pixels = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        whole = buffer.getvalue()
        (path / f"{i:02d}.png").write_bytes(whole[:-40] if i == len(shapes) - 1 else whole)
    return ImageFolder(path)


def buckets(**fields) -> Buckets:
    made = make_buckets({"size": (16, 16), "buckets": FIELDS | fields})
    assert made is not None
    return made


def loader(source, **options) -> Loader:
    transform = ImageTransform((16, 16), crop="random", flip=True)
    return Loader(source, transform, **{"batch_size": 4, "buckets": buckets(), **options})


def take(stream, count: int) -> list[dict]:
    with contextlib.closing(stream) as batches:
        return list(itertools.islice(batches, count))


def test_sizes_are_those_of_sdxl():
    """arXiv:2307.01952, appendix I: the first and the middle of its table."""
    fields = {"step": 64, "areas": (1024 * 1024,)}
    sizes = batch_sizes({"size": (64, 64), "buckets": fields})
    assert sizes[:10] == [
        *((512, 1856), (512, 1920), (512, 1984), (512, 2048), (576, 1664), (576, 1728)),
        *((576, 1792), (640, 1536), (640, 1600), (704, 1344)),
    ]
    middle = [(896, 1088), (896, 1152), (960, 1024), (960, 1088), (1024, 960), (1024, 1024)]
    assert [size for size in sizes if 896 <= size[0] <= 1024] == middle
    assert {(width, height) for height, width in sizes} == set(sizes)
    near = batch_sizes({"size": (1024, 1024), "buckets": {"step": 64, "ratios": (1, 3 / 2, 5)}})
    assert near == [(448, 2240), (832, 1216), (1024, 1024)]
    assert batch_sizes({"size": (64, 48), "buckets": {"step": 0}}) == [(64, 48)]


def test_a_picture_goes_where_it_loses_least():
    several = Buckets((((32, 32), (64, 64), (48, 80), (80, 48)),))
    assert several.choose((500, 800)) == [(48, 80)]
    assert several.choose((640, 640)) == [(64, 64)]
    assert several.choose((40, 40)) == [(32, 32)]  # not enlarged
    assert several.choose((20, 20)) == [(32, 32)]  # or as little as possible
    assert lost_share((500, 800), (48, 80)) == pytest.approx(0.04)
    assert lost_share((48, 80), (48, 80)) == 0
    areas = make_buckets({"size": (8, 8), "buckets": {"step": 16, "areas": (64**2, 32**2)}})
    assert areas.choose((640, 640)) == [(32, 32), (64, 64)]
    assert areas.choose((40, 40)) == areas.choose((9, 9)) == [(32, 32)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 7}, "step 7 leaves no size"),
        ({"step": -4}, "must be above 0"),
        ({"areas": (0,)}, "must be above 0"),
        ({"max_ratio": 0.5}, "max_ratio at least 1"),
        ({"step": 0, "ratios": (1.5,)}, "step is missing"),
        ({"sizes": ((8, 8),)}, "takes the place of step"),
        ({"step": 0, "sizes": (8, 8)}, "give pairs"),
        ({"columns": ("width",)}, "columns"),
    ],
)
def test_settings_that_do_not_fit(fields, message):
    with pytest.raises(DataError, match=message):
        buckets(**fields)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_rest_of_a_group_is_carried_to_the_next_epoch(shuffle):
    counts = (57, 3, 20, 8, 1)
    parts = np.split(np.random.default_rng(0).permutation(sum(counts)), np.cumsum(counts)[:-1])
    groups = [np.sort(part) for part in parts]
    order, seen = Grouped(groups, 8, seed=1, shuffle=shuffle), np.zeros(sum(counts), int)
    # After eight epochs nothing is left over: everything was seen eight times.
    for step in range(sum(counts)):
        places = [order.place(step, row) for row in range(8)]
        assert len({place.group for place in places}) == 1
        for place in places:
            assert place.sample in groups[place.group]
            assert place.fresh == (seen[place.sample] == 0)
            seen[place.sample] += 1
        if step % 11 == 10:  # an epoch is 11.1 batches: no sample is ahead by more than a batch
            per_group = [seen[group].sum() / len(group) for group in groups]
            assert max(per_group) - min(per_group) <= 8
    assert (seen == 8).all()
    copied = pickle.loads(pickle.dumps(order))
    assert [copied.place(s, 3) for s in range(100)] == [order.place(s, 3) for s in range(100)]
    other = Grouped(groups, 8, seed=2, shuffle=shuffle)
    same = [other.place(s, 3) == order.place(s, 3) for s in range(100)]
    assert all(same) != shuffle


def test_batches_have_one_size_and_resume_anywhere(pictures):
    batches = take(loader(pictures).iterate(), 30)
    assert {batch["image"].shape for batch in batches} == {
        (4, *size, 3) for size in [(16, 16), (12, 20), (20, 12)]
    }
    for workers, start in ((0, 13), (1, 0)):
        again = take(loader(pictures, num_workers=workers).iterate(start), 30 - start)
        for one, other in zip(again, batches[start:], strict=True):
            np.testing.assert_array_equal(one["image"], other["image"])
            assert one["index"].tolist() == other["index"].tolist()
    halves = [
        take(loader(pictures, process_index=i, process_count=2).iterate(), 30) for i in range(2)
    ]
    for whole, *parts in zip(batches, *halves, strict=True):
        assert len({part["image"].shape for part in parts}) == 1
        np.testing.assert_array_equal(whole["image"], np.concatenate([p["image"] for p in parts]))


def test_one_pass_has_every_picture_once_and_a_damaged_one_is_replaced(pictures):
    ours = loader(pictures)
    assert ours.count == 18
    batches = take(ours.batches(), 100)
    seen = [i for b in batches for i, good in zip(b["index"], b["valid"], strict=True) if good]
    assert sorted(seen) == list(range(17))
    assert [*ours.broken] == ["17.png"]
    # The replacement is the first picture of the same bucket.
    filled = next(b for b in batches if 0 in b["index"] and not b["valid"].all())
    assert filled["image"].shape[1:3] == (16, 16)
    assert len(take(loader(pictures, drop_remainder=True).batches(), 100)) == 1 + 2 + 0
    assert len(take(ours.batches(2, start=1), 100)) == 2
    assert ours.transform_of(7).size == (12, 20)


def test_notes_name_the_largest_crop(pictures):
    found = assign(pictures, buckets(), 4)
    assert found.notes[0] == (
        "3 of 5 buckets have pictures (height x width: 12x20: 9, 16x16: 6, 20x12: 3)"
    )
    assert found.notes[1] == (
        "the largest crop to a bucket loses 5.9 % of a picture (17.png, 17x16 to 16x16)"
    )
    assert found.notes[2].endswith("several times: 20x12")


def test_sizes_may_come_from_columns():
    rows = [{"w": 40, "h": 24}, {"w": None, "h": 8}, {"w": 8, "h": 8}]

    class Table:
        path = "table"

        def __init__(self):
            self.rows, self.read = rows, []

        def __len__(self):
            return 3

        def name(self, index):
            return str(index)

        def __getitem__(self, index):
            self.read.append(index)
            return {"image": np.zeros((8, 32, 3), np.uint8)}

    table = Table()
    found = assign(table, buckets(columns=("h", "w")), 1)
    assert dict(zip(found.sizes, map(list, found.groups), strict=True)) == {
        (8, 32): [1],
        (12, 20): [0],
        (16, 16): [2],
    }
    assert table.read == [1]
    with pytest.raises(DataError, match="no column 'height': there are w, h"):
        assign(table, buckets(columns=("height", "w")), 1)


def test_streamed_and_unreadable_data_are_refused(tmp_path):
    with pytest.raises(DataError, match="streamed"):
        assign(types.SimpleNamespace(path="x", window=8), buckets(), 1)  # type: ignore[arg-type]
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"no readable picture in .*a\.png: not a picture"):
        loader(ImageFolder(tmp_path))


def test_sizes_of_sdxl_are_those_of_the_picture_and_its_crop(pictures):
    condition = RowSizes(("original_size", "crop", "target_size"))
    options = {"buckets": Buckets((((12, 12),),)), "condition": condition, "batch_size": 18}
    batch = take(Loader(pictures, ImageTransform((16, 16)), **options).batches(), 1)[0]
    crops = {(16, 16): (0, 0), (24, 40): (0, 4), (12, 20): (0, 4), (40, 24): (4, 0)}
    shapes = [shape for shape, count in SHAPES.items() for _ in range(count)]
    for index, numbers in zip(batch["index"][:17], batch["condition"], strict=False):
        original = shapes[index]
        assert numbers.tolist() == [*original, *crops[original], 12, 12]
