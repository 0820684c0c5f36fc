"""Data sets as found in the wild: other tools' files, odd names and encodings, hostile files."""

import bz2
import gzip
import io
import json
import logging
import lzma
import struct
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sources import encode, lines, picture, write_folder, write_zip

from ldm_jax.data import Loader, decode, decode_image, make_source, to_rgb
from ldm_jax.data.transforms import ImageTransform
from ldm_jax.errors import DataError, UnreadablePicture

THREE = {f"{i}.png": picture(i) for i in range(3)}


GIF = encode(Image.new("L", (8, 8)), "GIF")


def texts(**config) -> list[str]:
    return [row["text"] for row in make_source(config).rows]


def values(**config) -> list[int]:
    source = make_source(config)
    return [int(decode_image(source[i]["image"])[0, 0, 0]) for i in range(len(source))]


def fails(match: str, **config) -> None:
    with pytest.raises(DataError, match=match) as caught:
        make_source(config)
    assert "\n" not in str(caught.value)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


# --------------------------------------------------------------------------------- hostile pictures


@pytest.mark.fast
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(12_000, 12_000), "too large"),
        (png(60_000, 60_000), "pixels"),
        (b"GIF89a" + struct.pack("<HH", 65_000, 64_000) + GIF[10:], "pixels"),
        (png(4_000, 8), "too narrow"),
        (encode(Image.new("L", (1, 300))), "too narrow"),
        (png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 80_000_000))), "too large"),
        (encode(Image.new("RGB", (8, 8)), "EPS"), "drawing"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99, "pip install pillow-heif"),
    ],
    ids=["pixels", "bomb", "gif", "wide", "tall", "text", "eps", "heic"],
)
def test_hostile_pictures_are_one_line(data, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UnreadablePicture, match=message) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)


@pytest.mark.fast
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK"])
def test_large_pictures_are_converted_in_strips_to_the_same_pixels(mode, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (37, 11, 4)).astype(np.uint8)
    image = Image.fromarray(noise).convert("RGB").convert(mode)
    if mode == "RGBA":
        image = Image.fromarray(noise)
    if mode == "P":
        image.info["transparency"] = 3
    whole = to_rgb(image)
    monkeypatch.setattr(decode, "_STRIP", 50)
    np.testing.assert_array_equal(to_rgb(image), whole)


@pytest.mark.fast
def test_suffixes_of_pictures(tmp_path):
    pixels = Image.fromarray(np.full((6, 8), 9, np.uint8))
    suffixes = {"jpe": "JPEG", "PGM": "PPM", "pnm": "PPM", "tga": "TGA", "jp2": "JPEG2000"}
    files = {f"{i}.{s}": encode(pixels, kind) for i, (s, kind) in enumerate(suffixes.items())}
    assert set(values(path=write_folder(tmp_path / "d", files))) <= {8, 9, 10}
    assert len(values(path=tmp_path / "d")) == len(suffixes)


@pytest.mark.fast
def test_files_that_are_not_read_are_named(tmp_path, caplog):
    files = THREE | {"a.svg": b"<svg/>", "b.cr3": b"x", "notes.txt": b"", "x.jxl": b"\xff\x0a"}
    with caplog.at_level(logging.WARNING):
        assert len(values(path=write_folder(tmp_path, files))) == 3
    assert "1 .cr3, 1 .jxl, 1 .svg" in caplog.text


# ----------------------------------------------------------------------------------------- captions


@pytest.mark.fast
@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ('"file_name";"Prompt"\n0.png;"a; b"\n1.png;\n', ["a; b", ""]),
        ("Filename,Caption,\n0.png,x,\n1.png,None,\n", ["x", ""]),
        ("file_name,text\r\n0.png,nan\r\n1.png,1.50\r\n", ["", "1.50"]),
        ("file_name\ttext\n0.png\tone\n1.png\ttwo\n", ["one", "two"]),
        ('file_name, text\n0.png, "a, b"\n1.png, c\n', ["a, b", "c"]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_delimited_tables_of_other_programs(tmp_path, table, expected, encoding):
    write_folder(tmp_path, THREE | {"t.csv": table.encode(encoding)})
    assert texts(source="table", path=tmp_path / "t.csv") == expected
    (tmp_path / "t.csv").rename(tmp_path / "metadata.csv")
    assert texts(path=tmp_path) == expected


@pytest.mark.fast
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([None, "b"], ["", "b"]),
        ([float("nan"), 2.5], ["", "2.5"]),
        ([["first", "second"], []], ["first", ""]),
        ([[None, "second"], [float("nan")]], ["second", ""]),
        ([7, True], ["7", "True"]),
        (["\ud800 x", "b"], ["? x", "b"]),
    ],
)
@pytest.mark.parametrize("column", ["text", "captions", "Prompt", "description"])
def test_values_of_captions(tmp_path, values, expected, column):
    rows = [{"file_name": f"{i}.png", column: value} for i, value in enumerate(values)]
    rows.append({"file_name": "2.png"})  # a row without the column
    write_folder(tmp_path, THREE | {"metadata.jsonl": lines(*rows)})
    assert texts(path=tmp_path) == [*expected, ""]
    loader = Loader(make_source({"path": tmp_path}), ImageTransform((4, 4)), batch_size=3)
    assert next(iter(loader.batches()))["caption"] == [*expected, ""]


