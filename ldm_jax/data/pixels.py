"""Pictures of any number of channels, of 8 bits, 16 bits or floating-point numbers."""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.data.decode import NUMPY, check_extent, describe, open_picture, upright
from ldm_jax.errors import DataError, UnreadablePicture

MOST_CHANNELS = 16
RANGES = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0)}  # of types that have one of their own


@dataclasses.dataclass(frozen=True)
class PixelFormat:
    """How the numbers of pictures are read. Picklable.

    Attributes:
      channels: Of every picture, 1 to 16.
      values: The numbers that become black and white, -1 and 1 of a network; () is the whole range
        of 8 or 16 bits, and floating-point numbers need it.
    """

    channels: int = 3
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))  # JSON has lists
        if not 1 <= self.channels <= MOST_CHANNELS:
            raise DataError(f"data.channels is {self.channels}: give 1 to {MOST_CHANNELS}")
        if self.values and not (len(self.values) == 2 and self.values[0] < self.values[1]):
            raise DataError(f"data.values is {self.values}: give the lowest and highest number")

    @property
    def is_plain(self) -> bool:
        """Whether pictures are 8-bit RGB, as `ldm_jax.data.to_rgb` reads them."""
        return self == PixelFormat()

    def __call__(self, picture: Any) -> np.ndarray:
        """Reads a picture.

        Args:
          picture: Encoded bytes (also those of a .npy file), an array [h, w] or [h, w, c], or a PIL
            image.

        Returns:
          float32 [h, w, channels] from 0, the lowest number, to 255, the highest; numbers outside
          are clipped.

        Raises:
          UnreadablePicture: The bytes are damaged, or the picture has other channels.
          DataError: The type of the numbers needs ``values``.
        """
        array = self.read(picture)
        low, high = self.range_of(array.dtype)
        scaled = (array.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
        return np.clip(scaled, 0, 255)

    def range_of(self, dtype: np.dtype) -> tuple[float, float]:
        """Returns the numbers that become 0 and 255; raises DataError where they are not known."""
        if self.values:
            return self.values[0], self.values[1]
        if dtype.name not in RANGES:
            raise DataError(
                f"data.values is missing: pictures of {dtype} have no range of their own: give the "
                "lowest and the highest number"
            )
        return RANGES[dtype.name]

    def read(self, picture: Any) -> np.ndarray:
        """Returns a picture's own numbers [h, w, channels]; raises as `__call__`."""
        if isinstance(picture, bytes) and picture.startswith(NUMPY):
            picture = _load(picture)
        if isinstance(picture, bytes):
            with open_picture(picture) as image:
                image.load()
                picture = self._of_image(upright(image))
        elif isinstance(picture, Image.Image):
            picture = self._of_image(picture)
        array = np.asarray(picture)
        array = array[:, :, None] if array.ndim == 2 else array
        if array.ndim != 3 or array.size == 0 or array.dtype.kind not in "uif":
            raise UnreadablePicture(
                f"an array of {array.dtype} {array.shape} is no picture: give numbers [h, w, c]"
            )
        check_extent(array.shape[1], array.shape[0])
        if array.shape[2] != self.channels:
            raise UnreadablePicture(
                f"{array.shape[2]} channels, and data.channels is {self.channels}"
            )
        if not np.isfinite(array).all():
            raise UnreadablePicture("some of its numbers are NaN or infinite")
        return array

    def _of_image(self, image: Image.Image) -> np.ndarray:
        """Returns the numbers of a PIL image; 8-bit colours are converted to 1, 3 or 4 channels."""
        if image.mode == "F":
            return np.asarray(image)
        if image.mode.startswith("I"):  # 16 bits, whatever the type in which Pillow keeps them
            return np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
        bands = len(image.getbands())
        if image.mode in ("1", "P", "PA") or bands != self.channels or image.mode == "YCbCr":
            mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(self.channels)
            if mode is None:
                raise UnreadablePicture(
                    f"{bands} channels, and data.channels is {self.channels}: "
                    "give pictures of more than 4 channels as .npy files"
                )
            image = image.convert(mode)
        return np.asarray(image)

    def restore(self, pixels: np.ndarray, dtype: Any) -> np.ndarray:
        """Returns pixels from 0 to 255 as numbers of pictures of the type ``dtype``."""
        dtype = np.dtype(dtype)
        low, high = self.range_of(dtype)
        numbers = pixels.astype(np.float64) * ((high - low) / 255) + low
        return (np.rint(numbers) if dtype.kind in "ui" else numbers).astype(dtype)


def pixel_format(data: Mapping[str, Any]) -> PixelFormat:
    """Returns the format of the pictures of a config's "data"."""
    return PixelFormat(data.get("channels", 3), tuple(data.get("values") or ()))


def model_pixels(config: Mapping[str, Any]) -> PixelFormat:
    """Returns the format of the pictures that a model directory's first stage was trained on."""
    channels = config.get("first_stage", {}).get("in_channels", 3)
    return PixelFormat(**{"channels": channels, **config.get("pixels", {})})


def _load(data: bytes) -> np.ndarray:
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UnreadablePicture(f"no whole .npy file ({describe(error)})") from None


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Returns pixels [..., c] from 0 to 255 as pictures to look at, uint8 [..., 3].

    One channel is grey; of two the first is red and the second green and blue; of more than three
    the first three are red, green and blue.
    """
    channels = pixels.shape[-1]
    shown = [0, 0, 0] if channels == 1 else [0, 1, 1] if channels == 2 else [0, 1, 2]
    if pixels.dtype == np.uint8 and channels == 3:
        return pixels
    return np.rint(np.clip(pixels[..., shown], 0, 255)).astype(np.uint8)
