"""The resizers of the common evaluation codes, as linear maps along each axis.

FID differs between codes mainly because they resize differently (Parmar et al. 2022, "On Aliased
Resizing and Surprising Subtleties in GAN Evaluation", arXiv:2104.11222).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import EvaluationError, did_you_mean


def _linear(source: np.ndarray, size: int) -> np.ndarray:
    """Weights [len(source), size] of linear interpolation at the positions ``source``."""
    lower = np.floor(source).astype(int)
    weights, rows = np.zeros((len(source), size)), np.arange(len(source))
    np.add.at(weights, (rows, lower.clip(max=size - 1)), 1 - (source - lower))
    np.add.at(weights, (rows, (lower + 1).clip(max=size - 1)), source - lower)
    return weights


def tf1_bilinear(size: int, out: int) -> np.ndarray:
    """TensorFlow 1's bilinear resize: no half-pixel offset, no smoothing (FID's own graph)."""
    # float32, as the original computes positions.
    return _linear(np.arange(out, dtype=np.float32) * (np.float32(size) / np.float32(out)), size)


def torch_bilinear(size: int, out: int) -> np.ndarray:
    """PyTorch's `interpolate(mode="bilinear")`: half-pixel centres, no smoothing (pytorch-fid)."""
    source = (np.arange(out, dtype=np.float32) + np.float32(0.5)) * np.float32(size / out)
    return _linear((source - np.float32(0.5)).clip(min=0), size)


def _pillow(kernel: Callable[[np.ndarray], np.ndarray], support: float) -> Callable:
    def weights(size: int, out: int) -> np.ndarray:
        scale = size / out
        stretch = max(scale, 1.0)  # smooths when shrinking
        centre = (np.arange(out) + 0.5) * scale
        first = np.trunc((centre - support * stretch + 0.5).clip(min=0))[:, None]
        last = np.trunc((centre + support * stretch + 0.5).clip(max=size))[:, None]
        place = np.arange(size)[None]
        w = kernel((place - centre[:, None] + 0.5) / stretch) * ((first <= place) & (place < last))
        return w / w.sum(1, keepdims=True)

    return weights


def _triangle(x: np.ndarray) -> np.ndarray:
    return (1 - np.abs(x)).clip(min=0)


def _cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic convolution kernel with Pillow's a."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


# name -> weights(size, out): the matrix [out, size] that resizes one axis.
RESIZERS: dict[str, Callable[[int, int], np.ndarray]] = {
    "tf1_bilinear": tf1_bilinear,
    "torch_bilinear": torch_bilinear,
    "pil_bilinear": _pillow(_triangle, 1.0),
    "pil_bicubic": _pillow(_cubic, 2.0),
}


@lru_cache(maxsize=256)
def _weights(name: str, size: int, out: int) -> np.ndarray:
    return RESIZERS[name](size, out)


def resize(images: np.ndarray, size: Sequence[int], resizer: str) -> jax.Array:
    """Resizes pictures as one of the common evaluation codes does.

    Args:
      images: [b, h, w, c], numbers from 0 to 255.
      size: (height, width) of the result.
      resizer: A name in `RESIZERS`. Pillow's are those of its floating-point mode, clipped to
        [0, 255] as clean-fid does.

    Returns:
      float32 [b, height, width, c] in [0, 255].
    """
    if resizer not in RESIZERS:
        raise EvaluationError(
            f"resizer {resizer!r} does not exist{did_you_mean(resizer, RESIZERS)}"
        )
    rows, columns = (
        _weights(resizer, n, out) for n, out in zip(images.shape[1:3], size, strict=True)
    )
    return _resize(jnp.asarray(images), jnp.float32(rows), jnp.float32(columns))


@jax.jit
def _resize(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    x = images.astype(jnp.float32)
    x = jnp.einsum("bhwc,ow->bhoc", x, columns, precision="highest")
    return jnp.einsum("bhwc,oh->bowc", x, rows, precision="highest").clip(0, 255)
