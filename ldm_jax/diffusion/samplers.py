"""Samplers, and the one loop that runs any of them.

A sampler is a frozen dataclass, hence a static argument of a jitted function. Its ``nodes(schedule, timesteps, ...)`` are tables over the steps,
computed on the host in float64 and traced: another eta, temperature or grid of the same length compiles nothing. ``step`` is the algorithm.
DDPM and DDIM are here; solvers.py and stochastic.py hold those that are tables of weights (tableau.py), and all are in SAMPLERS below.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import solvers, stochastic
from ldm_jax.diffusion.adaptive import DPMAdaptive
from ldm_jax.diffusion.feature_cache import FeatureCache
from ldm_jax.diffusion.grids import step_grid, time_grid
from ldm_jax.diffusion.guidance import Predict
from ldm_jax.diffusion.schedule import Array, Schedule, log_sigmas, q_sample, sigma_to_t, t_to_sigma
from ldm_jax.diffusion.tableau import Tableau

__all__ = [
    "DDIM", "DDPM", "SAMPLERS", "AnySampler", "Known", "Sampler", "Trace", "initial_noise", "padded", "sample", "step_grid", "time_grid"
]  # fmt: skip

Carry = Any
State = tuple[Carry, jax.Array, Any]  # of the loop: the sampler's, x, and the features of a cache


# ----------------------------------------------------------------------------------------------------------------------- samplers


class Sampler(Protocol):
    """``draws`` standard normal arrays enter each step; ``blend_after`` says on which side of a step a known region is blended in. ``order`` is
    the order of convergence of the result: to the ODE's solution, or with noise in play in its mean and covariance.
    """

    @property
    def draws(self) -> int: ...
    @property
    def blend_after(self) -> bool: ...
    @property
    def order(self) -> int: ...
    @property
    def options(self) -> tuple[str, ...]:
        """What ``nodes`` takes by name."""
        ...

    @property
    def nodes(self) -> Callable[..., Any]:
        """(schedule, ascending timesteps, **options) -> a pytree of arrays [S] in the order of sampling. Its field ``t`` is the timestep at which
        the model is called; where there is a field ``begin``, a known region is blended in only where it is true.
        """
        ...

    def init(self, x: jax.Array) -> Carry:
        """What the sampler remembers between steps, before the first."""
        ...

    def step(
        self, carry: Carry, node: Any, x: jax.Array, predict: Predict, noise: jax.Array | None
    ) -> tuple[Carry, jax.Array, jax.Array]:
        """(carry, next x, predicted x0) from x [b, ...] and ``noise`` [draws, b, ...]: one call of the model."""
        ...


AnySampler = Sampler | DPMAdaptive


class DDIMNode(NamedTuple):
    t: Array
    sqrt_abar_prev: Array
    direction: Array
    sigma: Array


@dataclasses.dataclass(frozen=True)
class DDIM:
    """Song, Meng & Ermon 2021 (arXiv:2010.02502), eq. 12 and 16. ``eta`` 0 is deterministic, 1 has the DDPM's variance.

    The last step leads to the noise of timestep 0, as in the original, or with ``to_x0`` to none (diffusers' set_alpha_to_one).
    """

    to_x0: bool = False

    draws = 1
    blend_after = False
    order = 1
    options = ("eta", "temperature")

    def nodes(
        self,
        schedule: Schedule,
        timesteps: np.ndarray,
        *,
        eta: float = 0.0,
        temperature: float = 1.0,
    ) -> DDIMNode:
        abar, prev = _abar_pairs(schedule, timesteps, first=1.0 if self.to_x0 else None)
        sigma = eta * np.sqrt((1 - prev) / (1 - abar) * (1 - abar / prev))
        # An eta above 1 can ask for more noise than x_{t-1} has: then nothing is left for the direction.
        direction = np.sqrt(np.maximum(1 - prev - sigma**2, 0))
        return _descending(DDIMNode(timesteps, np.sqrt(prev), direction, temperature * sigma))

    def init(self, x: jax.Array) -> Carry:
        return None

    def step(
        self, carry: Carry, node: DDIMNode, x: jax.Array, predict: Predict, noise: jax.Array | None
    ) -> tuple[Carry, jax.Array, jax.Array]:
        assert noise is not None
        eps, x0 = predict(x, node.t)
        return carry, node.sqrt_abar_prev * x0 + node.direction * eps + node.sigma * noise[0], x0


class DDPMNode(NamedTuple):
    t: Array
    coef_x0: Array
    coef_xt: Array
    std: Array


@dataclasses.dataclass(frozen=True)
class DDPM:
    """Ancestral sampling (Ho, Jain & Abbeel 2020, algorithm 2); on fewer steps, that of the thinned process (Nichol & Dhariwal 2021)."""

    draws = 1
    blend_after = True
    order = 1
    options = ("temperature",)

    def nodes(
        self,
        schedule: Schedule,
        timesteps: np.ndarray,
        *,
        eta: float = 1.0,
        temperature: float = 1.0,
    ) -> DDPMNode:
        if eta != 1.0:
            raise ValueError(
                "the ddpm sampler has no eta; use ddim, whose eta 1 has the same variance"
            )
        abar, prev = _abar_pairs(schedule, timesteps, first=1.0)
        beta = 1 - abar / prev
        variance = (1 - schedule.v_posterior) * beta * (1 - prev) / (
            1 - abar
        ) + schedule.v_posterior * beta
        std = np.sqrt(np.maximum(variance, 1e-20)) * temperature
        std[0] = 0.0  # the last step of sampling returns the mean
        return _descending(
            DDPMNode(
                timesteps,
                beta * np.sqrt(prev) / (1 - abar),
                (1 - prev) * np.sqrt(1 - beta) / (1 - abar),
                std,
            )
        )

    def init(self, x: jax.Array) -> Carry:
        return None

    def step(
        self, carry: Carry, node: DDPMNode, x: jax.Array, predict: Predict, noise: jax.Array | None
    ) -> tuple[Carry, jax.Array, jax.Array]:
        assert noise is not None
        x0 = predict(x, node.t).x0
        return carry, node.coef_x0 * x0 + node.coef_xt * x + node.std * noise[0], x0


@dataclasses.dataclass(frozen=True)
class Inversion(Tableau):
    """DDIM run backwards (Song et al. 2021, section 4.3 and appendix; Dhariwal & Nichol 2021, appendix F): from an image's latents, which stand at
    ``end``, up to the noise at the last timestep, from which DDIM leads back.
    """

    def nodes(self, schedule: Schedule, timesteps: np.ndarray, **options: float) -> Any:
        """The table over ascending timesteps, in that order."""
        times = np.append(0.0 if self.end is None else self.end, np.asarray(timesteps, np.float64))
        return self.table(t_to_sigma(schedule, times), partial(sigma_to_t, schedule), **options)


def _abar_pairs(
    schedule: Schedule, timesteps: np.ndarray, first: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Abar at each timestep and at the one before it in the grid, float64; before the first stands ``first``, or abar_0 as DDIM has it."""
    table, timesteps = np.asarray(schedule.alphas_cumprod, np.float64), np.asarray(timesteps)
    if np.issubdtype(timesteps.dtype, np.integer):
        abar = table[timesteps]
    else:  # between timesteps, log sigma is linear
        abar = 1 / (
            1 + np.exp(2 * np.interp(timesteps, np.arange(len(table)), log_sigmas(schedule)))
        )
    return abar, np.append(table[0] if first is None else first, abar[:-1])


def _descending(nodes: Any) -> Any:
    """Ascending tables -> the order of sampling, in 32 bits."""
    return jax.tree.map(
        lambda a: np.asarray(
            a[::-1], np.int32 if np.issubdtype(a.dtype, np.integer) else np.float32
        ),
        nodes,
    )


# ------------------------------------------------------------------------------------------------------------------------ the loop


class Known(NamedTuple):
    """A region to keep while the rest is sampled: x <- mask * q_sample(x0, t) + (1 - mask) * x, at every step.

    x0 [b, ...]; mask 1 where x0 is kept, broadcastable to x0. ``noise`` [S, b, ...] for its q_sample, or None to draw it from the keys.
    """

    x0: jax.Array
    mask: jax.Array
    noise: jax.Array | None = None


class Trace(NamedTuple):
    """Every step of a run, [S, b, ...] each: x after the step, and the x0 predicted in it."""

    x: jax.Array
    x0: jax.Array


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal [b, *shape], one image per key: an image depends on its own key alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)


