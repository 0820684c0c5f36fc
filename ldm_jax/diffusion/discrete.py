"""Samplers of the original that step with x0 and eps themselves: DDPM, DDIM, PLMS, LCM, TCD."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.guidance import Predict
from ldm_jax.diffusion.schedule import Array, Schedule, log_sigmas, root, sigma_to_t
from ldm_jax.diffusion.tableau import (
    Time,
    check_options,
    combine,
    descending_sigmas,
    keywords,
    to_precision,
)
from ldm_jax.errors import RequestError


class OneStepNode(NamedTuple):
    """Weights [S] of x_{t-1} in x0, x_t, eps and noise; None is 0."""

    t: Array
    x0: Array
    noise: Array
    xt: Array | None = None
    eps: Array | None = None


@dataclasses.dataclass(frozen=True)
class OneStep:
    """A sampler whose step combines x0, x_t, eps and noise after one call of the model."""

    adaptive = False
    draws = 1
    blend_after = False
    renoises = False
    order = 1
    nodes: ClassVar[Callable[..., OneStepNode]]

    @property
    def options(self) -> dict[str, float]:
        """Keywords of `nodes`, and their defaults."""
        return keywords(self.nodes)

    def init(self, x: jax.Array) -> None:
        """Nothing is carried from step to step."""
        return None

    def step(
        self,
        carry: Any,
        node: OneStepNode,
        x: jax.Array,
        predict: Predict,
        noise: jax.Array | None,
    ) -> tuple[Any, jax.Array, jax.Array]:
        """One call of the model."""
        assert noise is not None
        eps, x0 = predict(x, node.t)
        y = node.x0 * x0
        y = y if node.xt is None else y + node.xt * x
        y = y if node.eps is None else y + node.eps * eps
        return carry, y + node.noise * noise[0], x0


@dataclasses.dataclass(frozen=True)
class DDIM(OneStep):
    """Song, Meng & Ermon 2021 (arXiv:2010.02502), eq. 12 and 16.

    Attributes:
      to_x0: The last step leads to sigma 0 (diffusers' set_alpha_to_one); otherwise, as in the
        original, to the noise of timestep 0.
    """

    to_x0: bool = False

    renoises = True

    def nodes(
        self,
        schedule: Schedule,
        timesteps: np.ndarray,
        *,
        eta: float = 0.0,
        temperature: float = 1.0,
    ) -> OneStepNode:
        """`eta` 0 is deterministic, 1 has the DDPM's variance; `temperature` scales the noise."""
        abar, prev = _abar_pairs(schedule, timesteps, first=1.0 if self.to_x0 else None)
        sigma = eta * root((1 - prev) / (1 - abar) * (1 - abar / prev))
        # An eta above 1 can ask for more noise than x_{t-1} has: no direction is left then.
        eps = root(1 - prev - sigma**2)
        return _descending(OneStepNode(timesteps, np.sqrt(prev), temperature * sigma, eps=eps))


@dataclasses.dataclass(frozen=True)
class DDPM(OneStep):
    """Ancestral sampling (Ho, Jain & Abbeel 2020, arXiv:2006.11239, algorithm 2).

    Fewer steps are those of the thinned process (Nichol & Dhariwal 2021, arXiv:2102.09672).
    """

    blend_after = True

    @property
    def options(self) -> dict[str, float]:
        """Keywords of `nodes`, which refuses every eta but its own."""
        return {"temperature": 1.0}

    def nodes(
        self,
        schedule: Schedule,
        timesteps: np.ndarray,
        *,
        eta: float = 1.0,
        temperature: float | np.ndarray = 1.0,
    ) -> OneStepNode:
        """`temperature` scales the noise; an array [T] is indexed by the timestep."""
        if eta != 1.0:
            raise RequestError(
                "the ddpm sampler has no eta; use ddim, whose eta 1 has the same variance"
            )
        abar, prev = _abar_pairs(schedule, timesteps, first=1.0)
        beta = 1 - abar / prev
        v = schedule.v_posterior
        variance = (1 - v) * beta * (1 - prev) / (1 - abar) + v * beta
        scale = np.asarray(temperature, np.float64)
        std = root(np.maximum(variance, 1e-20)) * (scale[timesteps] if scale.ndim else scale)
        std[0] = 0.0  # the last step of sampling returns the mean
        x0 = beta * np.sqrt(prev) / (1 - abar)
        xt = (1 - prev) * root(1 - beta) / (1 - abar)
        return _descending(OneStepNode(timesteps, x0, std, xt=xt))


@dataclasses.dataclass(frozen=True)
class LCM(OneStep):
    """Multistep sampling of latent consistency models (Luo et al. 2023, arXiv:2310.04378).

    It returns to x0 at every step, so only a distilled model makes it a sampler: order 0.
    """

    order = 0

    def nodes(
        self,
        schedule: Schedule,
        timesteps: np.ndarray,
        *,
        timestep_scaling: float = 10.0,
        temperature: float = 1.0,
    ) -> OneStepNode:
        """`timestep_scaling` is that of the boundary condition, with a data deviation of 1/2."""
        _, prev = _abar_pairs(schedule, timesteps, first=1.0)
        scaled = np.asarray(timesteps, np.float64) * timestep_scaling
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
        a, noise = np.sqrt(prev), temperature * root(1 - prev)
        return _descending(OneStepNode(timesteps, a * out, noise, xt=a * skip))


@dataclasses.dataclass(frozen=True)
class TCD(OneStep):
    """Trajectory consistency distillation (Zheng et al. 2024, arXiv:2402.19159, algorithm 4)."""

    renoises = True

    def nodes(
        self,
        schedule: Schedule,
        timesteps: np.ndarray,
        *,
        eta: float = 0.3,
        temperature: float = 1.0,
    ) -> OneStepNode:
        """`eta` (the paper's gamma) in [0, 1]: how far beyond the next timestep a step goes."""
        if not 0 <= eta <= 1:
            raise RequestError(f"tcd: eta must be from 0 to 1, not {eta}")
        times = np.append(np.zeros(1, timesteps.dtype), timesteps[:-1])
        beyond = ((1 - eta) * times).astype(times.dtype)
        prev, abar = _abar(schedule, times), _abar(schedule, beyond)
        ratio = np.minimum(prev / abar, 1.0)
        x0, eps = np.sqrt(abar * ratio), root((1 - abar) * ratio)
        return _descending(OneStepNode(timesteps, x0, temperature * root(1 - ratio), eps=eps))


def _abar(schedule: Schedule, timesteps: np.ndarray) -> np.ndarray:
    """Abar at ints, or at floats between which log sigma is linear; float64."""
    table, timesteps = np.asarray(schedule.alphas_cumprod, np.float64), np.asarray(timesteps)
    if np.issubdtype(timesteps.dtype, np.integer):
        return table[timesteps]
    logs = np.interp(timesteps, np.arange(len(table)), log_sigmas(schedule))
    return 1 / (1 + np.exp(2 * logs))


def _abar_pairs(
    schedule: Schedule, timesteps: np.ndarray, first: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Abar at each timestep and at the one before it; before the first stands `first` or abar_0."""
    abar = _abar(schedule, timesteps)
    first = float(np.asarray(schedule.alphas_cumprod, np.float64)[0]) if first is None else first
    # A grid in sigma may begin at timestep 0 but for rounding, where abar could exceed abar_0.
    prev = np.maximum(np.append(first, abar[:-1]), abar)
    return abar, prev


def _descending(nodes: Any) -> Any:
    """Ascending tables -> the order of sampling, in 32 bits."""

    def cast(a: np.ndarray) -> np.ndarray:
        return np.asarray(a[::-1], np.int32 if np.issubdtype(a.dtype, np.integer) else np.float32)

    return jax.tree.map(cast, nodes)


# ------------------------------------------------------------------------------------------- PLMS

ADAMS_BASHFORTH = {
    1: [1.0],
    2: [3 / 2, -1 / 2],
    3: [23 / 12, -16 / 12, 5 / 12],
    4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
}


class PLMSNode(NamedTuple):
    """[n] each: levels of the call, of the step's beginning and of its end; `weights` [n, 5]."""

    t: Array
    level: tuple[Array, Array]
    base: tuple[Array, Array]
    to: tuple[Array, Array]
    begin: Array
    weights: Array


@dataclasses.dataclass(frozen=True)
class PLMS:
    """Pseudo linear multistep (Liu et al. 2022, arXiv:2202.09778, eq. 9-13).

    The DDIM step along a mean of the last four eps. The x0 that is clipped or quantised is that of
    the mean; the eps themselves are the model's.

    Attributes:
      improved: The first step calls the model twice (pseudo improved Euler) and forgets the second
        output. Otherwise it is Euler's, as in iPNDM (Zhang & Chen 2023, arXiv:2204.13902).
      end: Timestep where sampling stops; None is sigma 0.
    """

    improved: bool = True
    end: float | None = 0.0

    adaptive = False
    draws = 0
    blend_after = False
    order = 2
    renoises = False

    @property
    def options(self) -> dict[str, float]:
        """Keywords of `nodes`: none."""
        return {}

    def nodes(self, schedule: Schedule, timesteps: np.ndarray, **options: float) -> PLMSNode:
        """The table over ascending `timesteps`, ints or floats."""
        check_options(self.options, options)
        sigmas = descending_sigmas(schedule, timesteps, self.end)
        return self.table(sigmas, partial(sigma_to_t, schedule))

    def table(self, sigmas: np.ndarray, time: Time) -> PLMSNode:
        """The table over any descending sigmas [S + 1]."""
        improved = self.improved and len(sigmas) > 2
        rows = []  # (sigma of the call, of the step's beginning, of its end, weights)
        for i, (sigma, to) in enumerate(itertools.pairwise(sigmas)):
            adams = ADAMS_BASHFORTH[min(i + 1, 4)]
            if improved and i == 0:
                rows += [(sigma, sigma, to, [1.0]), (to, sigma, to, [0.5, 0.5])]
                continue
            if improved and i < 4:  # the first step's output lies one call further back
                adams = [*adams[:-1], 0.0, adams[-1]]
            rows.append((sigma, sigma, to, adams))
        called, base, to = np.array([row[:3] for row in rows], np.float64).T
        weights = np.array([row[3] + [0.0] * (5 - len(row[3])) for row in rows])
        at, start, end = ((1 / np.hypot(1, s), s / np.hypot(1, s)) for s in (called, base, to))
        return to_precision(PLMSNode(time(called), at, start, end, called == base, weights))

    def init(self, x: jax.Array) -> Any:
        """The state where the step began, and the last four eps."""
        return x, (jnp.zeros_like(x),) * 4

    def step(
        self, carry: Any, node: PLMSNode, x: jax.Array, predict: Predict, noise: jax.Array | None
    ) -> tuple[Any, jax.Array, jax.Array]:
        """One row: one call of the model."""
        base, earlier = carry
        base = jnp.where(node.begin, x, base)
        outputs = (predict(x, node.t, node.level).eps, *earlier)
        eps = combine(node.weights, outputs)
        x0 = predict(base, node.t, node.base, eps).x0
        return (base, outputs[:4]), node.to[0] * x0 + node.to[1] * eps, x0
