"""Batches of pictures and captions."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ldm_jax.data.captions import Captions, make_captions
from ldm_jax.data.decode import describe, to_rgb
from ldm_jax.data.sources import Source
from ldm_jax.data.stream import Batches, Stream
from ldm_jax.data.transforms import Condition, ImageTransform, View
from ldm_jax.errors import DataError, UnreadablePicture

_LOG = logging.getLogger(__name__)
_MAX_BROKEN_IN_A_ROW = 1000
_RESERVED = ("image", "caption", "condition", "index", "valid")
_SKIPPED = "_skipped"

# Raised for a damaged picture, which is skipped.
UNREADABLE = (UnreadablePicture, OSError)

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def read_row(source: Source, index: int, condition: Condition | None = None) -> dict[str, Any]:
    """Reads a row, its picture as uint8 RGB and what its condition needs; raises `UNREADABLE`."""
    row = source[index]
    row["image"] = to_rgb(row["image"])
    if condition is not None:
        condition.read(row)
    return row


def fit_row(
    row: dict[str, Any], transform: Transform, condition: Condition | None, rng: np.random.Generator
) -> dict[str, Any]:
    """Returns the transformed "image" of a row of `read_row`, and its "condition" if any."""
    image = row["image"]
    if condition is None:
        return {"image": transform(image, rng)}
    assert isinstance(transform, ImageTransform)
    size = image.shape[0], image.shape[1]
    crop = transform.choose(size, rng)
    cut = transform.apply(image, crop)
    made = condition(row, cut, View(transform, crop, size), rng)
    return {"image": cut, "condition": np.asarray(made)}


class Loader(Stream):
    """Reads batches of a source; see `Stream` for their order.

    A batch has "image" uint8 [B, H, W, 3], "caption" list of B str, "index" int64 [B] (places in
    the source), each of ``columns`` as a list of B values, and with a condition "condition"
    [B, ...], where B = batch_size / process_count.

    A picture that cannot be read is replaced by the next readable one in index order, so that
    positions stay exact; each such file is named once in a warning and in ``broken``.

    Args:
      source: See `Source`.
      transform: (uint8 [h, w, 3], generator) -> uint8 [H, W, 3], of one size for all pictures, such
        as `ImageTransform`. `batches` uses its ``deterministic()`` form where it has one.
      caption: Templates over the row's columns, see `Captions`; None gives "".
      columns: Further metadata columns of the batches.
      condition: Makes the condition of a picture; needs an `ImageTransform`.
      **options: Those of `Stream`.

    Raises:
      DataError: An argument does not fit; while reading, no picture can be read, or the caption or
        a column does not fit the rows.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        caption: str | Sequence[str] | Captions | None = "{text}",
        columns: Sequence[str] = (),
        condition: Condition | None = None,
        **options: Any,
    ):
        for column in columns:
            if column in _RESERVED:
                raise DataError(f"column {column!r} is not available: batches use that name")
        if condition is not None and not isinstance(transform, ImageTransform):
            raise DataError("a condition is cut as its picture is: give an ImageTransform")
        self.source, self.transform, self.condition = source, transform, condition
        self.captions, self._columns = make_captions(caption), tuple(columns)
        self.broken: dict[str, str] = {}
        window = getattr(source, "window", 0)
        super().__init__(path=source.path, count=len(source), window=window, **options)

    def _make_batches(self, *, finite: bool, **options: Any) -> Batches:
        exact = getattr(self.transform, "deterministic", None) if finite else None
        transform = exact() if exact else self.transform
        parts = self.source, transform, self.captions, self._columns, self.condition
        return _PictureBatches(*parts, finite=finite, **options)

    def _receive(self, batch: dict[str, Any]) -> None:
        for name, reason in batch.pop(_SKIPPED):
            if name not in self.broken:
                self.broken[name] = reason
                message = "skipped unreadable picture %s (%s): %d so far"
                _LOG.warning(message, name, reason, len(self.broken))
        if self.condition is not None:
            names = [self.source.name(i) for i in batch["index"].tolist()]
            batch["condition"] = self.condition.complete(batch, names)


class _PictureBatches(Batches):
    def __init__(
        self,
        source: Source,
        transform: Transform,
        captions: Captions | None,
        columns: tuple[str, ...],
        condition: Condition | None,
        **options: Any,
    ):
        super().__init__(**options)
        self._source, self._transform, self._condition = source, transform, condition
        self._captions, self._columns = captions, columns
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

    def sample(
        self, wanted: int, rng: np.random.Generator, text_rng: np.random.Generator | None
    ) -> dict[str, Any]:
        index, row, skipped = self._readable(wanted)
        for column in self._columns:
            if column not in row:
                known = ", ".join(key for key in row if key != "image")
                raise DataError(
                    f"{self._source.path}: there is no column {column!r}: there are {known}"
                )
        return {
            **fit_row(row, self._transform, self._condition, rng),
            "caption": "" if self._captions is None else self._captions(row, text_rng),
            "index": index,
            "row": row,
            "valid": index == wanted,
            _SKIPPED: skipped,
        }

    def _readable(self, wanted: int) -> tuple[int, dict[str, Any], list[tuple[str, str]]]:
        """Returns the first readable row from ``wanted`` on, with its index, and those skipped."""
        skipped: list[tuple[str, str]] = []
        count = len(self._source)
        for offset in range(min(count, _MAX_BROKEN_IN_A_ROW)):
            index = (wanted + offset) % count
            if index not in self._broken:
                try:
                    return index, read_row(self._source, index, self._condition), skipped
                except UNREADABLE as error:
                    self._broken[index] = describe(error)
            skipped.append((self._source.name(index), self._broken[index]))
        name, reason = skipped[0]
        raise DataError(
            f"no readable picture in {self._source.path} (tried {len(skipped)}; "
            f"first: {name}: {reason})"
        )
