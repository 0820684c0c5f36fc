"""Boxes with labels, as the tokens that a layout-to-image model reads."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm_jax.conditioning.base import Names, RowCondition, Rows, column_of, label_number, some
from ldm_jax.conditioning.class_label import class_numbers
from ldm_jax.conditioning.text import BertText
from ldm_jax.errors import DataError, RequestError
from ldm_jax.io.paths import read_bytes
from ldm_jax.io.png import palette
from ldm_jax.models.bert import TransformerEncoder

LOG = logging.getLogger(__name__)
Box = tuple[float, float, float, float]  # left, top, width, height, as parts of the picture
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class RowLayout(RowCondition):
    """Tokens int32 [length] of the boxes in a ``column``.

    A row holds [{"label": name or number, "box": [left, top, width, height]}], in parts of the
    picture. Boxes are clipped to the crop, those outside of it left out. Where the tokens say
    which crop it is (a length of 3 n + 2), boxes stay those of the whole picture, as in the
    original. Their order is random; of too many boxes a random choice is taken.
    """

    column: str
    length: int
    vocabulary: int
    names: Names = ()

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: Any, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns the tokens of the row's boxes."""
        (h, w), cut = view.size, view.crop
        crop: Box = (cut.left / w, cut.top / h, cut.width / w, cut.height / h)
        says_crop = self.length % 3 == 2
        objects = []
        for label, box in boxes_of(row, self.column):
            number = label_number(label, self.names, "label")
            if not 0 <= number < self.vocabulary - 1:
                raise DataError(
                    f"label {label!r} is number {number}: the vocabulary has room for "
                    f"{self.vocabulary - 1}"
                )
            if (seen := clip_box(box, crop, cut.mirror)) is not None:
                whole = clip_box(box, WHOLE, cut.mirror)
                objects.append((number, whole if says_crop and whole else seen))
        objects = [objects[i] for i in rng.permutation(len(objects))]
        shown = clip_box(crop, WHOLE, cut.mirror) or WHOLE
        tokens = layout_tokens(objects, length=self.length, vocabulary=self.vocabulary, crop=shown)
        return np.array(tokens, np.int32)

    def draw(self, images: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Draws the boxes, with their names, on white."""
        h, w = images.shape[1:3]
        colours, sheets = palette(max(len(self.names), 64) + 1)[1:], []
        for tokens in values:
            sheet = Image.new("RGB", (w, h), "white")
            draw = ImageDraw.Draw(sheet)
            for label, box in boxes_of_tokens(tokens.tolist(), self.vocabulary):
                left, top = box[0] * (w - 1), box[1] * (h - 1)
                corners = (left, top, left + box[2] * (w - 1), top + box[3] * (h - 1))
                draw.rectangle(corners, outline=tuple(map(int, colours[label % len(colours)])))
                if self.names:
                    name, size = self.names[label], max(8, h // 24)
                    draw.text((left + 2, top), name, fill="black", font_size=size)
            sheets.append(np.asarray(sheet))
        return np.stack(sheets)


@dataclasses.dataclass(frozen=True)
class Layout(BertText):
    """Tokens of boxes through a transformer (the original's BERTEmbedder without tokenizer)."""

    field = "layout"
    by_patch = False
    network = TransformerEncoder
    default_guidance = 1.0  # the original's was trained without dropping conditions
    negative = interpolates = False
    cached = False
    argument = None

    def __post_init__(self) -> None:
        if self.weighted:
            raise ValueError("weighted: a layout has no words")

    @property
    def towers(self) -> Mapping[str, Any]:
        """None: it reads no text."""
        return {}

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what makes tokens of a row's boxes."""
        module = TransformerEncoder
        length = fields.get("max_seq_len", module.max_seq_len)
        vocabulary = fields.get("vocab_size", module.vocab_size)
        return RowLayout(**settings, length=length, vocabulary=vocabulary, names=names())

    @classmethod
    def row_labels(cls, row: Mapping[str, Any], column: str) -> Iterable[Any]:
        """Yields the labels of the row's boxes."""
        return (label for label, _ in boxes_of(row, column))

    def row_problems(self, rows: Rows, column: str, few: int) -> Iterator[str]:
        """Yields pictures without a box."""
        empty = [rows.name(i) for i, row in enumerate(rows.rows) if not row.get(column)]
        mean = np.mean([len(row.get(column) or ()) for row in rows.rows])
        LOG.info("%.1f boxes in a picture", mean)
        if empty:
            yield f"{len(empty)} of {len(rows.rows)} pictures have no box ({some(empty)})"

    def encode(self, values: Sequence[Any]) -> np.ndarray:
        """Returns tokens int32 [b, max_length] of rows of ``max_length`` tokens each."""
        tokens = np.asarray(values, np.int32)
        if tokens.ndim != 2 or tokens.shape[1] != self.max_length:
            raise ValueError(f"tokens of shape {tokens.shape}, expected rows of {self.max_length}")
        if tokens.min() < 0 or tokens.max() >= self.module.vocab_size:
            raise ValueError(f"tokens must be from 0 to {self.module.vocab_size - 1}")
        return tokens

    def encode_null(self, n: int) -> np.ndarray:
        """Returns zeros."""
        return np.zeros((n, self.max_length), np.int32)

    def tokenizer_json(self) -> str | None:
        """Returns None: tokens are not made of text."""
        return None

    def encode_rows(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Encodes the tokens of a batch."""
        return {"encoded": self.encode(raw["condition"])}

    def labels(self, names: Sequence[str] | None) -> list[str]:
        """Returns the names of the labels, or their numbers."""
        return list(names or map(str, range(self.module.vocab_size - 1)))

    def parse(self, value: Any, canvas: Any, geometry: Any) -> list[list[int]]:
        """Returns the tokens of one layout, for all pictures.

        ``value`` is the path of a JSON file, or boxes (label, (left, top, width, height)).
        """
        boxes = read_layout(value) if isinstance(value, str | Path) else value
        size = {"length": self.max_length, "vocabulary": self.module.vocab_size}
        return [request_tokens(boxes, **size, names=geometry.names)]


def boxes_of(row: Mapping[str, Any], column: str) -> list[tuple[Any, Box]]:
    """Returns (label, box) of a training row; raises DataError where one is no box."""
    found = []
    for item in column_of(row, column):
        box = item.get("box", ()) if isinstance(item, Mapping) else ()
        numbers = [float(v) for v in box if isinstance(v, int | float) and math.isfinite(v)]
        known = len(numbers) == 4 and "label" in item
        if not known or min(numbers[2:]) <= 0 or max(numbers) > 1.001:
            raise DataError(
                f"{column}: {item!r} is no box: write {{'label': ..., 'box': [left, top, width, "
                "height]}} in parts of the picture"
            )
        found.append((item["label"], (numbers[0], numbers[1], numbers[2], numbers[3])))
    return found


def read_layout(path: str | Path) -> list[tuple[Any, list[float]]]:
    """Reads boxes from a JSON file: [{"label": "cup", "box": [left, top, width, height]}, ...]."""
    try:
        boxes = json.loads(read_bytes(path).decode("utf-8-sig"))
        return [(box["label"], [float(v) for v in box["box"]]) for box in boxes]
    except OSError as error:
        raise RequestError(f"layout {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RequestError(
            f'layout {path}: write [{{"label": ..., "box": [left, top, width, height]}}, ...]'
        ) from None


def request_tokens(
    boxes: Sequence[tuple[int | str, Sequence[float]]],
    *,
    length: int,
    vocabulary: int,
    names: Sequence[str] | None = None,
) -> list[int]:
    """Returns the tokens of a request's boxes; see `layout_tokens`.

    Raises:
      RequestError: There are too many boxes, or one does not lie in the picture.
    """
    if len(boxes) > length // 3:
        raise RequestError(f"{len(boxes)} boxes: this model takes at most {length // 3}")
    numbered = []
    for label, box in boxes:
        ends = (*box, box[0] + box[2] - 1e-6, box[1] + box[3] - 1e-6) if len(box) == 4 else (-1,)
        if not all(0 <= end <= 1 for end in ends):
            raise RequestError(
                f"box {list(box)} of {label!r}: give left, top, width, height as parts of 1, "
                "inside the picture"
            )
        (number,) = class_numbers([label], vocabulary - 1, names)
        x, y, w, h = (float(v) for v in box)
        numbered.append((number, (x, y, w, h)))
    return layout_tokens(numbered, length=length, vocabulary=vocabulary)


def clip_box(box: Box, crop: Box, mirror: bool = False) -> Box | None:
    """Returns a box of the whole picture as one of its ``crop``, None if nothing is left of it."""
    left, top = max(box[0], crop[0]), max(box[1], crop[1])
    right, bottom = min(box[0] + box[2], crop[0] + crop[2]), min(box[1] + box[3], crop[1] + crop[3])
    if right <= left or bottom <= top:
        return None
    x, y = (left - crop[0]) / crop[2], (top - crop[1]) / crop[3]
    w, h = (right - left) / crop[2], (bottom - top) / crop[3]
    return (1 - x - w if mirror else x), y, w, h


def layout_tokens(
    boxes: Sequence[tuple[int, Box]], *, length: int, vocabulary: int, crop: Box = WHOLE
) -> list[int]:
    """Returns ``length`` tokens of labels and boxes.

    As in taming-transformers' ObjectsBoundingBoxConditionalBuilder: a triple for each box (label,
    first corner, last corner), then the last token of the vocabulary for boxes that are missing.
    Where the length leaves two over (the original's 92 = 3 * 30 + 2) these are the corners of the
    ``crop``. A corner is its cell, row by row, on a square grid of as many cells as the vocabulary
    has room for. Boxes beyond ``length`` // 3 are left out.
    """
    side, none, most = math.isqrt(vocabulary), vocabulary - 1, length // 3

    def corners(box: Box) -> list[int]:
        x, y, w, h = box
        ends = ((x, y), (min(x + w, 1), min(y + h, 1)))
        return [round(b * (side - 1)) * side + round(a * (side - 1)) for a, b in ends]

    tokens = [token for label, box in boxes[:most] for token in (label, *corners(box))]
    tokens += [none] * (3 * most - len(tokens))
    return tokens + (corners(crop) if length % 3 == 2 else [none] * (length % 3))


def boxes_of_tokens(tokens: Sequence[int], vocabulary: int) -> list[tuple[int, Box]]:
    """Returns the labels and boxes in `layout_tokens`, to the accuracy of its grid."""
    side, none = math.isqrt(vocabulary), vocabulary - 1
    found = []
    for i in range(0, len(tokens) - 2, 3):
        label, first, last = (int(token) for token in tokens[i : i + 3])
        if label != none:
            (top, left), (bottom, right) = (divmod(corner, side) for corner in (first, last))
            x, y, w, h = (v / (side - 1) for v in (left, top, right - left, bottom - top))
            found.append((label, (x, y, w, h)))
    return found