def sample(
    sampler: AnySampler,
    predict: Predict,
    x: jax.Array,
    nodes: Any,
    *,
    schedule: Schedule | None = None,
    keys: jax.Array | None = None,
    noise: jax.Array | None = None,
    known: Known | None = None,
    start: jax.Array | None = None,
    trace: bool = False,
    cache: FeatureCache | None = None,
) -> tuple[jax.Array, Trace | None]:
    """Runs ``sampler`` over ``nodes`` from ``x`` [b, ...], as one `jax.lax.scan`: (the last x, a Trace if asked for).

    Step noise comes from ``keys`` [b], one typed PRNG key per image, or is handed in as ``noise`` [S, draws, b, ...]. ``known`` needs the
    ``schedule``. Rows before ``start`` [], traced, are skipped and cost nothing (see `padded`); a Trace holds x in their places.
    ``cache`` is the one by which ``predict`` calls its network.
    """
    if keys is None and (
        (sampler.draws and noise is None) or (known is not None and known.noise is None)
    ):
        raise ValueError("sample: give keys, or every noise that the run needs")
    if known is not None and schedule is None:
        raise ValueError("sample: a known region needs the schedule")
    if isinstance(sampler, DPMAdaptive):
        if known is not None or start is not None or trace or cache is not None:
            raise ValueError(
                "sample: dpm_adaptive chooses its own steps, so it keeps no known region, skips none, leaves no trace and has no cache"
            )
        return sampler.run(predict, x, nodes)[0], None

    def draw(index: jax.Array, purpose: int, count: int) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 1), index), purpose)
            return jax.random.normal(key, (count, *x.shape[1:]), x.dtype)

        assert keys is not None
        return jax.vmap(one, out_axes=1)(keys)

    def blend(x: jax.Array, node: Any, index: jax.Array, given: jax.Array | None) -> jax.Array:
        if known is None:
            return x
        assert schedule is not None
        original = q_sample(
            schedule, known.x0, node.t, draw(index, 1, 1)[0] if given is None else given
        )
        blended = known.mask * original + (1 - known.mask) * x
        return jnp.where(node.begin, blended, x) if hasattr(node, "begin") else blended

    def body(state: State, inputs: Any) -> tuple[State, Trace | None]:
        carry, x, deep = state
        index, node, step_noise, known_noise = inputs
        if cache is not None:
            cache.begin(deep, index if start is None else index - start)
        if not sampler.blend_after:
            x = blend(x, node, index, known_noise)
        if step_noise is None and sampler.draws:
            step_noise = draw(index, 0, sampler.draws)
        carry, x, x0 = sampler.step(carry, node, x, predict, step_noise)
        if sampler.blend_after:
            x = blend(x, node, index, known_noise)
        return (carry, x, None if cache is None else cache.deep), Trace(x, x0) if trace else None

    def skip(state: State, inputs: Any) -> tuple[State, Trace | None]:
        return state, Trace(state[1], state[1]) if trace else None

    def maybe(state: State, inputs: Any) -> tuple[State, Trace | None]:
        # A condition on one number for the whole batch: only the branch that is taken runs.
        return jax.lax.cond(inputs[0] >= start, body, skip, state, inputs)

    count = jax.tree.leaves(nodes)[0].shape[0]
    inputs = (jnp.arange(count), nodes, noise, None if known is None else known.noise)
    state = sampler.init(x), x, None if cache is None else cache.empty(predict, x)
    (_, x, _), steps = jax.lax.scan(body if start is None else maybe, state, inputs)
    return x, steps