@pytest.mark.fast
def test_missing_values_in_templates_are_empty(tmp_path):
    rows = [{"file_name": "0.png", "text": "a", "style": None}, {"file_name": "1.png", "text": "b"}]
    rows[1]["score"] = float("nan")
    write_folder(tmp_path, THREE | {"metadata.jsonl": lines(*rows)})
    caption = "{text}|{style}|{score}"
    source = make_source({"path": tmp_path})
    loader = Loader(source, ImageTransform((4, 4)), batch_size=2, caption=caption)
    assert next(iter(loader.batches()))["caption"] == ["a||", "b||"]


@pytest.mark.fast
def test_metadata_in_several_folders_and_formats(tmp_path, caplog):
    files = {
        "a/x.png": picture(1),
        "a/deep/y.png": picture(2),
        "b/x.png": picture(3),
        "b/unlisted.png": picture(4),
        "a/metadata.jsonl": lines(
            {"file_name": "x.png", "text": "ax"}, {"file_name": "deep/y.png", "text": "ay"}
        ),
        "b/METADATA.CSV": b"file_name,text\nx.png,bx\n",
    }
    with caplog.at_level(logging.WARNING):
        source = make_source({"path": write_zip(tmp_path / "d.zip", files)})
    assert {row["text"]: row["file_name"] for row in source.rows} == {
        "ax": "a/x.png",
        "ay": "a/deep/y.png",
        "bx": "b/x.png",
    }
    assert "1 pictures are not in a/metadata.jsonl, b/METADATA.CSV" in caplog.text
    assert sorted(values(path=tmp_path / "d.zip")) == [1, 2, 3]


@pytest.mark.fast
def test_caption_files_next_to_pictures_and_metadata_without_captions(tmp_path, caplog):
    files = THREE | {"0.txt": b"\xef\xbb\xbfnull \n", "1.caption": "größe".encode()}
    with caplog.at_level(logging.WARNING):
        assert texts(path=write_folder(tmp_path, files)) == ["null", "größe", ""]
    assert "1 of 3 pictures have no caption" in caplog.text
    (tmp_path / "metadata.jsonl").write_bytes(lines({"file_name": "1.png", "n": 1}))
    assert texts(path=tmp_path) == ["größe"]


@pytest.mark.fast
def test_caption_files_of_other_programs(tmp_path, caplog):
    files = {
        "0.png": picture(0),
        "0.TXT": "weit".encode("utf-16"),  # as Notepad saves "Unicode"
        "B.PNG": picture(1),
        "b.txt": b"\xef\xbb\xbfsmall\r\n",
        "u\u0308.png": picture(2),
        "\u00fc.caption": "ü".encode(),
        "x.png": picture(3),
        "x.txt": "gr\xf6ße".encode("latin-1"),
    }
    with caplog.at_level(logging.WARNING):
        found = texts(path=write_folder(tmp_path / "d", files))
    assert sorted(found) == sorted(["weit", "small", "ü", "gr\ufffd\ufffde"])
    assert "1 captions are not UTF-8, letters are lost (first: x.txt)" in caplog.text


@pytest.mark.fast
def test_a_table_that_is_not_read_is_named(tmp_path, caplog):
    files = THREE | {"captions.csv": b"file_name,text\n0.png,red\n"}
    with caplog.at_level(logging.WARNING):
        assert texts(path=write_folder(tmp_path, files)) == ["", "", ""]
    assert "captions.csv is not read: call it metadata.csv" in caplog.text


