"""The sampler protocol, the one loop that runs any sampler, and the registry.

A sampler is a frozen dataclass, hence a static argument of a jitted function. Its `nodes` are
tables over the steps, computed on the host in float64 and traced: another eta, temperature or grid
of the same length does not recompile. `step` is the algorithm.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import solvers, stochastic
from ldm_jax.diffusion.adaptive import DPMAdaptive
from ldm_jax.diffusion.discrete import DDIM, DDPM, LCM, PLMS, TCD
from ldm_jax.diffusion.feature_cache import FeatureCache
from ldm_jax.diffusion.grids import step_grid, time_grid
from ldm_jax.diffusion.guidance import Predict
from ldm_jax.diffusion.schedule import Schedule, q_sample, sigma_to_t, t_to_sigma
from ldm_jax.diffusion.tableau import Rule, Tableau

__all__ = [
    "DDIM", "DDPM", "SAMPLERS", "Known", "Sampler", "Trace",
    "advance", "initial_noise", "padded", "sample", "step_grid", "time_grid",
]  # fmt: skip

Carry = Any


class Sampler(Protocol):
    """What `sample` runs."""

    @property
    def adaptive(self) -> bool:
        """Chooses its own steps: one row is the whole run, without intermediate results."""
        ...

    @property
    def draws(self) -> int:
        """Standard normal arrays that enter each step."""
        ...

    @property
    def blend_after(self) -> bool:
        """A known region is blended in after the step; otherwise before it."""
        ...

    @property
    def order(self) -> int:
        """Order of convergence: of the ODE's solution, or with noise of its mean and covariance."""
        ...

    @property
    def renoises(self) -> bool:
        """Steps with the model's own eps, as CFG++ needs (see `classifier_free`)."""
        ...

    @property
    def options(self) -> Mapping[str, float]:
        """Keywords of `nodes`, and their defaults."""
        ...

    @property
    def nodes(self) -> Callable[..., Any]:
        """(schedule, ascending timesteps, **options) -> arrays [S] in the order of sampling.

        The field `t` is the timestep of the model's call. Where there is a field `begin`, a known
        region is blended in only where it is true.
        """
        ...

    def init(self, x: jax.Array) -> Carry:
        """What the sampler carries between steps, before the first: a tree of arrays [b, ...]."""
        ...

    def step(
        self, carry: Carry, node: Any, x: jax.Array, predict: Predict, noise: jax.Array | None
    ) -> tuple[Carry, jax.Array, jax.Array]:
        """One call of the model.

        Args:
          carry: Of the step before.
          node: A row of `nodes`.
          x: State [b, ...].
          predict: The model.
          noise: Standard normal [draws, b, ...].

        Returns:
          (carry, next x, predicted x0).
        """
        ...


@dataclasses.dataclass(frozen=True)
class Inversion(Tableau):
    """DDIM run backwards, from an image's latents at `end` up to the noise that leads to them.

    Song et al. 2021, arXiv:2010.02502, section 4.3; Dhariwal & Nichol 2021, appendix F.
    """

    def nodes(self, schedule: Schedule, timesteps: np.ndarray, **options: float) -> Any:
        """The table over ascending timesteps, in that order."""
        times = np.append(0.0 if self.end is None else self.end, np.asarray(timesteps, np.float64))
        return self.table(t_to_sigma(schedule, times), partial(sigma_to_t, schedule), **options)


AnySampler = Sampler


class Known(NamedTuple):
    """A region to keep: x <- mask * q_sample(x0, t) + (1 - mask) * x at every step.

    Attributes:
      x0: [b, ...].
      mask: 1 where x0 is kept, broadcastable to x0.
      noise: [S, b, ...] for q_sample; None draws it from the keys.
    """

    x0: jax.Array
    mask: jax.Array
    noise: jax.Array | None = None


class Trace(NamedTuple):
    """Every step of a run, [S, b, ...] each: x after the step, and the x0 predicted in it."""

    x: jax.Array
    x0: jax.Array


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal [b, *shape]; each image depends on its own key alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)


def drop_noise(noise: jax.Array, uniform: jax.Array, rate: jax.Array | float) -> jax.Array:
    """Dropout of step noise: kept, divided by 1 - rate, where `uniform` is at least `rate`."""
    return jnp.where(uniform >= rate, noise / (1 - rate), 0.0)


