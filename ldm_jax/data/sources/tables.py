"""Lists of pictures: text files, CSV, JSONL and Parquet tables."""

import csv
import io
import os
import posixpath
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_jax.data.sources.files import FileRows, Files, stem
from ldm_jax.data.sources.folder import parse_json_lines
from ldm_jax.errors import DataError


class TextList(FileRows):
    """A text file with a picture's path in each line, as the splits of CelebA-HQ, FFHQ and LSUN are; a caption may follow after a tab.

    Args:
      path: the text file.
      root: the folder or archive that the paths are relative to; "" is the folder of the text file.
      captions: "column" reads them after the tab (none is ""), "beside" from a .txt file beside the picture.

    Raises:
      DataError: a file is missing or unreadable.
    """

    def __init__(self, path: str | os.PathLike[str], *, root: str = "", captions: str = "column"):
        self.path = os.fspath(path)
        if captions not in ("column", "beside"):
            raise DataError(f"data.captions is {captions!r}: choose 'column' or 'beside'")
        lines = [line.rstrip("\r") for line in _text(self.path).split("\n") if line.strip()]
        pairs = [line.partition("\t") for line in lines]
        self.rows = [{"file_name": name.strip(), "text": text.strip()} for name, _, text in pairs]
        self._files = Files(root or os.path.dirname(os.path.abspath(self.path)))
        if captions == "beside":
            for row in self.rows:
                text = self._member(f"{stem(row['file_name'])}.txt")
                if text in self._files.names:
                    row["text"] = self._files.read(text).decode("utf-8", errors="replace").strip()
        self._check_there(posixpath.basename(self.path))


class Table(FileRows):
    """A table with a row for each picture: .csv, .tsv, .jsonl or .parquet (where pyarrow is installed; for files with the pictures in them, see
    `Parquet`).

    Columns keep their names, but for those of the picture's path and of the caption, which become "file_name" and "text".

    Args:
      path: the table.
      root: the folder or archive that the paths are relative to; "" is the folder of the table.
      image: the column of paths.
      text: the column of captions; it may be missing.

    Raises:
      DataError: a file is missing or unreadable, or there is no column of paths.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        root: str = "",
        image: str = "file_name",
        text: str = "text",
    ):
        self.path = os.fspath(path)
        reader = TABLES.get(os.path.splitext(self.path)[1].lower())
        if reader is None:
            raise DataError(f"{self.path}: a table ends in {', '.join(TABLES)}")
        rows = reader(self.path)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get(image), str):
                what = (
                    f"{image}={row[image]!r}"
                    if image in row
                    else f"no column {image!r} but {', '.join(row)}"
                )
                raise DataError(
                    f"{self.path}: row {number} has {what}: set data.image to the column of paths"
                )
        self.rows = [
            {"file_name": row[image], "text": row.get(text) or ""}
            | {k: v for k, v in row.items() if k not in (image, text)}
            for row in rows
        ]
        self._files = Files(root or os.path.dirname(os.path.abspath(self.path)))
        self._check_there(posixpath.basename(self.path))


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None


def _delimited(path: str) -> list[dict[str, Any]]:
    tab = "\t" if path.lower().endswith(".tsv") else ","
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=tab)
    rows = list(reader)
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():  # DictReader's sign of too many or too few fields
            raise DataError(
                f"{path}: row {number} has not {len(reader.fieldnames or [])} fields, as the first line has"
            )
    return rows


def _json_lines(path: str) -> list[dict[str, Any]]:
    return parse_json_lines(_text(path).encode(), path, key=None)


def _parquet(path: str) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from None
    try:
        return parquet.read_table(path).to_pylist()
    except Exception as error:  # its errors are of many kinds
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise DataError(f"{path} cannot be read: {reason}") from None


TABLES: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    ".csv": _delimited,
    ".tsv": _delimited,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
