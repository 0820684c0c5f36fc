"""Prediction targets and their losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import objective as obj
from ldm_jax.diffusion.guidance import predictor
from ldm_jax.diffusion.samplers import DDIM
from ldm_jax.diffusion.schedule import make_schedule, q_sample

SCHEDULE = make_schedule("linear", 1000, 0.0015, 0.0195)
ABAR = SCHEDULE.alphas_cumprod.astype(np.float64)
SNR = ABAR / (1 - ABAR)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("name", ["eps", "x0", "v", "flow"])
def test_reading_a_perfect_network_gives_back_noise_and_picture(name):
    x0, noise = RNG.standard_normal((2, 5, 4, 4, 3)).astype(np.float32)
    t = np.array([0, 10, 300, 600, 999])
    xt = q_sample(SCHEDULE, x0, t, noise)
    read = obj.read(name, SCHEDULE, obj.target(name, SCHEDULE, x0, noise, t), xt, t)
    # Dividing by sqrt(abar) or sqrt(1 - abar) magnifies rounding by as much.
    np.testing.assert_allclose(read.x0, x0, atol=1e-4)
    np.testing.assert_allclose(read.eps, noise, atol=1e-4)


def test_objectives_are_equivalent_parametrisations():
    x0, noise = RNG.standard_normal((2, 3, 8)).astype(np.float32)
    t = np.array([5, 400, 800])
    a, s = np.sqrt(ABAR[t])[:, None], np.sqrt(1 - ABAR[t])[:, None]
    np.testing.assert_allclose(
        obj.target("v", SCHEDULE, x0, noise, t), a * noise - s * x0, atol=1e-5
    )
    assert (obj.target("eps", SCHEDULE, x0, noise, t) == noise).all()
    assert (obj.target("x0", SCHEDULE, x0, noise, t) == x0).all()


@pytest.mark.parametrize(
    ("name", "weight_of_x0_error"),
    [("eps", SNR), ("x0", 1.0), ("v", SNR + 1), ("flow", (np.sqrt(SNR) + 1) ** 2)],
)
def test_min_snr_weighs_the_error_of_x0_alike_whatever_the_network_predicts(
    name, weight_of_x0_error
):
    """The loss times the weight of an x0 error equals min(SNR, gamma) for all three outputs."""
    weights = obj.min_snr_weights(name, SCHEDULE, 5.0)
    assert weights.shape == (1000,)
    np.testing.assert_allclose(weights * weight_of_x0_error, np.minimum(SNR, 5.0), rtol=1e-6)


def test_bound_weights_are_those_of_the_variational_bound():
    """KL of two Gaussians of the posterior's variance: coef1^2 (x0 error) / (2 variance).

    Here x0 error = eps error (1 - abar) / abar.
    """
    t = np.arange(1, 1000)
    expected = (
        SCHEDULE.posterior_mean_coef1[t] ** 2
        * (1 - ABAR[t])
        / ABAR[t]
        / (2 * SCHEDULE.posterior_variance[t])
    )
    weights = obj.elbo_weights("eps", SCHEDULE)
    np.testing.assert_allclose(weights[1:], expected, rtol=1e-3)
    assert weights[0] == weights[1]


def test_loss_adds_up_its_parts():
    errors, t = jnp.array([1.0, 2.0, 3.0]), jnp.array([0, 1, 2])
    elbo, weights, logvar = (
        jnp.array([1.0, 10.0, 100.0]),
        jnp.array([0.5, 1.0, 2.0]),
        jnp.log(jnp.array([1.0, 2.0, 4.0])),
    )
    loss, parts = obj.diffusion_loss(
        errors, t, elbo=elbo, simple_weight=2.0, elbo_weight=0.1, weights=weights, logvar=logvar
    )
    simple = np.mean([0.5, 2 / 2 + np.log(2), 6 / 4 + np.log(4)])
    bound = np.mean([1.0, 20.0, 300.0])
    np.testing.assert_allclose(loss, 2 * simple + 0.1 * bound, rtol=1e-6)
    np.testing.assert_allclose([parts["loss_simple"], parts["loss_vlb"]], [2.0, bound], rtol=1e-6)


@pytest.mark.parametrize(("kind", "expected"), [("l1", [1.5, 4.0]), ("l2", [2.5, 16.0])])
def test_errors_are_means_over_each_picture(kind, expected):
    truth = np.zeros((2, 1, 2, 1), np.float32)
    out = jnp.array([1.0, -2.0, 4.0, -4.0], jnp.bfloat16).reshape(truth.shape)
    errors = obj.pointwise(kind, out, truth)
    assert errors.dtype == jnp.float32
    np.testing.assert_allclose(errors, expected)


def test_huber_is_l2_below_its_scale_and_a_line_above():
    truth = jnp.zeros((2, 3))
    small, large = jnp.full((1, 3), 1e-3), jnp.full((1, 3), 50.0)
    errors = obj.pointwise("huber", jnp.concatenate([small, large]), truth, 0.5)
    np.testing.assert_allclose(errors[0], 1e-6, rtol=1e-3)
    np.testing.assert_allclose(errors[1], 2 * 0.5 * (50 - 0.5), rtol=1e-3)
    slopes = jax.grad(lambda d: obj.pointwise("huber", d, truth, 0.5).sum())(
        jnp.concatenate([small, large])
    )
    np.testing.assert_allclose(slopes[:, 0] * 3, [2e-3, 2 * 0.5], rtol=1e-3)


@pytest.mark.parametrize("name", ["eps", "x0", "v"])
def test_p2_weighs_the_error_of_eps_alike_whatever_the_network_predicts(name):
    """The error of x0 of size 1 has the squared error `x0_error` in the network's output."""
    weights = obj.p2_weights(name, SCHEDULE, 0.5, 2.0)
    snr = np.asarray(ABAR, np.float64) / (1 - np.asarray(ABAR, np.float64))
    found = weights * obj.get_objective(name).x0_error(snr)
    np.testing.assert_allclose(found, snr / np.sqrt(2.0 + snr), rtol=1e-5)
    assert np.allclose(obj.p2_weights("eps", SCHEDULE, 0.0), 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: obj.get_objective("noise"), "objective 'noise' does not exist"),
        (lambda: obj.elbo_weights("noise", SCHEDULE), "objective 'noise' does not exist"),
        (
            lambda: obj.pointwise("l3", jnp.zeros((1, 2)), jnp.zeros((1, 2))),
            "'l3' is not one of l1, l2, huber",
        ),
    ],
)
def test_unknown_names_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_euler_along_the_flow_is_ddim():
    """One step of rectified flow from noise u to w, x + (w - u) v, in the scaled states."""
    schedule = make_schedule("flow", 10)
    x0, eps = RNG.standard_normal((2, 1, 4)).astype(np.float32)
    out = RNG.standard_normal((1, 4)).astype(np.float32)  # any velocity
    u, w = 0.8, 0.5
    nodes = DDIM().nodes(schedule, np.array([4, 7]))
    node = jax.tree.map(lambda a: a[0], nodes)
    state = q_sample(schedule, x0, 7, eps)
    length, next_length = np.hypot(1 - u, u), np.hypot(1 - w, w)
    predict = predictor(lambda x, t: out, schedule, "flow")
    _, after, _ = DDIM().step(None, node, state, predict, np.zeros((1, 1, 4), np.float32))
    np.testing.assert_allclose(after * next_length, state * length + (w - u) * out, atol=1e-5)
    truth = (1 - u) * x0 + u * eps
    np.testing.assert_allclose(state * length, truth, atol=1e-5)
