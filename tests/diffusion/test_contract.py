"""Contract of every sampler: convergence at its order, and images that depend on their seed alone.

x0 ~ N(MEAN, STD^2) in each of three places, with a known score. A sampler is then linear in x_T and
in its noise: running it on unit vectors gives its exact mean and covariance, without Monte Carlo
error.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.adaptive import DPMAdaptive
from ldm_jax.diffusion.discrete import PLMS
from ldm_jax.diffusion.guidance import classifier_free, predictor
from ldm_jax.diffusion.objective import Prediction
from ldm_jax.diffusion.samplers import SAMPLERS, Inversion, initial_noise, padded, sample, time_grid
from ldm_jax.diffusion.schedule import level, lift, log_sigmas, make_schedule, t_to_sigma
from ldm_jax.diffusion.solvers import Multistep
from ldm_jax.diffusion.stochastic import DPMppSDE
from ldm_jax.diffusion.tableau import Tableau

MEAN, STD = np.array([0.7, -0.3, 0.1]), np.array([0.5, 0.8, 1.2])
SCHEDULE = make_schedule("linear", 1000, 0.0015, 0.0195)
START, STOP = 40.0, 0.1  # sigmas between which orders are measured
ORDERS_WITHOUT_NOISE = [
    ("euler_ancestral", 1),
    ("dpm_2_ancestral", 2),
    ("dpmpp_2s_ancestral", 2),
    ("dpmpp_sde", 2),
    ("dpmpp_2m_sde", 2),
    ("dpmpp_3m_sde", 3),
]
TABLES = {name: s for name, s in SAMPLERS.items() if isinstance(s, (Tableau, PLMS))}
# The same number of model calls for every sampler. Where 2 calls are left, a single-step method of
# order 3 ends with a step of order 2, which does not lower its order.
COUNTS = [98, 194, 386]


@pytest.fixture(scope="module", autouse=True)
def float64():
    """Errors of order 4 vanish in float32."""
    with jax.enable_x64(True):
        yield


def exact(x: jax.Array, t: jax.Array, at: Any = None, eps: Any = None) -> Prediction:
    """E[x0 | x] and E[eps | x] at x = a x0 + s eps."""
    a, s = level(SCHEDULE, t, x) if at is None else (lift(jnp.asarray(v), x) for v in at)
    if eps is not None:
        return Prediction(eps, (x - s * eps) / a)
    x0 = MEAN + a * STD**2 * (x - a * MEAN) / (a**2 * STD**2 + s**2)
    return Prediction((x - a * x0) / s, x0)


@partial(jax.jit, static_argnums=0)
def run(sampler: Any, nodes: Any, x: jax.Array, noise: jax.Array | None) -> jax.Array:
    return sample(sampler, exact, x, nodes, noise=noise)[0]


def linear(sampler: Any, nodes: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(c, A, B [n, 3]) with x = c + A x_T + sum_i B_i z_i, from runs on 0 and unit vectors."""
    n = len(nodes.t) if sampler.draws else 0
    x = jnp.zeros((n + 2, 3)).at[1].set(1.0)
    noise = (
        jnp.zeros((n, 1, n + 2, 3)).at[jnp.arange(n), 0, 2 + jnp.arange(n)].set(1.0) if n else None
    )
    out = np.asarray(run(sampler, nodes, x, noise))
    return out[0], out[1] - out[0], out[2:] - out[0]


