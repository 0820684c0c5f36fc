"""Scenes composed of cut-outs, with exact maps of labels and boxes: data to try semantic and layout models on."""

import io
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ldm_jax.data.sources.folder import ImageFolder
from ldm_jax.errors import DataError

_STREAM_SCENE = 7  # apart from the loader's streams of random numbers
_TRIES = 12  # places tried for an object before it is left out


class Placed(NamedTuple):
    """An object in a scene: a ``picture`` of the cut-outs by its place, resized to ``height`` x ``width`` with its corner at (``top``, ``left``)."""

    picture: int
    top: int
    left: int
    height: int
    width: int


class Scenes:
    """``count`` scenes of ``size`` pixels square: cut-outs of the pictures of a folder or archive, on a gradient of two light colours.

    A cut-out is what is opaque, or in a picture without transparency what is not joined to its border by white. Objects overlap little; what lies
    behind is not in its map. Scene i is the same for the same arguments everywhere. Columns: "map", labels uint8 [size, size], 0 is the background
    and 1 + n the n-th class in sorted order; "boxes", see `ldm_jax.data.Layout`; "vectors", for each object the mean r, g, b in [0, 1] of its
    cut-out and its box; "text"; "scene", i.

    Args:
      path: as of `ImageFolder`; its metadata have the column of classes.
      column: of the classes.
      classes: the ones to compose of; every one in the column without it.
      count: scenes.
      size: of the pictures, in pixels.
      objects: at most so many in a scene, at least one.
      smallest, largest: of an object's longer side, in parts of the scene's side.
      background: the darkest that a component of its colours may be; 255 is white.
      seed: other scenes.

    Raises:
      DataError: the column is missing, a class is not in it, or whatever `ImageFolder` raises.
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
        if not all(column in row for row in self._pictures.rows):
            raise DataError(
                f"{self.path}: not every picture has a {column!r}, which would be its class: set data.column"
            )
        if min(count, size, objects) < 1:
            raise DataError("data.count, data.size and data.objects must be at least 1")
        if not 0 < smallest <= largest <= 1:
            raise DataError(
                f"data.smallest <= data.largest must be in (0, 1], not {smallest} and {largest}"
            )
        if not 0 <= background <= 255:
            raise DataError(f"data.background must be from 0 to 255, not {background}")
        named = [str(row[column]) for row in self._pictures.rows]
        if missing := sorted({*classes} - {*named}):
            raise DataError(
                f"{self.path}: no picture has the {column} {missing[0]!r}: change data.classes"
            )
        self.classes = sorted({*(classes or named)})
        self._labels = {
            i: self.classes.index(name) for i, name in enumerate(named) if name in self.classes
        }
        self._choice = list(self._labels)
        sides = smallest, largest
        streams = (np.random.default_rng([_STREAM_SCENE, seed, i]) for i in range(count))
        self._scenes = [self._compose(rng, objects, sides) for rng in streams]
        self._seed, self._darkest = seed, background
        self._colours: dict[int, list[float]] = {}
        self.rows = [self._row(i) for i in range(count)]

    def __len__(self) -> int:
        return len(self._scenes)

    def name(self, index: int) -> str:
        """Where the scene comes from, for messages."""
        return f"scene {index} of {self.path}"

    def _compose(
        self, rng: np.random.Generator, most: int, sides: tuple[float, float]
    ) -> list[Placed]:
        size, placed, taken = self._size, [], np.zeros((self._size, self._size), bool)
        for _ in range(rng.integers(1, most + 1)):
            picture = self._choice[rng.integers(len(self._choice))]
            h, w = cut_out(self.path, self._pictures, picture).shape[:2]
            scale = size * rng.uniform(*sides) / max(h, w)
            h, w = max(2, round(h * scale)), max(2, round(w * scale))
            for _ in range(_TRIES):
                top, left = int(rng.integers(size - h + 1)), int(rng.integers(size - w + 1))
                if taken[top : top + h, left : left + w].mean() <= 0.1:
                    taken[top : top + h, left : left + w] = True
                    placed.append(Placed(picture, top, left, h, w))
                    break
        return placed

    def _row(self, index: int) -> dict[str, Any]:
        placed, rows, size = self._scenes[index], self._pictures.rows, self._size
        boxes = [
            {
                "label": self.classes[self._labels[p.picture]],
                "box": [p.left / size, p.top / size, p.width / size, p.height / size],
            }
            for p in placed
        ]
        vectors = [
            [*self._colour(p.picture), *box["box"]] for p, box in zip(placed, boxes, strict=True)
        ]
        text = ", ".join(str(rows[p.picture].get("text", "")) for p in placed)
        return {
            "file_name": self.name(index),
            "text": text,
            "boxes": boxes,
            "vectors": vectors,
            "scene": index,
        }

    def _colour(self, picture: int) -> list[float]:
        """The mean colour of a cut-out, [r, g, b] in [0, 1]."""
        if picture not in self._colours:
            cut = cut_out(self.path, self._pictures, picture).astype(np.float64) / 255
            self._colours[picture] = np.average(
                cut[:, :, :3], (0, 1), np.repeat(cut[:, :, 3:], 3, 2)
            ).tolist()
        return self._colours[picture]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the row with the picture uint8 [size, size, 3] as "image" and its "map"."""
        size, rng = self._size, np.random.default_rng([_STREAM_SCENE + 1, self._seed, index])
        ends = rng.uniform(self._darkest, 255, (2, 3))
        slope = np.add.outer(*(np.linspace(0, 1, size) * part for part in rng.dirichlet((1, 1))))[
            :, :, None
        ]
        image, labels = ends[0] + (ends[1] - ends[0]) * slope, np.zeros((size, size), np.uint8)
        for p in self._scenes[index]:
            cut = Image.fromarray(cut_out(self.path, self._pictures, p.picture))
            # Premultiplied, so that the white around a cut-out does not bleed in where it is resized.
            pixels = np.asarray(
                cut.convert("RGBa").resize((p.width, p.height), Image.Resampling.BOX), np.float32
            )
            alpha = pixels[:, :, 3:] / 255
            part = np.s_[p.top : p.top + p.height, p.left : p.left + p.width]
            image[part] = image[part] * (1 - alpha) + pixels[:, :, :3]
            labels[part] = np.where(
                alpha[:, :, 0] >= 0.5, 1 + self._labels[p.picture], labels[part]
            )
        return {
            **self.rows[index],
            "image": np.round(image).clip(0, 255).astype(np.uint8),
            "map": labels,
        }


