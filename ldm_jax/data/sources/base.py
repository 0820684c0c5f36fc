"""The interface of a source of pictures, and what several sources share."""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ldm_jax.errors import DataError
from ldm_jax.io.paths import is_bucket, is_folder, local_copy, matches


class Source(Protocol):
    """Random access to pictures with metadata. Picklable: each process opens its own files.

    Attributes:
      path: Name of the data set in messages.
      rows: One dict of metadata for each picture, all with the same columns, without pixels. Every
        source has "text", the caption, or "" where there is none.
    """

    path: str

    @property
    def rows(self) -> Sequence[dict[str, Any]]: ...  # noqa: D102

    def name(self, index: int, /) -> str:
        """Returns the name of a picture in messages."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Returns the row and its "image": encoded bytes or uint8 [h, w, c]; raises OSError."""
        ...


class Rows:
    """Base of the sources that keep all their rows, each with a "file_name"."""

    path: str
    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Returns the name of a picture in messages."""
        return self.rows[index]["file_name"]


class Subset:
    """The pictures of ``source`` at ``indices``, in that order."""

    def __init__(self, source: Source, indices: Sequence[int]):
        if isinstance(source, Subset):  # keeps chains of selections flat
            indices = [source.indices[i] for i in indices]
            source = source.source
        self.source, self.indices, self.path = source, list(indices), source.path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metadata of the chosen pictures."""
        rows = self.source.rows
        return [rows[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Returns the name of a picture in messages."""
        return self.source.name(self.indices[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.indices[index]]


class Handles:
    """A cache of open files. A copy in another process, by pickle or fork, opens its own.

    Args:
      open_file: A module-level function from a key, such as a path, to what is kept open.
      per_thread: Also give each thread its own.
    """

    def __init__(self, open_file: Callable[[Any], Any], per_thread: bool = False):
        self._open, self._per_thread, self._opened = open_file, per_thread, {}

    def __call__(self, key: Any) -> Any:
        """Returns the open file of ``key``."""
        # A handle that a fork inherits shares its file offset with the parent.
        key = os.getpid(), threading.get_ident() if self._per_thread else 0, key
        if key not in self._opened:
            self._opened[key] = self._open(key[2])
        return self._opened[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}


def find_shards(path: str, suffix: str) -> list[str]:
    """Returns the files that ``path`` names: a file, a folder of them, or a glob pattern.

    Those of a bucket are copied to this machine.
    """
    compressed = tuple(f"{suffix}{end}" for end in ("", ".gz", ".bz2", ".xz", ".zst"))
    if is_bucket(path):
        pattern = f"{path.rstrip('/')}/*" if is_folder(path) else path
        shards = [name for name in matches(pattern) if name.endswith(compressed)]
        found = [os.fspath(local_copy(name)) for name in shards]
    elif os.path.isdir(path):
        found = [os.path.join(path, name) for name in os.listdir(path) if name.endswith(compressed)]
    else:
        found = matches(path)
    found = sorted(found) or ([path] if os.path.isfile(path) else [])
    if not found:
        raise DataError(
            f"{path}: there is no {suffix} there: give a file, its folder, or a pattern like "
            f"'train-*{suffix}'"
        )
    return found
