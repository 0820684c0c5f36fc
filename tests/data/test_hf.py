"""Hugging Face data sets, loaded and streamed."""

import contextlib
import itertools
import pickle
import sys

import numpy as np
import pytest
from test_sources import picture

from ldm_jax.data import ImageTransform, Loader, decode_image, make_source
from ldm_jax.errors import DataError

pytestmark = pytest.mark.fast


def test_without_datasets_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        make_source({"source": "hf", "path": str(tmp_path)})


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "captions": [datasets.Value("string")],
            "n": datasets.Value("int8"),
        }
    )
    rows = [
        {
            "photo": {"bytes": picture(i), "path": None},
            "captions": [f"thing {i}", "x"] if i else None,
            "n": i,
        }
        for i in range(20)
    ]
    data = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    data.to_parquet(tmp_path / "files/train.parquet")
    return tmp_path


@pytest.mark.parametrize("kind", ["saved", "files"])
def test_loaded(saved, kind, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(saved / "home"))
    source = make_source({"source": "hf", "path": str(saved / kind), "where": {"n": [0, 3, 5]}})
    assert [row["text"] for row in source.rows] == ["", "thing 3", "thing 5"]
    copy = pickle.loads(pickle.dumps(source))
    assert [int(decode_image(copy[i]["image"])[0, 0, 0]) for i in range(3)] == [0, 3, 5]
    with pytest.raises(DataError, match="no column 'img'"):
        make_source({"source": "hf", "path": str(saved / kind), "image": "img"})
    with pytest.raises(DataError, match="cannot open the data set"):
        make_source({"source": "hf", "path": str(saved / kind), "split": "nothing"})


@pytest.mark.parametrize("kind", ["saved", "files"])
def test_streamed(saved, kind):
    settings = {"source": "hf", "path": str(saved / kind), "streaming": True, "count": 20}
    source = make_source(settings)
    source.window = 8

    def take(start: int, n: int) -> list[list[int]]:
        loader = Loader(source, ImageTransform((4, 4)), batch_size=4, columns=("n",))
        with contextlib.closing(loader.iterate(start)) as batches:
            found = list(itertools.islice(batches, n))
        for batch in found:
            np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["n"])
        return [batch["n"] for batch in found]

    whole = take(0, 10)
    flat = [n for batch in whole for n in batch]
    assert sorted(flat[:20]) == sorted(flat[20:]) == list(range(20))
    assert [set(flat[:8]), set(flat[8:16])] == [set(range(8)), set(range(8, 16))]
    assert flat[:20] != flat[20:]
    assert take(7, 3) == whole[7:]
    with pytest.raises(DataError, match="is streamed, its rows are not known"):
        make_source(settings | {"where": {"n": [1]}})
