"""Pictures, masks and maps of any size and mode, fitted to what a model takes.

What is changed is said; each mistake is a RequestError of one line.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ldm_jax.conditioning.base import RescaledMap
from ldm_jax.data import ImageTransform, decode_image, to_rgb
from ldm_jax.errors import RequestError, UnreadablePicture

LOG = logging.getLogger(__name__)


class Canvas(NamedTuple):
    """The picture to make: its ``size``, the ``keep`` (H, W) of it that is handed out, and, [k, H, W, c] each, what it begins with."""

    size: tuple[int, int]
    keep: tuple[int, int]
    image: np.ndarray | None = None
    mask: np.ndarray | None = None


def read_picture(given: Any, what: str = "image") -> np.ndarray:
    """A path, PIL image or array -> uint8 RGB [h, w, 3]; transparency lies over white."""
    name = f"{what} {given}" if isinstance(given, str | Path) else what
    try:
        if isinstance(given, str | Path):
            return decode_image(Path(given).read_bytes())
        array = given
        if isinstance(array, np.ndarray) and array.dtype == bool:
            array = np.uint8(255) * array
        return to_rgb(array)
    except UnreadablePicture as error:
        raise RequestError(f"{name} is no readable picture: {error}") from None
    except OSError as error:
        raise RequestError(f"{name} cannot be read: {error.strerror or error}") from None


def read_labels(given: Any) -> np.ndarray:
    """A picture of one channel (path, PIL image or array), whose values are labels -> integers [h, w]."""
    name = f"semantic_map {given}" if isinstance(given, str | Path) else "semantic_map"
    try:
        labels = np.asarray(Image.open(given) if isinstance(given, str | Path) else given)
    except (UnidentifiedImageError, SyntaxError) as error:
        raise RequestError(f"{name} is no readable picture: {error}") from None
    except OSError as error:
        raise RequestError(f"{name} cannot be read: {error.strerror or error}") from None
    if (
        labels.ndim != 2
        or labels.size == 0
        or not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool)
    ):
        raise RequestError(
            f"{name}: give a picture of one channel, whose values are the labels (this is {labels.shape})"
        )
    return labels


def read_embeddings(given: Any, dim: int) -> np.ndarray:
    """Vectors [m, dim], or a single one [dim], as an array or the path of a .npy file -> float32 [m, dim]."""
    name = f"embeddings {given}" if isinstance(given, str | Path) else "embeddings"
    try:
        vectors = np.load(given, allow_pickle=False) if isinstance(given, str | Path) else given
        vectors = np.atleast_2d(np.asarray(vectors, np.float32))
    except OSError as error:
        raise RequestError(f"{name} cannot be read: {error.strerror or error}") from None
    except (
        Exception
    ):  # whatever a damaged file, another kind of file, or an array of no numbers makes NumPy raise
        what = "no .npy file of numbers" if isinstance(given, str | Path) else "no array of numbers"
        raise RequestError(f"{name}: this is {what}") from None
    if vectors.ndim != 2 or vectors.shape[1] != dim or not len(vectors):
        raise RequestError(
            f"{name} of shape {vectors.shape}: give vectors of this model's {dim} numbers, (m, {dim})"
        )
    if not np.isfinite(vectors).all():
        raise RequestError(f"{name} must be finite numbers")
    return vectors


def fit(
    picture: np.ndarray, size: tuple[int, int], what: str, resample: str = "bicubic"
) -> np.ndarray:
    """uint8 [h, w, 3] cut to the size's aspect ratio around its middle and resized, which is said; nothing is done to one that fits."""
    h, w = picture.shape[:2]
    if (h, w) != tuple(size):
        cut = " cut and" if h * size[1] != w * size[0] else ""
        LOG.info("%s of %dx%d%s resized to %dx%d", what, h, w, cut, *size)
    return ImageTransform(size, resample=resample)(picture, np.random.default_rng(0))


def natural_size(picture: np.ndarray, own: Sequence[int], factor: int) -> tuple[int, int]:
    """The size at which a model sees the whole picture at the scale that it was trained on: its short side is the model's ``own``."""
    h, w = picture.shape[:2]
    scale = min(own) / min(h, w)
    return max(round(h * scale / factor), 1) * factor, max(round(w * scale / factor), 1) * factor


