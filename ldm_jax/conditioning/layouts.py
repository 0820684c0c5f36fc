"""Boxes with labels, and the tokens that a layout-to-image model reads instead of them."""

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]  # left, top, width, height, as parts of the picture
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def clip_box(box: Box, crop: Box, mirror: bool = False) -> Box | None:
    """A box of the whole picture as one of its ``crop``, perhaps mirrored; None where nothing of it is left."""
    left, top = max(box[0], crop[0]), max(box[1], crop[1])
    right, bottom = min(box[0] + box[2], crop[0] + crop[2]), min(box[1] + box[3], crop[1] + crop[3])
    if right <= left or bottom <= top:
        return None
    x, y, w, h = (
        (left - crop[0]) / crop[2],
        (top - crop[1]) / crop[3],
        (right - left) / crop[2],
        (bottom - top) / crop[3],
    )
    return (1 - x - w if mirror else x), y, w, h


def layout_tokens(
    boxes: Sequence[tuple[int, Box]], *, length: int, vocabulary: int, crop: Box = WHOLE
) -> list[int]:
    """Labels and boxes -> ``length`` tokens, as taming-transformers' ObjectsBoundingBoxConditionalBuilder has them.

    A triple for each box (label, first corner, last corner), then the last token of the vocabulary for boxes that are not there. Where the length
    leaves two over (the original's 92 = 3 * 30 + 2) these are the corners of the ``crop``. A corner is its place, row by row, on a square grid of
    as many cells as the vocabulary has room for. Boxes too many are left out.
    """
    side, none, most = math.isqrt(vocabulary), vocabulary - 1, length // 3

    def corners(box: Box) -> list[int]:
        x, y, w, h = box
        return [
            round(b * (side - 1)) * side + round(a * (side - 1))
            for a, b in ((x, y), (min(x + w, 1), min(y + h, 1)))
        ]

    tokens = [token for label, box in boxes[:most] for token in (label, *corners(box))]
    tokens += [none] * (3 * most - len(tokens))
    return tokens + (corners(crop) if length % 3 == 2 else [none] * (length % 3))


def boxes_of_tokens(tokens: Sequence[int], vocabulary: int) -> list[tuple[int, Box]]:
    """The labels and boxes in `layout_tokens`, to the accuracy of its grid."""
    side, none = math.isqrt(vocabulary), vocabulary - 1
    found = []
    for i in range(0, len(tokens) - 2, 3):
        label, first, last = (int(token) for token in tokens[i : i + 3])
        if label != none:
            (top, left), (bottom, right) = (divmod(corner, side) for corner in (first, last))
            box = (left, top, right - left, bottom - top)
            found.append(
                (
                    label,
                    (
                        box[0] / (side - 1),
                        box[1] / (side - 1),
                        box[2] / (side - 1),
                        box[3] / (side - 1),
                    ),
                )
            )
    return found
