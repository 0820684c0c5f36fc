"""Decoding to RGB, resizing and cropping, and captions from metadata."""

import dataclasses
import io
import math
import string
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm_jax.errors import DataError, UnreadablePicture

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def decode_image(data: bytes) -> np.ndarray:
    """Decodes an encoded picture (PNG, JPEG, WebP, ...; the first frame of an animation).

    Returns:
      uint8 RGB [H, W, 3], upright by its EXIF orientation, transparency laid over white.

    Raises:
      UnreadablePicture: the bytes are empty, truncated, or no picture.
    """
    if not data:
        raise UnreadablePicture("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return np.asarray(_rgb(_upright(image)))
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise UnreadablePicture("not a picture that Pillow knows") from None
    except Exception as error:  # Pillow's decoders raise nearly every kind on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadablePicture(reason) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data are no reason to lose a good picture
        return image


def to_rgb(picture: bytes | np.ndarray | Image.Image) -> np.ndarray:
    """Brings encoded bytes, an array ([H, W], [H, W, 1/3/4], uint8 or uint16) or a PIL image to uint8 RGB [H, W, 3]."""
    if isinstance(picture, bytes):
        return decode_image(picture)
    if isinstance(picture, Image.Image):
        return np.asarray(_rgb(picture))
    array = np.asarray(picture)
    if array.dtype == np.uint16:
        array = _to_8_bit(array)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.size == 0:
        raise UnreadablePicture(
            f"an array of {array.dtype} {array.shape} is no picture: give uint8 [H, W, 3]"
        )
    if array.ndim == 3 and array.shape[2] == 3:
        return array
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 3 and array.shape[2] not in (2, 4):
        raise UnreadablePicture(
            f"an array with {array.shape[2]} channels is no picture: give uint8 [H, W, 3]"
        )
    return np.asarray(_rgb(Image.fromarray(array)))


def _to_8_bit(array: np.ndarray) -> np.ndarray:
    # 65535 / 255 = 257: rounds to the nearest 8-bit level
    return ((np.clip(array, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(
        "I"
    ):  # 16 bits in all of Pillow's spellings: convert() would clip them at 255
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    if image.mode == "F":
        raise UnreadablePicture("pixels are floating-point numbers: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


class Crop(NamedTuple):
    """What a transform keeps of a picture: a rectangle in pixels, perhaps mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirror: bool


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Crops to the target's aspect ratio and resizes; picklable.

    The crop is the largest rectangle of the target's aspect ratio, that is, the short side fits. The result equals
    resizing the short side and then cropping, with one resampling of only the pixels that are kept.

    Attributes:
      size: (H, W) of the result.
      crop: where to crop: "center", "random", or "none" (the whole picture is stretched to the size).
      flip: mirror every second picture, on average, left to right.
      resample: "nearest", "box" (area average), "bilinear", "bicubic" or "lanczos"; all but "nearest" smooth
        when shrinking.
      min_crop: below 1 the crop's sides shrink by a random factor in [min_crop, 1].
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
        """The same without anything random: centre crop of full size, no flip."""
        crop = "center" if self.crop == "random" else self.crop
        return dataclasses.replace(self, crop=crop, flip=False, min_crop=1.0)

    def choose(self, size: tuple[int, int], rng: np.random.Generator) -> Crop:
        """What to keep of a picture of ``size`` (h, w). ``rng`` draws four numbers, whatever the settings are."""
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
        """That part of a picture or of a map of labels ([h, w] or [h, w, c], whole numbers), at the target size, C-contiguous.

        What has the target size already is not resampled. Only "nearest" resamples other than 8-bit numbers.
        """
        height, width = self.size
        image = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        if image.shape[:2] != (height, width):
            pixels = Image.fromarray(np.ascontiguousarray(image))
            image = np.asarray(pixels.resize((width, height), _RESAMPLE[resample or self.resample]))
        return np.ascontiguousarray(image[:, ::-1] if crop.mirror else image)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Transforms one picture.

        Args:
          image: uint8 RGB [h, w, 3]; any other picture that ``to_rgb`` takes is converted.
          rng: draws four numbers, whatever the settings are.

        Returns:
          uint8 RGB [H, W, 3], C-contiguous. A picture of the target size is not resampled.
        """
        image = to_rgb(image)
        return self.apply(image, self.choose((image.shape[0], image.shape[1]), rng))


class _Joined(list):
    """A list column that a template prints as "a, b", and can still index."""

    def __format__(self, spec: str) -> str:
        return format(", ".join(map(str, self)), spec)


class View(NamedTuple):
    """How the picture was cut: ``crop`` of its original ``size`` (h, w), by ``transform``."""

    transform: ImageTransform
    crop: Crop
    size: tuple[int, int]


class Condition(Protocol):
    """Makes one row's condition. ``column`` is the row's column that it needs, if any."""

    @property
    def column(self) -> str: ...

    def read(self, row: dict[str, Any]) -> None:
        """Decodes what the row holds as bytes, in place; UnreadablePicture where that fails."""
        ...

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: View, rng: np.random.Generator
    ) -> np.ndarray | int:
        """The condition of the transformed ``image`` uint8 [H, W, 3]: an array of the same shape for every row."""
        ...


def caption_template(template: str, row: Mapping[str, Any]) -> str:
    """Fills a caption such as "{text}, {style} style" from a row; list columns are joined with ", ".

    Raises:
      DataError: the template is malformed or names a column that the row does not have.
    """
    columns = {
        key: _Joined(value) if isinstance(value, list) else value for key, value in row.items()
    }
    try:
        return string.Formatter().vformat(template, (), columns)
    except KeyError as error:
        known = ", ".join(key for key in row if key != "image")
        raise DataError(
            f"caption {template!r}: there is no column {error.args[0]!r}: there are {known}"
        ) from None
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise DataError(
            f"caption {template!r} does not fit: {error}; write columns as {{text}}"
        ) from None
