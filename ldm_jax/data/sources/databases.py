"""LSUN's LMDB databases."""

import os
from typing import Any

from ldm_jax.errors import DataError

_ENVIRONMENTS: dict[tuple[int, str], Any] = {}  # (process, path) -> opened


class LSUN:
    """An LSUN category as it is published: an LMDB of encoded pictures (needs the package lmdb). "text" is the category.

    Args:
      path: the folder of the database, bedroom_train_lmdb say.
      text: of every picture; "" is the folder's name up to its split.

    Raises:
      DataError: lmdb is not installed, or the path is no LMDB, or empty.
    """

    def __init__(self, path: str | os.PathLike[str], *, text: str = ""):
        self.path = os.fspath(path)
        text = text or os.path.basename(os.path.normpath(self.path)).rsplit("_", 2)[0].replace(
            "_", " "
        )
        with self._open().begin() as transaction:
            keys = [
                bytes(key).decode("ascii", errors="surrogateescape")
                for key in transaction.cursor().iternext(values=False)
            ]
        self.rows = [{"file_name": key, "text": text} for key in keys]
        if not keys:
            raise DataError(f"{self.path}: no picture found in this LMDB")

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """The picture's key, for messages."""
        return self.rows[index]["file_name"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the row with the picture's encoded bytes as "image"."""
        row = self.rows[index]
        with self._open().begin() as transaction:
            return {
                **row,
                "image": transaction.get(row["file_name"].encode("ascii", errors="surrogateescape"))
                or b"",
            }

    def _open(self) -> Any:
        # An LMDB environment must not cross a fork, nor be opened twice in a process, where two parts of the data may lie in it.
        key = os.getpid(), os.path.realpath(self.path)
        if key not in _ENVIRONMENTS:
            try:
                import lmdb  # pyright: ignore[reportMissingImports]
            except ImportError:
                raise DataError(
                    f"{self.path}: LSUN's databases need lmdb: pip install lmdb"
                ) from None
            try:
                _ENVIRONMENTS[key] = lmdb.open(
                    key[1], readonly=True, lock=False, readahead=False, meminit=False
                )
            except lmdb.Error as error:
                raise DataError(
                    f"{self.path} is no LMDB folder ({error}): unpack the published .zip first"
                ) from None
        return _ENVIRONMENTS[key]
