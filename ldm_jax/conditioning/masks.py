"""Masks for inpainting, drawn on the host: which part of a picture is to be made anew."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw


def boxes(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    """One to four rectangles, each a tenth to a half of either side."""
    mask = np.zeros((h, w), bool)
    for _ in range(rng.integers(1, 5)):
        high, wide = _side(h, rng, 0.1, 0.5), _side(w, rng, 0.1, 0.5)
        top, left = rng.integers(0, h - high + 1), rng.integers(0, w - wide + 1)
        mask[top : top + high, left : left + wide] = True
    return mask


def strokes(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    """One to four free strokes of a round brush, as a hand would scribble (Yu et al. 2019, arXiv:1806.03589, algorithm 1 in spirit)."""
    image = Image.new("1", (w, h))
    draw, side = ImageDraw.Draw(image), min(h, w)
    for _ in range(rng.integers(1, 5)):
        radius = max(1, round(side * rng.uniform(0.02, 0.08)))
        at, angle = rng.uniform((0, 0), (w, h)), rng.uniform(0, 2 * np.pi)
        for _ in range(rng.integers(3, 9)):
            angle += rng.normal(0, 0.9)
            to = np.clip(
                at + side * rng.uniform(0.1, 0.3) * np.array([np.cos(angle), np.sin(angle)]),
                0,
                (w, h),
            )
            draw.line([*at, *to], fill=1, width=2 * radius)
            for x, y in (at, to):  # round ends, and no notches between two pieces
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1)
            at = to
    return np.array(image)


def outpaint(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    """Borders of one to four sides, each a tenth to two fifths of the picture."""
    mask = np.zeros((h, w), bool)
    for side in rng.permutation(4)[: rng.integers(1, 5)]:
        turned = np.rot90(mask, int(side))  # a view: writes into the mask
        turned[: _side(turned.shape[0], rng, 0.1, 0.4)] = True
    return mask


def half(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    """One half: upper, lower, left or right."""
    mask = np.zeros((h, w), bool)
    turned = np.rot90(mask, int(rng.integers(4)))
    turned[: max(1, turned.shape[0] // 2)] = True
    return mask


def _side(length: int, rng: np.random.Generator, least: float, most: float) -> int:
    return max(1, round(length * rng.uniform(least, most)))


MASKS: dict[str, Callable[[int, int, np.random.Generator], np.ndarray]] = {
    "boxes": boxes,
    "strokes": strokes,
    "outpaint": outpaint,
    "half": half,
}