@lru_cache(maxsize=8192)
def _cut_out(path: str, name: str, data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGBA"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path}: {name} is no readable picture ({error}): remove it") from None
    opaque = pixels[:, :, 3] >= 128
    if opaque.all():
        opaque = ~_outside(pixels[:, :, :3].min(2) > 235)
    if not opaque.any():
        opaque[:] = True  # white all over: the whole picture
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    cut = pixels.copy()
    cut[:, :, 3] = np.where(opaque, cut[:, :, 3], 0)
    return cut[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def cut_out(path: str, pictures: ImageFolder, index: int) -> np.ndarray:
    """The object in a picture, cut to its bounds: RGBA uint8 [h, w, 4]."""
    row = pictures[index]
    return _cut_out(path, row["file_name"], row["image"])


def _outside(white: np.ndarray) -> np.ndarray:
    """What of a boolean picture is joined to its border, by fours."""
    inside = np.zeros_like(white)
    inside[1:-1, 1:-1] = True
    outside, before = white & ~inside, -1
    while (count := int(outside.sum())) != before:
        before = count
        outside = _along_rows(_along_rows(outside, white).T, white.T).T
    return outside


def _along_rows(seeds: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Every unbroken run of ``where`` in a row that holds one of the ``seeds``."""
    wall = np.pad(~where, ((0, 0), (0, 1)), constant_values=True)  # no run goes on in the next row
    runs = np.cumsum(wall).reshape(wall.shape)[:, :-1]
    return where & (np.bincount(runs.ravel(), seeds.ravel()) > 0)[runs]
