"""Sources beyond folders: archives, lists, tables, annotations, tar shards, scenes."""

import io
import json
import pathlib
import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from test_sources import lines, picture, write_folder, write_zip

from ldm_jax.conditioning.layout import RowLayout, boxes_of
from ldm_jax.conditioning.semantic_map import RowLabelMap, read_labels
from ldm_jax.data import SOURCES, decode_image, make_source
from ldm_jax.data.sources.files import Files
from ldm_jax.data.transforms import Crop, ImageTransform, View
from ldm_jax.errors import DataError

pytestmark = pytest.mark.fast


def write_tar(path: pathlib.Path, files: dict[str, bytes], mode: str = "w") -> pathlib.Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1000 + len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def values(source) -> list[int]:
    """The values of single-colour pictures, read through a pickled copy of the source."""
    copy = pickle.loads(pickle.dumps(source))
    return [int(decode_image(copy[i]["image"])[0, 0, 0]) for i in range(len(copy))]


def test_every_source_has_a_test():
    folder = pathlib.Path(__file__).parent
    text = "".join((folder / f"test_{n}sources.py").read_text() for n in ("", "more_"))
    text += (folder / "test_hf.py").read_text()
    assert [name for name in SOURCES if f'"{name}"' not in text and name != "image_folder"] == []


def test_tars_are_read_at_random(tmp_path):
    files = {"./b.png": picture(2), "a/a.png": picture(1), "a/._a.png": b"", "metadata.txt": b"x"}
    source = make_source({"path": write_tar(tmp_path / "d.tar", files)})
    assert [row["file_name"] for row in source.rows] == ["a/a.png", "b.png"]
    assert values(source) == [1, 2]
    assert source.stamp(0) == 1000 + len(picture(1))
    with_text = {
        "1.png": picture(7),
        "metadata.jsonl": lines({"file_name": "1.png", "text": "seven"}),
    }
    assert (
        make_source({"path": write_tar(tmp_path / "m.tar", with_text)}).rows[0]["text"] == "seven"
    )
    with pytest.raises(DataError, match="unpack it first if it is compressed"):
        Files(write_tar(tmp_path / "d.tar.gz", files, "w:gz"))
    whole = (tmp_path / "d.tar").read_bytes()
    (tmp_path / "d.tar").write_bytes(whole[:600])
    with pytest.raises(OSError, match="ends before this file does"):
        source[0]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar of tars"])
def test_class_folders(tmp_path, kind):
    files = {f"n{c}/{i}.png": picture(10 * c + i) for c in (3, 1) for i in (0, 1)}
    if kind == "folder":
        path = write_folder(tmp_path / "train", files)
    elif kind == "zip":
        path = write_zip(
            tmp_path / "d.zip", {f"imagenet/train/{name}": data for name, data in files.items()}
        )
    elif kind == "tar":
        path = write_tar(tmp_path / "d.tar", files)
    else:  # as ImageNet's own training set comes
        inner = {}
        for c in (1, 3):
            mine = {n.split("/")[1]: d for n, d in files.items() if n.startswith(f"n{c}/")}
            inner[f"n{c}.tar"] = write_tar(tmp_path / "inner.tar", mine).read_bytes()
        path = write_tar(tmp_path / "outer.tar", inner)
    (tmp_path / "names.txt").write_text("n1 tench, Tinca tinca\nn3 shark\n")
    source = make_source(
        {"source": "class_folders", "path": path, "names": str(tmp_path / "names.txt")}
    )
    found = [(row["class"], row["label"], row["text"]) for row in source.rows]
    assert found == [("n1", 0, "tench, Tinca tinca")] * 2 + [("n3", 1, "shark")] * 2
    assert values(source) == [10, 11, 30, 31]


