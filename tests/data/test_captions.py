"""Captions: optional parts, draws among templates and tags, and the same from a latent cache."""

import contextlib
import itertools
from collections import Counter

import numpy as np
import pytest
from test_sources import lines, picture, write_folder

from ldm_jax.data import Captions, ImageFolder, ImageTransform, LatentLoader, Loader
from ldm_jax.data.captions import configured_captions
from ldm_jax.data.latents import CacheInfo, check_key, claim, text_columns, write_shard
from ldm_jax.errors import DataError

ROW = {"text": "a cat", "style": "", "tags": ["fur", "paw", "tail"], "n": 3, "none": None}


def draws(captions: Captions, row: dict, count: int = 400) -> Counter:
    return Counter(captions(row, np.random.default_rng(i)) for i in range(count))


@pytest.mark.fast
def test_parts_in_brackets_are_left_out_where_their_columns_are_empty():
    captions = Captions(("{text}[, {style} style][ with {tags}][ no {none}] [[{n}]] {tags[0]}",))
    assert captions(ROW) == "a cat with fur, paw, tail [3] fur"
    assert captions(ROW | {"style": "oil"}).startswith("a cat, oil style with")
    assert Captions(("{text} [plain] {none}",))(ROW) == "a cat [plain] "
    assert not captions.random
    with pytest.raises(DataError, match="no column 'colour'"):
        Captions(("{text}[ {colour}]",))(ROW)


@pytest.mark.fast
def test_draws_follow_their_probabilities():
    found = draws(Captions(("{text}", "{n}"), weights=(3, 1)), ROW)
    assert found.keys() == {"a cat", "3"}
    assert 260 < found["a cat"] < 340
    found = draws(Captions(("{text}[, {n}]",), part_dropout=0.25), ROW)
    assert 260 < found["a cat, 3"] < 340
    found = draws(Captions(("{tags:any}",)), ROW)
    assert found.keys() == set(ROW["tags"])
    assert Captions(("{tags:any}",))(ROW) == "fur"


