"""Sources of pictures, and choosing parts of them."""

import io
import json
import pathlib
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import (
    TFDS,
    ImageFolder,
    Subset,
    decode_image,
    hold_out_pairs,
    make_source,
    select,
    split_by,
)
from ldm_jax.errors import DataError

RNG = np.random.default_rng(0)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(
        buffer, kind, **options
    )
    return buffer.getvalue()


def picture(value: int, size: tuple[int, int] = (6, 8)) -> bytes:
    return encode(np.full((*size, 3), value, np.uint8))


def write_zip(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_folder(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def lines(*rows: dict) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def concepts(count: int = 200) -> ImageFolder:
    """A source of metadata alone: 3 styles of each concept."""
    source = ImageFolder.__new__(ImageFolder)
    source.path = "concepts"
    source.rows = [
        {
            "file_name": f"{style}/{i}.png",
            "hexcode": f"{i:04X}",
            "style": style,
            "tags": [f"t{i % 2}", "all"],
        }
        for style in ("a", "b", "c")
        for i in range(count)
    ]
    return source


@pytest.mark.processes
def test_importing_data_loads_nothing_heavy():
    heavy = ("jax", "flax", "grain", "tensorflow_datasets")
    code = f"import sys, ldm_jax.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.fast
@pytest.mark.parametrize("write", [write_zip, write_folder])
@pytest.mark.parametrize("top", ["", "set/"])
def test_folder_and_zip_with_metadata(tmp_path, write, top):
    rows = [
        {"file_name": "b/2.png", "text": "two", "style": "x"},
        {"file_name": "./1.png", "text": "one", "n": [1, 2]},
    ]
    files = {
        top + "1.png": picture(1),
        top + "b/2.png": picture(2),
        top + "unlisted.png": picture(3),
    }
    path = write(
        tmp_path / "data",
        files | {top + "metadata.jsonl": b"\xef\xbb\xbf" + lines(*rows) + b"\n\n"},
    )
    source = ImageFolder(path)
    rows = [rows[0] | {"n": None}, rows[1] | {"style": None}]  # all rows have all columns
    assert source.rows == rows
    assert len(source) == 2
    assert [decode_image(source[i]["image"])[0, 0, 0] for i in range(2)] == [2, 1]
    assert {k: v for k, v in source[1].items() if k != "image"} == rows[1]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[0] == source[0]


@pytest.mark.fast
@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_folder_and_zip_without_metadata(tmp_path, write):
    names = [
        "z.png",
        "a/b/c.JPG",
        "a/1.webp",
        "x.gif",
        "notes.txt",
        ".hidden.png",
        "__MACOSX/._z.png",
    ]
    source = ImageFolder(write(tmp_path / "data", {name: picture(5) for name in names}))
    expected = ["a/1.webp", "a/b/c.JPG", "x.gif", "z.png"]
    assert source.rows == [{"file_name": name, "text": ""} for name in expected]
    assert source.name(3) == "z.png"


@pytest.mark.fast
def test_metadata_without_any_text_gets_empty_text(tmp_path):
    files = {"1.png": picture(1), "metadata.jsonl": lines({"file_name": "1.png", "width": 8})}
    assert ImageFolder(write_zip(tmp_path / "d.zip", files)).rows == [
        {"file_name": "1.png", "width": 8, "text": ""}
    ]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (b'{"file_name": "1.png"}\n{"file_name": ', r"metadata\.jsonl: line 2 is not JSON"),
        (b'\n{"file_name": "\xff.png"}', r"line 2 is not UTF-8"),
        (b"[1, 2]", r"row 1 is not a JSON object"),
        (b'{"file_name": "1.png"}\n\n{"text": "x"}', r"row 2 has no file_name"),
        (
            lines(*({"file_name": n} for n in ("1.png", "no.png", "../1.png"))),
            r"2 of 3 files .*\(first: no\.png\)",
        ),
        (b"", r"no picture found"),
    ],
)
def test_metadata_errors_are_one_clear_line(tmp_path, metadata, message):
    path = write_zip(tmp_path / "d.zip", {"1.png": picture(1), "metadata.jsonl": metadata})
    with pytest.raises(DataError, match=message) as caught:
        ImageFolder(path)
    assert "\n" not in str(caught.value)
    assert "d.zip" in str(caught.value)


@pytest.mark.fast
def test_path_errors(tmp_path):
    with pytest.raises(DataError, match="none does not exist"):
        ImageFolder(tmp_path / "none")
    write_folder(tmp_path, {"fake.zip": b"not a zip", "empty/readme.txt": b""})
    with pytest.raises(DataError, match=r"fake\.zip is not a zip archive"):
        ImageFolder(tmp_path / "fake.zip")
    with pytest.raises(DataError, match="empty: no picture found"):
        ImageFolder(tmp_path / "empty")


@pytest.mark.fast
def test_select_by_values_and_by_list_columns():
    source = concepts(10)
    chosen = select(source, {"style": ["a", "c"], "tags": "t1"})
    assert {row["style"] for row in chosen.rows} == {"a", "c"}
    assert all("t1" in row["tags"] for row in chosen.rows)
    assert len(chosen) == 10
    assert select(source, None) is source
    with pytest.raises(
        DataError, match="no column 'colour': there are file_name, hexcode, style, tags"
    ):
        select(source, {"colour": ["red"]})
    with pytest.raises(DataError, match="no row has"):
        select(source, {"style": ["z"]})


