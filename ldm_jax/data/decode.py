"""Decoding to 8-bit RGB: the one place that reads the bytes of a picture."""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm_jax.errors import UnreadablePicture

PICTURE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga", ".avif", ".heic", ".heif"),
)
MAX_PIXELS = 2**27
MAX_ASPECT = 128
_STRIP = 2**24  # pixels converted at a time, which bounds the memory that a large picture takes
_RUNS_PROGRAMS = ("EPS", "WMF")  # Pillow hands these to other programs
_ORIENTATION = 0x0112  # EXIF tag
NUMPY = b"\x93NUMPY"  # how a .npy file begins


def describe(error: BaseException) -> str:
    """Returns an exception's message as one line, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def open_picture(data: bytes) -> Iterator[Image.Image]:
    """Opens an encoded picture (PNG, JPEG, WebP, ...), whose size is checked before decoding.

    Raises:
      UnreadablePicture: The bytes are empty, damaged, no picture, or a picture of more than
        `MAX_PIXELS` pixels or of an aspect ratio above `MAX_ASPECT`. Also raised for an error of
        the decoder inside the block.
    """
    if not data:
        raise UnreadablePicture("empty file")
    try:
        with _identify(data) as image:
            check_extent(*image.size)
            if image.format in _RUNS_PROGRAMS:
                raise UnreadablePicture(f"{image.format} is a drawing: save it as PNG")
            yield image
    except (MemoryError, UnreadablePicture):
        raise
    except UnidentifiedImageError:
        raise UnreadablePicture("not a picture that Pillow can read") from None
    except Exception as error:  # Pillow's decoders raise nearly every class on damaged files
        raise UnreadablePicture(describe(error)) from error


def check_extent(w: int, h: int) -> None:
    """Raises UnreadablePicture for a picture that is too large or too narrow."""
    if w * h > MAX_PIXELS:
        raise UnreadablePicture(f"{w}x{h} pixels are too large (at most {MAX_PIXELS})")
    if max(w, h) > MAX_ASPECT * min(w, h):
        raise UnreadablePicture(
            f"{w}x{h} pixels are too narrow (aspect ratio at most {MAX_ASPECT})"
        )


def _identify(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if data[4:8] != b"ftyp":
            raise
        try:
            import pillow_heif  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UnreadablePicture(
                "HEIC and HEIF need a decoder: pip install pillow-heif"
            ) from None
        pillow_heif.register_heif_opener()
        return Image.open(io.BytesIO(data))


def decode_image(data: bytes) -> np.ndarray:
    """Decodes an encoded picture; of an animation, the first frame.

    Returns:
      uint8 RGB [h, w, 3], upright by its EXIF orientation, transparency laid over white.

    Raises:
      UnreadablePicture: See `open_picture`.
    """
    with open_picture(data) as image:
        image.load()
        return _rgb(upright(image))


def picture_size(data: bytes) -> tuple[int, int]:
    """Returns the (h, w) of an encoded picture, from its header where no EXIF data turns it."""
    if data.startswith(NUMPY):
        return _array_size(data)
    with open_picture(data) as image:
        w, h = upright(image).size
        return h, w


def _array_size(data: bytes) -> tuple[int, int]:
    file = io.BytesIO(data)
    try:
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(file)]
        shape = read(file)[0]
    except (ValueError, KeyError, EOFError) as error:
        raise UnreadablePicture(f"no whole .npy file ({describe(error)})") from None
    if len(shape) not in (2, 3):
        raise UnreadablePicture(f"an array of {shape} is no picture: give numbers [h, w, c]")
    return shape[0], shape[1]


def upright(image: Image.Image) -> Image.Image:
    """Returns a picture turned as its EXIF data say."""
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged EXIF data are no reason to lose a good picture
        return image


def to_rgb(picture: bytes | np.ndarray | Image.Image) -> np.ndarray:
    """Converts a picture to uint8 RGB [h, w, 3].

    Args:
      picture: Encoded bytes, an array ([h, w] or [h, w, 1/2/3/4], uint8 or uint16) or a PIL image.
    """
    if isinstance(picture, bytes):
        return decode_image(picture)
    if isinstance(picture, Image.Image):
        return _rgb(picture)
    array = np.asarray(picture)
    if array.dtype == np.uint16:
        array = _to_8_bit(array)
    channels = array.shape[2] if array.ndim == 3 else 1
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or array.size == 0
        or channels not in (1, 2, 3, 4)
    ):
        raise UnreadablePicture(
            f"an array of {array.dtype} {array.shape} is no picture: give uint8 [H, W, 3]"
        )
    if array.ndim == 3 and channels == 3:
        return array
    return _rgb(Image.fromarray(array[:, :, 0] if array.ndim == 3 and channels == 1 else array))


def _to_8_bit(array: np.ndarray) -> np.ndarray:
    # 65535 / 255 = 257: rounds to the nearest 8-bit level.
    return ((np.clip(array, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise UnreadablePicture("pixels are floating-point numbers: save it with 8 or 16 bits")
    w, h = image.size
    rows = max(1, _STRIP // w)
    if h <= rows:
        return np.asarray(_flatten(image))
    pixels = np.empty((h, w, 3), np.uint8)
    for top in range(0, h, rows):
        bottom = min(top + rows, h)
        pixels[top:bottom] = np.asarray(_flatten(image.crop((0, top, w, bottom))))
    return pixels


def _flatten(image: Image.Image) -> Image.Image:
    """Converts to the mode RGB, over white."""
    if image.mode.startswith("I"):  # 16 bits in each of Pillow's modes: convert() would clip at 255
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
