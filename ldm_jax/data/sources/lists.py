"""Lists of pictures: text files and tables."""

import os
import posixpath

from ldm_jax.data.sources.files import FileRows, Files, read_texts
from ldm_jax.data.sources.tables import (
    FILE_COLUMNS,
    decode_text,
    find_columns,
    parse_table,
    read_bytes,
    with_text,
)
from ldm_jax.errors import DataError
from ldm_jax.io.paths import parent_of


class TextList(FileRows):
    """A text file with a picture's path in each line, as the splits of CelebA-HQ and FFHQ.

    A caption may follow after a tab.

    Args:
      path: The text file.
      root: The folder or archive that paths are relative to; "" is the folder of the text file.
      captions: "column" reads them after the tab, "beside" from .txt files beside the pictures.
      missing: "error", or "skip" to leave out lines whose files are missing.

    Raises:
      DataError: A file is missing or unreadable.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        root: str = "",
        captions: str = "column",
        missing: str = "error",
    ):
        self.path = os.fspath(path)
        if captions not in ("column", "beside"):
            raise DataError(f"data.captions is {captions!r}: choose 'column' or 'beside'")
        lines = decode_text(read_bytes(self.path), self.path).split("\n")
        pairs = [line.rstrip("\r").partition("\t") for line in lines if line.strip()]
        self.rows = [{"file_name": name.strip(), "text": text.strip()} for name, _, text in pairs]
        self._files = Files(root or parent_of(self.path))
        self._resolve(posixpath.basename(self.path), missing)
        if captions == "beside":
            members = [self._member(row["file_name"]) for row in self.rows]
            for row, text in zip(self.rows, read_texts(self._files, members), strict=True):
                row["text"] = text or row["text"]


class Table(FileRows):
    """A table with a row for each picture: .csv, .tsv, .jsonl, .json or .parquet.

    All columns are kept; "file_name" and "text" are added where they have other names. For Parquet
    files that hold the pictures themselves, see `Parquet`.

    Args:
      path: The table.
      root: The folder or archive that paths are relative to; "" is the folder of the table.
      image: The column of paths; "" finds "file_name", "image", "path" and other usual names.
      text: The column of captions; "" finds "text", "caption", "prompt" and other usual names.
      missing: "error", or "skip" to leave out rows whose files are missing.

    Raises:
      DataError: A file is missing or unreadable, or there is no column of paths.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        root: str = "",
        image: str = "",
        text: str = "",
        missing: str = "error",
    ):
        self.path = os.fspath(path)
        rows = parse_table(read_bytes(self.path), self.path)
        columns = dict.fromkeys(key for row in rows for key in row)
        column = (find_columns(columns, "image", image, FILE_COLUMNS, self.path) or ["file_name"])[
            0
        ]
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get(column), str):
                found = (
                    f"{column}={row[column]!r}" if column in row else f"columns {', '.join(row)}"
                )
                raise DataError(
                    f"{self.path}: row {number} has {found}: set data.image to the column of paths"
                )
            row["file_name"] = row[column]
        self.rows = with_text(rows, self.path, text)
        self._files = Files(root or parent_of(self.path))
        self._resolve(posixpath.basename(self.path), missing)
