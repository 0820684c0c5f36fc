"""Seeded mutations of good data sets, and what reading one of them comes to.

`python mutations.py FIRST LAST FOLDER` reads the data sets FIRST to LAST and prints a line of JSON
for each fault, then one with the number of data sets, the slowest and the memory.
"""

import io
import json
import logging
import os
import random
import resource
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.data import ImageTransform, Loader, make_source
from ldm_jax.errors import DataError

COUNT = 6  # pictures of a data set
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_INSERTS = (
    b"\0",
    b'"',
    b"\xff\xfe",
    b"\n",
    b"[" * 5000,
    b"PK\x03\x04",
    b"\0" * 512,
    b"NaN",
    b"null",
)
_EXTREMES = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1)
_VALUES: tuple[Any, ...] = (
    *(None, float("nan"), float("inf"), -1, 10**400, "", " ", "\0", "../x.png", "/", [], {}, True),
    *([[[[]]]], {"a": {"b": 1}}, "\ud800", 1e308, "x" * 200_000, 0.5),
)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """Damages bytes as a bad disk, a cut download or an attacker would."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, kind = rng.randrange(len(out) + 1), rng.randrange(7)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(_EXTREMES) % (1 << 8 * width)
            out[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + rng.choice((1, 2, 16, 512))]
        elif kind == 4:
            out[at:at] = rng.choice(_INSERTS)
        elif kind == 5:
            out[at:at] = out[at : at + rng.choice((4, 64, 1024))]
        else:
            out[at : at + rng.choice((4, 64))] = rng.randbytes(rng.choice((4, 64)))
    return bytes(out)


def _value(value: Any, rng: random.Random) -> Any:
    """Replaces one value somewhere in JSON, or removes one."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.15:
            del value[key]
        else:
            value[key] = _value(value[key], rng)
        return value
    return rng.choice(_VALUES)


def _json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return _bytes(data, rng)
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(_value(json.loads(lines[at]), rng))
    return "\n".join(lines).encode()