def sample(
    sampler: Sampler,
    predict: Predict,
    x: jax.Array,
    nodes: Any,
    *,
    schedule: Schedule | None = None,
    keys: jax.Array | None = None,
    noise: jax.Array | None = None,
    noise_dropout: jax.Array | float | None = None,
    known: Known | None = None,
    start: jax.Array | None = None,
    trace: bool = False,
    cache: FeatureCache | None = None,
) -> tuple[jax.Array, Trace | None]:
    """Runs a sampler over its nodes as one `jax.lax.scan`.

    Args:
      sampler: Of SAMPLERS.
      predict: The model, as of `predictor`.
      x: State [b, ...] at the first node.
      nodes: Of `sampler.nodes`.
      schedule: The forward process, which `known` needs.
      keys: One typed PRNG key per image, [b]; all noise comes from it.
      noise: [S, draws, b, ...], instead of the keys'.
      noise_dropout: Rate in [0, 1) of dropout on the step noise that is drawn from the keys.
      known: A region to keep.
      start: Traced []: rows before it are skipped and cost nothing (see `padded`).
      trace: Return every step.
      cache: The cache through which `predict` calls its network.

    Returns:
      (the last x, a Trace or None).
    """
    (_, x), steps = advance(
        sampler, predict, (sampler.init(x), x), nodes,
        schedule=schedule, keys=keys, noise=noise, noise_dropout=noise_dropout, known=known,
        start=start, trace=trace, cache=cache,
    )  # fmt: skip
    return x, steps


def advance(
    sampler: Sampler,
    predict: Predict,
    state: tuple[Carry, jax.Array],
    nodes: Any,
    *,
    schedule: Schedule | None = None,
    keys: jax.Array | None = None,
    noise: jax.Array | None = None,
    noise_dropout: jax.Array | float | None = None,
    known: Known | None = None,
    start: jax.Array | None = None,
    stop: jax.Array | None = None,
    trace: bool = False,
    cache: FeatureCache | None = None,
) -> tuple[tuple[Carry, jax.Array], Trace | None]:
    """Like `sample`, from a state to a state, so that a run can be made in parts.

    ``state`` is (the sampler's carry, x), (sampler.init(x), x) before the first node. Rows from
    ``stop``, traced [], on are skipped as those before ``start`` are. The other arguments are those
    of `sample`.

    Returns:
      (the state after the last row that was run, a Trace or None).
    """
    drawn = (sampler.draws and noise is None) or (known is not None and known.noise is None)
    if keys is None and drawn:
        raise ValueError("sample: give keys, or every noise that the run needs")
    if known is not None and schedule is None:
        raise ValueError("sample: a known region needs the schedule")
    if sampler.adaptive and (known is not None or cache is not None):
        raise ValueError("sample: adaptive steps keep no known region and have no cache")
    if stop is not None and (start is None or cache is not None):
        raise ValueError("sample: a part of a run needs start and stop, and has no cache")
    carry, x = state

    def fold(index: jax.Array, purpose: int) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            return jax.random.fold_in(
                jax.random.fold_in(jax.random.fold_in(key, 1), index), purpose
            )

        assert keys is not None
        return jax.vmap(one)(keys)

    def draw(index: jax.Array, purpose: int, count: int, kind: Any = jax.random.normal) -> Any:
        shape = (count, *x.shape[1:])
        return jax.vmap(lambda key: kind(key, shape, x.dtype), out_axes=1)(fold(index, purpose))

    def blend(x: jax.Array, node: Any, index: jax.Array, given: jax.Array | None) -> jax.Array:
        if known is None:
            return x
        assert schedule is not None
        given = draw(index, 1, 1)[0] if given is None else given
        original = q_sample(schedule, known.x0, node.t, given)
        blended = known.mask * original + (1 - known.mask) * x
        return jnp.where(node.begin, blended, x) if hasattr(node, "begin") else blended

    def body(state: Any, inputs: Any) -> tuple[Any, Trace | None]:
        carry, x, deep = state
        index, node, step_noise, known_noise = inputs
        if cache is not None:
            cache.begin(deep, index if start is None else index - start)
        if not sampler.blend_after:
            x = blend(x, node, index, known_noise)
        if step_noise is None and sampler.draws:
            step_noise = draw(index, 0, sampler.draws)
            if noise_dropout is not None:
                uniform = draw(index, 2, sampler.draws, jax.random.uniform)
                step_noise = drop_noise(step_noise, uniform, noise_dropout)
        carry, x, x0 = sampler.step(carry, node, x, predict, step_noise)
        if sampler.blend_after:
            x = blend(x, node, index, known_noise)
        return (carry, x, None if cache is None else cache.deep), Trace(x, x0) if trace else None

    def skip(state: Any, inputs: Any) -> tuple[Any, Trace | None]:
        return state, Trace(state[1], state[1]) if trace else None

    def maybe(state: Any, inputs: Any) -> tuple[Any, Trace | None]:
        # A condition on one number for the whole batch, so that only one branch runs.
        taken = inputs[0] >= start
        if stop is not None:
            taken &= inputs[0] < stop
        return jax.lax.cond(taken, body, skip, state, inputs)

    count = jax.tree.leaves(nodes)[0].shape[0]
    inputs = (jnp.arange(count), nodes, noise, None if known is None else known.noise)
    # The state of the loop: the sampler's carry, x, and the features of the cache.
    whole = carry, x, None if cache is None else cache.empty(predict, x)
    (carry, x, _), steps = jax.lax.scan(body if start is None else maybe, whole, inputs)
    return (carry, x), steps