def padded(nodes: Any, count: int) -> tuple[Any, np.int32]:
    """(nodes with ``count`` rows, the row where they begin): filled up in front, so that shorter runs are the same program as the longest."""
    missing = count - jax.tree.leaves(nodes)[0].shape[0]
    return jax.tree.map(
        lambda a: np.concatenate([np.repeat(a[:1], missing, 0), a]), nodes
    ), np.int32(missing)


# ------------------------------------------------------------------------------------------------------------------- the registry

SAMPLERS: dict[str, AnySampler] = {
    "ddim": DDIM(),
    "ddim_x0": DDIM(to_x0=True),
    "ddpm": DDPM(),
    "ddim_inversion": Inversion(solvers.euler, 1, end=0.0),
    "plms": Tableau(solvers.plms, 2, "eps", history=4, end=0.0),
    "dpm_solver_1": Tableau(solvers.Singlestep(1, "eps"), 1, "eps"),
    "dpm_solver_2": Tableau(solvers.Singlestep(2, "eps"), 2, "eps", history=1),
    "dpm_solver_3": Tableau(solvers.Singlestep(3, "eps"), 3, "eps", history=2),
    "dpm_solver_1m": Tableau(solvers.Multistep(1, "eps"), 1, "eps"),
    "dpm_solver_2m": Tableau(solvers.Multistep(2, "eps"), 2, "eps", history=1),
    "dpm_solver_3m": Tableau(solvers.Multistep(3, "eps"), 3, "eps", history=2),
    "dpmpp_2s": Tableau(solvers.Singlestep(2, "x0"), 2, history=1),
    "dpmpp_2m": Tableau(solvers.Multistep(2, "x0"), 2, history=1),
    "dpmpp_3m": Tableau(solvers.Multistep(3, "x0"), 3, history=2),
    "unipc": Tableau(solvers.UniPC(2), 3, history=2, corrects=True),
    "euler": Tableau(solvers.euler, 1, draws=1),
    "heun": Tableau(solvers.heun, 2, history=1, draws=1),
    "dpm_2": Tableau(solvers.dpm_2, 2, draws=1),
    "lms": Tableau(solvers.lms, 4, "eps", history=3),
    "euler_ancestral": Tableau(stochastic.euler_ancestral, 1, draws=1),
    "dpm_2_ancestral": Tableau(stochastic.dpm_2_ancestral, 2, draws=1),
    "dpmpp_2s_ancestral": Tableau(stochastic.dpmpp_2s_ancestral, 2, history=1, draws=1),
    "dpmpp_sde": Tableau(stochastic.DPMppSDE(), 2, history=1, draws=1),
    "dpmpp_2m_sde": Tableau(stochastic.DPMppMultistepSDE(2, "half"), 2, history=1, draws=1),
    "dpmpp_3m_sde": Tableau(stochastic.DPMppMultistepSDE(3, "exact"), 2, history=2, draws=1),
    "dpm_fast": Tableau(
        solvers.Singlestep(3, "eps"), 3, "eps", history=2, arrange=solvers.dpm_fast_sigmas
    ),
    "dpm_adaptive": DPMAdaptive(),
}