def _csv(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return _bytes(data, rng)
    rows = [line.split(",") for line in data.decode().splitlines()]
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = str(rng.choice(_VALUES)).encode("utf-8", "replace").decode()
    return "\n".join(",".join(row) for row in rows).encode()


def _picture(number: int, kind: str) -> bytes:
    pixels = np.full((24, 20, 3), 30 * number, np.uint8)
    pixels[:12, :10] = np.random.default_rng(number).integers(0, 255, (12, 10, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _zip(files: dict[str, bytes], path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def _tar(files: dict[str, bytes], path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _mutate_file(path: Path, mutate: Callable[[bytes, random.Random], bytes], rng: Any) -> None:
    path.write_bytes(mutate(path.read_bytes(), rng))


def make(seed: int, folder: Path) -> tuple[dict[str, Any], int]:
    """Writes a mutated data set; returns its settings and expected number of pictures."""
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    image = rng.choice(FORMATS)
    names = [f"{i}.{image.lower()}" for i in range(COUNT)]
    pictures = {name: _picture(i, image) for i, name in enumerate(names)}
    rows = [{"file_name": n, "text": f"a thing {i}", "n": i} for i, n in enumerate(names)]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    root = folder / str(seed)
    root.mkdir(parents=True)
    expected = COUNT

    def write(files: dict[str, bytes]) -> None:
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)

    if kind in ("picture", "text"):
        texts = {f"{i}.txt": f"a thing {i}".encode() for i in range(COUNT)}
        write(pictures | texts)
        name = rng.choice(names) if kind == "picture" else f"{rng.randrange(COUNT)}.txt"
        _mutate_file(root / name, _bytes, rng)
        return {"path": str(root)}, expected
    if kind == "jsonl":
        write(pictures | {"metadata.jsonl": _json(lines, rng)})
        return {"path": str(root)}, expected
    if kind in ("csv", "list"):
        if kind == "csv":
            table = "file_name,text\n" + "".join(f"{n},a thing {i}\n" for i, n in enumerate(names))
            data = _csv(table.encode(), rng)
            settings = {"source": "table", "path": str(root / "t.csv")}
        else:
            data = _bytes("".join(f"{n}\ta thing {i}\n" for i, n in enumerate(names)).encode(), rng)
            settings = {"source": "text_list", "path": str(root / "t.csv")}
        write(pictures | {"t.csv": data})
        lines_left = [line for line in data.split(b"\n") if line.strip()]
        return settings, min(expected, len(lines_left) - (kind == "csv"))
    if kind in ("zip", "class zip", "tar"):
        path = root / f"d.{kind[-3:]}"
        inside = {f"{i % 2}/{n}": pictures[n] for i, n in enumerate(names)}
        (_tar if kind == "tar" else _zip)(
            inside if kind == "class zip" else pictures | {"metadata.jsonl": lines}, path
        )
        _mutate_file(path, _bytes, rng)
        source = "class_folders" if kind == "class zip" else "image_folder"
        return {"source": source, "path": str(path)}, expected
    if kind == "webdataset":
        files = {}
        for i, name in enumerate(names):
            files[name] = pictures[name]
            files[f"{i}.txt"] = f"a thing {i}".encode()
            files[f"{i}.json"] = _json(b'{"n": 1, "text": "x"}', rng) if i == 1 else b"{}"
        _tar(files, root / "d.tar")
        if rng.random() < 0.7:
            _mutate_file(root / "d.tar", _bytes, rng)
        return {"source": "webdataset", "path": str(root / "d.tar")}, expected
    if kind == "coco":
        table = {
            "images": [
                {"id": i, "file_name": n, "width": 20, "height": 24} for i, n in enumerate(names)
            ],
            "annotations": [
                {"image_id": i, "category_id": 1, "bbox": [1, 2, 9, 9], "iscrowd": 0}
                for i in range(COUNT)
            ],
            "categories": [{"id": 1, "name": "cat"}],
        }
        table["annotations"] += [{"image_id": i, "caption": f"a thing {i}"} for i in range(COUNT)]
        data = _json(json.dumps(table).encode(), rng)
        write(pictures | {"a.json": data})
        try:
            expected = min(expected, len(json.loads(data)["images"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            expected = 0
        return {"source": "coco", "path": str(root), "annotations": str(root / "a.json")}, expected
    import pyarrow
    import pyarrow.parquet as parquet

    table = [{"image": {"bytes": pictures[n], "path": n}, "text": f"{n}"} for n in names]
    parquet.write_table(pyarrow.Table.from_pylist(table), root / "t.parquet", row_group_size=2)
    _mutate_file(root / "t.parquet", _bytes, rng)
    return {"source": "parquet", "path": str(root / "t.parquet")}, expected


KINDS = [
    *("picture", "picture", "jsonl", "csv", "list", "zip", "class zip", "tar", "webdataset"),
    *("coco", "text"),
]
try:
    import pyarrow  # noqa: F401

    KINDS.append("parquet")
except ImportError:
    pass


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def read(settings: dict[str, Any], expected: int) -> str:
    """Reads a whole data set as training does; returns the first fault, or ""."""
    handler = _Messages()
    logging.getLogger("ldm_jax").addHandler(handler)
    found = 0
    try:
        loader = Loader(make_source(settings), ImageTransform((16, 16)), batch_size=3)
        for batch in loader.batches():
            found += int(batch["valid"].sum())
            if words := {"None", "nan", "null"} & set(batch["caption"]):
                return f"a caption is {words}"
    except DataError as error:
        handler.messages.append(str(error))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger("ldm_jax").removeHandler(handler)
    if any("\n" in message for message in handler.messages):
        return f"more than a line: {handler.messages}"
    if found < expected and not handler.messages:
        return f"{found} of {expected} pictures were read, without a word"
    return ""


def main(first: int, last: int, folder: Path) -> None:
    slowest, before = (0.0, -1), 0
    import grain  # noqa: F401  (slow, and no part of what is timed)

    logging.getLogger("ldm_jax").propagate = False
    for seed in range(first, last):
        settings, expected = make(seed, folder)
        began = time.monotonic()
        if fault := read(settings, expected):
            print(json.dumps({"seed": seed, "settings": settings, "fault": fault}), flush=True)
        slowest = max(slowest, (time.monotonic() - began, seed))
        if seed == first:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"count": last - first, "slowest_s": slowest[0], "grown_mb": grown / 1024}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)  # no thread of a reader may hold up the end
