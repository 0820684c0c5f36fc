"""Batches of pictures and captions."""

import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ldm_jax.data.sources import DataError, Source
from ldm_jax.data.stream import Batches, Stream
from ldm_jax.data.transforms import UnreadablePicture, caption_template, to_rgb

_LOG = logging.getLogger(__name__)
_MAX_BROKEN_IN_A_ROW = 1000
_RESERVED = ("image", "caption", "index", "valid")
_SKIPPED = "_skipped"

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Loader(Stream):
    """Reads batches of a source: see `Stream` for their order.

    A batch has "image" uint8 [B, H, W, 3], "caption" list of B str, "index" int64 [B] (the pictures' places in the
    source), and each requested column as a list of B values; B = batch_size / process_count.

    A picture that cannot be read is replaced by the next readable one in index order, so that positions stay exact;
    each such file is named once in a warning and in ``broken``.

    Args:
      source: see ``ldm_jax.data.sources``.
      transform: (uint8 [h, w, 3], generator) -> uint8 [H, W, 3], equal sizes for all pictures; ``ImageTransform``.
        ``batches`` takes its ``deterministic()`` form where it has one.
      batch_size: rows per global batch, over all processes.
      caption: template over the row's columns, see ``caption_template``; None gives "".
      columns: further metadata columns to put into the batches, as lists.
      options: those of `Stream`.

    Raises:
      DataError: an argument does not fit; while reading, no picture can be read, or the caption or a column does not
        fit the rows.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        caption: str | None = "{text}",
        columns: Sequence[str] = (),
        **options: Any,
    ):
        for column in columns:
            if column in _RESERVED:
                raise DataError(f"column {column!r} cannot be asked for: batches use that name themselves")
        self.source = source
        self.broken: dict[str, str] = {}

        def make(finite: bool = False, **rest: Any) -> Batches:
            exact = getattr(transform, "deterministic", None) if finite else None
            return _PictureBatches(
                source, exact() if exact else transform, caption, tuple(columns), finite=finite, **rest
            )

        super().__init__(make, path=source.path, count=len(source), batch_size=batch_size, **options)

    def note(self, batch: dict[str, Any]) -> None:
        for name, why in batch.pop(_SKIPPED):
            if name not in self.broken:
                self.broken[name] = why
                _LOG.warning("skipped unreadable picture %s (%s): %d so far", name, why, len(self.broken))


class _PictureBatches(Batches):
    def __init__(
        self, source: Source, transform: Transform, caption: str | None, columns: tuple[str, ...], **options: Any
    ):
        super().__init__(**options)
        self._source, self._transform, self._caption, self._columns = source, transform, caption, columns
        self._broken: dict[int, str] = {}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "image": np.stack([s["image"] for s in samples]),
            "caption": [s["caption"] for s in samples],
            "index": np.array([s["index"] for s in samples], np.int64),
            _SKIPPED: [skip for s in samples for skip in s[_SKIPPED]],
        }
        return batch | {column: [s["row"][column] for s in samples] for column in self._columns}

    def sample(self, wanted: int, rng: np.random.Generator) -> dict[str, Any]:
        index, row, skipped = self._readable(wanted)
        for column in self._columns:
            if column not in row:
                known = ", ".join(key for key in row if key != "image")
                raise DataError(f"{self._source.path}: there is no column {column!r}: there are {known}")
        return {
            "image": self._transform(row.pop("image"), rng),
            "caption": "" if self._caption is None else caption_template(self._caption, row),
            "index": index,
            "row": row,
            "valid": index == wanted,
            _SKIPPED: skipped,
        }

    def _readable(self, wanted: int) -> tuple[int, dict[str, Any], list[tuple[str, str]]]:
        skipped: list[tuple[str, str]] = []
        for index in self._candidates(wanted):
            if index not in self._broken:
                try:
                    row = self._source[index]
                    row["image"] = to_rgb(row["image"])
                    return index, row, skipped
                except DataError:
                    raise
                except (UnreadablePicture, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
                    self._broken[index] = " ".join(str(error).split()) or type(error).__name__
            skipped.append((self._source.name(index), self._broken[index]))
        name, why = skipped[0]
        raise DataError(f"no readable picture in {self._source.path} (tried {len(skipped)}; first: {name}: {why})")

    def _candidates(self, wanted: int) -> Iterator[int]:
        count = len(self._source)
        return ((wanted + i) % count for i in range(min(count, _MAX_BROKEN_IN_A_ROW)))
