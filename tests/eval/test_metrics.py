"""Metrics equal closed forms and their definitions."""

import subprocess
import sys

import numpy as np
import pytest

from ldm_jax.eval import metrics


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def to_float(images: np.ndarray) -> np.ndarray:
    return images / 127.5 - 1


# --------------------------------------------------------------------------------------------- PSNR


@pytest.mark.fast
def test_psnr_of_a_constant_error_per_image():
    a = np.full((3, 8, 8, 3), 100, np.uint8)
    b = a + np.array([1, 10, 0], np.uint8)[:, None, None, None]
    assert metrics.psnr(a, b) == pytest.approx([20 * np.log10(255), 20 * np.log10(25.5), np.inf])


@pytest.mark.fast
def test_psnr_takes_uint8_and_float_alike(rng):
    a, b = rng.integers(0, 256, (2, 4, 8, 8, 3), dtype=np.uint8)
    expected = metrics.psnr(a, b)
    assert metrics.psnr(to_float(a), to_float(b)) == pytest.approx(expected)
    assert metrics.psnr(a, to_float(b).astype(np.float32)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize("measure", [metrics.psnr, metrics.ssim])
def test_images_that_do_not_fit_raise(measure):
    images = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="one shape"):
        measure(images, images[:1])
    with pytest.raises(ValueError, match="one shape"):
        measure(images[0], images[0])
    with pytest.raises(TypeError, match="int64"):
        measure(images.astype(np.int64), images)


# --------------------------------------------------------------------------------------------- SSIM


@pytest.mark.fast
def test_ssim_of_identical_images_is_one(rng):
    a = rng.integers(0, 256, (2, 16, 20, 3), dtype=np.uint8)
    assert metrics.ssim(a, a) == pytest.approx([1, 1])


@pytest.mark.fast
def test_ssim_of_constant_images_is_the_luminance_term():
    a, b = np.full((1, 12, 12, 1), 51, np.uint8), np.full((1, 12, 12, 1), 204, np.uint8)
    c1 = 0.01**2
    assert metrics.ssim(a, b) == pytest.approx([(2 * 0.2 * 0.8 + c1) / (0.2**2 + 0.8**2 + c1)])


@pytest.mark.fast
def test_ssim_is_the_papers_formula_written_out(rng):
    a, b = rng.uniform(-1, 1, (2, 2, 12, 13, 3))
    y, x = np.mgrid[-5:6, -5:6]
    window = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    window = (window / window.sum())[:, :, None]
    expected = []
    for p, q in zip((a + 1) / 2, (b + 1) / 2, strict=True):
        values = []
        for i in range(2):
            for j in range(3):
                u, v = p[i : i + 11, j : j + 11], q[i : i + 11, j : j + 11]
                mu, mv = (window * u).sum((0, 1)), (window * v).sum((0, 1))
                su, sv = (window * (u - mu) ** 2).sum((0, 1)), (window * (v - mv) ** 2).sum((0, 1))
                suv = (window * (u - mu) * (v - mv)).sum((0, 1))
                values.append(
                    (2 * mu * mv + 1e-4)
                    * (2 * suv + 9e-4)
                    / ((mu**2 + mv**2 + 1e-4) * (su + sv + 9e-4))
                )
        expected.append(np.mean(values))
    assert metrics.ssim(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.fast
def test_ssim_falls_below_zero_for_a_negative(rng):
    a = rng.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    assert metrics.ssim(a, 255 - a)[0] < -0.5


@pytest.mark.fast
def test_ssim_needs_room_for_its_window():
    with pytest.raises(ValueError, match="11x11"):
        metrics.ssim(np.zeros((1, 10, 16, 3)), np.zeros((1, 10, 16, 3)))


# --------------------------------------------------------------------------------- Frechet distance


@pytest.mark.fast
def test_frechet_distance_of_commuting_covariances(rng):
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    v1, v2 = rng.uniform(0, 4, (2, 5))
    mu1, mu2 = rng.normal(size=(2, 5))
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(v1) - np.sqrt(v2)) ** 2).sum()
    found = metrics.frechet_distance(mu1, basis * v1 @ basis.T, mu2, basis * v2 @ basis.T)
    assert found == pytest.approx(expected)


