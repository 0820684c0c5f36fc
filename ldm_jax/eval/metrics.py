"""Measures of pictures and of sets of features: pure functions on NumPy arrays.

Pictures are [b, h, w, c], uint8 or float in [-1, 1]; features are [n, d]. Sums are float64.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]

# ------------------------------------------------------------------------------- pairs of pictures


def psnr(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each picture, [b]; inf where two are identical.

    Floats are not clipped: clip a decoder's output before, or compare uint8.

    Raises:
      ValueError: The shapes differ or are not [b, h, w, c].
      TypeError: The pictures are integers other than uint8.
    """
    a, b = _pair(a, b)
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.square(a - b).mean(axis=(1, 2, 3)))


def ssim(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Structural similarity of each picture, [b], at most 1 (Wang et al. 2004, equation 13).

    "Image Quality Assessment: From Error Visibility to Structural Similarity", with the paper's
    window (Gaussian, 11x11, sigma 1.5, only where it lies inside the picture) and constants
    (K1 = 0.01, K2 = 0.03); the mean over channels.

    Raises:
      ValueError: As `psnr`, or the pictures are smaller than the window.
      TypeError: As `psnr`.
    """
    a, b = _pair(a, b)
    if min(a.shape[1:3]) < 11:
        size = f"{a.shape[1]}x{a.shape[2]}"
        raise ValueError(f"ssim has an 11x11 window: pictures of {size} are too small")
    c1, c2 = 0.01**2, 0.03**2
    mu_a, mu_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mu_a**2, _blur(b * b) - mu_b**2
    cov = _blur(a * b) - mu_a * mu_b
    luminance = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(axis=(1, 2, 3))


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"expected two batches [b, h, w, c] of one shape, not {a.shape} and {b.shape}"
        )
    return _unit_range(a), _unit_range(b)


def _unit_range(x: np.ndarray) -> np.ndarray:
    if x.dtype == np.uint8:
        return x / 255.0
    if np.issubdtype(x.dtype, np.integer) or x.dtype == np.bool_:
        raise TypeError(f"pictures are uint8 or float in [-1, 1], not {x.dtype}")
    return (x.astype(np.float64) + 1) / 2


def _blur(x: np.ndarray) -> np.ndarray:
    """[b, h, w, c] -> [b, h - 10, w - 10, c]; the Gaussian window is separable."""
    weights = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    weights /= weights.sum()
    for axis in (1, 2):
        windows = np.lib.stride_tricks.sliding_window_view(x, 11, axis)
        x = windows @ weights
    return x


# ------------------------------------------------------------------------------- Frechet distance


class RunningMoments:
    """Mean and covariance of features that arrive in batches, in float64.

    The pairwise update of Chan, Golub & LeVeque 1979. ``mean`` is [d], ``covariance`` [d, d] (over
    n - 1, as FID has it). `merge` joins the moments of several hosts.
    """

    def __init__(self, features: int) -> None:
        self.count = 0
        self.mean = np.zeros(features)
        self.scatter = np.zeros((features, features))  # sum of (x - mean)(x - mean)^T

    def update(self, batch: ArrayLike) -> Self:
        """Adds a batch [n, d]; returns itself."""
        batch = np.asarray(batch, np.float64)
        if batch.ndim != 2 or batch.shape[1] != self.mean.size:
            d = self.mean.size
            raise ValueError(f"RunningMoments({d}) takes batches [n, {d}], not {batch.shape}")
        if len(batch):
            centred = batch - batch.mean(axis=0)
            self._add(len(batch), batch.mean(axis=0), centred.T @ centred)
        return self

    def merge(self, other: "RunningMoments") -> Self:
        """Adds the features of another one; returns itself."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"cannot merge moments of {other.mean.size} features into {self.mean.size}"
            )
        if other.count:
            self._add(other.count, other.mean, other.scatter)
        return self

    @property
    def covariance(self) -> np.ndarray:
        """[d, d], unbiased."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two rows or more, not {self.count}")
        return self.scatter / (self.count - 1)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        delta = mean - self.mean
        # New arrays: a mean that a caller holds does not change.
        self.scatter = (
            self.scatter + scatter + np.outer(delta, delta) * (self.count * count / total)
        )
        self.mean = self.mean + delta * (count / total)
        self.count = total


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Squared Frechet distance of two Gaussians: with Inception features, FID.

    Heusel et al. 2017, arXiv:1706.08500, equation 6. The trace of (sigma1 sigma2)^(1/2) is the sum
    of the singular values of F1^T F2 with sigma = F F^T, which stays exact for singular covariances
    (fewer samples than features), where a general matrix square root does not.

    Args:
      mu1: [d].
      sigma1: [d, d], symmetric and positive semi-definite.
      mu2: [d].
      sigma2: [d, d].
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    square = (mu1.size, mu1.size)
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == square:
        shapes = [x.shape for x in (mu1, sigma1, mu2, sigma2)]
        raise ValueError(f"frechet_distance takes [d], [d, d], [d], [d, d], not {shapes}")
    cross = np.linalg.svd(_factor(sigma1).T @ _factor(sigma2), compute_uv=False).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def _factor(sigma: np.ndarray) -> np.ndarray:
    """F with sigma = F F^T."""
    values, vectors = np.linalg.eigh(sigma)
    return vectors * np.sqrt(values.clip(min=0))  # rounding may leave -1e-16 for 0


# ------------------------------------------------------------------------------- kernel distances


def polynomial_kernel(degree: int = 3, gamma: float | None = None, coef0: float = 1.0) -> Kernel:
    """(gamma x.y + coef0)^degree; gamma None is 1 / d, as in KID."""
    return lambda x, y: (x @ y.T * (gamma or 1 / x.shape[1]) + coef0) ** degree


def gaussian_kernel(sigma: float) -> Kernel:
    """exp(-|x - y|^2 / (2 sigma^2))."""
    return lambda x, y: np.exp(-_squared_distances(x, y) / (2 * sigma**2))


def mmd(x: np.ndarray, y: np.ndarray, kernel: Kernel, *, unbiased: bool) -> float:
    """Squared maximum mean discrepancy (Gretton et al. 2012, equations 3 and 5)."""
    m, n = len(x), len(y)
    kxx, kyy, kxy = kernel(x, x), kernel(y, y), kernel(x, y)
    if not unbiased:
        return float(kxx.mean() + kyy.mean() - 2 * kxy.mean())
    within_x = (kxx.sum() - np.trace(kxx)) / (m * (m - 1))
    within_y = (kyy.sum() - np.trace(kyy)) / (n * (n - 1))
    return float(within_x + within_y - 2 * kxy.mean())


class Spread(NamedTuple):
    """Mean and population standard deviation over subsets."""

    mean: float
    std: float


def kernel_distance(
    generated: ArrayLike,
    real: ArrayLike,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    kernel: Kernel | None = None,
) -> Spread:
    """KID with Inception features (Binkowski et al. 2018, arXiv:1801.01401), as torch-fidelity.

    The unbiased `mmd` of random subsets without replacement, by default with the cubic polynomial
    kernel. The subsets are torch-fidelity's for the same seed and order of the features.
    """
    x, y = _features(generated, real)
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(
            f"subsets of {subset_size} do not fit sets of {len(x)} and {len(y)} features"
        )
    rng, kernel = np.random.RandomState(seed), kernel or polynomial_kernel()
    values = []
    for _ in range(subsets):
        rows = (rng.choice(len(a), subset_size, replace=False) for a in (x, y))
        a, b = (features[i] for features, i in zip((x, y), rows, strict=True))
        values.append(mmd(a, b, kernel, unbiased=True))
    return Spread(float(np.mean(values)), float(np.std(values)))


def cmmd(generated: ArrayLike, real: ArrayLike) -> float:
    """CMMD of CLIP embeddings (Jayasumana et al. 2024, arXiv:2401.09603).

    1000 times the biased `mmd` of unit vectors with a Gaussian kernel of sigma 10.
    """
    x, y = _features(generated, real)
    return 1000 * mmd(_unit_length(x), _unit_length(y), gaussian_kernel(10), unbiased=False)


# ------------------------------------------------------------------------------- manifolds


class Manifold(NamedTuple):
    """Shares in [0, 1], but for density, which may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(
    real: ArrayLike, generated: ArrayLike, k: int = 3, block: int = 1024
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991, equations 1-3).

    A set's manifold is the union of balls around its points that reach to the point's k-th nearest
    neighbour. Precision is the share of generated points on the real manifold, recall the share of
    real points on the generated one.

    Args:
      real: [n, d].
      generated: [m, d].
      k: The neighbour, at least 1 and below n and m.
      block: Bounds the memory to block x max(n, m) distances; the result does not depend on it.
    """
    return manifold_metrics(real, generated, k, block)[:2]


def density_coverage(
    real: ArrayLike, generated: ArrayLike, k: int = 5, block: int = 1024
) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv:2002.09797, equations 4 and 5).

    Density is the mean number of real balls that a generated point lies in, over k; coverage the
    share of real balls with a generated point inside. Arguments as `precision_recall`.
    """
    return manifold_metrics(real, generated, k, block)[2:]


