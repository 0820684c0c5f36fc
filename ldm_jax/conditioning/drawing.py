"""Conditions as pictures, for people: previews and contact sheets."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm_jax.conditioning.columns import LabelMap, Layout, Mask, SmallPicture
from ldm_jax.conditioning.layouts import boxes_of_tokens
from ldm_jax.data.transforms import Condition


def colours(n: int) -> np.ndarray:
    """``n`` colours that can be told apart, uint8 [n, 3]: a light grey, then hues by the golden angle, in three brightnesses."""
    hue = np.arange(n) * 0.61803 % 1 * 6
    rgb = np.clip(np.abs((hue[:, None] + [0, 4, 2]) % 6 - 3) - 1, 0, 1)
    found = (255 * rgb * np.array([0.95, 0.75, 0.55])[np.arange(n) % 3, None]).astype(np.uint8)
    found[:1] = 225
    return found


def draw_conditions(condition: Condition | None, raw: Mapping[str, Any]) -> np.ndarray | None:
    """The conditions of a loader's batch, uint8 [b, H, W, 3] of the pictures' size; None where they are not of the picture's plane."""
    if condition is None or "image" not in raw or "condition" not in raw:
        return None
    images, given = raw["image"], raw["condition"]
    h, w = images.shape[1:3]
    if isinstance(condition, Mask):
        return np.where(given > 0, np.uint8(127), images)
    if isinstance(condition, SmallPicture):
        return np.stack(
            [np.asarray(Image.fromarray(x).resize((w, h), Image.Resampling.NEAREST)) for x in given]
        )
    if isinstance(condition, LabelMap):
        return np.concatenate([colours(condition.labels), np.full((1, 3), 255, np.uint8)])[
            given
        ]  # -1, the last, is white
    if isinstance(condition, Layout):
        return np.stack([_draw_boxes(condition, tokens, (h, w)) for tokens in given])
    return None


def _draw_boxes(condition: Layout, tokens: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    h, w = size
    sheet = Image.new("RGB", (w, h), "white")
    draw, palette = ImageDraw.Draw(sheet), colours(max(len(condition.names), 64) + 1)[1:]
    for label, (left, top, width, height) in boxes_of_tokens(tokens.tolist(), condition.vocabulary):
        corners = [
            left * (w - 1),
            top * (h - 1),
            (left + width) * (w - 1),
            (top + height) * (h - 1),
        ]
        draw.rectangle(corners, outline=tuple(int(v) for v in palette[label % len(palette)]))
        if condition.names:
            draw.text(
                (corners[0] + 2, corners[1]),
                condition.names[label],
                fill="black",
                font_size=max(8, h // 24),
            )
    return np.asarray(sheet)


def contact_sheet(
    pictures: np.ndarray, texts: Sequence[str], shown: np.ndarray | None = None, columns: int = 4
) -> np.ndarray:
    """Pictures uint8 [n, H, W, 3], what is ``shown`` of each beside it, and its text below -> one picture."""
    h, w = pictures.shape[1:3]
    zoom = max(1, 160 // w)
    beside = pictures if shown is None else np.concatenate([pictures, shown], axis=2)
    width, height, gap, line = beside.shape[2] * zoom, h * zoom, 8, 13
    letters = max(1, width // 6)
    wrapped = [textwrap.wrap(text, letters, max_lines=3) for text in texts]
    rows = -(-len(pictures) // columns)
    cell = height + 3 * line + gap
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * cell + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(beside):
        x, y = gap + (i % columns) * (width + gap), gap + (i // columns) * cell
        sheet.paste(
            Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (x, y)
        )
        draw.multiline_text(
            (x, y + height + 1), "\n".join(wrapped[i]), fill="black", font_size=11, spacing=1
        )
    return np.asarray(sheet)
