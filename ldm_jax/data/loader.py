"""Batches of pictures and captions."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ldm_jax.data.buckets import Buckets, assign
from ldm_jax.data.captions import Captions, make_captions
from ldm_jax.data.decode import describe, to_rgb
from ldm_jax.data.order import Place
from ldm_jax.data.pixels import PixelFormat
from ldm_jax.data.sources import Source, Subset
from ldm_jax.data.stream import Batches, Stream
from ldm_jax.data.transforms import Condition, ImageTransform, View
from ldm_jax.errors import DataError, UnreadablePicture

_LOG = logging.getLogger(__name__)
_MAX_BROKEN_IN_A_ROW = 1000
_RESERVED = ("image", "caption", "condition", "index", "valid")
_SKIPPED = "_skipped"
_PLAIN = PixelFormat()

# Raised for a damaged picture, which is skipped.
UNREADABLE = (UnreadablePicture, OSError)

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def read_row(
    source: Source,
    index: int,
    condition: Condition | None = None,
    pixels: PixelFormat = _PLAIN,
) -> dict[str, Any]:
    """Reads a row, its picture and what its condition needs; raises `UNREADABLE`.

    The picture is uint8 RGB, or for another format than that float32 from 0 to 255.
    """
    row = source[index]
    row["image"] = (to_rgb if pixels.is_plain else pixels)(row["image"])
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
    [B, ...], where B = batch_size / process_count. Pictures that are no 8-bit RGB are float32
    [B, H, W, c], from 0 to 255.

    A picture that cannot be read is replaced by the next readable one in index order, so that
    positions stay exact; each such file is named once in a warning and in ``broken``. With buckets
    the replacement is of the same bucket.

    Args:
      source: See `Source`.
      transform: (uint8 [h, w, 3], generator) -> uint8 [H, W, 3], of one size for all pictures, such
        as `ImageTransform`. `batches` uses its ``deterministic()`` form where it has one.
      caption: Templates over the row's columns, see `Captions`; None gives "".
      columns: Further metadata columns of the batches.
      condition: Makes the condition of a picture; needs an `ImageTransform`.
      buckets: Cut each picture to the size of its bucket instead of the transform's, which must be
        an `ImageTransform`; all pictures of a batch are of one bucket.
      pixels: Channels and range of the pictures' numbers.
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
        buckets: Buckets | None = None,
        pixels: PixelFormat = _PLAIN,
        **options: Any,
    ):
        for column in columns:
            if column in _RESERVED:
                raise DataError(f"column {column!r} is not available: batches use that name")
        if condition is not None and not isinstance(transform, ImageTransform):
            raise DataError("a condition is cut as its picture is: give an ImageTransform")
        self.source, self.transform, self.condition = source, transform, condition
        self.captions, self._columns = make_captions(caption), tuple(columns)
        self.pixels = pixels
        self.broken: dict[str, str] = {}
        self._settings = {"caption": self.captions, "columns": columns, "pixels": pixels, **options}
        self._transforms: list[Transform] = [transform]
        self._members: list[np.ndarray] | None = None
        if buckets is not None:
            self._transforms, self._members = self._bucketed(buckets, options["batch_size"])
        super().__init__(
            path=source.path,
            count=len(source),
            window=getattr(source, "window", 0),
            groups=self._members,
            **options,
        )

    def _bucketed(
        self, buckets: Buckets, batch_size: int
    ) -> tuple[list[Transform], list[np.ndarray]]:
        """Returns the transform and the pictures of each bucket."""
        if not isinstance(self.transform, ImageTransform):
            raise DataError("buckets change the size of a transform: give an ImageTransform")
        found = assign(self.source, buckets, batch_size)
        self.notes = found.notes
        self._skip([(self.source.name(i), why) for i, why in found.unreadable.items()])
        transforms = [dataclasses.replace(self.transform, size=size) for size in found.sizes]
        return [*transforms], [*found.groups]

    def by_bucket(self) -> dict[tuple[int, int], "Loader"]:
        """Returns a loader of each bucket's pictures alone, by size (H, W); {} without buckets."""
        loaders: dict[tuple[int, int], Loader] = {}
        for transform, members in zip(self._transforms, self._members or (), strict=False):
            assert isinstance(transform, ImageTransform)
            subset = Subset(self.source, members.tolist())
            alone = Loader(subset, transform, condition=self.condition, **self._settings)
            loaders[transform.size] = alone
        return loaders

    def transform_of(self, index: int) -> Transform:
        """Returns the transform of a picture; in several buckets, that of the first."""
        for transform, members in zip(self._transforms, self._members or (), strict=False):
            at = int(np.searchsorted(members, index))
            if at < len(members) and members[at] == index:
                return transform
        return self.transform

    def _make_batches(self, *, finite: bool, **options: Any) -> Batches:
        transforms = self._transforms
        if finite:
            transforms = [
                getattr(one, "deterministic", lambda one=one: one)() for one in transforms
            ]
        parts = self.source, transforms, self._members, self.captions, self._columns, self.condition
        return _PictureBatches(*parts, self.pixels, finite=finite, **options)

    def _skip(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Names pictures that cannot be read, each once."""
        for name, reason in skipped:
            if name not in self.broken:
                self.broken[name] = reason
                message = "skipped unreadable picture %s (%s): %d so far"
                _LOG.warning(message, name, reason, len(self.broken))

    def _receive(self, batch: dict[str, Any]) -> None:
        self._skip(batch.pop(_SKIPPED))
        if self.condition is not None:
            names = [self.source.name(i) for i in batch["index"].tolist()]
            batch["condition"] = self.condition.complete(batch, names)


class _PictureBatches(Batches):
    def __init__(
        self,
        source: Source,
        transforms: Sequence[Transform],
        members: Sequence[np.ndarray] | None,
        captions: Captions | None,
        columns: tuple[str, ...],
        condition: Condition | None,
        pixels: PixelFormat,
        **options: Any,
    ):
        super().__init__(**options)
        self._source, self._condition, self._pixels = source, condition, pixels
        self._transforms, self._members = transforms, members  # of each group
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
        self, wanted: Place, rng: np.random.Generator, text_rng: np.random.Generator | None
    ) -> dict[str, Any]:
        index, row, skipped = self._readable(wanted)
        for column in self._columns:
            if column not in row:
                known = ", ".join(key for key in row if key != "image")
                raise DataError(
                    f"{self._source.path}: there is no column {column!r}: there are {known}"
                )
        return {
            **fit_row(row, self._transforms[wanted.group], self._condition, rng),
            "caption": "" if self._captions is None else self._captions(row, text_rng),
            "index": index,
            "row": row,
            "valid": index == wanted.sample,
            _SKIPPED: skipped,
        }

    def _readable(self, wanted: Place) -> tuple[int, dict[str, Any], list[tuple[str, str]]]:
        """Returns the first readable row from ``wanted`` on, with its index, and those skipped."""
        skipped: list[tuple[str, str]] = []
        members = range(len(self._source)) if self._members is None else self._members[wanted.group]
        start, count = _position(members, wanted.sample), len(members)
        for offset in range(min(count, _MAX_BROKEN_IN_A_ROW)):
            index = int(members[(start + offset) % count])
            if index not in self._broken:
                try:
                    row = read_row(self._source, index, self._condition, self._pixels)
                    return index, row, skipped
                except UNREADABLE as error:
                    self._broken[index] = describe(error)
            skipped.append((self._source.name(index), self._broken[index]))
        name, reason = skipped[0]
        raise DataError(
            f"no readable picture in {self._source.path} (tried {len(skipped)}; "
            f"first: {name}: {reason})"
        )


def _position(members: Sequence[int] | np.ndarray, index: int) -> int:
    return index if isinstance(members, range) else int(np.searchsorted(members, index))
