"""Parquet files that hold the pictures themselves, as Hugging Face's data sets do."""

import bisect
import glob
import itertools
import os
import threading
from typing import Any

from ldm_jax.errors import DataError


class Parquet:
    """Parquet shards with encoded pictures in a column, of bytes or of {"bytes", "path"}; needs the package pyarrow. Other columns stay as they are.

    A picture is read with the row group that it lies in, so shards are best written with small ones (Hugging Face's have 100 pictures).

    Args:
      path: a file, a folder of .parquet files, or a pattern such as "data/train-*.parquet".
      image: the column of pictures.
      text: the column of captions, which becomes "text"; it may be missing.

    Raises:
      DataError: pyarrow is not installed, there is no such file or column, or a file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, image: str = "image", text: str = "text"):
        self.path, self._image = os.fspath(path), image
        pattern = (
            os.path.join(glob.escape(self.path), "*.parquet")
            if os.path.isdir(self.path)
            else self.path
        )
        self._shards = sorted(glob.glob(pattern)) or (
            [self.path] if os.path.isfile(self.path) else []
        )
        if not self._shards:
            raise DataError(
                f"{self.path}: there is no .parquet there: give a file, their folder, or a pattern like 'train-*.parquet'"
            )
        self._groups: list[tuple[int, int]] = []  # (shard, row group)
        self.rows: list[dict[str, Any]] = []
        self._opened: dict[tuple[int, int, int], Any] = {}
        self._last: dict[tuple[int, int], tuple[int, Any]] = {}
        sizes = []
        for number, shard in enumerate(self._shards):
            opened = self._open(number)
            names = opened.schema_arrow.names
            if image not in names:
                raise DataError(
                    f"{shard}: there is no column {image!r}: there are {', '.join(names)}; set data.image"
                )
            if names == [image]:
                table = [{}] * opened.metadata.num_rows
            else:
                table = opened.read(columns=[name for name in names if name != image]).to_pylist()
            where = os.path.basename(shard)
            self.rows += [
                {"file_name": f"{where}[{i}]", **row, "text": row.get(text) or ""}
                for i, row in enumerate(table)
            ]
            self._groups += [(number, group) for group in range(opened.num_row_groups)]
            sizes += [
                opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)
            ]
        self._starts = [0, *itertools.accumulate(sizes)]
        if not self.rows:
            raise DataError(f"{self.path}: no picture found")

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """shard[row], for messages."""
        return self.rows[index]["file_name"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the row with the picture's encoded bytes as "image"; raises OSError."""
        place = bisect.bisect_right(self._starts, index) - 1
        value = self._column(place)[index - self._starts[place]].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        return {**self.rows[index], "image": data if isinstance(data, bytes) else b""}

    def _column(self, place: int) -> Any:
        """The pictures of a row group; each thread keeps the one that it read last."""
        me = os.getpid(), threading.get_ident()
        if self._last.get(me, (-1, None))[0] != place:
            number, group = self._groups[place]
            self._last[me] = (
                place,
                self._open(number).read_row_group(group, columns=[self._image]).column(0),
            )
        return self._last[me][1]

    def _open(self, number: int) -> Any:
        key = (
            os.getpid(),
            threading.get_ident(),
            number,
        )  # neither processes nor threads share a reader
        if key not in self._opened:
            try:
                import pyarrow.parquet as parquet
            except ImportError:
                raise DataError(
                    f"{self.path}: Parquet needs pyarrow: pip install pyarrow"
                ) from None
            try:
                self._opened[key] = parquet.ParquetFile(self._shards[number])
            except Exception as error:  # its errors are of many kinds
                reason = next(
                    (line.strip() for line in str(error).splitlines() if line.strip()),
                    type(error).__name__,
                )
                raise DataError(f"{self._shards[number]} cannot be read: {reason}") from None
        return self._opened[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}, "_last": {}}