def manifold_metrics(
    real: ArrayLike, generated: ArrayLike, k: int = 3, block: int = 1024
) -> Manifold:
    """Precision, recall, density and coverage from one pass over the distances."""
    real, generated = _features(real, generated)
    if not 1 <= k < min(len(real), len(generated)):
        raise ValueError(
            f"balls to the neighbour k={k} need more than {k} points in each set, "
            f"not {len(real)} and {len(generated)}"
        )
    real_radii, generated_radii = (
        neighbour_radii(real, k, block),
        neighbour_radii(generated, k, block),
    )
    on_real, recalled = 0, np.zeros(len(real), bool)
    inside, covered = 0, np.zeros(len(real), bool)
    for start in range(0, len(generated), block):
        rows = slice(start, start + block)
        distances = _squared_distances(generated[rows], real)
        on_real += int((distances <= real_radii).any(axis=1).sum())
        recalled |= (distances <= generated_radii[rows, None]).any(axis=0)
        within = distances < real_radii
        inside += int(within.sum())
        covered |= within.any(axis=0)
    m = len(generated)
    return Manifold(on_real / m, float(recalled.mean()), inside / (k * m), float(covered.mean()))


def neighbour_radii(points: np.ndarray, k: int, block: int = 1024) -> np.ndarray:
    """Squared distance of each point to its k-th nearest other point."""
    radii = np.empty(len(points))
    for start in range(0, len(points), block):
        distances = _squared_distances(points[start : start + block], points)
        rows = np.arange(len(distances))
        distances[rows, start + rows] = np.inf  # a point is not its own neighbour
        radii[start : start + block] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return radii


