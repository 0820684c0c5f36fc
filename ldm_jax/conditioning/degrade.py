"""Degradations that make the small pictures super-resolution trains on.

`bsr` follows Zhang et al. 2021 (arXiv:2103.14006, section 3) without its camera model: blur,
downsampling, noise and JPEG with random parameters in random order, and a final JPEG. All of it
runs on the host and is deterministic given the generator.
"""

import dataclasses
import io
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)

Degradation = Callable[[np.ndarray, tuple[int, int], np.random.Generator], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Strength:
    """Ranges of a degradation's random parameters.

    Attributes:
      blur: standard deviations of the Gaussian kernels, in pixels, for a factor of 4.
      noise: standard deviations of the noise, of 255.
      jpeg: qualities.
      jpeg_share: probability of the JPEG in the middle; the final one always happens.
      detour: probability that downsampling passes through a random size.
    """

    blur: tuple[float, float]
    noise: tuple[float, float]
    jpeg: tuple[int, int]
    jpeg_share: float
    detour: float


STRENGTHS = {
    "bsr_light": Strength(
        blur=(0.1, 1.2), noise=(0.5, 8.0), jpeg=(75, 96), jpeg_share=0.5, detour=0.25
    ),
    "bsr": Strength(
        blur=(0.1, 2.8), noise=(1.0, 25.0), jpeg=(30, 96), jpeg_share=0.75, detour=0.75
    ),
}


def bicubic(image: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to uint8 [h, w, 3], antialiased; nothing is random."""
    h, w = size
    return np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))


def bsr(
    image: np.ndarray, size: tuple[int, int], rng: np.random.Generator, *, strength: Strength
) -> np.ndarray:
    """Degrades uint8 [H, W, 3] to uint8 [h, w, 3]."""
    h, w = size
    x = image.astype(np.float32)
    steps = [blur, blur, shrink, partial(shrink, last=True), noise, middle_jpeg]
    order = list(rng.permutation(len(steps)))
    a, b = order.index(2), order.index(3)
    if a > b:  # the second downsampling is the one that reaches the size
        order[a], order[b] = order[b], order[a]
    for i in order:
        x = steps[i](x, (h, w), rng, strength)
    return jpeg(x, int(rng.integers(*strength.jpeg))).astype(np.uint8)


def gaussian_kernel(deviations: tuple[float, float], angle: float) -> np.ndarray:
    """Returns a normalised Gaussian kernel [k, k], k odd, whose axes are turned by ``angle``."""
    radius = max(1, int(np.ceil(3 * max(deviations))))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kernel = np.exp(-0.5 * ((u / deviations[0]) ** 2 + (v / deviations[1]) ** 2))
    return kernel / kernel.sum()


def convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolves [h, w, c] with a symmetric kernel [k, k] by FFT; borders are mirrored."""
    radius = kernel.shape[0] // 2
    h, w = x.shape[0] + 2 * radius, x.shape[1] + 2 * radius
    padded = np.pad(x, ((radius, radius), (radius, radius), (0, 0)), mode="symmetric")
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, (h, w))[:, :, None]
    return np.fft.irfft2(spectrum, (h, w), axes=(0, 1))[2 * radius :, 2 * radius :].astype(
        np.float32
    )


def blur(
    x: np.ndarray, size: tuple[int, int], rng: np.random.Generator, strength: Strength
) -> np.ndarray:
    """Blurs by a Gaussian whose width is proportional to the remaining reduction."""
    scale = max(x.shape[0] / size[0], 1.0) / 4
    first, second = rng.uniform(*strength.blur, 2) * scale
    if rng.random() < 0.5:
        second = first
    return convolve(
        x, gaussian_kernel((max(first, 1e-2), max(second, 1e-2)), rng.uniform(0, np.pi))
    )


def shrink(
    x: np.ndarray,
    size: tuple[int, int],
    rng: np.random.Generator,
    strength: Strength,
    last: bool = False,
) -> np.ndarray:
    """Downsamples by a random filter, to ``size`` if it is the ``last`` time, else part of it."""
    now = np.array(x.shape[:2])
    target = (
        np.array(size)
        if last
        else np.maximum(size, np.round(now / rng.uniform(1, max(now[0] / size[0], 1.0))))
    )
    if rng.random() < strength.detour:  # through a random size between, or beyond
        there = rng.uniform(0.5, 1.5) * np.sqrt(now * target)
        x = _resize(x, np.maximum(1, np.round(there)), rng)
    return _resize(x, target, rng)


def _resize(x: np.ndarray, size: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    h, w = (int(n) for n in size)
    filter_ = _FILTERS[rng.integers(len(_FILTERS))]
    channels = [Image.fromarray(x[:, :, c]).resize((w, h), filter_) for c in range(x.shape[2])]
    return np.stack([np.asarray(c) for c in channels], axis=-1)


def noise(
    x: np.ndarray, size: tuple[int, int], rng: np.random.Generator, strength: Strength
) -> np.ndarray:
    """Adds Gaussian noise: equal, independent or correlated over the channels."""
    deviation = rng.uniform(*strength.noise)
    drawn, kind = rng.standard_normal(x.shape), rng.integers(3)
    if kind == 0:
        drawn = drawn[:, :, :1]
    elif kind == 1:
        mix = rng.standard_normal((x.shape[2], x.shape[2]))
        drawn = drawn @ (mix / np.linalg.norm(mix, axis=0))
    return (x + deviation * drawn).astype(np.float32)


def middle_jpeg(
    x: np.ndarray, size: tuple[int, int], rng: np.random.Generator, strength: Strength
) -> np.ndarray:
    """Applies JPEG with probability ``jpeg_share``."""
    happens, quality = rng.random() < strength.jpeg_share, int(rng.integers(*strength.jpeg))
    return jpeg(x, quality) if happens else x


def jpeg(x: np.ndarray, quality: int) -> np.ndarray:
    """Writes [h, w, 3], about 0 to 255, as a JPEG and reads it again: float32."""
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.round(x), 0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=quality
    )
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB"), np.float32)


DEGRADATIONS: dict[str, Degradation] = {
    "bicubic": bicubic,
    **{name: partial(bsr, strength=strength) for name, strength in STRENGTHS.items()},
}
