"""Parquet files that hold the pictures themselves, as Hugging Face's data sets do."""

import bisect
import itertools
import os
import threading
from typing import Any

from ldm_jax.data.decode import describe
from ldm_jax.data.sources.base import Handles, Rows, find_shards
from ldm_jax.data.sources.tables import PICTURE_COLUMNS, find_columns, with_text
from ldm_jax.errors import DataError


class Parquet(Rows):
    """Parquet shards with pictures in a column: bytes, {"bytes", "path"}, or paths (needs pyarrow).

    A picture is read with the row group that it lies in, so shards are best written with small ones
    (Hugging Face's have 100 rows). Paths are relative to the shard. Other columns are kept.

    Args:
      path: A file, a folder of .parquet files, or a pattern such as "data/train-*.parquet".
      image: The column of pictures; "" finds "image" and other usual names.
      text: The column of captions; "" finds "text", "caption", "prompt" and other usual names.

    Raises:
      DataError: pyarrow is not installed, there is no such file or column, or a file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, image: str = "", text: str = ""):
        self.path = os.fspath(path)
        self._opened = Handles(_open, per_thread=True)
        self._groups: list[tuple[str, int]] = []  # (shard, row group)
        self._last: dict[tuple[int, int], tuple[int, Any]] = {}
        rows: list[dict[str, Any]] = []
        sizes, self._image = [], image
        for shard in find_shards(self.path, ".parquet"):
            file = self._opened(shard)
            names = file.schema_arrow.names
            found = find_columns(names, "image", self._image, PICTURE_COLUMNS, shard)
            if not found:
                columns = ", ".join(names)
                raise DataError(
                    f"{shard}: there is no column of pictures but {columns}; set data.image"
                )
            self._image = found[0]
            others = [name for name in names if name != self._image]
            try:
                table = file.read(columns=others).to_pylist() if others else None
            except Exception as error:  # pyarrow raises nearly every class on damaged files
                raise DataError(f"{shard} cannot be read: {describe(error)}") from None
            for i in range(file.metadata.num_rows):
                name = f"{os.path.basename(shard)}[{i}]"
                rows.append((table[i] if table else {}) | {"file_name": name})
            groups = range(file.num_row_groups)
            self._groups += [(shard, group) for group in groups]
            sizes += [file.metadata.row_group(group).num_rows for group in groups]
        self._starts = [0, *itertools.accumulate(sizes)]
        if not rows or self._starts[-1] != len(rows):
            raise DataError(f"{self.path}: no picture found")
        self.rows = with_text(rows, self.path, text)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the row with the picture's encoded bytes as "image"; raises OSError."""
        place = bisect.bisect_right(self._starts, index) - 1
        value = self._column(place)[index - self._starts[place]].as_py()
        data, path = (
            (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        )
        if isinstance(data, str):
            data, path = None, data
        if data is None and path:
            file = os.path.join(os.path.dirname(self._groups[place][0]), path)
            if not os.path.isfile(file):
                raise OSError(f"the table holds only the path of the picture: there is no {file}")
            with open(file, "rb") as opened:
                data = opened.read()
        return {**self.rows[index], "image": data if isinstance(data, bytes) else b""}

    def _column(self, place: int) -> Any:
        """Returns the pictures of a row group; each thread keeps the one that it read last."""
        thread = os.getpid(), threading.get_ident()
        if self._last.get(thread, (-1, None))[0] != place:
            shard, group = self._groups[place]
            try:
                column = self._opened(shard).read_row_group(group, columns=[self._image]).column(0)
            except Exception as error:  # pyarrow raises nearly every class on damaged files
                raise OSError(describe(error)) from error
            self._last[thread] = place, column
        return self._last[thread][1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": {}}


def _open(shard: str) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{shard}: Parquet needs pyarrow: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(shard)
    except Exception as error:  # pyarrow raises nearly every class on damaged files
        raise DataError(f"{shard} cannot be read: {describe(error)}") from None