# ------------------------------------------------------------------------------- classifiers


def inception_score(
    logits: ArrayLike, *, splits: int = 10, shuffle_seed: int | None = 2020
) -> Spread:
    """Inception Score over ``splits`` equal parts (Salimans et al. 2016, arXiv:1606.03498).

    Args:
      logits: [n, classes]; FID's code leaves the classifier's bias out.
      splits: Number of parts.
      shuffle_seed: Seed of the permutation before splitting, as torch-fidelity; None keeps the
        order, as ADM.
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or not 1 <= splits <= len(logits):
        raise ValueError(f"logits {logits.shape} cannot be split into {splits} parts")
    if shuffle_seed is not None:
        order = np.random.RandomState(shuffle_seed).permutation(len(logits))
        logits = logits[order]
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    return Spread(float(np.mean(scores)), float(np.std(scores)))


def clip_score(images: ArrayLike, texts: ArrayLike) -> float:
    """Mean of 100 max(cos, 0) over pairs of CLIP embeddings (Hessel et al. 2021, arXiv:2104.08718).

    Args:
      images: [n, d].
      texts: [n, d], the prompt of each picture.
    """
    x, y = (_unit_length(np.asarray(a, np.float64)) for a in (images, texts))
    if x.shape != y.shape:
        raise ValueError(f"clip_score compares pairs: {x.shape} and {y.shape} differ")
    return float(100 * (x * y).sum(axis=1).clip(min=0).mean())


def retrieval(
    generated: ArrayLike,
    labels: ArrayLike,
    real: ArrayLike,
    real_labels: ArrayLike,
    k: int,
    *,
    own: ArrayLike | None = None,
    groups: tuple[ArrayLike, ArrayLike] | None = None,
) -> float:
    """Top-k retrieval accuracy: how often the right label is among the k nearest labels.

    A label is as near as the real picture of it with the largest cosine similarity.

    Args:
      generated: [m, d].
      labels: [m], the right label of each generated picture.
      real: [n, d], the gallery.
      real_labels: [n].
      k: Number of nearest labels that count.
      own: int [m], the gallery row that each generated picture was prompted from, which is left
        out for it.
      groups: Group, such as the style, of each generated and each real picture; the mean of the
        gallery's group is subtracted from the features.
    """
    x, gallery = _features(generated, real)
    labels, real_labels = np.asarray(labels), np.asarray(real_labels)
    if groups is not None:
        mine, theirs = (np.asarray(g) for g in groups)
        means = {group: gallery[theirs == group].mean(axis=0) for group in np.unique(theirs)}
        x = x - np.stack([means[group] for group in mine])
        gallery = gallery - np.stack([means[group] for group in theirs])
    order = np.argsort(real_labels, kind="stable")
    known, starts = np.unique(real_labels[order], return_index=True)
    similarity = _unit_length(x) @ _unit_length(gallery).T
    if own is not None:
        similarity[np.arange(len(x)), np.asarray(own)] = -np.inf
    nearness = np.maximum.reduceat(similarity[:, order], starts, axis=1)
    places = np.searchsorted(known, labels).clip(max=len(known) - 1)
    right = np.take_along_axis(nearness, places[:, None], axis=1)
    found = ((nearness > right).sum(axis=1) < k) & np.isfinite(right[:, 0])
    return float((found & (known[places] == labels)).mean())


# ------------------------------------------------------------------------------- shared


def _features(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"expected features [n, d] and [m, d], not {a.shape} and {b.shape}")
    return a, b


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T).clip(min=0)


def _unit_length(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True).clip(min=1e-12)
