"""Image quality and distribution measures: pure functions on NumPy arrays.

Images are [b, h, w, c], uint8 or float in [-1, 1]; features are [n, d]. Sums are done in float64.
"""

from typing import Self

import numpy as np
from numpy.typing import ArrayLike


def psnr(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each image, [b]: -10 log10 of the mean square error on a scale of 0..1.

    Identical images give inf. Floats are not clipped: clip what a decoder overshoots before, or compare uint8.
    Raises ValueError when the shapes differ or are not [b, h, w, c], TypeError for integers other than uint8.
    """
    a, b = _pair(a, b)
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.square(a - b).mean(axis=(1, 2, 3)))


def ssim(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Structural similarity of each image, [b], at most 1 (Wang et al. 2004, "Image Quality Assessment: From Error
    Visibility to Structural Similarity", equation 13).

    The paper's window (Gaussian, 11x11, sigma 1.5) and constants (K1 = 0.01, K2 = 0.03), at the positions where the
    window lies inside the image; channels are averaged. Raises as psnr does, and ValueError for images under 11x11.
    """
    a, b = _pair(a, b)
    if min(a.shape[1:3]) < 11:
        raise ValueError(
            f"ssim looks through an 11x11 window: images of {a.shape[1]}x{a.shape[2]} are too small"
        )
    c1, c2 = 0.01**2, 0.03**2
    mu_a, mu_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mu_a**2, _blur(b * b) - mu_b**2
    cov = _blur(a * b) - mu_a * mu_b
    luminance = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(axis=(1, 2, 3))


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Squared Frechet (2-Wasserstein) distance between the Gaussians N(mu1, sigma1) and N(mu2, sigma2): with Inception
    features, FID (Heusel et al. 2017, arXiv:1706.08500, equation 6).

    mu [d], sigma [d, d] symmetric, positive semi-definite. The trace of (sigma1 sigma2)^(1/2) is the sum of the square
    roots of the eigenvalues of the symmetric sigma1^(1/2) sigma2 sigma1^(1/2), all real. They are taken as the singular
    values of F1^T F2 with sigma = F F^T, which is exact to rounding on singular covariances too (fewer samples than
    features), where a general matrix square root is not. Raises ValueError when shapes do not fit.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if (
        mu1.ndim != 1
        or mu1.shape != mu2.shape
        or not sigma1.shape == sigma2.shape == (mu1.size, mu1.size)
    ):
        shapes = [x.shape for x in (mu1, sigma1, mu2, sigma2)]
        raise ValueError(f"frechet_distance takes [d], [d, d], [d], [d, d], not {shapes}")
    root_trace = np.linalg.svd(_factor(sigma1).T @ _factor(sigma2), compute_uv=False).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace)


def precision_recall(
    real: ArrayLike, generated: ArrayLike, k: int = 3, block: int = 1024
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991, equations 1-3), each in 0..1.

    real [n, d] and generated [m, d] are features. Each set's manifold is the union of balls around its points, reaching
    to the point's k-th nearest neighbour in the set. Precision is the share of generated points on the real manifold,
    recall the share of real points on the generated one. `block` bounds the memory to block x max(n, m) distances and
    does not change the result. Raises ValueError when a set has k points or fewer, or the shapes do not fit.
    """
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"precision_recall takes features [n, d] and [m, d], not {real.shape} and {generated.shape}"
        )
    if not 1 <= k < min(len(real), len(generated)):
        raise ValueError(
            f"precision_recall needs more than k={k} points in each set: {len(real)} and {len(generated)} given"
        )
    return _coverage(real, generated, k, block), _coverage(generated, real, k, block)


class RunningMoments:
    """Mean and covariance of features that arrive in batches, in float64 (Chan, Golub & LeVeque 1979, pairwise update).

    moments = RunningMoments(d); moments.update(batch [n, d]); moments.mean [d]; moments.covariance [d, d] (over n - 1,
    as np.cov and FID have it). `merge` joins what several hosts have seen.
    """

    def __init__(self, features: int) -> None:
        self.count = 0
        self.mean = np.zeros(features)
        self._scatter = np.zeros((features, features))  # sum of (x - mean)(x - mean)^T

    def update(self, batch: ArrayLike) -> Self:
        """Add a batch [n, d]; returns itself. Raises ValueError for another shape."""
        batch = np.asarray(batch, np.float64)
        if batch.ndim != 2 or batch.shape[1] != self.mean.size:
            raise ValueError(
                f"RunningMoments({self.mean.size}) takes batches [n, {self.mean.size}], not {batch.shape}"
            )
        if len(batch):
            centred = batch - batch.mean(axis=0)
            self._add(len(batch), batch.mean(axis=0), centred.T @ centred)
        return self

    def merge(self, other: "RunningMoments") -> Self:
        """Add all that another one has seen; returns itself. Raises ValueError when it counts other features."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"cannot merge moments of {other.mean.size} features into {self.mean.size}"
            )
        if other.count:
            self._add(other.count, other.mean, other._scatter)
        return self

    @property
    def covariance(self) -> np.ndarray:
        """[d, d], unbiased. Raises ValueError before two rows have been seen."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two rows or more: {self.count} seen")
        return self._scatter / (self.count - 1)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        delta = mean - self.mean
        # New arrays, so that a mean handed out earlier stays what it was.
        self._scatter = (
            self._scatter + scatter + np.outer(delta, delta) * (self.count * count / total)
        )
        self.mean = self.mean + delta * (count / total)
        self.count = total


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"two batches of images [b, h, w, c] of one shape are compared, not {a.shape} and {b.shape}"
        )
    return _unit_range(a), _unit_range(b)


def _unit_range(x: np.ndarray) -> np.ndarray:
    if x.dtype == np.uint8:
        return x / 255.0
    if np.issubdtype(x.dtype, np.integer) or x.dtype == np.bool_:
        raise TypeError(f"images are uint8 or float in [-1, 1], not {x.dtype}")
    return (
        x.astype(np.float64) + 1
    ) / 2  # also takes bfloat16, which NumPy does not count among its floats


def _blur(x: np.ndarray) -> np.ndarray:
    """[b, h, w, c] -> [b, h - 10, w - 10, c]: the window is a product of two one-dimensional ones."""
    weights = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    weights /= weights.sum()
    for axis in (1, 2):
        size = x.shape[axis] - 10
        x = sum(w * np.take(x, np.arange(i, i + size), axis) for i, w in enumerate(weights))  # pyright: ignore
    return x


def _factor(sigma: np.ndarray) -> np.ndarray:
    """F with sigma = F F^T."""
    values, vectors = np.linalg.eigh(sigma)
    return vectors * np.sqrt(values.clip(min=0))  # rounding may leave -1e-16 where 0 is meant


def _coverage(centres: np.ndarray, queries: np.ndarray, k: int, block: int) -> float:
    """The share of queries inside at least one ball around the centres."""
    radii = np.empty(len(centres))
    for start in range(0, len(centres), block):
        distances = _squared_distances(centres[start : start + block], centres)
        rows = np.arange(len(distances))
        distances[rows, start + rows] = np.inf  # a point is not its own neighbour
        radii[start : start + block] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    inside = 0
    for start in range(0, len(queries), block):
        inside += int(
            (_squared_distances(queries[start : start + block], centres) <= radii).any(axis=1).sum()
        )
    return inside / len(queries)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T).clip(min=0)
