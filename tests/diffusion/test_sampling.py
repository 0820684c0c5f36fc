"""Samplers on distributions with a known denoiser, and the loop around them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.guidance import (
    classifier_free,
    dynamic_threshold,
    predictor,
    unguided,
)
from ldm_jax.diffusion.likelihood import log_likelihood
from ldm_jax.diffusion.samplers import (
    SAMPLERS,
    Known,
    drop_noise,
    initial_noise,
    padded,
    sample,
    step_grid,
    time_grid,
)
from ldm_jax.diffusion.schedule import make_schedule, q_sample

SCHEDULE = make_schedule("linear", 1000, 0.0015, 0.0195)
MEAN, STD = 1.5, 0.4
DDIM, DDPM = SAMPLERS["ddim"], SAMPLERS["ddpm"]


def exact_eps(x, t):
    """E[eps | x_t] where x0 ~ N(MEAN, STD^2): x_t is Gaussian too."""
    a, s = (
        jnp.asarray(SCHEDULE.sqrt_alphas_cumprod)[t],
        jnp.asarray(SCHEDULE.sqrt_one_minus_alphas_cumprod)[t],
    )
    return s * (x - a * MEAN) / (a**2 * STD**2 + s**2)


PREDICT = predictor(exact_eps, SCHEDULE, "eps")
PREDICT_AT_ANY_TIME = predictor(lambda x, t: x * (0.5 + t / 2000), SCHEDULE, "eps")


def draw(sampler, steps, eta, n=20000):
    """Mean and standard deviation of n numbers, drawn as one image from one key."""
    keys = jax.random.key(0)[None]
    nodes = sampler.nodes(SCHEDULE, step_grid("trailing", steps, 1000), eta=eta)
    a, s = SCHEDULE.sqrt_alphas_cumprod[-1], SCHEDULE.sqrt_one_minus_alphas_cumprod[-1]
    # The exact distribution of the last x_t.
    start = a * MEAN + np.sqrt(a**2 * STD**2 + s**2) * initial_noise(keys, (n,))
    x = run(sampler, nodes, start, keys)
    return float(x.mean()), float(x.std())


@partial(jax.jit, static_argnums=0)
def run(sampler, nodes, x, keys):
    return sample(sampler, PREDICT, x, nodes, keys=keys)[0]


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 1.0)])
def test_more_steps_come_closer_to_the_distribution(sampler, eta):
    results = [draw(SAMPLERS[sampler], steps, eta) for steps in (5, 40, 1000)]
    errors = [abs(std - STD) for _, std in results]
    assert errors[0] > errors[1] > 0.003
    # Of 20,000 samples, the standard error is 0.5 % of the deviation (0.002) and 0.003 of the mean.
    # DDIM ends at the noise level of t = 0.
    assert errors[2] < 0.008
    assert abs(results[2][0] - MEAN) < 0.012


def test_ddpm_over_all_steps_is_the_posterior_of_the_schedule():
    nodes = DDPM.nodes(SCHEDULE, np.arange(1000))
    assert nodes.t.tolist() == list(range(999, -1, -1))
    # The tables are of float32.
    np.testing.assert_allclose(nodes.x0[::-1], SCHEDULE.posterior_mean_coef1, rtol=2e-3)
    np.testing.assert_allclose(nodes.xt[::-1], SCHEDULE.posterior_mean_coef2, rtol=2e-3)
    np.testing.assert_allclose(
        nodes.noise[::-1][1:] ** 2, SCHEDULE.posterior_variance[1:], rtol=2e-3
    )
    assert nodes.noise[-1] == 0


def test_ddim_with_eta_1_has_the_variance_of_ddpm():
    timesteps = step_grid("uniform", 50, 1000)
    ddim, ddpm = DDIM.nodes(SCHEDULE, timesteps, eta=1.0), DDPM.nodes(SCHEDULE, timesteps)
    np.testing.assert_allclose(ddim.noise[:-1], ddpm.noise[:-1], rtol=1e-5)


def test_an_eta_above_1_stays_finite():
    assert np.isfinite(DDIM.nodes(SCHEDULE, step_grid("uniform", 10, 1000), eta=3.0).eps).all()


def test_ddpm_has_no_eta_but_its_own():
    with pytest.raises(ValueError, match=r"ddpm.*eta"):
        DDPM.nodes(SCHEDULE, np.arange(10), eta=0.5)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
class TestLoop:
    """On pictures of 3 numbers, with noise in play."""

    SHAPE = (2, 3)
    KEYS = jax.random.split(jax.random.key(7), 2)

    def nodes(self, name):
        return SAMPLERS[name].nodes(SCHEDULE, step_grid("uniform", 4, 1000), eta=1.0)

    def step_noise(self, purpose, count):
        """The loop's noise: the key folded with 1, step and purpose (0 sampler, 1 known region)."""
        fold = jax.random.fold_in
        rows = [
            [
                jax.random.normal(
                    fold(fold(fold(key, 1), index), purpose), (count, *self.SHAPE[1:])
                )
                for key in self.KEYS
            ]
            for index in range(4)
        ]
        return jnp.stack([jnp.stack(row, axis=1) for row in rows])

    def test_noise_handed_in_equals_noise_from_keys(self, name):
        x = initial_noise(self.KEYS, self.SHAPE[1:])
        drawn, _ = sample(SAMPLERS[name], PREDICT, x, self.nodes(name), keys=self.KEYS)
        given, _ = sample(SAMPLERS[name], PREDICT, x, self.nodes(name), noise=self.step_noise(0, 1))
        np.testing.assert_allclose(drawn, given, rtol=1e-6)
        other, _ = sample(
            SAMPLERS[name], PREDICT, x, self.nodes(name), noise=self.step_noise(0, 1) + 1
        )
        assert np.abs(other - given).max() > 0.01

    def test_scan_is_a_loop(self, name):
        sampler, nodes, noise = SAMPLERS[name], self.nodes(name), self.step_noise(0, 1)
        x = initial_noise(self.KEYS, self.SHAPE[1:])
        last, trace = sample(sampler, PREDICT, x, nodes, noise=noise, trace=True)
        carry = sampler.init(x)
        for i in range(4):
            carry, x, x0 = sampler.step(
                carry, jax.tree.map(lambda a, i=i: a[i], nodes), x, PREDICT, noise[i]
            )
            np.testing.assert_allclose(trace.x[i], x, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(trace.x0[i], x0, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(last, trace.x[-1])

    def test_an_image_depends_on_its_own_key_alone(self, name):
        def made(keys):
            return sample(
                SAMPLERS[name],
                PREDICT,
                initial_noise(keys, self.SHAPE[1:]),
                self.nodes(name),
                keys=keys,
            )[0]

        both = made(self.KEYS)
        np.testing.assert_allclose(both[1], made(self.KEYS[1:])[0], rtol=1e-6)
        assert np.abs(both[0] - both[1]).max() > 0.01

    def test_a_known_region_is_kept(self, name):
        x, x0 = initial_noise(self.KEYS, self.SHAPE[1:]), jnp.full(self.SHAPE, 3.0)
        mask = jnp.array([[1.0, 1.0, 0.0]])
        nodes = self.nodes(name)
        made, _ = sample(
            SAMPLERS[name],
            PREDICT,
            x,
            nodes,
            schedule=SCHEDULE,
            keys=self.KEYS,
            known=Known(x0, mask),
        )
        if SAMPLERS[name].blend_after:
            level = float(SCHEDULE.sqrt_one_minus_alphas_cumprod[nodes.t[-1]])
            expected = q_sample(SCHEDULE, x0, jnp.int32(nodes.t[-1]), self.step_noise(1, 1)[-1, 0])
            np.testing.assert_allclose(made[:, :2], expected[:, :2], atol=1e-6)
        else:  # one step after the last blend
            level = float(SCHEDULE.sqrt_one_minus_alphas_cumprod[nodes.t[-1]])
        np.testing.assert_allclose(made[:, :2], 3.0, atol=6 * level)
        assert np.abs(made[:, 2] - 3.0).min() > 0.5

    def test_a_known_regions_noise_can_be_handed_in(self, name):
        x, x0, mask = (
            initial_noise(self.KEYS, self.SHAPE[1:]),
            jnp.full(self.SHAPE, 3.0),
            jnp.array([[1.0, 1.0, 0.0]]),
        )
        options = {"schedule": SCHEDULE, "keys": self.KEYS}
        drawn, _ = sample(
            SAMPLERS[name], PREDICT, x, self.nodes(name), known=Known(x0, mask), **options
        )
        given, _ = sample(
            SAMPLERS[name],
            PREDICT,
            x,
            self.nodes(name),
            known=Known(x0, mask, self.step_noise(1, 1)[:, 0]),
            **options,
        )
        np.testing.assert_allclose(drawn, given, rtol=1e-5, atol=1e-6)

    def test_missing_inputs_are_errors(self, name):
        x, known = jnp.zeros(self.SHAPE), Known(jnp.zeros(self.SHAPE), jnp.ones(self.SHAPE))
        with pytest.raises(ValueError, match="give keys"):
            sample(SAMPLERS[name], PREDICT, x, self.nodes(name))
        with pytest.raises(ValueError, match="give keys"):
            sample(
                SAMPLERS[name],
                PREDICT,
                x,
                self.nodes(name),
                noise=self.step_noise(0, 1),
                known=known,
                schedule=SCHEDULE,
            )
        with pytest.raises(ValueError, match="needs the schedule"):
            sample(SAMPLERS[name], PREDICT, x, self.nodes(name), keys=self.KEYS, known=known)


@pytest.mark.parametrize("name", ["ddim", "plms", "dpm_2", "dpmpp_3m", "unipc"])
def test_skipped_rows_do_nothing_and_every_start_is_one_program(name):
    sampler, grid = SAMPLERS[name], step_grid("uniform", 6, 1000)
    rows = len(sampler.nodes(SCHEDULE, grid).t)
    x, keys = jnp.linspace(-1.0, 2.0, 6).reshape(2, 3), jax.random.split(jax.random.key(7), 2)

    @jax.jit
    def run(nodes, start):
        last, trace = sample(
            sampler, PREDICT_AT_ANY_TIME, x, nodes, keys=keys, start=start, trace=True
        )
        assert trace is not None
        return last, trace.x

    for steps in (1, 4, 6):
        short = sampler.nodes(SCHEDULE, grid[:steps])
        nodes, start = padded(short, rows)
        assert (len(nodes.t), start) == (rows, rows - len(short.t))
        last, states = run(nodes, start)
        np.testing.assert_allclose(
            last, sample(sampler, PREDICT_AT_ANY_TIME, x, short, keys=keys)[0], rtol=2e-5
        )
        np.testing.assert_array_equal(states[:start], np.broadcast_to(x, (start, *x.shape)))
        assert np.abs(last - x).max() > 1e-3
    assert run._cache_size() == 1


def test_guidance_extrapolates_from_the_null_condition():
    def model(x, t, cond):
        return x + t[:, None] + cond

    x, t = jnp.ones((2, 3)), jnp.int32(5)
    cond, null = jnp.array([[2.0], [4.0]]), jnp.array([[1.0], [1.0]])
    for scale, expected in [
        (0.0, [7.0, 7.0]),
        (1.0, [8.0, 10.0]),
        (3.0, [10.0, 16.0]),
        (jnp.array([1.0, 2.0]), [8.0, 13.0]),
    ]:
        np.testing.assert_allclose(classifier_free(model, cond, null, scale)(x, t)[:, 0], expected)
    np.testing.assert_allclose(unguided(model, cond)(x, t)[:, 0], [8.0, 10.0])


def test_clipping_bounds_the_predicted_picture_and_leaves_the_noise():
    x, t = jnp.full((1, 2), 30.0), jnp.int32(500)
    free, clipped = PREDICT(x, t), predictor(exact_eps, SCHEDULE, "eps", clip=True)(x, t)
    assert float(free.x0.max()) > 1
    assert float(clipped.x0.max()) == 1
    np.testing.assert_array_equal(free.eps, clipped.eps)


def test_cfg_pp_renoises_with_the_eps_of_the_null_condition():
    def model(x, t, cond):
        return 0.1 * x + cond

    x, cond, null = jnp.ones((2, 3)), jnp.full((2, 1), 0.7), jnp.full((2, 1), 0.2)
    guided = classifier_free(model, cond, null, 0.6)(x, jnp.int32(500))
    both = classifier_free(model, cond, null, 0.6, renoise_null=True)
    ours = predictor(both, SCHEDULE, "eps")(x, jnp.int32(500))
    expected = predictor(lambda x, t: guided, SCHEDULE, "eps")(x, jnp.int32(500))
    np.testing.assert_allclose(ours.x0, expected.x0, rtol=1e-6)
    np.testing.assert_allclose(ours.eps, 0.1 * x + 0.2, rtol=1e-6)


def test_dynamic_threshold_divides_each_picture_by_its_own_quantile():
    x0 = jnp.array([[0.5, -0.2, 0.1], [4.0, -8.0, 2.0]])
    out = dynamic_threshold(1.0)(x0)
    np.testing.assert_allclose(out, [[0.5, -0.2, 0.1], [0.5, -1.0, 0.25]])
    np.testing.assert_allclose(dynamic_threshold(1.0, 10.0)(x0), x0 / 10)


def test_noise_dropout_keeps_the_expectation_and_acts_on_drawn_noise():
    noise, uniform = jnp.ones((4,)), jnp.array([0.1, 0.3, 0.5, 0.9])
    np.testing.assert_allclose(drop_noise(noise, uniform, 0.5), [0, 0, 2, 2])
    keys = jax.random.split(jax.random.key(0), 2)
    nodes = DDIM.nodes(SCHEDULE, step_grid("uniform", 4, 1000), eta=1.0)
    run = partial(sample, DDIM, PREDICT, initial_noise(keys, (3,)), nodes, keys=keys)
    plain = run()[0]
    np.testing.assert_array_equal(run(noise_dropout=0.0)[0], plain)
    assert np.abs(run(noise_dropout=0.5)[0] - plain).max() > 0.01


def test_a_temperature_for_each_timestep():
    scale = np.linspace(0.5, 2.0, 1000)
    grid = step_grid("uniform", 6, 1000)
    nodes, plain = DDPM.nodes(SCHEDULE, grid, temperature=scale), DDPM.nodes(SCHEDULE, grid)
    np.testing.assert_allclose(nodes.noise, plain.noise * scale[grid[::-1]], rtol=1e-6)


def test_log_likelihood_of_a_gaussian():
    """x ~ N(0, STD^2) at sigma_min: the flow is linear, so any probe gives the divergence."""
    low, high = 0.05, 8.0
    x, probe = jnp.linspace(-1, 1, 6).reshape(2, 3), jnp.ones((2, 3))
    found = log_likelihood(
        lambda y, sigma: y * STD**2 / (STD**2 + sigma**2), x, probe, low, high, rtol=1e-6, atol=1e-6
    )
    # The prior N(0, high^2) stands for N(0, STD^2 + high^2).
    wide, start = np.hypot(STD, high), np.hypot(STD, low)
    latent = np.asarray(x) * wide / start
    exact = -0.5 * (latent / high) ** 2 - np.log(high * np.sqrt(2 * np.pi)) + np.log(wide / start)
    np.testing.assert_allclose(found, exact.sum(1), atol=2e-3)


def test_lcm_returns_to_x0_at_every_step():
    grid = time_grid("distilled", 4, SCHEDULE)
    nodes = SAMPLERS["lcm"].nodes(SCHEDULE, grid)
    assert nodes.t.tolist() == [999, 759, 499, 259]
    prev = np.append(SCHEDULE.alphas_cumprod[grid[::-1][1:]], 1.0)
    np.testing.assert_allclose(nodes.x0, np.sqrt(prev), rtol=1e-5)
    np.testing.assert_allclose(nodes.noise, np.sqrt(1 - prev), rtol=1e-5)
    assert np.abs(nodes.xt).max() < 1e-6


def test_tcd_without_noise_is_ddim_and_with_it_keeps_the_level():
    grid = step_grid("uniform", 5, 1000)
    exact, ddim = SAMPLERS["tcd"].nodes(SCHEDULE, grid, eta=0.0), DDIM.nodes(SCHEDULE, grid)
    for name in ("x0", "eps", "noise"):
        np.testing.assert_allclose(getattr(exact, name), getattr(ddim, name), atol=1e-6)
    noisy = SAMPLERS["tcd"].nodes(SCHEDULE, grid, eta=0.4)
    np.testing.assert_allclose(noisy.x0, ddim.x0, rtol=1e-5)
    np.testing.assert_allclose(noisy.eps**2 + noisy.noise**2, ddim.eps**2, rtol=1e-4)
    assert noisy.noise[:-1].min() > 0.01
    with pytest.raises(ValueError, match="eta must be from 0 to 1"):
        SAMPLERS["tcd"].nodes(SCHEDULE, grid, eta=1.5)
