"""Aspect-ratio buckets: pictures of different shapes, in batches that each have one size.

As Stable Diffusion XL is trained: Podell et al. 2023, arXiv:2307.01952, section 2.3 and appendix I.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm_jax.data.decode import describe, picture_size
from ldm_jax.data.latents import fingerprint
from ldm_jax.data.sources import Source, Subset
from ldm_jax.data.sources.tables import is_missing
from ldm_jax.errors import DataError, UnreadablePicture

Size = tuple[int, int]  # height, width in pixels

# Sides are chosen so that the pixels lie between this part of the area and all of it. With steps of
# 64 pixels and ratios up to 4 these are the sizes of the paper's appendix.
_LEAST_AREA = 0.9
_READERS = 8  # threads that read sizes
_MEASURED: dict[Any, tuple[np.ndarray, dict[int, str]]] = {}  # of the last sources


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that pictures are cut to.

    Attributes:
      areas: The sizes of each area, in ascending order of the areas.
      columns: Columns of the pictures' height and width; () reads them from the pictures.
    """

    areas: tuple[tuple[Size, ...], ...]
    columns: tuple[str, ...] = ()

    @property
    def sizes(self) -> list[Size]:
        """All sizes, sorted."""
        return sorted({size for sizes in self.areas for size in sizes})

    def choose(self, picture: Size) -> list[Size]:
        """Returns the sizes that a picture is trained at.

        In each area that is the size that loses the smallest part of it; of several, the largest
        that the picture fills. Areas that it does not fill are left out, but for the smallest.
        """
        chosen = [min(sizes, key=lambda size: _rank(picture, size)) for sizes in self.areas]
        return [size for size in chosen if _fills(picture, size)] or chosen[:1]


def lost_share(picture: Size, size: Size) -> float:
    """Returns the share of a picture that is lost when it is cropped to the ratio of ``size``."""
    wide, high = picture[1] * size[0], picture[0] * size[1]
    return 1 - min(wide, high) / max(wide, high)


def _fills(picture: Size, size: Size) -> bool:
    return picture[0] >= size[0] and picture[1] >= size[1]


def _rank(picture: Size, size: Size) -> tuple[float, bool, int]:
    pixels, filled = math.prod(size), _fills(picture, size)
    # Sizes of one ratio must compare as equal, whatever the rounding.
    return round(lost_share(picture, size), 9), not filled, -pixels if filled else pixels


def make_buckets(data: Mapping[str, Any]) -> Buckets | None:
    """Returns the buckets of a config's "data"; None where they are not in use.

    Raises:
      DataError: A setting does not fit.
    """
    fields = data.get("buckets") or {}
    step, sizes = fields.get("step", 0), [_pair(size) for size in fields.get("sizes") or ()]
    areas, ratios = sorted(fields.get("areas") or ()), list(fields.get("ratios") or ())
    most, columns = fields.get("max_ratio", 4.0), tuple(fields.get("columns") or ())
    if len(columns) not in (0, 2):
        raise DataError(f"data.buckets.columns is {columns}: give those of height and width")
    if sizes:
        if step or areas or ratios:
            raise DataError(
                "data.buckets.sizes takes the place of step, areas and ratios: leave those out"
            )
        return Buckets((tuple(sorted(set(sizes))),), columns)
    if not step:
        if areas or ratios:
            raise DataError(
                "data.buckets.step is missing: the sides are multiples of it, in pixels"
            )
        return None
    if step < 0 or most < 1 or min([1, *areas, *ratios]) <= 0:
        raise DataError(
            "data.buckets: step, areas (pixels) and ratios (width / height) must be above 0, and "
            "max_ratio at least 1"
        )
    most = max([most, *ratios, *(1 / ratio for ratio in ratios)])
    areas = areas or [math.prod(data["size"])]
    return Buckets(tuple(_sizes_of(area, step, most, ratios) for area in areas), columns)


def _pair(size: Any) -> Size:
    if not isinstance(size, Sequence) or len(size) != 2 or min(size) < 1:
        raise DataError(f"data.buckets.sizes has {size!r}: give pairs (height, width) in pixels")
    return int(size[0]), int(size[1])


def _sizes_of(area: float, step: int, most: float, ratios: Sequence[float]) -> tuple[Size, ...]:
    """Returns the sizes of an area, or of them those that are nearest to ``ratios``."""
    sides = range(step, math.isqrt(int(area * most)) + step, step)
    found = [
        (height, width)
        for height, width in itertools.product(sides, sides)
        if _LEAST_AREA * area <= height * width <= area
        and max(height, width) <= most * min(height, width)
    ]
    if not found:
        raise DataError(
            f"data.buckets.step {step} leaves no size of about {area:.0f} pixels: make it smaller"
        )
    if ratios:
        found = {
            min(found, key=lambda size: (abs(math.log(size[1] / size[0] / r)), -math.prod(size)))
            for r in ratios
        }
    return tuple(sorted(found))


