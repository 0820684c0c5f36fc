"""Conditions that come from the data beside the picture: classes, masks, small pictures, maps of labels, boxes, vectors.

A `Condition` runs where pictures are decoded, in the loader's workers, and draws from the sample's own generator: what it makes of a row is the
same on every machine and after a resume. It is picklable.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.conditioning.degrade import DEGRADATIONS
from ldm_jax.conditioning.layouts import WHOLE, Box, clip_box, layout_tokens
from ldm_jax.conditioning.masks import MASKS
from ldm_jax.data.transforms import View
from ldm_jax.errors import DataError, UnreadablePicture


class _OfPicture:
    """The base of conditions that are made of the picture alone."""

    column = ""

    def read(self, row: dict[str, Any]) -> None:
        pass


def number_of(value: Any, names: Sequence[str], what: str) -> int:
    """A label's number: itself, or its place in ``names``; DataError where it has none."""
    if names and isinstance(value, str):
        if value not in names:
            raise DataError(
                f"{what} {value!r} is not in model.classes: add it there, or leave these rows out by data.where"
            )
        return names.index(value)
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    raise DataError(f"{what} {value!r} is neither a whole number nor one of model.classes")


@dataclasses.dataclass(frozen=True)
class ClassOf:
    """The class that a column names: its number in the sorted list of ``names``, or the column's own number."""

    column: str
    names: tuple[str, ...] = ()

    def read(self, row: dict[str, Any]) -> None:
        pass

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: View, rng: np.random.Generator
    ) -> int:
        return number_of(_column(row, self.column), self.names, "class")


_MASKS_DRAWN = 100


@dataclasses.dataclass(frozen=True)
class Mask(_OfPicture):
    """A mask uint8 [H, W, 1], 1 where the picture is to be made anew, of one of the ``kinds`` at random.

    One that hides more than the share ``most`` of the picture is drawn again.
    """

    kinds: tuple[str, ...] = tuple(MASKS)
    most: float = 1.0

    def __post_init__(self) -> None:
        _known(self.kinds, MASKS, "mask")

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: View, rng: np.random.Generator
    ) -> np.ndarray:
        h, w = image.shape[:2]
        for _ in range(_MASKS_DRAWN):
            kind = self.kinds[rng.integers(len(self.kinds))]
            mask = MASKS[kind](h, w, rng)
            if mask.mean() <= self.most:
                return mask[:, :, None].astype(np.uint8)
        raise DataError(
            f"of {_MASKS_DRAWN} masks none hides {self.most:g} of a picture of {(h, w)} or less: raise data.condition.most"
        )


