"""Scenes composed of cut-outs with exact label maps and boxes, to try conditioned models on."""

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm_jax.data.decode import open_picture
from ldm_jax.data.sources.folder import ImageFolder
from ldm_jax.errors import DataError, UnreadablePicture

_STREAM_SCENE = 7  # apart from the loader's streams of random numbers
_TRIES = 12  # positions drawn for an object before it is left out


class _Placed(NamedTuple):
    """An object in a scene: its cut-out, resized to (h, w), with its corner at (top, left)."""

    picture: int
    top: int
    left: int
    h: int
    w: int


class Scenes:
    """Scenes of cut-outs of the pictures of a folder, on a gradient of two light colours.

    A cut-out is the opaque part of a picture; in a picture without transparency, what is not
    connected to its border by white. Objects overlap little, and hide each other in the label map.
    Scene i depends only on the arguments. Columns: "map", labels uint8 [size, size], 0 for the
    background and 1 + n for the n-th class in sorted order; "boxes", [{"label", "box": [left, top,
    width, height] as fractions}]; "vectors", for each object the mean r, g, b in [0, 1] of its
    cut-out and its box; "text"; "scene", i.

    Args:
      path: As of `ImageFolder`; its metadata have the column of classes.
      column: The column of classes.
      classes: The classes to compose of; all in the column by default.
      count: Number of scenes.
      size: Side of a scene, in pixels.
      objects: The largest number of objects in a scene, at least 1.
      smallest: The smallest longer side of an object, as a fraction of ``size``.
      largest: The largest longer side of an object, as a fraction of ``size``.
      background: The darkest value of a background's channels, 0 to 255.
      seed: Seed of all draws.

    Raises:
      DataError: The column is missing, a class is not in it, or whatever `ImageFolder` raises.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        column: str = "group",
        classes: Sequence[str] = (),
        count: int = 2000,
        size: int = 64,
        objects: int = 3,
        smallest: float = 0.3,
        largest: float = 0.55,
        background: int = 170,
        seed: int = 0,
    ):
        self.path, self._size = os.fspath(path), size
        self._pictures = ImageFolder(path)
        if not all(row.get(column) is not None for row in self._pictures.rows):
            raise DataError(
                f"{self.path}: not every picture has a {column!r}, which would be its class: "
                "set data.column"
            )
        if min(count, size, objects) < 1:
            raise DataError("data.count, data.size and data.objects must be at least 1")
        if not 0 < smallest <= largest <= 1:
            raise DataError(
                f"data.smallest <= data.largest must be in (0, 1], not {smallest} and {largest}"
            )
        if not 0 <= background <= 255:
            raise DataError(f"data.background must be from 0 to 255, not {background}")
        found = [str(row[column]) for row in self._pictures.rows]
        if missing := sorted({*classes} - {*found}):
            raise DataError(
                f"{self.path}: no picture has the {column} {missing[0]!r}: change data.classes"
            )
        self.classes = sorted({*(classes or found)})
        self._labels = {
            i: self.classes.index(name) for i, name in enumerate(found) if name in self.classes
        }
        self._choice = list(self._labels)
        streams = (np.random.default_rng([_STREAM_SCENE, seed, i]) for i in range(count))
        self._scenes = [self._compose(rng, objects, (smallest, largest)) for rng in streams]
        self._seed, self._darkest = seed, background
        self._colours: dict[int, list[float]] = {}
        self.rows = [self._row(i) for i in range(count)]

    def __len__(self) -> int:
        return len(self._scenes)

    def name(self, index: int) -> str:
        """Returns the name of a scene in messages."""
        return f"scene {index} of {self.path}"

    def _compose(
        self, rng: np.random.Generator, most: int, sides: tuple[float, float]
    ) -> list[_Placed]:
        size, placed, taken = self._size, [], np.zeros((self._size, self._size), bool)
        for _ in range(rng.integers(1, most + 1)):
            picture = self._choice[rng.integers(len(self._choice))]
            h, w = self._cut_out(picture).shape[:2]
            scale = size * rng.uniform(*sides) / max(h, w)
            h, w = max(2, round(h * scale)), max(2, round(w * scale))
            for _ in range(_TRIES):
                top, left = int(rng.integers(size - h + 1)), int(rng.integers(size - w + 1))
                if taken[top : top + h, left : left + w].mean() <= 0.1:
                    taken[top : top + h, left : left + w] = True
                    placed.append(_Placed(picture, top, left, h, w))
                    break
        return placed

    def _row(self, index: int) -> dict[str, Any]:
        placed, rows, size = self._scenes[index], self._pictures.rows, self._size
        boxes = [[p.left / size, p.top / size, p.w / size, p.h / size] for p in placed]
        labels = [self.classes[self._labels[p.picture]] for p in placed]
        return {
            "file_name": self.name(index),
            "text": ", ".join(str(rows[p.picture].get("text", "")) for p in placed),
            "boxes": [{"label": n, "box": box} for n, box in zip(labels, boxes, strict=True)],
            "vectors": [
                [*self._colour(p.picture), *box] for p, box in zip(placed, boxes, strict=True)
            ],
            "scene": index,
        }

    def _colour(self, picture: int) -> list[float]:
        """Returns the mean colour of a cut-out, [r, g, b] in [0, 1]."""
        if picture not in self._colours:
            cut = self._cut_out(picture).astype(np.float64) / 255
            alpha = np.repeat(cut[:, :, 3:], 3, 2)
            self._colours[picture] = np.average(cut[:, :, :3], (0, 1), alpha).tolist()
        return self._colours[picture]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the row with the picture uint8 [size, size, 3] as "image" and its "map"."""
        size, rng = self._size, np.random.default_rng([_STREAM_SCENE + 1, self._seed, index])
        ends = rng.uniform(self._darkest, 255, (2, 3))
        axes = (np.linspace(0, 1, size) * part for part in rng.dirichlet((1, 1)))
        slope = np.add.outer(*axes)[:, :, None]
        image, labels = ends[0] + (ends[1] - ends[0]) * slope, np.zeros((size, size), np.uint8)
        for p in self._scenes[index]:
            # Premultiplied, so that resizing does not blend in the white around a cut-out.
            cut = Image.fromarray(self._cut_out(p.picture)).convert("RGBa")
            pixels = np.asarray(cut.resize((p.w, p.h), Image.Resampling.BOX), np.float32)
            alpha = pixels[:, :, 3:] / 255
            part = np.s_[p.top : p.top + p.h, p.left : p.left + p.w]
            image[part] = image[part] * (1 - alpha) + pixels[:, :, :3]
            label = 1 + self._labels[p.picture]
            labels[part] = np.where(alpha[:, :, 0] >= 0.5, label, labels[part])
        pixels = np.round(image).clip(0, 255).astype(np.uint8)
        return {**self.rows[index], "image": pixels, "map": labels}

    def _cut_out(self, index: int) -> np.ndarray:
        """Returns the object in a picture, cut to its bounds: RGBA uint8 [h, w, 4]."""
        row = self._pictures[index]
        return _cut_out(self.path, row["file_name"], row["image"])