@pytest.mark.fast
def test_archives_that_are_compressed_and_cut_are_one_line(tmp_path):
    whole = write_shard(tmp_path / "a.tar", list(THREE.items())).read_bytes()
    for i, data in enumerate((gzip.compress(whole), bz2.compress(whole), lzma.compress(whole))):
        for size in (len(data), len(data) // 2, 12):
            path = tmp_path / f"{i}-{size}.tar.gz"
            path.write_bytes(data[:size])
            fails("unpack it first|is not a zip archive", path=path)


@pytest.mark.fast
def test_a_configured_column_must_exist(tmp_path):
    write_folder(tmp_path, THREE | {"t.csv": b"file_name,alt\n0.png,a\n"})
    assert texts(source="table", path=tmp_path / "t.csv", text="alt") == ["a"]
    fails("no column 'captoin' but", source="table", path=tmp_path / "t.csv", text="captoin")


# -------------------------------------------------------------------------------------------- names


@pytest.mark.fast
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("kind", ["list", "csv", "jsonl"])
def test_names_match_across_unicode_forms(tmp_path, form, kind):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    stored, listed = (unicodedata.normalize(f, "über/Ångström 가.png") for f in (form, other))
    files = {
        "list": ("l.txt", f"{listed}\tx\n".encode(), {"source": "text_list"}),
        "csv": ("l.csv", f"file_name,text\n{listed},x\n".encode(), {"source": "table"}),
        "jsonl": ("metadata.jsonl", lines({"file_name": listed, "text": "x"}), {}),
    }
    name, data, config = files[kind]
    write_folder(tmp_path / "d", {stored: picture(5), name: data})
    path = tmp_path / "d" if kind == "jsonl" else tmp_path / "d" / name
    assert values(path=path, **config) == [5]


@pytest.mark.fast
def test_names_with_backslashes_case_and_other_folders(tmp_path):
    files = {"img/Photo.PNG": picture(1), "other/2.png": picture(2)}
    write_folder(tmp_path, files)
    listed = f"img\\photo.png\n../other/2.png\n{tmp_path}/img/Photo.PNG\n"
    write_folder(tmp_path / "lists", {"l.txt": listed.encode()})
    (tmp_path / "lists/img").symlink_to(tmp_path / "img")
    assert values(source="text_list", path=tmp_path / "lists/l.txt") == [1, 2, 1]
    write_folder(tmp_path, {"img/photo.png": picture(3), "amb.txt": b"img/PHOTO.png\n"})
    fails("1 of 1 files", source="text_list", path=tmp_path / "amb.txt")  # two would fit


@pytest.mark.fast
@pytest.mark.parametrize("encoding", ["cp1251", "big5", "euc-kr"])
def test_zip_names_of_other_encodings(tmp_path, encoding):
    name = {"cp1251": "кот", "big5": "照片", "euc-kr": "사진"}[encoding] + ".png"
    raw = name.encode(encoding)
    stand_in = "M" * (len(raw) - 4) + ".png"  # of the same length, without the UTF-8 flag
    listed = {"metadata.jsonl": lines({"file_name": name, "text": "x"})}
    path = write_zip(tmp_path / "d.zip", {stand_in: picture(6)} | listed)
    path.write_bytes(path.read_bytes().replace(stand_in.encode(), raw))
    assert values(path=path) == [6]


@pytest.mark.fast
def test_missing_files_can_be_skipped(tmp_path, caplog):
    write_folder(tmp_path, THREE | {"t.tsv": b"path\ttext\n0.png\ta\nno.png\tb\n2.png\tc\n"})
    config = {"source": "table", "path": tmp_path / "t.tsv"}
    fails(r"1 of 3 files listed in t\.tsv are missing .*data\.missing='skip'", **config)
    with caplog.at_level(logging.WARNING):
        assert texts(**config, missing="skip") == ["a", "c"]
    assert "no.png" in caplog.text
    fails("choose 'error' or 'skip'", **config, missing="ignore")


# ---------------------------------------------------------------------------------- tables and JSON


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.csv", b'file_name,text\n0.png,"open\n1.png,b\n2.png,c\n', "line 4 is damaged"),
        ("t.csv", b'file_name,text\n0.png,"a"b\n', "line 2 is damaged"),
        ("t.csv", b"file_name,text,text\n0.png,a,b\n", "column 'text' is there twice"),
        ("t.csv", b"file_name,text\n0.png,a,b\n", "line 2 has 3 fields, the header has 2"),
        ("t.csv", b"file_name,text\n0.png,\xe9\n", "is not UTF-8"),
        ("t.jsonl", b'{"file_name": "0.png"}\n{"file_name": ["0.png"]}', "row 2 has file_name"),
        ("t.jsonl", b'{"file_name": "0.png", "x": ' + b"[" * 9000, "line 1 is not JSON"),
        ("t.json", b'[{"file_name": "0.png", "x": %s}]' % (b"[" * 90 + b"]" * 90), "nested"),
        ("t.json", b'[{"file_name": "0.png"}, 3]', "row 2 is not a JSON object"),
        ("t.jsonl", b'{"file_name": "0.png", "text": {"en": "x"}}', "row 1: the caption"),
    ],
)
def test_tables_that_cannot_be_read_name_the_row(tmp_path, name, data, message):
    write_folder(tmp_path, THREE | {name: data})
    fails(message, source="table", path=tmp_path / name)


