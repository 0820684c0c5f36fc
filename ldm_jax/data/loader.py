"""Batches of pictures and captions."""

import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ldm_jax.data.sources import Source
from ldm_jax.data.stream import Batches, Stream
from ldm_jax.data.transforms import Condition, ImageTransform, View, caption_template, to_rgb
from ldm_jax.errors import DataError, UnreadablePicture

_LOG = logging.getLogger(__name__)
_MAX_BROKEN_IN_A_ROW = 1000
_RESERVED = ("image", "caption", "condition", "index", "valid")
_SKIPPED = "_skipped"

# What a damaged file may raise while it is read.
UNREADABLE = (UnreadablePicture, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def read_row(source: Source, index: int, condition: Condition | None = None) -> dict[str, Any]:
    """A row with its picture as uint8 RGB, and what its condition reads; one of `UNREADABLE` where that fails."""
    row = source[index]
    row["image"] = to_rgb(row["image"])
    if condition is not None:
        condition.read(row)
    return row


def fit_row(
    row: dict[str, Any], transform: Transform, condition: Condition | None, rng: np.random.Generator
) -> dict[str, Any]:
    """The transformed "image" of a row of `read_row`, and its "condition" where there is one."""
    image = row["image"]
    if condition is None:
        return {"image": transform(image, rng)}
    assert isinstance(transform, ImageTransform)
    size = image.shape[0], image.shape[1]
    crop = transform.choose(size, rng)
    cut = transform.apply(image, crop)
    return {
        "image": cut,
        "condition": np.asarray(condition(row, cut, View(transform, crop, size), rng)),
    }


class Loader(Stream):
    """Reads batches of a source: see `Stream` for their order.

    A batch has "image" uint8 [B, H, W, 3], "caption" list of B str, "index" int64 [B] (the pictures' places in the
    source), each requested column as a list of B values, and with a condition "condition" [B, ...]; B = batch_size /
    process_count.

    A picture that cannot be read is replaced by the next readable one in index order, so that positions stay exact;
    each such file is named once in a warning and in ``broken``.

    Args:
      source: see ``ldm_jax.data.sources``.
      transform: (uint8 [h, w, 3], generator) -> uint8 [H, W, 3], equal sizes for all pictures; ``ImageTransform``.
        ``batches`` takes its ``deterministic()`` form where it has one.
      batch_size: rows per global batch, over all processes.
      caption: template over the row's columns, see ``caption_template``; None gives "".
      columns: further metadata columns to put into the batches, as lists.
      condition: what else is made of a row and its picture, see ``ldm_jax.conditioning.columns``; needs an ``ImageTransform``.
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
        condition: Condition | None = None,
        **options: Any,
    ):
        for column in columns:
            if column in _RESERVED:
                raise DataError(
                    f"column {column!r} cannot be asked for: batches use that name themselves"
                )
        if condition is not None and not isinstance(transform, ImageTransform):
            raise DataError("a condition is cut as its picture is: give an ImageTransform")
        self.source, self.transform, self.condition = source, transform, condition
        self.broken: dict[str, str] = {}

        def make(finite: bool = False, **rest: Any) -> Batches:
            exact = getattr(transform, "deterministic", None) if finite else None
            return _PictureBatches(
                source,
                exact() if exact else transform,
                caption,
                tuple(columns),
                condition,
                finite=finite,
                **rest,
            )

        super().__init__(
            make, path=source.path, count=len(source), batch_size=batch_size, **options
        )

    def note(self, batch: dict[str, Any]) -> None:
        for name, why in batch.pop(_SKIPPED):
            if name not in self.broken:
                self.broken[name] = why
                _LOG.warning(
                    "skipped unreadable picture %s (%s): %d so far", name, why, len(self.broken)
                )


class _PictureBatches(Batches):
    def __init__(
        self,
        source: Source,
        transform: Transform,
        caption: str | None,
        columns: tuple[str, ...],
        condition: Condition | None,
        **options: Any,
    ):
        super().__init__(**options)
        self._source, self._transform, self._caption, self._columns = (
            source,
            transform,
            caption,
            columns,
        )
        self._condition = condition
        self._broken: dict[int, str] = {}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "image": np.stack([s["image"] for s in samples]),
            "caption": [s["caption"] for s in samples],
            "index": np.array([s["index"] for s in samples], np.int64),
            _SKIPPED: [skip for s in samples for skip in s[_SKIPPED]],
        }
        if self._condition is not None:
            batch["condition"] = np.stack([s["condition"] for s in samples])
        return batch | {column: [s["row"][column] for s in samples] for column in self._columns}

    def sample(self, wanted: int, rng: np.random.Generator) -> dict[str, Any]:
        index, row, skipped = self._readable(wanted)
        for column in self._columns:
            if column not in row:
                known = ", ".join(key for key in row if key != "image")
                raise DataError(
                    f"{self._source.path}: there is no column {column!r}: there are {known}"
                )
        return {
            **fit_row(row, self._transform, self._condition, rng),
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
                    return index, read_row(self._source, index, self._condition), skipped
                except DataError:
                    raise
                except UNREADABLE as error:
                    self._broken[index] = " ".join(str(error).split()) or type(error).__name__
            skipped.append((self._source.name(index), self._broken[index]))
        name, why = skipped[0]
        raise DataError(
            f"no readable picture in {self._source.path} (tried {len(skipped)}; first: {name}: {why})"
        )

    def _candidates(self, wanted: int) -> Iterator[int]:
        count = len(self._source)
        return ((wanted + i) % count for i in range(min(count, _MAX_BROKEN_IN_A_ROW)))
