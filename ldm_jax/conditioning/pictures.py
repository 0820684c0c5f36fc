"""Reads pictures and masks of any size and mode, and fits them to what a model takes.

Changes are logged. Each mistake is a RequestError of one line.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm_jax.conditioning.base import as_list
from ldm_jax.data import ImageTransform, decode, decode_image, to_rgb
from ldm_jax.errors import RequestError, UnreadablePicture
from ldm_jax.io.paths import read_bytes

LOG = logging.getLogger(__name__)
MOST_ASPECT = 16  # sides' ratio above which a picture is not taken whole


class Geometry(NamedTuple):
    """What the pictures of a request have to fit.

    Attributes:
      size: The requested (H, W) in pixels; None leaves it to the image.
      own: The model's own (H, W).
      factor: Pixels along a side of a latent's cell.
      multiple: Cells that the UNet's levels need along a side.
      names: The names of the model's classes.
    """

    size: tuple[int, int] | None
    own: tuple[int, int]
    factor: int
    multiple: int
    names: Sequence[str] | None = None


class Canvas(NamedTuple):
    """The picture to make.

    Attributes:
      size: (H, W) that is computed.
      keep: (H, W) of it that is returned.
      image: What it starts from, uint8 [k, H, W, 3].
      mask: uint8 [k, H, W, 1], 1 where the image is to be painted.
      small: Pictures to enlarge, uint8 [k, h, w, 3].
    """

    size: tuple[int, int]
    keep: tuple[int, int]
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    small: np.ndarray | None = None


def open_picture(value: Any, what: str, convert: Callable[[Any], np.ndarray]) -> np.ndarray:
    """Returns ``convert`` of a picture's file (opened with Pillow), PIL image or array.

    Raises:
      RequestError: It cannot be read, or is no picture.
    """
    path = isinstance(value, str | Path)
    name = f"{what} {value}" if path else what
    try:
        if not path:
            return convert(value)
        data = read_bytes(value)
    except UnreadablePicture as error:
        raise RequestError(f"{name} is no readable picture: {error}") from None
    except OSError as error:
        raise RequestError(f"{name} cannot be read: {error.strerror or error}") from None
    try:
        with decode.open_picture(data) as image:
            image.load()
            return convert(image)
    except UnreadablePicture as error:
        raise RequestError(f"{name} is no readable picture: {error}") from None


def read_picture(value: Any, what: str = "image") -> np.ndarray:
    """Returns a path, PIL image or array as uint8 RGB [h, w, 3]; transparency lies over white."""
    if not isinstance(value, str | Path):
        if isinstance(value, np.ndarray) and value.dtype == bool:
            value = np.uint8(255) * value
        return open_picture(value, what, to_rgb)
    try:
        return decode_image(read_bytes(value))
    except UnreadablePicture as error:
        raise RequestError(f"{what} {value} is no readable picture: {error}") from None
    except OSError as error:
        raise RequestError(f"{what} {value} cannot be read: {error.strerror or error}") from None


def read_mask(value: Any) -> np.ndarray:
    """Returns a mask as uint8 [h, w], bright where an image is to be painted.

    Without transparency brightness counts. Of a mask with transparency, one opaque tone is paint
    on an empty layer, or, where it covers more than half, the frame of an erased hole; white and
    black are a mask whose empty part is black; other colours are a picture with an erased hole.
    """

    def convert(mask: Any) -> np.ndarray:
        if isinstance(mask, np.ndarray) and mask.ndim == 3 and mask.shape[2] in (2, 4):
            mask = Image.fromarray(mask)
        if not (isinstance(mask, Image.Image) and mask.has_transparency_data):
            if isinstance(mask, np.ndarray) and mask.dtype == bool:
                mask = np.uint8(255) * mask
            return np.asarray(Image.fromarray(to_rgb(mask)).convert("L"))
        pixels = np.asarray(mask.convert("RGBA"))
        tone, alpha = np.asarray(mask.convert("RGBA").convert("RGB").convert("L")), pixels[..., 3]
        if alpha.min() == 255:
            return tone
        opaque = alpha >= 128
        tones = np.unique(tone[opaque])
        if len(tones) == 2 and tones[0] < 16 and tones[1] > 239:
            part, painted = "bright", np.where(opaque, tone, 0)
        elif len(tones) == 1 and opaque.mean() <= 0.5:
            part, painted = "opaque", alpha
        else:
            part, painted = "transparent", 255 - alpha
        share = 100 * (painted >= 128).mean()
        LOG.info("the mask has transparency: its %s part, %.0f %%, is painted", part, share)
        return painted.astype(np.uint8)

    return open_picture(value, "mask", convert)


def fit(
    picture: np.ndarray, size: tuple[int, int], what: str, resample: str = "bicubic"
) -> np.ndarray:
    """Crops uint8 [h, w, 3] around its middle to the aspect ratio of ``size`` and resizes it."""
    h, w = picture.shape[:2]
    if (h, w) != tuple(size):
        cut = " cropped and" if h * size[1] != w * size[0] else ""
        LOG.info("%s of %dx%d%s resized to %dx%d", what, h, w, cut, *size)
    return ImageTransform(size, resample=resample)(picture, np.random.default_rng(0))


def natural_size(picture: np.ndarray, geometry: Geometry) -> tuple[int, int]:
    """Returns the size of the whole picture at the scale that a model was trained on.

    The short side is that of the model's own size, and both are multiples of what it needs.
    """
    h, w = picture.shape[:2]
    if max(h, w) > MOST_ASPECT * min(h, w):
        raise RequestError(
            f"image of {h}x{w}: its aspect ratio is beyond {MOST_ASPECT}:1; crop it, or give a size"
        )
    scale, factor = min(geometry.own) / min(h, w), geometry.factor * geometry.multiple
    return max(round(h * scale / factor), 1) * factor, max(round(w * scale / factor), 1) * factor


def edit_canvas(
    image: Any, mask: Any, outpaint: Sequence[int] | None, geometry: Geometry
) -> Canvas:
    """Returns the canvas of images, with the part of them that is to be painted."""
    size = geometry.size or geometry.own
    if image is None:
        return Canvas(size, size)
    borders = None if outpaint is None else check_borders(outpaint)
    images = [read_picture(one) for one in as_list(image)]
    if not images:
        raise RequestError("there is no image; give at least one")
    size = geometry.size or natural_size(images[0], geometry)
    masks = [read_mask(one) for one in as_list(mask)]
    if masks and len(masks) not in (1, len(images)) and len(images) != 1:
        raise RequestError(
            f"{len(masks)} masks and {len(images)} images: give one, or one for each"
        )
    for i, one in enumerate(masks):  # brought to its image's size, so that both are cropped alike
        h, w = images[min(i, len(images) - 1)].shape[:2]
        if one.shape != (h, w):
            LOG.info("mask of %dx%d stretched to its image's %dx%d", *one.shape, h, w)
            one = np.asarray(Image.fromarray(one).resize((w, h), Image.Resampling.BILINEAR))
        masks[i] = fit(np.repeat(one[:, :, None], 3, 2), size, "mask", "bilinear")[:, :, :1]
    pixels = np.stack([fit(one, size, "image") for one in images])
    if not masks and borders is None:
        return Canvas(size, size, pixels)
    holes = np.stack(masks) >= 128 if masks else np.zeros((1, *size, 1), bool)
    if borders is not None:
        (top, right, bottom, left), factor = borders, geometry.factor * geometry.multiple
        bottom += -(size[0] + top + bottom) % factor  # up to the next multiple
        right += -(size[1] + left + right) % factor
        padding = ((0, 0), (top, bottom), (left, right), (0, 0))
        pixels = np.pad(pixels, padding, mode="edge")
        holes = np.pad(holes, padding, constant_values=True)
        size = pixels.shape[1], pixels.shape[2]
        grown = (top, right, bottom, left, *size)
        LOG.info("image grows by %d, %d, %d, %d (top, right, bottom, left) to %dx%d", *grown)
    if not holes.any(axis=(1, 2, 3)).all():
        raise RequestError("the mask is black all over: white is the part that is painted")
    return Canvas(size, size, pixels, holes.astype(np.uint8))


def check_borders(borders: Sequence[int]) -> tuple[int, int, int, int]:
    """Returns (top, right, bottom, left) in pixels; raises RequestError where they are not."""
    if len(borders) != 4 or any(int(v) != v or v < 0 for v in borders) or not any(borders):
        raise RequestError(
            f"outpaint {','.join(map(str, borders))}: give top, right, bottom, left in pixels, at "
            "least one above 0"
        )
    top, right, bottom, left = (int(v) for v in borders)
    return top, right, bottom, left


def small_canvas(image: Any, geometry: Geometry) -> Canvas:
    """Returns the canvas of super-resolution, with the small pictures.

    Without a requested size the first picture's own is padded by its edges to what the UNet needs;
    the padding is cut off again.
    """
    images, f = [read_picture(one) for one in as_list(image)], geometry.factor
    h, w = (n // f for n in geometry.size) if geometry.size else images[0].shape[:2]
    small = np.stack([fit(one, (h, w), "image") for one in images])
    down, right = -h % geometry.multiple, -w % geometry.multiple
    if down or right:
        size = (h, w, h + down, w + right)
        LOG.info("image of %dx%d padded to %dx%d; the padding is cut off again", *size)
    small = np.pad(small, ((0, 0), (0, down), (0, right), (0, 0)), mode="edge")
    return Canvas((f * (h + down), f * (w + right)), (f * h, f * w), small=small)