@pytest.mark.fast
def test_json_arrays_and_long_fields(tmp_path):
    rows = [{"image": "1.png", "caption": "x" * 300_000}, {"image": "0.png", "caption": None}]
    write_folder(tmp_path, THREE | {"t.json": json.dumps(rows, indent=1).encode()})
    assert texts(source="table", path=tmp_path / "t.json") == ["x" * 300_000, ""]


# ----------------------------------------------------------------------------------------- archives


@pytest.mark.fast
def test_a_zip_with_one_member_of_each_fault(tmp_path, caplog):
    path = write_zip(tmp_path / "d.zip", THREE | {"3.png": picture(3), "4.png": picture(4)})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offsets = [info.header_offset for info in archive.infolist()]
    central = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    data[central[0] + 8] |= 1  # encrypted
    data[offsets[0] + 6] |= 1
    data[central[1] + 10] = data[offsets[1] + 8] = 14  # LZMA of no LZMA data
    data[central[2] + 24 : central[2] + 28] = b"\xff\xff\xff\x7f"  # 2 GiB
    data[offsets[3] + 60] ^= 1  # bad checksum
    path.write_bytes(data)
    source = make_source({"path": path})
    loader = Loader(source, ImageTransform((4, 4)), batch_size=5)
    batch = next(iter(loader.batches()))
    assert batch["valid"].tolist() == [False] * 4 + [True]
    reasons = [loader.broken[f"{i}.png"] for i in range(4)]
    for reason, word in zip(reasons, ("encrypted", "", "too large", "CRC"), strict=True):
        assert word in reason
        assert "\n" not in reason


@pytest.mark.fast
@pytest.mark.parametrize("method", [1, 6, 9, 98])  # shrunk, imploded, Deflate64, PPMd
def test_compression_that_is_not_supported_is_named(tmp_path, method):
    path = write_zip(tmp_path / "d.zip", THREE)
    data = bytearray(path.read_bytes())
    data[8] = data[data.index(b"PK\x01\x02") + 10] = method
    path.write_bytes(data)
    loader = Loader(make_source({"path": path}), ImageTransform((4, 4)), batch_size=3)
    assert next(iter(loader.batches()))["valid"].tolist() == [False, True, True]
    assert "compression" in loader.broken["0.png"]
    assert "\n" not in loader.broken["0.png"]


def write_shard(path: Path, files: list[tuple[str, bytes]], link: str = "") -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.LNKTYPE, files[0][0]
            archive.addfile(info)
    return path


@pytest.mark.fast
def test_shards_with_dots_and_twins_in_folders(tmp_path, caplog):
    files = [
        ("s.1/a.b.c.jpg", picture(1)),
        ("s.1/a.b.c.txt", b"abc"),
        ("s.1/a.b.d.jpg", picture(2)),
        ("s.1/a.b.d.json", b'\xef\xbb\xbf{"caption": "abd"}'),
        ("k.png", picture(3)),
        ("k.txt", b"k"),
        ("k.depth.png", picture(9)),
        ("k.png", picture(4)),
        ("k.txt", b"k again"),
        ("lonely.cls", b"3"),
    ]
    path = write_shard(tmp_path / "a.tar", files)
    with caplog.at_level(logging.WARNING):
        assert texts(source="webdataset", path=path) == ["abc", "abd", "k", "k again"]
    assert values(source="webdataset", path=path) == [1, 2, 3, 4]
    for message in (
        "keys are there twice (first: k)",
        "1 samples without a picture",
        "1 .depth.png",
    ):
        assert message in caplog.text
    assert values(source="webdataset", path=path, image="depth.png") == [9]


