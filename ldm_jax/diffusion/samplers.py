"""Samplers, and the one loop that runs any of them.

A sampler is a frozen dataclass, hence a static argument of a jitted function. Its ``nodes(schedule, timesteps, ...)`` are tables over the steps,
computed on the host in float64 and traced: another eta, temperature or grid of the same length compiles nothing. ``step`` is the algorithm.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.guidance import Predict
from ldm_jax.diffusion.schedule import Array, Schedule, q_sample

Carry = Any


# --------------------------------------------------------------------------------------------------------------------- step grids


def _uniform(steps: int, total: int) -> np.ndarray:
    grid = np.arange(steps) * total // steps
    return grid + (grid[-1] + 1 < total)  # the original's +1, except where it would leave the schedule


# name -> ascending timesteps [steps] within 0 .. total - 1, before they are made distinct
GRIDS: dict[str, Callable[[int, int], np.ndarray]] = {
    "uniform": _uniform,
    "quad": lambda steps, total: (np.linspace(0, np.sqrt(total * 0.8), steps) ** 2).astype(int) + 1,
    "trailing": lambda steps, total: (
        np.round(np.arange(1, steps + 1) * total / steps).astype(int) - 1
    ),  # Lin et al. 2023, arXiv:2305.08891
}


def step_grid(kind: str, steps: int, total: int, *, compat: bool = False) -> np.ndarray:
    """Ascending, distinct timesteps, int64 [steps], for any ``steps`` from 1 to ``total``.

    ``compat`` gives the original's "uniform" grid instead: stride total // steps, which for some counts has more than ``steps`` entries and for
    others (where the original crashes) leaves the schedule: ValueError.
    """
    if kind not in GRIDS:
        raise ValueError(f"step grid {kind!r} does not exist (have {', '.join(GRIDS)})")
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be from 1 to {total}, not {steps}")
    original = compat and kind == "uniform"
    grid = np.arange(0, total, total // steps) + 1 if original else GRIDS[kind](steps, total)
    if compat:
        if grid[-1] >= total:
            raise ValueError(
                f"the original's {kind} grid of {steps} steps reaches timestep {grid[-1]} of {total}; leave out compat or take other steps"
            )
        return grid
    ramp = np.arange(len(grid))
    grid = np.maximum.accumulate(grid - ramp) + ramp  # distinct: at least one apart ...
    return np.minimum(grid, total - len(grid) + ramp)  # ... and inside the schedule


# ----------------------------------------------------------------------------------------------------------------------- samplers


class Sampler(Protocol):
    """``draws`` standard normal arrays enter each step; ``blend_after`` says on which side of a step a known region is blended in."""

    draws: int
    blend_after: bool

    def nodes(self, schedule: Schedule, timesteps: np.ndarray, *, eta: float = ..., temperature: float = ...) -> Any:
        """A pytree of arrays [S] in the order of sampling, with a field ``t``: the timestep at which the step starts."""
        ...

    def init(self, x: jax.Array) -> Carry:
        """What the sampler remembers between steps, before the first."""
        ...

    def step(
        self, carry: Carry, node: Any, x: jax.Array, predict: Predict, noise: jax.Array | None
    ) -> tuple[Carry, jax.Array, jax.Array]:
        """(carry, next x, predicted x0) from x [b, ...] and ``noise`` [draws, b, ...]."""
        ...


class DDIMNode(NamedTuple):
    t: Array
    sqrt_abar_prev: Array
    direction: Array
    sigma: Array


@dataclasses.dataclass(frozen=True)
class DDIM:
    """Song, Meng & Ermon 2021 (arXiv:2010.02502), eq. 12 and 16. ``eta`` 0 is deterministic, 1 has the DDPM's variance."""

    draws = 1
    blend_after = False

    def nodes(
        self, schedule: Schedule, timesteps: np.ndarray, *, eta: float = 0.0, temperature: float = 1.0
    ) -> DDIMNode:
        abar, prev = _abar_pairs(schedule, timesteps)
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

    def nodes(
        self, schedule: Schedule, timesteps: np.ndarray, *, eta: float = 1.0, temperature: float = 1.0
    ) -> DDPMNode:
        if eta != 1.0:
            raise ValueError("the ddpm sampler has no eta; use ddim, whose eta 1 has the same variance")
        abar, prev = _abar_pairs(schedule, timesteps, first=1.0)
        beta = 1 - abar / prev
        variance = (1 - schedule.v_posterior) * beta * (1 - prev) / (1 - abar) + schedule.v_posterior * beta
        std = np.sqrt(np.maximum(variance, 1e-20)) * temperature
        std[0] = 0.0  # the last step of sampling returns the mean
        return _descending(
            DDPMNode(timesteps, beta * np.sqrt(prev) / (1 - abar), (1 - prev) * np.sqrt(1 - beta) / (1 - abar), std)
        )

    def init(self, x: jax.Array) -> Carry:
        return None

    def step(
        self, carry: Carry, node: DDPMNode, x: jax.Array, predict: Predict, noise: jax.Array | None
    ) -> tuple[Carry, jax.Array, jax.Array]:
        assert noise is not None
        x0 = predict(x, node.t).x0
        return carry, node.coef_x0 * x0 + node.coef_xt * x + node.std * noise[0], x0