def test_pictures_outside_of_class_folders_are_named(tmp_path):
    path = write_folder(tmp_path / "d", {"a/1.png": picture(1), "2.png": picture(2)})
    with pytest.raises(
        DataError, match=r"2\.png lies in no class folder: use the source image_folder"
    ):
        make_source({"source": "class_folders", "path": path})
    (path / "2.png").unlink()
    (tmp_path / "names.txt").write_text("n1\n")
    with pytest.raises(DataError, match="write lines like"):
        make_source({"source": "class_folders", "path": path, "names": str(tmp_path / "names.txt")})


def test_text_lists(tmp_path):
    files = {f"img/{i}.png": picture(i) for i in range(3)} | {"img/2.txt": "zwei ü\n".encode()}
    write_folder(tmp_path, files | {"list.txt": b"2.png\r\n\n0.png\ta caption, with comma\n"})
    settings = {"source": "text_list", "path": tmp_path / "list.txt", "root": str(tmp_path / "img")}
    source = make_source(settings)
    assert [row["text"] for row in source.rows] == ["", "a caption, with comma"]
    assert values(source) == [2, 0]
    beside = make_source(settings | {"captions": "beside"})
    assert [row["text"] for row in beside.rows] == ["zwei ü", "a caption, with comma"]
    zipped = write_zip(tmp_path / "i.zip", {n.removeprefix("img/"): d for n, d in files.items()})
    assert values(make_source(settings | {"root": str(zipped)})) == [2, 0]
    with pytest.raises(
        DataError, match=r"2 of 2 files listed in list\.txt are missing \(first: 2\.png\)"
    ):
        make_source(settings | {"root": ""})
    with pytest.raises(DataError, match="'column' or 'beside'"):
        make_source(settings | {"captions": "above"})
    with pytest.raises(DataError, match=r"none\.txt cannot be read: No such file"):
        make_source(settings | {"path": tmp_path / "none.txt"})


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(tmp_path, kind):
    write_folder(tmp_path, {f"img/{i}.png": picture(i) for i in range(3)})
    rows = [
        {"url": "img/2.png", "caption": 'a "b", c', "n": 5},
        {"url": "img/0.png", "caption": "", "n": 6},
    ]
    path = tmp_path / f"table.{kind}"
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_bytes(lines(*rows))
    else:
        mark = "\t" if kind == "tsv" else ","
        quoted = '"a ""b"", c"'
        path.write_text(
            f"url{mark}caption{mark}n\nimg/2.png{mark}{quoted}{mark}5\nimg/0.png{mark}{mark}6\n"
        )
    source = make_source({"source": "table", "path": path, "image": "url", "text": "caption"})
    number = str if kind in ("csv", "tsv") else int
    assert source.rows == [
        rows[0] | {"file_name": "img/2.png", "text": 'a "b", c', "n": number(5)},
        rows[1] | {"file_name": "img/0.png", "text": "", "n": number(6)},
    ]
    assert values(source) == [2, 0]
    with pytest.raises(
        DataError, match=r"there is no column 'image' but url, caption, n: set data\.image"
    ):
        make_source({"source": "table", "path": path, "image": "image"})


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_with_pictures_inside(tmp_path, struct, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for shard, numbers in enumerate([range(5), range(5, 7)]):
        rows = [
            {
                "image": {"bytes": picture(i), "path": None} if struct else picture(i),
                "caption": f"number {i}",
                "n": i,
            }
            for i in numbers
        ]
        parquet.write_table(
            pyarrow.Table.from_pylist(rows), tmp_path / f"train-{shard}.parquet", row_group_size=2
        )
    settings = {"source": "parquet", "path": tmp_path, "text": "caption"}
    source = make_source(settings)
    assert source.rows[5] == {
        "file_name": "train-1.parquet[0]",
        "caption": "number 5",
        "n": 5,
        "text": "number 5",
    }
    assert values(source) == list(range(7))
    with ThreadPoolExecutor(4) as pool:  # as the loader reads
        order = [6, 0, 3, 1, 5, 2, 4] * 6
        found = list(pool.map(lambda i: int(decode_image(source[i]["image"])[0, 0, 0]), order))
    assert found == order
    assert len(make_source(settings | {"path": f"{tmp_path}/*-1.parquet"})) == 2
    with pytest.raises(DataError, match=r"no column 'png' but image, caption, n: set data\.image"):
        make_source(settings | {"image": "png"})
    with pytest.raises(DataError, match=r"there is no \.parquet there"):
        make_source(settings | {"path": tmp_path / "none"})
    (tmp_path / "train-2.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"train-2\.parquet cannot be read"):
        make_source(settings)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="Parquet needs pyarrow: pip install pyarrow"):
        make_source(settings)


def test_table_errors(tmp_path, monkeypatch):
    write_folder(
        tmp_path, {"t.csv": b"file_name,text\na.png\n", "t.xls": b"", "t.parquet": b"PAR?"}
    )
    for name, message in [
        ("t.csv", "the row in line 2 has 1 fields, the header has 2"),
        ("t.xls", r"a table ends in \.csv"),
        ("t.parquet", "read"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            make_source({"source": "table", "path": tmp_path / name})
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="Parquet needs pyarrow: pip install pyarrow"):
        make_source({"source": "table", "path": tmp_path / "t.parquet"})


def test_label_maps_next_to_their_pictures(tmp_path):
    labels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    files = {"images/training/a.jpg": picture(4), "annotations/training/a.png": buffer.getvalue()}
    path = write_zip(tmp_path / "ade.zip", files | {"annotations/training/b.png": b""})
    source = make_source({"source": "label_maps", "path": path})
    assert source.rows == [
        {"file_name": "images/training/a.jpg", "map": "annotations/training/a.png", "text": ""}
    ]
    np.testing.assert_array_equal(read_labels(source[0]["map"]), labels)
    with pytest.raises(DataError, match=r"1 of 1 pictures in images have no map in other .*a\.jpg"):
        make_source({"source": "label_maps", "path": path, "maps": "other"})


@pytest.fixture
def coco(tmp_path):
    """Three pictures of 40 x 80 pixels in COCO's form."""
    images = [{"id": i, "file_name": f"{i:03d}.png", "width": 80, "height": 40} for i in (7, 8, 9)]
    captions = [{"image_id": i, "caption": f"caption {k} of {i}\n"} for k in (0, 1) for i in (8, 7)]
    box = {"image_id": 7, "category_id": 2, "bbox": [20.0, 10.0, 40.0, 20.0], "iscrowd": 0}
    boxes = [
        box,
        box | {"category_id": 5},
        box | {"iscrowd": 1},
        box | {"bbox": [0, 0, 0.01, 0.01]},
        box | {"image_id": 8},
    ]
    categories = [{"id": 2, "name": "bicycle"}, {"id": 5, "name": "cat"}]
    table = {"images": images, "annotations": captions}
    files = {f"val/{i:03d}.png": picture(i) for i in (7, 8, 9)} | {
        f"maps/{i:03d}.png": picture(0) for i in (7, 8)
    }
    write_folder(
        tmp_path,
        files
        | {
            "captions.json": json.dumps(table).encode(),
            "instances.json": json.dumps(
                table | {"annotations": boxes, "categories": categories}
            ).encode(),
        },
    )
    return tmp_path


def test_coco_captions_and_boxes(coco):
    settings = {"source": "coco", "path": coco / "val", "annotations": str(coco / "captions.json")}
    source = make_source(settings)
    assert [row["text"] for row in source.rows] == ["caption 0 of 7", "caption 0 of 8", ""]
    assert source.rows[0]["captions"] == ["caption 0 of 7", "caption 1 of 7"]
    assert values(source) == [7, 8, 9]
    both = f"{coco}/captions.json,{coco}/instances.json"
    source = make_source(settings | {"annotations": both, "min_boxes": 1})
    assert [row["file_name"] for row in source.rows] == ["007.png", "008.png"]
    assert boxes_of(source.rows[0], "boxes") == [
        ("bicycle", (0.25, 0.25, 0.5, 0.5)),
        ("cat", (0.25, 0.25, 0.5, 0.5)),
    ]
    assert source.rows[1]["text"] == "caption 0 of 8"
    source = make_source(
        settings | {"path": coco, "annotations": both, "min_boxes": 1, "maps": "maps"}
    )
    assert source.rows[0]["map"] == "maps/007.png"
    with pytest.raises(
        DataError,
        match=r"1 of 6 files listed in captions\.json are missing \(first: maps/009\.png\)",
    ):
        make_source(settings | {"path": coco, "maps": "maps"})


def test_coco_errors(coco):
    settings = {"source": "coco", "path": coco / "val", "annotations": str(coco / "instances.json")}
    with pytest.raises(DataError, match=r"no picture is left: check data\.min_boxes"):
        make_source(settings | {"min_boxes": 3})
    with pytest.raises(DataError, match=r"none\.json does not exist: give COCO's"):
        make_source(settings | {"annotations": "none.json"})
    (coco / "list.json").write_text("[]")
    with pytest.raises(DataError, match="no 'images' and 'annotations'"):
        make_source(settings | {"annotations": str(coco / "list.json")})


def test_webdataset_shards(tmp_path):
    first = {
        "s/0.jpg": picture(10),
        "s/0.txt": b"nought",
        "s/0.json": b'{"text": "x", "size": 3}',
        "s/0.cls": b"4",
    }
    second = {
        "1.seg.png": picture(0),
        "1.png": picture(20),
        "1.json": b'{"caption": "one"}',
        "2.txt": b"no picture",
    }
    write_tar(tmp_path / "a-0.tar", first)
    write_tar(tmp_path / "a-1.tar", second)
    source = make_source({"source": "webdataset", "path": tmp_path})
    assert source.rows == [
        {
            "file_name": "a-0.tar/s/0.jpg",
            "text": "nought",
            "size": 3,
            "label": 4,
            "caption": None,
        },
        {
            "file_name": "a-1.tar/1.png",
            "text": "one",
            "size": None,
            "label": None,
            "caption": "one",
        },
    ]
    np.testing.assert_allclose(values(source), [10, 20], atol=1)
    assert source.stamp(1) == 1000 + len(picture(20))
    one = make_source({"source": "webdataset", "path": f"{tmp_path}/a-*1.tar", "image": "seg.png"})
    assert values(one) == [0]
    with pytest.raises(DataError, match=r"there is no \.tar there"):
        make_source({"source": "webdataset", "path": tmp_path / "none-*.tar"})
    write_tar(tmp_path / "a-1.tar", {"1.json": b"{", "1.png": picture(1)})
    with pytest.raises(DataError, match=r"a-1\.tar/1\.json is not JSON"):
        make_source({"source": "webdataset", "path": tmp_path})


def test_lsun_without_lmdb_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataError, match="need lmdb: pip install lmdb"):
        make_source({"source": "lsun", "path": tmp_path})


def test_lsun(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    path = tmp_path / "church_outdoor_train_lmdb"
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        for i in (2, 1):
            transaction.put(f"key{i}".encode(), picture(i))
    source = make_source({"source": "lsun", "path": path})
    assert source.rows == [{"file_name": f"key{i}", "text": "church outdoor"} for i in (1, 2)]
    assert values(source) == [1, 2]
    with pytest.raises(DataError, match="is no LMDB folder"):
        make_source({"source": "lsun", "path": tmp_path / "none"})


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A red square and a green one, 8 of 16 pixels, the second transparent and in two halves."""
    folder = tmp_path_factory.mktemp("cut-outs")
    red = np.full((16, 16, 3), 255, np.uint8)
    red[4:12, 4:12] = (255, 0, 0)
    green = np.zeros((16, 16, 4), np.uint8)
    green[4:12, 2:6] = green[4:12, 10:14] = (0, 255, 0, 255)
    rows = [
        {"file_name": "r.png", "text": "red", "kind": "b"},
        {"file_name": "g.png", "text": "green", "kind": "a"},
    ]
    Image.fromarray(red).save(folder / "r.png")
    Image.fromarray(green).save(folder / "g.png")
    (folder / "metadata.jsonl").write_bytes(lines(*rows))
    return {"source": "scenes", "path": str(folder), "column": "kind", "count": 40, "size": 32}


def test_scenes_have_exact_maps_and_boxes(scenes):
    source = make_source(scenes)
    assert source.classes == ["a", "b"]
    seen = set()
    for i in range(len(source)):
        row = source[i]
        assert row["image"].shape == (32, 32, 3)
        for number, (label, colour) in enumerate([("a", (0, 255, 0)), ("b", (255, 0, 0))], start=1):
            painted = np.abs(row["image"].astype(int) - colour).max(2) < 40
            np.testing.assert_array_equal(painted[row["map"] == number], True)
            assert not painted[row["map"] == 0].any()
            boxes = [box for name, box in boxes_of(row, "boxes") if name == label]
            if len(boxes) == 1 and len(row["boxes"]) == 1:
                y, x = np.nonzero(row["map"] == number)
                bounds = [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
                np.testing.assert_allclose(np.array(boxes[0]) * 32, bounds)
                seen.add(label)
                np.testing.assert_allclose(row["vectors"], [[*np.array(colour) / 255, *boxes[0]]])
    assert seen == {"a", "b"}
    again = pickle.loads(pickle.dumps(make_source(scenes)))
    np.testing.assert_array_equal(again[3]["map"], source[3]["map"])
    assert again.rows == source.rows
    assert make_source(scenes | {"seed": 1}).rows != source.rows
    white = make_source(scenes | {"background": 255})[0]
    assert (white["image"][white["map"] == 0] == 255).all()
    assert source[0]["image"][source[0]["map"] == 0].min() >= 170
    with pytest.raises(DataError, match=r"data\.background must be from 0 to 255, not 256"):
        make_source(scenes | {"background": 256})
    sides = [
        max(box["box"][2:])
        for row in make_source(scenes | {"smallest": 0.75, "largest": 1}).rows
        for box in row["boxes"]
    ]
    assert 0.75 <= min(sides) < max(sides) <= 1
    with pytest.raises(DataError, match=r"must be in \(0, 1\], not 0\.5 and 0\.4"):
        make_source(scenes | {"smallest": 0.5, "largest": 0.4})
    chosen = make_source(scenes | {"classes": ("b",)})
    assert chosen.classes == ["b"]
    assert {box["label"] for row in chosen.rows for box in row["boxes"]} == {"b"}
    assert {int(label) for i in range(len(chosen)) for label in np.unique(chosen[i]["map"])} == {
        0,
        1,
    }
    with pytest.raises(DataError, match=r"no picture has the \w+ 'c': change data\.classes"):
        make_source(scenes | {"classes": ["b", "c"]})
    # Both conditions read them.
    view = View(ImageTransform((32, 32)), Crop(0, 0, 32, 32, False), (32, 32))
    row = source[0]
    condition = RowLabelMap("map", 3)
    condition.read(row)
    np.testing.assert_array_equal(
        condition(row, row["image"], view, np.random.default_rng(0)), source[0]["map"]
    )
    layout = RowLayout("boxes", 9, 1026, ("a", "b"))
    tokens = layout(row, row["image"], view, np.random.default_rng(0))
    assert tokens.shape == (9,)
    with pytest.raises(DataError, match="not every picture has a 'group'"):
        make_source(scenes | {"column": "group"})