@pytest.mark.fast
def test_split_is_disjoint_complete_and_keeps_values_together():
    source = concepts()
    train, held = (
        split_by(source, "hexcode", 0.2, seed=3, part=part) for part in ("train", "validation")
    )
    train_codes, held_codes = ({row["hexcode"] for row in part.rows} for part in (train, held))
    assert not train_codes & held_codes
    assert len(train) + len(held) == len(source)
    assert len(held) == 3 * len(held_codes)
    assert 20 <= len(held_codes) <= 60
    other = {
        row["hexcode"] for row in split_by(source, "hexcode", 0.2, seed=4, part="validation").rows
    }
    assert other != held_codes


@pytest.mark.fast
def test_split_depends_on_seed_and_value_alone():
    source = concepts()
    codes = {row["hexcode"] for row in split_by(source, "hexcode", 0.05, part="validation").rows}
    # a change here would silently move concepts between parts for every user
    pinned = [
        "000D",
        "0023",
        "0025",
        "0040",
        "0041",
        "0044",
        "005C",
        "0078",
        "00A3",
        "00AA",
        "00AC",
        "00BE",
    ]
    assert sorted(codes) == pinned
    shuffled = Subset(source, list(RNG.permutation(len(source))[:300]))
    again = {row["hexcode"] for row in split_by(shuffled, "hexcode", 0.05, part="validation").rows}
    assert again == codes & {row["hexcode"] for row in shuffled.rows}


@pytest.mark.fast
def test_hold_out_pairs_takes_combinations_not_concepts():
    source = concepts()
    train, held = (
        hold_out_pairs(source, fraction=0.3, part=part) for part in ("train", "validation")
    )
    pairs = [{(row["hexcode"], row["style"]) for row in part.rows} for part in (train, held)]
    assert not pairs[0] & pairs[1]
    assert len(pairs[0]) + len(pairs[1]) == len(source)
    assert {code for code, _ in pairs[1]} & {code for code, _ in pairs[0]}
    with pytest.raises(DataError, match="validation part by hexcode/style is empty"):
        hold_out_pairs(source, fraction=0.0, part="validation")
    with pytest.raises(DataError, match="give a number from 0"):
        hold_out_pairs(source, fraction=1.0)


@pytest.mark.fast
def test_subsets_nest(tmp_path):
    source = ImageFolder(write_folder(tmp_path, {f"{i}.png": picture(i) for i in range(6)}))
    nested = Subset(Subset(source, [5, 3, 1]), [2, 0])
    assert [row["file_name"] for row in nested.rows] == ["1.png", "5.png"]
    assert nested.name(1) == nested[1]["file_name"] == "5.png"
    assert nested.source is source


@pytest.mark.fast
def test_make_source_parts_and_package_path():
    config = {
        "path": "pkg:assets/emoji_subset.zip",
        "where": {"style": ["noto", "fluent"]},
        "split_column": "hexcode",
        "holdout": 0.1,
        "pair_holdout": 0.1,
    }
    parts = {
        part: make_source({**config, "part": part})
        for part in ("all", "train", "validation", "pairs")
    }
    names = {part: {row["file_name"] for row in source.rows} for part, source in parts.items()}
    assert names["train"] | names["validation"] | names["pairs"] == names["all"]
    assert sum(len(names[part]) for part in ("train", "validation", "pairs")) == len(names["all"])
    assert decode_image(parts["pairs"][0]["image"]).shape == (64, 64, 3)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"path": "x", "hold_out": 0.1}, "unknown data setting 'hold_out'; did you mean 'holdout'"),
        ({"path": "x", "source": "imagefolder"}, "did you mean 'image_folder'"),
        ({"source": "image_folder"}, "'path' is missing"),
        ({"path": "x", "part": "test"}, "unknown part 'test'"),
        (
            {"path": "pkg:assets/emoji_subset.zip", "part": "validation"},
            "needs split_column and holdout",
        ),
        ({"path": "pkg:assets/emoji_subset.zip", "part": "pairs"}, "needs pair_holdout"),
    ],
)
def test_make_source_errors(config, message):
    with pytest.raises(DataError, match=message):
        make_source(config)


def test_tfds_round_trip_without_tensorflow(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class LdmJaxTiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path  # builders normally find it with a package that is not installed

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "caption": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["even", "odd"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                yield (
                    i,
                    {
                        "image": io.BytesIO(picture(i * 10)),
                        "caption": f"number {i} ü",
                        "label": i % 2,
                    },
                )

    data_dir = str(tmp_path / "tfds")
    with pytest.raises(DataError, match="prepare it, or set download=True"):
        TFDS("ldm_jax_tiny", data_dir=data_dir)
    TFDS("ldm_jax_tiny", data_dir=data_dir, download=True)
    source = make_source(
        {
            "source": "tfds",
            "path": f"{data_dir}/ldm_jax_tiny/1.0.0",
            "where": {"label_name": ["odd"]},
        }
    )
    assert sorted(row["caption"] for row in source.rows) == [
        "number 1 ü",
        "number 3 ü",
        "number 5 ü",
    ]
    source = pickle.loads(
        pickle.dumps(TFDS("ldm_jax_tiny:1.0.0", data_dir=data_dir, columns=["caption"]))
    )
    for i in range(6):
        row = source[i]
        assert decode_image(row["image"])[0, 0, 0] == 10 * int(row["caption"].split()[1])
        assert source.rows[i] == {"caption": row["caption"], "text": row["caption"]}
    with pytest.raises(DataError, match="no feature 'text': it has"):
        TFDS("ldm_jax_tiny", data_dir=data_dir, columns=["text"])
    with pytest.raises(DataError, match="Unknown split 'test'"):
        TFDS("ldm_jax_tiny", data_dir=data_dir, split="test")