def _abar_pairs(schedule: Schedule, timesteps: np.ndarray, first: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """abar at each timestep and at the one before it in the grid, float64; before the first stands ``first``, or abar_0 as DDIM has it."""
    table = np.asarray(schedule.alphas_cumprod, np.float64)
    abar = table[timesteps]
    return abar, np.append(table[0] if first is None else first, abar[:-1])


def _descending(nodes: Any) -> Any:
    """Ascending tables -> the order of sampling, in 32 bits."""
    return jax.tree.map(
        lambda a: np.asarray(a[::-1], np.int32 if np.issubdtype(a.dtype, np.integer) else np.float32), nodes
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
    sampler: Sampler,
    predict: Predict,
    x: jax.Array,
    nodes: Any,
    *,
    schedule: Schedule | None = None,
    keys: jax.Array | None = None,
    noise: jax.Array | None = None,
    known: Known | None = None,
    trace: bool = False,
) -> tuple[jax.Array, Trace | None]:
    """Runs ``sampler`` over ``nodes`` from ``x`` [b, ...], as one `jax.lax.scan`: (the last x, a Trace if asked for).

    Step noise comes from ``keys`` [b], one typed PRNG key per image, or is handed in as ``noise`` [S, draws, b, ...]. ``known`` needs the
    ``schedule``.
    """
    if keys is None and ((sampler.draws and noise is None) or (known is not None and known.noise is None)):
        raise ValueError("sample: give keys, or every noise that the run needs")
    if known is not None and schedule is None:
        raise ValueError("sample: a known region needs the schedule")

    def draw(index: jax.Array, purpose: int, count: int) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 1), index), purpose)
            return jax.random.normal(key, (count, *x.shape[1:]), x.dtype)

        assert keys is not None
        return jax.vmap(one, out_axes=1)(keys)

    def blend(x: jax.Array, t: jax.Array, index: jax.Array, given: jax.Array | None) -> jax.Array:
        if known is None:
            return x
        assert schedule is not None
        original = q_sample(schedule, known.x0, t, draw(index, 1, 1)[0] if given is None else given)
        return known.mask * original + (1 - known.mask) * x

    def body(state: tuple[Carry, jax.Array], inputs: Any) -> tuple[tuple[Carry, jax.Array], Trace | None]:
        carry, x = state
        index, node, step_noise, known_noise = inputs
        if not sampler.blend_after:
            x = blend(x, node.t, index, known_noise)
        if step_noise is None and sampler.draws:
            step_noise = draw(index, 0, sampler.draws)
        carry, x, x0 = sampler.step(carry, node, x, predict, step_noise)
        if sampler.blend_after:
            x = blend(x, node.t, index, known_noise)
        return (carry, x), Trace(x, x0) if trace else None

    count = jax.tree.leaves(nodes)[0].shape[0]
    inputs = (jnp.arange(count), nodes, noise, None if known is None else known.noise)
    (_, x), steps = jax.lax.scan(body, (sampler.init(x), x), inputs)
    return x, steps


SAMPLERS: dict[str, Sampler] = {"ddim": DDIM(), "ddpm": DDPM()}