def padded(nodes: Any, count: int) -> tuple[Any, np.int32]:
    """Repeats the first row in front, so that shorter runs are the same program as the longest.

    Returns:
      (nodes with `count` rows, the row where they begin).
    """
    missing = count - jax.tree.leaves(nodes)[0].shape[0]
    return jax.tree.map(
        lambda a: np.concatenate([np.repeat(a[:1], missing, 0), a]), nodes
    ), np.int32(missing)


def _unipc(p: int, second: Rule) -> Tableau:
    """The released UniPC of p outputs. It ends at low orders, hence the order 2 of the result."""
    algorithm = solvers.UniPC(p, second, lower_final=True)
    return Tableau(algorithm, 2, history=p, corrects=True)


_2M_SDE = stochastic.MultistepSDE(2, lower_final=False)
_3M_SDE = stochastic.MultistepSDE(3, second="exact", lower_final=False)

SAMPLERS: dict[str, Sampler] = {
    "ddim": DDIM(),
    "ddim_x0": DDIM(to_x0=True),
    "ddpm": DDPM(),
    "ddim_inversion": Inversion(solvers.euler, 1, end=0.0),
    "plms": PLMS(),
    "dpm_solver_1": Tableau(solvers.Singlestep(1, "eps"), 1, "eps"),
    "dpm_solver_2": Tableau(solvers.Singlestep(2, "eps"), 2, "eps", history=1),
    "dpm_solver_3": Tableau(solvers.Singlestep(3, "eps"), 3, "eps", history=2),
    "dpm_solver_1m": Tableau(solvers.Multistep(1, "eps"), 1, "eps"),
    "dpm_solver_2m": Tableau(solvers.Multistep(2, "eps"), 2, "eps", history=1),
    "dpm_solver_3m": Tableau(solvers.Multistep(3, "eps"), 3, "eps", history=2),
    "dpmpp_2s": Tableau(solvers.Singlestep(2, "x0"), 2, history=1),
    "dpmpp_2m": Tableau(solvers.Multistep(2), 2, history=1),
    "dpmpp_3m": Tableau(solvers.Multistep(3), 3, history=2),
    "unipc": Tableau(solvers.UniPC(2), 3, history=2, corrects=True),
    "unipc_bh1": _unipc(2, "linear"),
    "unipc_bh2": _unipc(2, "half"),
    "unipc_3_bh1": _unipc(3, "linear"),
    "unipc_3_bh2": _unipc(3, "half"),
    "deis": Tableau(solvers.Multistep(2, "eps", "exact"), 2, "eps", history=1, end=0.0),
    "deis_3": Tableau(solvers.Multistep(3, "eps", "exact"), 3, "eps", history=2, end=0.0),
    "ipndm": PLMS(improved=False, end=None),
    "euler": Tableau(solvers.euler, 1, draws=1),
    "heun": Tableau(solvers.heun, 2, history=1, draws=1),
    "restart": Tableau(solvers.restart, 2, history=1, draws=1),
    "dpm_2": Tableau(solvers.dpm_2, 2, draws=1),
    "lms": Tableau(solvers.lms, 4, "eps", history=3),
    "euler_ancestral": Tableau(stochastic.euler_ancestral, 1, draws=1),
    "dpm_2_ancestral": Tableau(stochastic.dpm_2_ancestral, 2, draws=1),
    "dpmpp_2s_ancestral": Tableau(stochastic.dpmpp_2s_ancestral, 2, history=1, draws=1),
    "dpmpp_sde": Tableau(stochastic.DPMppSDE(), 2, history=1, draws=1),
    "dpmpp_2m_sde": Tableau(_2M_SDE, 2, history=1, draws=1),
    "dpmpp_3m_sde": Tableau(_3M_SDE, 2, history=2, draws=1),
    "dpm_fast": Tableau(solvers.dpm_fast, 3, "eps", history=2, draws=1),
    "dpm_adaptive": DPMAdaptive(),
    "lcm": LCM(),
    "tcd": TCD(),
}
