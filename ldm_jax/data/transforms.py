"""Cropping and resizing, and the interface of what else is made of a picture."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ldm_jax.data.decode import to_rgb
from ldm_jax.errors import DataError

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Crop(NamedTuple):
    """The rectangle that a transform keeps of a picture, in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirror: bool


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Crops to the target's aspect ratio and resizes. Picklable.

    The crop is the largest rectangle of the target's aspect ratio. The result equals resizing the
    short side and then cropping, with one resampling of only the pixels that are kept.

    Attributes:
      size: (H, W) of the result.
      crop: Where to crop: "center", "random", or "none" (the whole picture is stretched).
      flip: Mirror every second picture, on average, left to right.
      resample: "nearest", "box" (area average), "bilinear", "bicubic" or "lanczos"; all but
        "nearest" smooth when shrinking.
      min_crop: Below 1 the crop's sides shrink by a random factor in [min_crop, 1].
    """

    size: tuple[int, int]
    crop: Literal["center", "random", "none"] = "center"
    flip: bool = False
    resample: str = "bicubic"
    min_crop: float = 1.0

    def __post_init__(self) -> None:
        size = tuple(self.size)
        if len(size) != 2 or not all(isinstance(s, int | np.integer) and s > 0 for s in size):
            raise DataError(f"size is {self.size}: give (height, width) in pixels")
        object.__setattr__(self, "size", (int(size[0]), int(size[1])))
        if self.crop not in ("center", "random", "none"):
            raise DataError(f"crop is {self.crop!r}: choose 'center', 'random' or 'none'")
        if self.resample not in _RESAMPLE:
            raise DataError(f"resample is {self.resample!r}: choose one of {', '.join(_RESAMPLE)}")
        if not 0 < self.min_crop <= 1:
            raise DataError(f"min_crop is {self.min_crop}: give a number above 0 and up to 1")

    def deterministic(self) -> "ImageTransform":
        """Returns the same transform without draws: centre crop of full size, no flip."""
        crop = "center" if self.crop == "random" else self.crop
        return dataclasses.replace(self, crop=crop, flip=False, min_crop=1.0)

    def choose(self, size: tuple[int, int], rng: np.random.Generator) -> Crop:
        """Draws the crop of a picture of ``size`` (h, w); always four numbers of ``rng``."""
        height, width = self.size
        shrink, down, right, mirror = rng.random(4)
        h, w = size
        if self.crop == "none":
            return Crop(0, 0, h, w, bool(self.flip and mirror < 0.5))
        scale = min(h / height, w / width) * (self.min_crop + (1 - self.min_crop) * shrink)
        ch, cw = max(1, min(h, round(height * scale))), max(1, min(w, round(width * scale)))
        if self.crop == "center":
            top, left = (h - ch) // 2, (w - cw) // 2
        else:
            top, left = math.floor(down * (h - ch + 1)), math.floor(right * (w - cw + 1))
        return Crop(top, left, ch, cw, bool(self.flip and mirror < 0.5))

    def apply(self, image: np.ndarray, crop: Crop, resample: str | None = None) -> np.ndarray:
        """Cuts and resizes a picture or a label map ([h, w] or [h, w, c]).

        Of integers only 8-bit numbers are resampled otherwise than by "nearest"; float32 numbers
        are pixels from 0 to 255, each channel by itself. A crop of the target size is not
        resampled. The result is C-contiguous.
        """
        height, width = self.size
        image = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        if image.shape[:2] != (height, width):
            how = _RESAMPLE[resample or self.resample]

            def resized(array: np.ndarray) -> np.ndarray:
                pixels = Image.fromarray(np.ascontiguousarray(array))
                return np.asarray(pixels.resize((width, height), how))

            if image.dtype == np.float32:
                channels = [resized(image[:, :, i]) for i in range(image.shape[2])]
                image = np.clip(np.stack(channels, axis=2), 0, 255)
            else:
                image = resized(image)
        return np.ascontiguousarray(image[:, ::-1] if crop.mirror else image)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Transforms one picture.

        Args:
          image: uint8 RGB [h, w, 3], or float32 [h, w, c] from 0 to 255; any other picture that
            `to_rgb` takes is converted.
          rng: Draws four numbers, whatever the settings are.

        Returns:
          [H, W, c] of the same type, C-contiguous.
        """
        if not (isinstance(image, np.ndarray) and image.dtype == np.float32 and image.ndim == 3):
            image = to_rgb(image)
        return self.apply(image, self.choose((image.shape[0], image.shape[1]), rng))


class View(NamedTuple):
    """How a picture was cut: ``crop`` of its original ``size`` (h, w), by ``transform``."""

    transform: ImageTransform
    crop: Crop
    size: tuple[int, int]


class Condition(Protocol):
    """Makes one row's condition. ``column`` is the row's column that it needs, or ""."""

    @property
    def column(self) -> str: ...  # noqa: D102

    def read(self, row: dict[str, Any]) -> None:
        """Decodes the row's encoded bytes in place; UnreadablePicture where that fails."""
        ...

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: View, rng: np.random.Generator
    ) -> np.ndarray | int:
        """Returns the condition of the transformed ``image`` uint8 [H, W, 3], of fixed shape."""
        ...

    def complete(self, batch: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
        """Returns a batch's conditions from those of its rows, in the process of the loader."""
        ...