@dataclasses.dataclass(frozen=True)
class SmallPicture(_OfPicture):
    """The picture made small: uint8 [h, w, 3] of ``size``, by one of the ``kinds`` of degradation at random."""

    size: tuple[int, int]
    kinds: tuple[str, ...] = ("bicubic",)

    def __post_init__(self) -> None:
        _known(self.kinds, DEGRADATIONS, "degradation")

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: View, rng: np.random.Generator
    ) -> np.ndarray:
        if any(n < m for n, m in zip(image.shape, self.size, strict=False)):
            raise DataError(
                f"pictures of {image.shape[:2]} cannot be made small to {self.size}: raise data.size"
            )
        return DEGRADATIONS[self.kinds[rng.integers(len(self.kinds))]](image, self.size, rng)


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """The map of labels in a ``column`` (a picture of one channel, encoded or as an array), cut as the picture is: int32 [H, W] of the target size.

    Labels are 0 to ``labels`` - 1, those of ``ignore`` become -1: no label at all.
    """

    column: str
    labels: int
    ignore: tuple[int, ...] = (255,)

    def read(self, row: dict[str, Any]) -> None:
        row[self.column] = read_labels(_column(row, self.column))

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: View, rng: np.random.Generator
    ) -> np.ndarray:
        labels = row[self.column]
        if labels.shape != view.size:
            h, w = view.size
            labels = np.asarray(Image.fromarray(labels).resize((w, h), Image.Resampling.NEAREST))
        labels = view.transform.apply(labels, view.crop, "nearest")
        labels = np.where(np.isin(labels, self.ignore), -1, labels)
        if labels.max() >= self.labels or labels.min() < -1:
            raise DataError(
                f"the label map {row.get('file_name', '')!r} has the label {labels.max()}: model.conditioner.in_channels is {self.labels}"
            )
        return labels


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tokens int32 [length] of the boxes in a ``column``: [{"label": name or number, "box": [left, top, width, height] in parts of the picture}].

    Boxes that the crop cuts are cut, those outside of it left out. Where the tokens say which crop it is (a length of 3 n + 2), boxes stay those
    of the whole picture, as in the original. Of too many boxes a random choice is taken; their order is random.
    """

    column: str
    length: int
    vocabulary: int
    names: tuple[str, ...] = ()

    def read(self, row: dict[str, Any]) -> None:
        pass

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: View, rng: np.random.Generator
    ) -> np.ndarray:
        h, w = view.size
        crop: Box = (
            view.crop.left / w,
            view.crop.top / h,
            view.crop.width / w,
            view.crop.height / h,
        )
        mirror, says_crop = view.crop.mirror, self.length % 3 == 2
        objects = []
        for label, box in boxes_of(row, self.column):
            number = number_of(label, self.names, "label")
            if not 0 <= number < self.vocabulary - 1:
                raise DataError(
                    f"label {label!r} is number {number}: the vocabulary has room for {self.vocabulary - 1}"
                )
            if (seen := clip_box(box, crop, mirror)) is not None:
                whole = clip_box(box, WHOLE, mirror)
                objects.append((number, whole if says_crop and whole else seen))
        objects = [objects[i] for i in rng.permutation(len(objects))]
        shown = clip_box(crop, WHOLE, mirror) or WHOLE
        return np.array(
            layout_tokens(objects, length=self.length, vocabulary=self.vocabulary, crop=shown),
            np.int32,
        )


@dataclasses.dataclass(frozen=True)
class Vectors:
    """``count`` of the vectors in a ``column``, float32 [count, dim]: where a row has more, so many at random, in their order.

    A row holds a list of lists of ``dim`` numbers, one such list, or the bytes of a .npy file [m, dim].
    """

    column: str
    count: int
    dim: int

    def read(self, row: dict[str, Any]) -> None:
        value = _column(row, self.column)
        if isinstance(value, bytes):
            try:
                row[self.column] = np.load(io.BytesIO(value), allow_pickle=False)
            except Exception as error:  # whatever a damaged file makes NumPy raise
                raise UnreadablePicture("its vectors are no .npy file") from error

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: View, rng: np.random.Generator
    ) -> np.ndarray:
        vectors = vectors_of(row, self.column, self.dim)
        if len(vectors) < self.count:
            raise DataError(
                f"{self.column}: {row.get('file_name', 'a row')} has {len(vectors)} vectors, model.conditioner.count is {self.count}"
            )
        if len(vectors) == self.count:
            return vectors
        return vectors[np.sort(rng.choice(len(vectors), self.count, replace=False))]


def vectors_of(row: Mapping[str, Any], column: str, dim: int) -> np.ndarray:
    """The vectors of a row, float32 [m, dim]; DataError where they are not as `Vectors` wants them."""
    name, value = row.get("file_name", "a row"), _column(row, column)
    try:
        vectors = np.atleast_2d(np.asarray(value, np.float32))
    except (TypeError, ValueError):  # texts; lists of several lengths
        raise DataError(
            f"{column}: what {name} has is no list of vectors, lists of {dim} numbers each"
        ) from None
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise DataError(
            f"{column}: {name} has vectors of the shape {vectors.shape}, not (m, {dim}), model.conditioner.dim"
        )
    if not np.isfinite(vectors).all():
        raise DataError(f"{column}: {name} has vectors that are not finite")
    return vectors


def boxes_of(row: Mapping[str, Any], column: str) -> list[tuple[Any, Box]]:
    """(label, box) of a row; DataError where they are not as `Layout` wants them."""
    found = []
    for item in _column(row, column):
        box = item.get("box", ()) if isinstance(item, Mapping) else ()
        numbers = [float(v) for v in box if isinstance(v, int | float) and math.isfinite(v)]
        if (
            len(numbers) != 4
            or "label" not in item
            or min(numbers[2:]) <= 0
            or max(numbers) > 1.001
        ):
            raise DataError(
                f"{column}: {item!r} is no box: write {{'label': ..., 'box': [left, top, width, height]}} in parts of the picture"
            )
        found.append((item["label"], (numbers[0], numbers[1], numbers[2], numbers[3])))
    return found


def read_labels(data: bytes | np.ndarray) -> np.ndarray:
    """A map of labels from an encoded picture of one channel (palettes give their indices) or an array: int32 [h, w]."""
    if isinstance(data, bytes):
        try:
            with Image.open(io.BytesIO(data)) as image:
                labels = np.asarray(image)
        except Exception as error:  # as in decode_image
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnreadablePicture(f"its label map: {reason}") from error
    else:
        labels = np.asarray(data)
    if labels.ndim == 3 and labels.shape[2] == 1:
        labels = labels[:, :, 0]
    if labels.ndim != 2 or not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool):
        raise UnreadablePicture(
            f"its label map has the shape {labels.shape}: one channel of whole numbers is needed"
        )
    return labels.astype(np.int32)


def class_names(rows: Sequence[Mapping[str, Any]], column: str, boxes: bool = False) -> list[str]:
    """The sorted names in a column (or of the boxes in it); [] where it holds numbers."""
    values = (
        (label for row in rows for label, _ in boxes_of(row, column))
        if boxes
        else (_column(r, column) for r in rows)
    )
    found = set(values)
    strings = sorted(value for value in found if isinstance(value, str))
    if strings and len(strings) != len(found):
        other = next(value for value in found if not isinstance(value, str))
        raise DataError(f"column {column!r} holds names and {other!r}: every row needs a name")
    return strings


def _column(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        known = ", ".join(key for key in row if key != "image")
        raise DataError(f"data.condition: there is no column {column!r}: there are {known}")
    return row[column]


def _known(kinds: Sequence[str], registry: Mapping[str, Any], what: str) -> None:
    for kind in kinds:
        if kind not in registry:
            raise DataError(f"{what} {kind!r} does not exist: there are {', '.join(registry)}")
    if not kinds:
        raise DataError(f"kinds of {what} are missing: choose from {', '.join(registry)}")