def picture_canvas(
    images: Sequence[Any],
    masks: Sequence[Any],
    outpaint: Sequence[int] | None,
    size: tuple[int, int] | None,
    own: Sequence[int],
    factor: int,
) -> Canvas:
    """The canvas of images with what is to be made anew of them. ``size``: what was asked for, else it is `natural_size`."""
    borders = None if outpaint is None else check_borders(outpaint)
    images = [read_picture(image) for image in images]
    size = size or natural_size(images[0], own, factor)
    masks = [np.asarray(Image.fromarray(read_picture(mask, "mask")).convert("L")) for mask in masks]
    if masks and len(masks) not in (1, len(images)) and len(images) != 1:
        raise RequestError(
            f"{len(masks)} masks and {len(images)} images: give one, or one for each"
        )
    for i, mask in enumerate(masks):  # brought to its image's size, so that both are cut alike
        h, w = images[min(i, len(images) - 1)].shape[:2]
        if mask.shape != (h, w):
            LOG.info("mask of %dx%d stretched to its image's %dx%d", *mask.shape, h, w)
            mask = np.asarray(Image.fromarray(mask).resize((w, h), Image.Resampling.BILINEAR))
        masks[i] = fit(np.repeat(mask[:, :, None], 3, 2), size, "mask", "bilinear")[:, :, :1]
    image = np.stack([fit(image, size, "image") for image in images])
    if not masks and borders is None:
        return Canvas(size, size, image)
    holes = np.stack(masks) >= 128 if masks else np.zeros((1, *size, 1), bool)
    if borders is not None:
        top, right, bottom, left = borders
        bottom += -(size[0] + top + bottom) % factor  # up to the next multiple
        right += -(size[1] + left + right) % factor
        borders = ((0, 0), (top, bottom), (left, right), (0, 0))
        image = np.pad(image, borders, mode="edge")
        holes = np.pad(holes, borders, constant_values=True)
        size = image.shape[1], image.shape[2]
        LOG.info(
            "image grows by %d, %d, %d, %d (top, right, bottom, left) to %dx%d",
            top,
            right,
            bottom,
            left,
            *size,
        )
    if not holes.any(axis=(1, 2, 3)).all():
        raise RequestError("the mask is black all over: white is what is made anew")
    return Canvas(size, size, image, holes.astype(np.uint8))


def check_borders(borders: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, right, bottom, left) in pixels, or a RequestError."""
    if len(borders) != 4 or any(int(v) != v or v < 0 for v in borders) or not any(borders):
        raise RequestError(
            f"outpaint {','.join(map(str, borders))}: give top, right, bottom, left in pixels, at least one above 0"
        )
    top, right, bottom, left = (int(v) for v in borders)
    return top, right, bottom, left


def small_canvas(
    images: Sequence[Any], size: tuple[int, int] | None, f: int, multiple: int
) -> tuple[Canvas, np.ndarray]:
    """Super-resolution by ``f``: (the canvas, the small pictures float32 [k, h, w, 3] in [-1, 1]).

    Where no ``size`` is asked for, the first picture's own is padded by its edges to the ``multiple`` that the UNet needs; what grows from that is
    cut off.
    """
    images = [read_picture(image) for image in images]
    h, w = (n // f for n in size) if size else images[0].shape[:2]
    small = np.stack([fit(image, (h, w), "image") for image in images])
    down, right = -h % multiple, -w % multiple
    if down or right:
        LOG.info(
            "image of %dx%d padded to %dx%d; the padding is cut off again",
            h,
            w,
            h + down,
            w + right,
        )
    small = np.pad(small, ((0, 0), (0, down), (0, right), (0, 0)), mode="edge")
    return Canvas((f * (h + down), f * (w + right)), (f * h, f * w)), small.astype(
        np.float32
    ) / 127.5 - 1.0


def semantic_maps(
    given: Sequence[Any], conditioner: RescaledMap, latent_size: Sequence[int]
) -> np.ndarray:
    """Maps for a model of semantic maps, float32 [k, h, w, in_channels], of the size that its rescaler brings to the latent's.

    One-hot labels; for a model whose maps have 3 channels, a picture in [-1, 1].
    """
    module, maps = conditioner.module, []
    h, w = (round(n / module.multiplier**module.n_stages) for n in latent_size)
    for one in given:
        if module.in_channels == 3:
            maps.append(
                fit(read_picture(one, "semantic_map"), (h, w), "semantic_map").astype(np.float32)
                / 127.5
                - 1.0
            )
            continue
        labels = read_labels(one)
        if labels.min() < 0 or labels.max() >= module.in_channels:
            highest = max(labels.max(), -labels.min(), key=abs)
            raise RequestError(
                f"semantic_map has the label {highest}; this model knows 0 to {module.in_channels - 1}"
            )
        pixels = np.stack([labels & 255, labels >> 8, np.zeros_like(labels)], -1).astype(np.uint8)
        fitted = fit(pixels, (h, w), "semantic_map", "nearest").astype(int)
        maps.append(
            np.eye(module.in_channels, dtype=np.float32)[fitted[:, :, 0] + 256 * fitted[:, :, 1]]
        )
    return np.stack(maps)
