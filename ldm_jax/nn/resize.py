"""Resizing as PyTorch's interpolate does, by a scale factor or to a size. Arrays are NHWC."""

from typing import Literal

import jax.numpy as jnp
import numpy as np

from ldm_jax.nn.layers import Array

Method = Literal["nearest", "bilinear", "bicubic", "area"]


def _source(n: int, m: int, scale: float) -> np.ndarray:
    """Positions of ``m`` output centres in an axis of ``n`` pixels, from the scale alone."""
    step = np.float32(1.0 / scale)
    return step * (np.arange(m, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)


def _taps(at: np.ndarray, weights: dict[int, np.ndarray], n: int) -> np.ndarray:
    """Matrix [m, n] with the weight of input floor(at) + offset, clamped to the edge."""
    matrix, base = np.zeros((len(at), n), np.float32), np.floor(at).astype(int)
    for offset, weight in weights.items():
        np.add.at(matrix, (np.arange(len(at)), np.clip(base + offset, 0, n - 1)), weight)
    return matrix


def _linear(n: int, m: int, scale: float) -> np.ndarray:
    at = np.maximum(_source(n, m, scale), 0)
    f = at - np.floor(at)
    return _taps(at, {0: 1 - f, 1: f}, n)


def _cubic(n: int, m: int, scale: float) -> np.ndarray:
    return _cubic_taps(_source(n, m, scale), n)


def _cubic_taps(at: np.ndarray, n: int) -> np.ndarray:
    """Matrix [m, n] of Keys' cubic convolution at the positions ``at`` [m], with a = -0.75."""
    a = np.float32(-0.75)
    f = at - np.floor(at)

    def near(x: np.ndarray) -> np.ndarray:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return _taps(at, {-1: far(f + 1), 0: near(f), 1: near(1 - f), 2: far(2 - f)}, n)


def _area(n: int, m: int, scale: float) -> np.ndarray:
    # Adaptive average pooling: the pixels that an output pixel touches, whatever the scale.
    matrix = np.zeros((m, n), np.float32)
    for i in range(m):
        start, stop = i * n // m, -(-(i + 1) * n // m)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


_MATRICES = {"bilinear": _linear, "bicubic": _cubic, "area": _area}


def resize(x: Array, scale: float, method: Method = "bilinear") -> Array:
    """``x`` [b, h, w, c] -> [b, floor(h scale), floor(w scale), c], computed in float32.

    Without antialiasing and with corners not aligned. Source coordinates follow ``scale`` itself,
    also where it does not divide the size.

    Raises:
      ValueError: The method does not exist, or no pixel would be left.
    """
    _, h, w, _ = x.shape
    sizes = int(np.floor(h * scale)), int(np.floor(w * scale))
    if min(sizes) < 1:
        raise ValueError(f"resize: {h}x{w} pixels by {scale} leave {sizes[0]}x{sizes[1]}")
    return _resample(x, sizes, (scale, scale), method)


def resize_to(x: Array, size: tuple[int, int], method: Method = "bilinear") -> Array:
    """``x`` [b, h, w, c] -> [b, *size, c], computed in float32.

    Raises:
      ValueError: The method does not exist.
    """
    _, h, w, _ = x.shape
    return _resample(x, size, (size[0] / h, size[1] / w), method)


def _resample(x: Array, sizes: tuple[int, int], scales: tuple[float, float], method: str) -> Array:
    """Resizes; the scales give the coordinates of the source."""
    _, h, w, _ = x.shape
    axes = list(zip((h, w), sizes, scales, strict=True))
    if method == "nearest":
        rows, columns = (
            np.minimum(
                (np.arange(m, dtype=np.float32) * np.float32(1.0 / scale)).astype(int), n - 1
            )
            for n, m, scale in axes
        )
        return x[:, rows][:, :, columns]
    if method not in _MATRICES:
        raise ValueError(f"resize: method {method!r} is not one of nearest, {', '.join(_MATRICES)}")
    vertical, horizontal = (_MATRICES[method](n, m, scale) for n, m, scale in axes)
    return _both_axes(x, vertical, horizontal)


def _both_axes(x: Array, vertical: np.ndarray, horizontal: np.ndarray) -> Array:
    """Applies matrices [h', h] and [w', w] to the axes of ``x`` [b, h, w, c], in float32."""
    y = jnp.einsum("ph,bhwc->bpwc", vertical, x.astype(jnp.float32), precision="highest")
    return jnp.einsum("qw,bpwc->bpqc", horizontal, y, precision="highest").astype(x.dtype)


def resize_corners(x: Array, size: tuple[int, int], antialias: bool = False) -> Array:
    """Bicubic resize of ``x`` [b, h, w, c] to [b, *size, c] with corners aligned, in float32.

    Args:
      x: The pictures. The aspect ratio is not kept.
      size: (height, width) of the result.
      antialias: Where one axis shrinks, first blur each axis by a Gaussian of the standard
        deviation (factor - 1) / 2, at least 0.001, cut off at two of them; edges are mirrored.
    """
    factors = [n / m for n, m in zip(x.shape[1:3], size, strict=True)]
    matrices = []
    for n, m, factor in zip(x.shape[1:3], size, factors, strict=True):
        step = np.float32((n - 1) / (m - 1) if m > 1 else 0)
        matrix = _cubic_taps(step * np.arange(m, dtype=np.float32), n)
        if antialias and max(factors) > 1:
            matrix = matrix @ _gaussian(n, max((factor - 1) / 2, 0.001))
        matrices.append(matrix)
    return _both_axes(x, *matrices)


def _gaussian(n: int, sigma: float) -> np.ndarray:
    """Matrix [n, n] that blurs an axis of ``n`` pixels, mirrored at its edges."""
    half = int(max(4 * sigma, 3)) // 2
    if half >= n:
        raise ValueError(f"resize: a blur over {2 * half + 1} pixels needs more than {n}")
    offsets = np.arange(-half, half + 1)
    weights = np.exp(-(offsets.astype(np.float32) ** 2) / (2 * np.float32(sigma) ** 2))
    places = np.abs(np.arange(n)[:, None] + offsets)
    places = np.where(places < n, places, 2 * (n - 1) - places)
    matrix = np.zeros((n, n), np.float32)
    np.add.at(matrix, (np.arange(n)[:, None], places), weights / weights.sum())
    return matrix