@pytest.mark.fast
def test_links_and_damaged_headers_in_tars(tmp_path, caplog):
    path = write_shard(tmp_path / "d.tar", list(THREE.items()), link="again.png")
    assert sorted(values(path=path)) == [0, 0, 1, 2]
    data = bytearray(path.read_bytes())
    data[1024 + 148] ^= 0xFF  # the checksum of the second header
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert values(path=path) == [0]
    assert "is damaged at byte 1024: its other files are lost" in caplog.text


@pytest.mark.fast
def test_an_empty_header_within_a_tar_is_no_end(tmp_path, caplog):
    path = write_shard(tmp_path / "d.tar", list(THREE.items()))
    whole = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        assert len(values(path=path)) == 3
    assert "damaged" not in caplog.text
    # A block that a disk zeroed, and two archives one after the other.
    for data, where in ((whole[:1024] + bytes(2048) + whole[1024:], 3072), (whole * 2, len(whole))):
        caplog.clear()
        path.write_bytes(data)
        with caplog.at_level(logging.WARNING):
            values(path=path)
        assert f"is damaged at byte {where}: its other files are lost" in caplog.text


@pytest.mark.fast
def test_compressed_shards_are_named(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    fails(r"a\.tar\.gz is not a plain tar .* unpack it first", source="webdataset", path=tmp_path)


# --------------------------------------------------------------------------------------------- COCO


def coco(tmp_path, **changes) -> dict:
    table = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 6} for i in range(2)],
        "annotations": [{"image_id": i, "category_id": 1, "bbox": [1, 1, 4, 3]} for i in range(2)],
        "categories": [{"id": 1, "name": "cat"}],
    }
    write_folder(tmp_path, {f"{i}.png": picture(i) for i in range(2)})
    (tmp_path / "a.json").write_text(json.dumps(table | changes))
    return {"source": "coco", "path": tmp_path, "annotations": str(tmp_path / "a.json")}


@pytest.mark.fast
def test_coco_of_other_tools_is_read(tmp_path):
    images = [
        {"id": "x1", "file_name": "0.png"},  # no size: the picture's own
        {"id": 2, "file_name": "C:\\data\\1.png", "width": "8", "height": "6"},
    ]
    notes = [
        {"image_id": "x1", "category_id": "1", "bbox": ["2", "3", "4", "3"], "iscrowd": None},
        {"image_id": "2", "category_id": 1, "bbox": [0, 0, 8, 6], "iscrowd": "1"},
        {"image_id": "2", "category_id": 1, "bbox": None},
        {"image_id": "2", "caption": float("nan")},
        {"image_id": 2, "caption": 12},
        {"image_id": 77, "caption": "of no picture"},
    ]
    config = coco(tmp_path, images=images, annotations=notes)
    source = make_source(config)
    assert [row["boxes"] for row in source.rows] == [
        [{"label": "cat", "box": [0.25, 0.5, 0.5, 0.5]}],
        [],
    ]
    assert [row["text"] for row in source.rows] == ["", "12"]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {"0": "0.png"}}, "number 0 of its images has no file_name"),
        ({"images": [{"id": 0}]}, "number 0 of its images has no file_name"),
        ({"annotations": [{"caption": "x"}]}, "number 0 of its annotations has no image_id"),
        ({"annotations": [{"image_id": 0, "bbox": [1, 2, 3], "category_id": 1}]}, "annotation 0"),
        ({"annotations": [{"image_id": 0, "bbox": "1 2 3 4", "category_id": 1}]}, "four numbers"),
        ({"annotations": [{"image_id": 0, "bbox": [1] * 4, "category_id": 9}]}, "category 9"),
        ({"annotations": [{"image_id": 0, "caption": {}}]}, "annotation 0: the caption"),
        ({"categories": [{"id": 1}]}, "number 0 of its categories has no name"),
    ],
)
def test_coco_faults_name_the_annotation(tmp_path, changes, message):
    fails(message, **coco(tmp_path, **changes))


# ---------------------------------------------------------------------------------------- mutations


@pytest.mark.processes
def test_300_mutated_data_sets(tmp_path):
    script = Path(__file__).parent / "mutations.py"
    command = [sys.executable, str(script), "0", "300", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *faults, summary = map(json.loads, done.stdout.splitlines())
    assert faults == []
    assert summary["count"] == 300
    assert summary["slowest_s"] < 10
    assert summary["grown_mb"] < 1000