def moments(
    sampler: Any, nodes: Any, start: float, stop: float, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of y = x / sqrt(abar) at the sigma ``stop``.

    At ``start`` the distribution is exact, except for a mean ``shift`` standard deviations off.
    """
    a, a_end = 1 / np.hypot(1, start), 1 / np.hypot(1, stop)
    c, gain, noise = linear(sampler, nodes)
    std = np.hypot(STD, start)
    mean = (c + gain * a * (MEAN + shift * std)) / a_end
    return mean, np.sqrt((gain * a * std) ** 2 + (noise**2).sum(0)) / a_end


def table(sampler: Tableau, steps: int, **options: float) -> tuple[Any, float, float]:
    """(nodes, first sigma, last sigma).

    log sigma is quadratic in the step: methods that start at low order start with short steps, so
    that their own order shows.
    """
    sigmas = START * (STOP / START) ** (np.linspace(0, 1, steps + 1) ** 2)
    sigmas = sigmas[::-1] if isinstance(sampler, Inversion) else sigmas
    return sampler.table(sigmas, np.zeros_like, **options), sigmas[0], sigmas[-1]


def errors(sampler: Tableau, steps: int, **options: float) -> tuple[float, float]:
    """Errors (mean, standard deviation) over the true deviation, the largest of three places.

    ODE solvers start one standard deviation off, because the ODE transports quantiles. For SDE
    solvers only the distribution converges.
    """
    nodes, start, stop = table(sampler, steps, **options)
    noisy = {"eta", "restarts"} & set(sampler.options)
    shift = 1.0 if options.get("eta") == 0.0 or not noisy else 0.0
    mean, std = moments(sampler, nodes, start, stop, shift)
    true = np.hypot(STD, stop)
    return float(np.abs((mean - MEAN) / true - shift).max()), float(np.abs(std / true - 1).max())


def slope(counts: list[int], values: list[float]) -> float:
    """The order of convergence: minus the slope of log error over log count."""
    return float(-np.polyfit(np.log(counts), np.log(values), 1)[0])


@pytest.mark.parametrize("name", TABLES)
def test_order(name: str) -> None:
    sampler = TABLES[name]
    if name.startswith("unipc_"):  # without the low orders at the end, that of the paper
        algorithm = dataclasses.replace(sampler.algorithm, lower_final=False)
        sampler = dataclasses.replace(sampler, algorithm=algorithm, order=algorithm.p + 1)
    of_mean, of_std = zip(*(errors(sampler, n) for n in COUNTS), strict=True)
    assert abs(slope(COUNTS, of_std) - sampler.order) < 0.3
    assert of_std[-1] < 0.02
    if {"eta", "restarts"} & set(sampler.options):  # what noise is added to is right on average
        assert max(of_mean) < 1e-9
    else:
        assert abs(slope(COUNTS, of_mean) - sampler.order) < 0.3


@pytest.mark.parametrize(("name", "order"), ORDERS_WITHOUT_NOISE)
def test_order_of_the_ode_with_eta_0(name: str, order: int) -> None:
    of_mean, of_std = zip(*(errors(TABLES[name], n, eta=0.0) for n in COUNTS), strict=True)
    assert abs(slope(COUNTS, of_std) - order) < 0.3
    assert abs(slope(COUNTS, of_mean) - order) < 0.3


@pytest.mark.parametrize(
    ("name", "options"), [("ddim", {"eta": 0.0}), ("ddim", {"eta": 1.0}), ("ddpm", {})]
)
def test_order_on_timesteps(name: str, options: dict[str, float]) -> None:
    """DDIM stops at the schedule's first level and DDPM with the mean of x0 there."""
    first, last = t_to_sigma(SCHEDULE, [0, 999])
    truth = np.hypot(STD, first) if name == "ddim" else STD**2 / np.hypot(STD, first)
    off = []
    for steps in COUNTS:
        nodes = SAMPLERS[name].nodes(SCHEDULE, time_grid("exponential", steps, SCHEDULE), **options)
        mean, std = moments(SAMPLERS[name], nodes, last, first if name == "ddim" else 0.0)
        assert np.abs(mean - MEAN).max() < 1e-3
        off.append(float(np.abs(std / truth - 1).max()))
    assert abs(slope(COUNTS, off) - SAMPLERS[name].order) < 0.3
    assert off[-1] < 0.02


def test_released_third_order_is_of_second_order() -> None:
    """The reason to depart from the authors' code: it drops half a moment."""
    released = Tableau(Multistep(3, third="released"), 3, history=2)
    assert abs(slope(COUNTS, [errors(released, n)[1] for n in COUNTS]) - 2) < 0.3


def test_fresh_noise_in_both_stages_is_of_first_order() -> None:
    """The reason for DPM++ SDE to follow one Brownian path."""
    fresh = Tableau(DPMppSDE(one_path=False), 1, history=1, draws=1)
    assert abs(slope(COUNTS, [errors(fresh, n)[1] for n in COUNTS]) - 1) < 0.3


def test_adaptive_steps() -> None:
    """Adaptive steps per image: the tolerance bounds the error, the order the number of steps."""
    sampler = SAMPLERS["dpm_adaptive"]
    assert isinstance(sampler, DPMAdaptive)
    y = MEAN + np.array([[1.0], [-0.5], [0.1]]) * np.hypot(STD, START)
    truth = MEAN + (y - MEAN) * np.hypot(STD, STOP) / np.hypot(STD, START)
    counts, off = [], []
    for tolerance in (1e-5, 1e-6, 1e-7, 1e-8):
        nodes = sampler.table(START, STOP, log_sigmas(SCHEDULE), rtol=tolerance, atol=tolerance)
        row = jax.tree.map(lambda a: a[0], nodes)
        x, state = jax.jit(partial(sampler.run, exact))(y / np.hypot(1, START), row)
        off.append(float(np.abs(x * np.hypot(1, STOP) - truth).max()))
        counts.append(float(state.accepted.mean()))
        assert off[-1] < 200 * tolerance
        assert (state.lam >= -np.log(STOP) - 1e-4).all()
    assert len(set(state.accepted.tolist())) > 1
    assert abs(slope(counts, off) - sampler.order) < 0.3


# ----------------------------------------------------------------- through the schedule, with seeds


@partial(jax.jit, static_argnums=0)
def pictures(
    sampler: Any, nodes: Any, seeds: jax.Array, scale: jax.Array, phi: jax.Array, last: jax.Array
) -> jax.Array:
    """A guided nonlinear model on pictures of 4 x 4 x 2."""

    def model(x: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
        return jnp.tanh(x + lift(cond, x)) * lift(0.5 + t / 2000, x)

    keys = jax.vmap(jax.random.key)(seeds)
    x = initial_noise(keys, (4, 4, 2)).astype(jnp.float32)
    cond, null = jnp.full(x.shape[:1], 0.3), jnp.zeros(x.shape[:1])
    denoise = classifier_free(model, cond, null, scale, interval=(0.0, last), rescale=phi)
    return sample(
        sampler, predictor(denoise, SCHEDULE, "eps"), x, nodes, schedule=SCHEDULE, keys=keys
    )[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_is_a_picture_and_settings_compile_nothing(name: str) -> None:
    sampler = SAMPLERS[name]
    with jax.enable_x64(False):
        grid = time_grid("uniform", 7, SCHEDULE)
        common = (jnp.float32(3.0), jnp.float32(0.0), jnp.float32(999.0))
        nodes, seeds = sampler.nodes(SCHEDULE, grid), np.arange(8, dtype=np.uint32)
        eight = pictures(sampler, nodes, seeds, *common)
        assert np.isfinite(eight).all()
        assert np.abs(eight[0] - eight[3]).max() > 0.01
        np.testing.assert_allclose(
            pictures(sampler, nodes, seeds[3:4], *common)[0], eight[3], rtol=2e-5, atol=2e-5
        )
        compiled = pictures._cache_size()
        changed = {
            "eta": 0.35,
            "temperature": 0.7,
            "s_noise": 1.01,
            "churn": 2.0,
            "s_tmin": 0.1,
            "s_tmax": 9.0,
        }
        changed |= {"rtol": 0.02, "atol": 0.01, "h_init": 0.1, "safety": 0.9}
        changed |= {"r": 0.4, "order": 2, "timestep_scaling": 0.01}
        changed |= {"restarts": 2, "restart_min": 0.6, "restart_max": 6.0}
        for option in sampler.options:
            settings = {o: v for o, v in {"churn": 2.0, "eta": 0.5}.items() if o in sampler.options}
            nodes_changed = sampler.nodes(SCHEDULE, grid, **(settings | {option: changed[option]}))
            off = np.abs(pictures(sampler, nodes_changed, seeds, *common) - eight).max()
            assert off > 1e-6 or option == "safety", option  # which decides on few steps
        for other in ((1.5, 0.0, 999.0), (3.0, 0.7, 999.0), (3.0, 0.0, 500.0)):
            assert (
                np.abs(pictures(sampler, nodes, seeds, *map(jnp.float32, other)) - eight).max()
                > 1e-6
            )
        pictures(
            sampler, sampler.nodes(SCHEDULE, time_grid("trailing", 7, SCHEDULE)), seeds + 8, *common
        )
        if name != "restart":  # its options change the number of rows
            assert pictures._cache_size() == compiled


@partial(jax.jit, static_argnums=0)
def run_from(sampler: Any, nodes: Any, start: Any, x: jax.Array) -> jax.Array:
    noise = jnp.zeros((jax.tree.leaves(nodes)[0].shape[0], 1, *x.shape)) if sampler.draws else None
    return sample(sampler, exact, x, nodes, noise=noise, start=start)[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_fewest_steps_give_pictures(name: str) -> None:
    """One to three steps on every grid come near the distribution and stay finite."""
    sampler, x = SAMPLERS[name], jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)))
    rows = 0
    for steps in (3, 2, 1):
        for grid in ("uniform", "quad", "trailing", "leading", "karras", "exponential"):
            nodes = sampler.nodes(SCHEDULE, time_grid(grid, steps, SCHEDULE))
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nodes)), (steps, grid)
        nodes, start = sampler.nodes(SCHEDULE, time_grid("trailing", steps, SCHEDULE)), None
        rows = rows or len(jax.tree.leaves(nodes)[0])  # of three steps: shorter runs are padded
        nodes, start = padded(nodes, rows)
        out = run_from(sampler, nodes, start, x)
        assert np.isfinite(out).all(), steps
        # Inversion goes away from the data, to noise of the last level.
        assert (
            np.abs(out - (0 if isinstance(sampler, Inversion) else MEAN)).max() < 4 * STD.max()
        ), steps