@pytest.mark.fast
def test_frechet_distance_of_covariances_that_do_not_commute():
    # For 2x2: trace sqrt(M) = sqrt(trace M + 2 sqrt(det M)), with M = sigma1 sigma2.
    s1, s2 = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.5], [-0.5, 0.5]])
    m = s1 @ s2
    expected = np.trace(s1 + s2) - 2 * np.sqrt(np.trace(m) + 2 * np.sqrt(np.linalg.det(m)))
    assert metrics.frechet_distance(np.zeros(2), s1, np.zeros(2), s2) == pytest.approx(expected)


@pytest.mark.fast
def test_frechet_distance_holds_on_singular_covariances(rng):
    x = rng.normal(size=(10, 64))  # fewer rows than features: rank 9
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    assert metrics.frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(mu, sigma, mu, 4 * sigma) == pytest.approx(np.trace(sigma))
    assert metrics.frechet_distance(mu + 1, sigma, mu, np.zeros_like(sigma)) == pytest.approx(
        64 + np.trace(sigma)
    )


@pytest.mark.fast
def test_frechet_distance_names_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        metrics.frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))


# ----------------------------------------------------------------------------- precision and recall


@pytest.mark.fast
def test_precision_recall_counted_by_hand():
    # With k = 1 the balls around 0, 1, 4 reach 1, 1, 3: the real manifold is [-1, 7].
    # Those around 0.5, 8, 20 reach 7.5, 7.5, 12.
    real, generated = np.array([[0.0], [1.0], [4.0]]), np.array([[0.5], [8.0], [20.0]])
    assert metrics.precision_recall(real, generated, k=1) == (pytest.approx(1 / 3), 1.0)


@pytest.mark.fast
def test_precision_recall_at_the_extremes(rng):
    x = rng.normal(size=(50, 4))
    assert metrics.precision_recall(x, x) == (1.0, 1.0)
    assert metrics.precision_recall(x, x + 100) == (0.0, 0.0)


@pytest.mark.fast
def test_one_mode_of_two_has_precision_without_recall(rng):
    real = np.concatenate([rng.normal(size=(200, 2)), rng.normal(size=(200, 2)) + 50])
    precision, recall = metrics.precision_recall(real, rng.normal(size=(200, 2)))
    assert precision > 0.9
    assert 0.4 < recall <= 0.5


@pytest.mark.fast
def test_precision_recall_does_not_depend_on_the_block(rng):
    real, generated = rng.normal(size=(37, 3)), rng.normal(size=(41, 3)) + 1
    whole = metrics.precision_recall(real, generated)
    assert whole == metrics.precision_recall(real, generated, block=5)
    distances = np.linalg.norm(real[:, None] - real[None], axis=-1)
    radii = np.sort(distances, axis=1)[:, 3]  # the nearest is the point itself
    inside = (np.linalg.norm(generated[:, None] - real[None], axis=-1) <= radii).any(1)
    assert whole[0] == pytest.approx(inside.mean())


@pytest.mark.fast
def test_precision_recall_needs_more_points_than_neighbours():
    with pytest.raises(ValueError, match="k=3"):
        metrics.precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="expected features"):
        metrics.precision_recall(np.zeros((9, 2)), np.zeros((9, 3)))


# ---------------------------------------------------------------------------------- running moments


@pytest.mark.fast
def test_running_moments_equal_those_of_the_whole(rng):
    # Far from 0, where E[x^2] - E[x]^2 would lose all digits.
    x = rng.normal(size=(100, 6)) @ rng.normal(size=(6, 6)) + 1e4
    moments = metrics.RunningMoments(6)
    for part in np.split(x, [1, 1, 30, 77]):
        moments.update(part)
    assert moments.count == 100
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-9)


@pytest.mark.fast
def test_running_moments_of_several_hosts_merge(rng):
    x = rng.normal(size=(40, 3))
    parts = [metrics.RunningMoments(3).update(p) for p in (x[:7], x[7:])]
    merged = (
        metrics.RunningMoments(3).merge(parts[0]).merge(metrics.RunningMoments(3)).merge(parts[1])
    )
    np.testing.assert_allclose(merged.covariance, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-12)
    assert parts[0].count == 7


@pytest.mark.fast
def test_running_moments_refuse_what_does_not_fit():
    moments = metrics.RunningMoments(3)
    with pytest.raises(ValueError, match=r"\[n, 3\]"):
        moments.update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="two rows"):
        _ = moments.update(np.zeros((1, 3))).covariance
    with pytest.raises(ValueError, match="2 features"):
        moments.merge(metrics.RunningMoments(2))


@pytest.mark.processes
def test_metrics_imports_no_jax():
    code = (
        f"import sys, runpy; runpy.run_path({metrics.__file__!r}); sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
