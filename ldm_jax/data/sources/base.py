"""What a source is, what goes wrong with one, and the part of one."""

from collections.abc import Sequence
from typing import Any, Protocol

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Source(Protocol):
    """What the loader needs of a source (see the package's text)."""

    path: str

    @property
    def rows(self) -> Sequence[dict[str, Any]]: ...

    def name(self, index: int, /) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class Subset:
    """The pictures of ``source`` at ``indices``, in that order; ``rows`` and pictures stay in step."""

    def __init__(self, source: Source, indices: Sequence[int]):
        if isinstance(source, Subset):  # keeps chains of selections flat
            indices = [source.indices[i] for i in indices]
            source = source.source
        self.source, self.indices, self.path = source, list(indices), source.path

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows = self.source.rows
        return [rows[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """The picture's name, for messages."""
        return self.source.name(self.indices[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.indices[index]]