def batch_sizes(data: Mapping[str, Any]) -> list[Size]:
    """Returns every (height, width) that a batch of a config's "data" may have."""
    buckets = make_buckets(data)
    return [_pair(data["size"])] if buckets is None else buckets.sizes


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The pictures of each bucket.

    Attributes:
      sizes: Of the buckets that have pictures.
      groups: The indices of each one's pictures, ascending.
      unreadable: Reasons by index; these pictures are in no bucket.
      notes: What the log shows of it.
    """

    sizes: Sequence[Size]
    groups: Sequence[np.ndarray]
    unreadable: Mapping[int, str]
    notes: Sequence[str]


def assign(source: Source, buckets: Buckets, batch_size: int) -> Assignment:
    """Puts the pictures of a source into buckets.

    Args:
      source: The pictures.
      buckets: The buckets.
      batch_size: Rows of a batch; smaller buckets are noted.

    Raises:
      DataError: The source is read in order, no picture can be read, or a column is missing.
    """
    if getattr(source, "window", 0):
        raise DataError(
            f"{source.path}: data.buckets need the sizes of all pictures, and these are streamed: "
            "store them, or leave data.buckets empty"
        )
    pictures, unreadable = measure(source, buckets.columns)
    if len(unreadable) == len(source) > 0:
        index, reason = next(iter(unreadable.items()))
        raise DataError(
            f"no readable picture in {source.path} (tried {len(source)}; "
            f"first: {source.name(index)}: {reason})"
        )
    chosen: dict[Size, list[int]] = {size: [] for size in buckets.sizes}
    worst, loses_most, loss = 0.0, "", 0.0
    choose = functools.cache(buckets.choose)  # many pictures of a data set have the same size
    for index, (height, width) in enumerate(pictures.tolist()):
        if index in unreadable:
            continue
        for size in choose((height, width)):
            chosen[size].append(index)
            loss = lost_share((height, width), size)
            if loss > worst:
                worst = loss
                loses_most = f" ({source.name(index)}, {height}x{width} to {_text(size)})"
    used = {size: np.array(members, np.int64) for size, members in chosen.items() if members}
    listed = ", ".join(f"{_text(size)}: {len(members)}" for size, members in used.items())
    notes = [
        f"{len(used)} of {len(chosen)} buckets have pictures (height x width: {listed})",
        f"the largest crop to a bucket loses {100 * worst:.1f} % of a picture{loses_most}",
    ]
    if few := [_text(size) for size, members in used.items() if len(members) < batch_size]:
        notes.append(
            f"buckets with fewer pictures than a batch of {batch_size}, which has some of them "
            f"several times: {', '.join(few)}"
        )
    return Assignment(list(used), list(used.values()), unreadable, notes)


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def measure(source: Source, columns: Sequence[str] = ()) -> tuple[np.ndarray, dict[int, str]]:
    """Returns the sizes int64 [n, 2] of a source's pictures, and why some cannot be read.

    Args:
      source: The pictures; only their headers are decoded.
      columns: Columns of height and width; pictures that lack them are read.
    """
    inner = source.source if isinstance(source, Subset) else source
    stamped = getattr(inner, "stamp", None) is not None
    key = (source.path, type(inner), fingerprint(source), *columns) if stamped else None
    if key in _MEASURED:
        return _MEASURED[key]
    sizes, unreadable = np.zeros((len(source), 2), np.int64), {}
    rows = source.rows if columns else ()
    for index, row in enumerate(rows):
        for place, column in enumerate(columns):
            if column not in row:
                known = ", ".join(row)
                raise DataError(
                    f"data.buckets.columns: there is no column {column!r}: there are {known}"
                )
            value = row[column]
            sizes[index, place] = 0 if is_missing(value) else _side(value, column)
    unknown = np.flatnonzero((sizes <= 0).any(axis=1)).tolist()

    def read(index: int) -> Size | str:
        try:
            return _size_of(source[index]["image"])
        except (UnreadablePicture, OSError) as error:
            return describe(error)

    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        found = zip(unknown, readers.map(read, unknown), strict=True)
        show = {"desc": "reading sizes", "unit": " pictures", "leave": False, "disable": None}
        for index, size in tqdm(found, total=len(unknown), **show):
            if isinstance(size, str):
                unreadable[index] = size
            else:
                sizes[index] = size
    if key is not None:
        while len(_MEASURED) >= 4:  # the parts of the data of a run, each read by several loaders
            _MEASURED.pop(next(iter(_MEASURED)))
        _MEASURED[key] = sizes, unreadable
    return sizes, unreadable


def _side(value: Any, column: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise DataError(f"data.buckets.columns: {column} has {value!r}, no number") from None


def _size_of(image: Any) -> Size:
    if isinstance(image, bytes):
        return picture_size(image)
    if isinstance(image, Image.Image):
        return image.height, image.width
    shape = np.shape(image)
    return shape[0], shape[1]