@pytest.mark.fast
def test_tags_are_shuffled_and_dropped_but_for_the_first():
    captions = Captions(("{tags}",), tag_column="tags", tag_shuffle=True, tag_keep=1)
    assert draws(captions, ROW).keys() == {"fur, paw, tail", "fur, tail, paw"}
    row = {"tags": "one,two, three"}
    dropped = Captions(("{tags}",), tag_column="tags", tag_dropout=0.5)
    found = draws(dropped, row)
    assert len(found) == 8
    assert all(tag in ("one", "two", "three", "") for text in found for tag in text.split(", "))
    assert dropped(row) == "one,two, three"  # nothing is drawn in validation


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"templates": ()}, "give a template"),
        ({"templates": ("a", "b"), "weights": (1,)}, "give 2 numbers"),
        ({"templates": ("a", "b"), "weights": (0, 0)}, "give 2 numbers"),
        ({"templates": ("a",), "part_dropout": 1.5}, "part_dropout is 1.5"),
        ({"templates": ("a",), "tag_shuffle": True}, "need data.tag_column"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(DataError, match=message):
        Captions(**fields)


@pytest.mark.fast
def test_a_config_of_before_and_one_with_every_setting():
    assert configured_captions({"caption": "{text}"}) == Captions(("{text}",))
    assert configured_captions({"caption": None}) is None
    data = {"caption": "x", "caption_templates": ["a", "b"], "caption_weights": [1, 2]}
    captions = configured_captions(data | {"tag_column": "t", "tag_shuffle": True})
    assert captions == Captions(("a", "b"), (1, 2), tag_column="t", tag_shuffle=True)


@pytest.fixture
def source(tmp_path):
    rows = [
        {"file_name": f"{i}.png", "text": f"thing {i}", "tags": ["a", "b", "c"]} for i in range(6)
    ]
    files = {f"{i}.png": picture(i) for i in range(6)} | {"metadata.jsonl": lines(*rows)}
    return ImageFolder(write_folder(tmp_path / "data", files))


def take(loader, first: int, count: int) -> list[list[str]]:
    with contextlib.closing(loader.iterate(first)) as batches:
        return [batch["caption"] for batch in itertools.islice(batches, count)]


RANDOM = Captions(("{text}: {tags}", "{text}"), tag_column="tags", tag_shuffle=True)


def test_a_resumed_run_draws_the_same_captions(source):
    loader = Loader(source, ImageTransform((8, 8)), batch_size=4, caption=RANDOM)
    whole = take(loader, 0, 9)
    assert take(loader, 5, 4) == whole[5:]
    assert len({caption for batch in whole for caption in batch}) > 12
    parts = [
        Loader(source, ImageTransform((8, 8)), batch_size=4, caption=RANDOM, **process)
        for process in ({"process_index": i, "process_count": 2} for i in range(2))
    ]
    joined = [a + b for a, b in zip(*(take(part, 5, 4) for part in parts), strict=True)]
    assert joined == whole[5:]
    first = next(iter(loader.batches()))
    assert first["caption"][0] == "thing 0: a, b, c"
    # Drawing captions changes no pixel.
    plain = Loader(source, ImageTransform((4, 4), "random", True), batch_size=4)
    drawn = Loader(source, ImageTransform((4, 4), "random", True), batch_size=4, caption=RANDOM)
    for a, b in zip(plain.batches(), drawn.batches(), strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


def cached(source, folder, columns=None):
    fields = {
        "moments": {"dtype": "float16", "shape": (1, 2, 2, 3)},
        "encoded": {"dtype": "int32", "shape": (4,)},
        "valid": {"dtype": "bool", "shape": (1,)},
    }
    columns = text_columns(source.rows) if columns is None else columns
    key = {"data.caption": "{text}", "data.size": [8, 8]}
    info = CacheInfo(key, fields, {"train": len(source)}, 4, 2 if columns else 1, columns)
    claim(folder, info)
    claim(folder, info)  # resumed
    for name, places in info.shards("train"):
        arrays = {
            "moments": np.ones((1, 2, 2, 3)),
            "encoded": np.zeros(4),
            "valid": np.ones(1),
        }
        texts = [(source.rows[i]["text"], source.rows[i]) for i in places]
        records = ((arrays, text if columns else text[0]) for text in texts)
        write_shard(folder / name, records, info)
    return folder


@pytest.mark.fast
def test_a_latent_cache_draws_the_captions_of_the_pictures(source, tmp_path):
    folder = cached(source, tmp_path / "cache")
    pictures = Loader(source, ImageTransform((8, 8)), batch_size=4, caption=RANDOM)
    latents = LatentLoader(folder, "train", batch_size=4, caption=RANDOM)
    assert take(latents, 3, 5) == take(pictures, 3, 5)
    assert "encoded" not in next(iter(latents.batches()))
    same = LatentLoader(folder, "train", batch_size=4, caption="{text}")
    assert "encoded" in next(iter(same.batches()))
    other = LatentLoader(folder, "train", batch_size=4, caption="a {text}")
    assert next(iter(other.batches()))["caption"][0] == "a thing 0"
    with pytest.raises(DataError, match="no column 'style'"):
        list(LatentLoader(folder, "train", batch_size=4, caption="{style}").batches())
    check_key(folder, latents.source.info, {"data.caption": "{n}", "data.tag_keep": 2})
    with pytest.raises(DataError, match=r"data\.size"):
        check_key(folder, latents.source.info, {"data.size": (9, 9)})


@pytest.mark.fast
def test_a_cache_without_columns_keeps_its_captions(source, tmp_path):
    folder = cached(source, tmp_path / "cache", columns=[])
    assert "columns" not in (folder / "cache.json").read_text()
    batch = next(iter(LatentLoader(folder, "train", batch_size=4, caption="{text}").batches()))
    assert batch["caption"][1] == "thing 1"
    assert "encoded" in batch
    with pytest.raises(DataError, match="no columns to draw captions from"):
        LatentLoader(folder, "train", batch_size=4, caption=RANDOM)
    info = CacheInfo({"data.caption": "{text}"}, {}, {}, 4)
    check_key(folder, info, {"data.caption": "{text}", "data.caption_templates": ()})
    with pytest.raises(DataError, match=r"data\.caption="):
        check_key(folder, info, {"data.caption": "a"})


@pytest.mark.fast
def test_text_columns_are_those_that_json_keeps():
    rows = [{"a": "x", "b": [1, "y"], "c": b"bytes", "d": {"k": 1}, "e": None}, {"a": 2}]
    assert text_columns(rows) == ["a", "b", "e"]