@pytest.mark.parametrize("name", TABLES)
def test_every_step_calls_the_model_once_in_the_program(name: str) -> None:
    """Multi-stage steps are rows of one loop, so that the program holds the model once."""
    calls = []

    def counted(x: jax.Array, t: jax.Array, at: Any = None, eps: Any = None) -> Prediction:
        calls.extend([1] * (eps is None))
        return exact(x, t, at, eps)

    nodes, _, _ = table(TABLES[name], 6)
    noise = jnp.zeros((len(nodes.t), 1, 2, 3)) if TABLES[name].draws else None
    jax.eval_shape(
        lambda x: sample(TABLES[name], counted, x, nodes, noise=noise), jnp.zeros((2, 3))
    )
    assert len(calls) == 1


def test_inversion_leads_back() -> None:
    grid = time_grid("exponential", 200, SCHEDULE)
    x = jnp.asarray(MEAN + STD * np.array([[1.0], [-1.2]]))
    noise = run(
        SAMPLERS["ddim_inversion"], SAMPLERS["ddim_inversion"].nodes(SCHEDULE, grid), x, None
    )
    back = run(SAMPLERS["plms"], SAMPLERS["plms"].nodes(SCHEDULE, grid), noise, None)
    np.testing.assert_allclose(back, x, atol=0.06)


def test_unknown_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"no 'eta' \(it has churn"):
        SAMPLERS["heun"].nodes(SCHEDULE, np.arange(5), eta=0.5)
