"""LSUN's LMDB databases."""

import os
from typing import Any

from ldm_jax.data.sources.base import Handles, Rows
from ldm_jax.errors import DataError
from ldm_jax.io.paths import local_copy


class LSUN(Rows):
    """An LSUN category as it is published: an LMDB of encoded pictures (needs lmdb).

    Args:
      path: The folder of the database, such as bedroom_train_lmdb.
      text: Caption of every picture; "" is the folder's name up to its split.

    Raises:
      DataError: lmdb is not installed, or the path is no LMDB, or empty.
    """

    def __init__(self, path: str | os.PathLike[str], *, text: str = ""):
        self.path, self._local = os.fspath(path), local_copy(path)  # LMDB maps it into memory
        category = os.path.basename(os.path.normpath(self.path)).rsplit("_", 2)[0]
        text = text or category.replace("_", " ")
        with self._begin() as transaction:
            keys = [
                bytes(key).decode("ascii", errors="surrogateescape")
                for key in transaction.cursor().iternext(values=False)
            ]
        self.rows = [{"file_name": key, "text": text} for key in keys]
        if not keys:
            raise DataError(f"{self.path}: no picture found in this LMDB")

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the row with the picture's encoded bytes as "image"."""
        row = self.rows[index]
        key = row["file_name"].encode("ascii", errors="surrogateescape")
        with self._begin() as transaction:
            return {**row, "image": transaction.get(key) or b""}

    def _begin(self) -> Any:
        return _ENVIRONMENTS(os.path.realpath(self._local)).begin()


def _open(path: str) -> Any:
    try:
        import lmdb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f"{path}: LSUN's databases need lmdb: pip install lmdb") from None
    try:
        return lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise DataError(
            f"{path} is no LMDB folder ({error}): unpack the published .zip first"
        ) from None


# An environment may be open only once in a process, where two parts of the data may lie in it.
_ENVIRONMENTS = Handles(_open)