@lru_cache(maxsize=8192)
def _cut_out(path: str, name: str, data: bytes) -> np.ndarray:
    try:
        with open_picture(data) as image:
            pixels = np.asarray(image.convert("RGBA"))
    except UnreadablePicture as error:
        raise DataError(f"{path}: {name} is no readable picture ({error}): remove it") from None
    opaque = pixels[:, :, 3] >= 128
    if opaque.all():
        opaque = ~_outside(pixels[:, :, :3].min(2) > 235)
    if not opaque.any():
        opaque[:] = True  # an all-white picture is kept whole
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    cut = pixels.copy()
    cut[:, :, 3] = np.where(opaque, cut[:, :, 3], 0)
    return cut[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _outside(white: np.ndarray) -> np.ndarray:
    """Returns the part of a boolean picture that is 4-connected to its border."""
    inside = np.zeros_like(white)
    inside[1:-1, 1:-1] = True
    outside, before = white & ~inside, -1
    while (count := int(outside.sum())) != before:
        before = count
        outside = _along_rows(_along_rows(outside, white).T, white.T).T
    return outside


def _along_rows(seeds: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Returns each unbroken run of ``where`` in a row that contains one of the ``seeds``."""
    wall = np.pad(~where, ((0, 0), (0, 1)), constant_values=True)  # ends the runs at the row's end
    runs = np.cumsum(wall).reshape(wall.shape)[:, :-1]
    return where & (np.bincount(runs.ravel(), seeds.ravel()) > 0)[runs]
