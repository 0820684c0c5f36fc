"""Tables of the forward process."""

import jax
import numpy as np
import pytest

from ldm_jax.diffusion.schedule import (
    BETA_SCHEDULES,
    make_betas,
    make_schedule,
    posterior,
    predict_x0,
    q_mean_variance,
    q_sample,
)

pytestmark = pytest.mark.fast

T, START, END, S = 1000, 0.0015, 0.0195, 8e-3
KINDS = [kind for kind in BETA_SCHEDULES if kind != "flow"]


def beta(kind: str, i: int) -> float:
    """Beta i, computed independently of the code."""
    even = i / (T - 1)
    match kind:
        case "linear":
            return (START**0.5 * (1 - even) + END**0.5 * even) ** 2
        case "sqrt_linear":
            return START * (1 - even) + END * even
        case "sqrt":
            return (START * (1 - even) + END * even) ** 0.5
        case "cosine":
            return min(
                1
                - (
                    np.cos(((i + 1) / T + S) / (1 + S) * np.pi / 2)
                    / np.cos((i / T + S) / (1 + S) * np.pi / 2)
                )
                ** 2,
                0.999,
            )
    raise AssertionError


def abar(kind: str) -> np.ndarray:
    """By logarithms, in long double."""
    return np.exp(np.cumsum(np.log1p(-np.array([beta(kind, i) for i in range(T)], np.longdouble))))


def schedule(kind: str, **options):
    return make_schedule(kind, T, START, END, S, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_betas_follow_their_formula_in_float64(kind):
    betas = make_betas(kind, T, START, END, S)
    assert betas.dtype == np.float64
    # abs: 1 - abar_i / abar_(i-1) of the cosine schedule cancels.
    np.testing.assert_allclose(betas, [beta(kind, i) for i in range(T)], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_every_table_is_its_float64_value_rounded_once(kind):
    tables, a = schedule(kind), abar(kind)
    prev, betas = np.append(1.0, a[:-1]), np.array([beta(kind, i) for i in range(T)], np.longdouble)
    expected = {
        "alphas_cumprod": a,
        "sqrt_alphas_cumprod": np.sqrt(a),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - a),
        "log_one_minus_alphas_cumprod": np.log(1 - a),
        "sqrt_recip_alphas_cumprod": 1 / np.sqrt(a),
        "sqrt_recipm1_alphas_cumprod": np.sqrt((1 - a) / a),
        "posterior_mean_coef1": np.sqrt(prev) * betas / (1 - a),
        "posterior_mean_coef2": np.sqrt(1 - betas) * (1 - prev) / (1 - a),
    }
    for name, values in expected.items():
        table = getattr(tables, name)
        assert table.dtype == np.float32
        np.testing.assert_allclose(
            table, values.astype(np.float64), rtol=1e-7, atol=1e-16, err_msg=name
        )


@pytest.mark.parametrize("kind", KINDS)
def test_noise_only_grows(kind):
    betas = make_betas(kind, T, START, END, S)
    assert ((betas > 0) & (betas < 1)).all()
    a = schedule(kind).alphas_cumprod
    assert (np.diff(a) <= 0).all()
    assert a[0] > 0.9
    assert 0 <= a[-1] < 0.01


def test_unknown_schedule_names_the_nearest():
    with pytest.raises(ValueError, match=r"'linaer' does not exist; did you mean 'linear'\?"):
        make_betas("linaer", T)


@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
def test_posterior_agrees_with_bayes(v):
    """The posterior as a product of q(x_t | x_t-1) and q(x_t-1 | x_0): precisions add.

    v interpolates the variance towards beta.
    """
    tables, t = schedule("linear", v_posterior=v), np.arange(1, T)
    a, betas = abar("linear").astype(np.float64), make_betas("linear", T, START, END)
    prev, x0, xt = a[t - 1], 0.7, -1.3
    precision = (1 - betas[t]) / betas[t] + 1 / (1 - prev)
    mean = (np.sqrt(1 - betas[t]) / betas[t] * xt + np.sqrt(prev) / (1 - prev) * x0) / precision
    found_mean, variance, log_variance = posterior(
        tables, np.full(T - 1, x0), np.full(T - 1, xt), t
    )
    np.testing.assert_allclose(found_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, (1 - v) / precision + v * betas[t], rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_variance), variance, rtol=1e-5)


def test_noise_is_added_and_taken_off_again():
    tables, rng = schedule("linear"), np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 4, 3, 3, 2)).astype(np.float32)
    t = np.array([0, 1, 500, 900])
    xt = q_sample(tables, x0, t, noise)
    np.testing.assert_allclose(predict_x0(tables, xt, t, noise), x0, atol=2e-5)
    mean, variance, log_variance = q_mean_variance(tables, x0, t)
    np.testing.assert_allclose(xt, mean + np.sqrt(variance) * noise, atol=1e-6)
    np.testing.assert_allclose(np.exp(log_variance), variance, rtol=1e-5)


def test_the_flow_has_the_ratios_of_rectified_flow():
    noise = np.arange(1, 9) / 8
    tables = make_schedule("flow", 8)
    ratio = tables.sqrt_alphas_cumprod / tables.sqrt_one_minus_alphas_cumprod
    np.testing.assert_allclose(ratio, (1 - noise) / noise, rtol=1e-6, atol=1e-7)
    assert tables.alphas_cumprod[-1] == 0


def test_given_betas_are_the_schedule():
    betas = make_betas("cosine", 9)
    given = make_schedule("linear", 1000, given_betas=betas, v_posterior=0.5)
    np.testing.assert_array_equal(given.alphas_cumprod, make_schedule("cosine", 9).alphas_cumprod)
    for wrong in ([], [0.1, 1.5], [[0.1]], [0.0, 0.1]):
        with pytest.raises(ValueError, match="given_betas must be a list of numbers"):
            make_schedule(given_betas=wrong)


def test_a_single_timestep_is_a_schedule():
    tables = make_schedule("linear", 1, 0.1, 0.1)
    assert all(np.isfinite(np.asarray(v)).all() for v in jax.tree.leaves(tables))
    with pytest.raises(ValueError, match="at least 2 timesteps"):
        make_schedule("linear", 1, zero_terminal_snr=True)
