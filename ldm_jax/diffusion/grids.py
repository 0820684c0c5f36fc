"""Where a sampler stops: ascending timesteps, ints of the schedule or floats between them."""

from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats

from ldm_jax.diffusion.schedule import Schedule, sigma_to_t, t_to_sigma
from ldm_jax.errors import RequestError, did_you_mean


def _distilled(steps: int, total: int, trained: int = 50) -> np.ndarray:
    """Even choice of the `trained` steps that LCM and TCD are distilled on, from the last down."""
    trained = max(min(trained, total), steps)
    kept = trained - np.floor(np.arange(steps) * trained / steps).astype(int)
    return kept[::-1] * (total // trained) - 1


def _beta(steps: int, total: int) -> np.ndarray:
    """Quantiles of Beta(0.6, 0.6) (Lee et al. 2024, arXiv:2407.12173): dense at both ends."""
    return scipy.stats.beta.ppf(_ramp(steps), 0.6, 0.6) * (total - 1)


def _linear_quadratic(steps: int, total: int, threshold: float = 0.025) -> np.ndarray:
    """Linear down to 1 - `threshold` in half of the steps, then quadratic (arXiv:2410.13720)."""
    half = steps // 2
    i = np.arange(steps, dtype=np.float64)
    slope = threshold / max(half, 1)  # of both parts where they meet
    rest = max(steps - half, 1)
    curve = (1 - threshold - slope * rest) / rest**2
    tail = threshold + slope * (i - half) + curve * (i - half) ** 2
    return (1 - np.where(i < half, slope * i, tail if half else i / steps))[::-1] * (total - 1)


def _ramp(steps: int) -> np.ndarray:
    """0 to 1, and 1 alone for a single step."""
    return np.linspace(0, 1, steps) if steps > 1 else np.ones(1)


def _uniform(steps: int, total: int) -> np.ndarray:
    """The original's grid with its +1, except where that would leave the schedule."""
    grid = np.arange(steps) * total // steps
    return grid + (grid[-1] + 1 < total)


# name -> ascending timesteps (steps, T) -> int [steps], before they are made distinct.
# "trailing" is of Lin et al. 2023, arXiv:2305.08891.
GRIDS: dict[str, Callable[[int, int], np.ndarray]] = {
    "uniform": _uniform,
    "quad": lambda steps, total: (np.linspace(0, np.sqrt(total * 0.8), steps) ** 2).astype(int) + 1,
    "trailing": lambda steps, total: (
        np.round(np.arange(1, steps + 1) * total / steps).astype(int) - 1
    ),
    "leading": lambda steps, total: np.arange(steps) * (total // steps),
    "leading_1": lambda steps, total: np.arange(steps) * (total // steps) + 1,
    "linspace": lambda steps, total: np.round(np.linspace(0, total - 1, steps + 1)[1:]).astype(int),
    "distilled": lambda steps, total: _distilled(steps, total),
}


def step_grid(kind: str, steps: int, total: int, *, compat: bool = False) -> np.ndarray:
    """Ascending, distinct timesteps, int64 [steps].

    Args:
      kind: A key of GRIDS.
      steps: From 1 to `total`.
      total: T of the schedule.
      compat: The original's own grid: "uniform" has stride total // steps, which for some counts
        gives more than `steps` entries, and for others leaves the schedule, an error.
    """
    _check(kind, GRIDS, steps, total)
    original = compat and kind == "uniform"
    grid = np.arange(0, total, total // steps) + 1 if original else GRIDS[kind](steps, total)
    if compat:
        if grid[-1] >= total:
            raise RequestError(
                f"the original's {kind} grid of {steps} steps reaches timestep {grid[-1]} of "
                f"{total}; leave out compat or take other steps"
            )
        return grid
    ramp = np.arange(len(grid))
    grid = np.maximum.accumulate(grid - ramp) + ramp  # distinct: at least one apart ...
    return np.minimum(grid, total - len(grid) + ramp)  # ... and inside the schedule


def karras(steps: int, low: float, high: float, rho: float = 7.0) -> np.ndarray:
    """Sigmas, descending: sigma^(1/rho) is linear (Karras et al. 2022, arXiv:2206.00364, eq. 5)."""
    return np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho


def polyexponential(steps: int, low: float, high: float, rho: float = 2.0) -> np.ndarray:
    """Sigmas, descending: log sigma is linear in the rho-th power of a ramp."""
    return np.exp(np.linspace(1, 0, steps) ** rho * np.log(high / low) + np.log(low))


def vp_sigma(t: np.ndarray, beta_d: float = 19.9, beta_min: float = 0.1) -> np.ndarray:
    """Sigma at time t of the VP SDE (Song et al. 2021, arXiv:2011.13456, eq. 33)."""
    return np.sqrt(np.expm1(beta_d * np.square(t) / 2 + beta_min * t))


def vp(
    steps: int, low: float, high: float, beta_d: float = 19.9, beta_min: float = 0.1
) -> np.ndarray:
    """Sigmas, descending, at even times of the VP SDE."""
    logs = np.log1p(np.square([high, low]))
    first, last = (np.sqrt(beta_min**2 + 2 * beta_d * logs) - beta_min) / beta_d
    return vp_sigma(np.linspace(first, last, steps), beta_d, beta_min)


# name -> ascending timesteps (steps, T) -> float [steps]
FLOAT_GRIDS: dict[str, Callable[[int, int], np.ndarray]] = {
    "linspace_ends": lambda steps, total: _ramp(steps) * (total - 1),
    "beta": _beta,
    "linear_quadratic": _linear_quadratic,
}

# Align Your Steps (Sabour et al. 2024, arXiv:2404.14507) for Stable Diffusion v1 and XL.
LISTS: dict[str, Sequence[float]] = {
    "ays": (24, 124, 233, 343, 455, 545, 645, 736, 850, 999),
    "ays_sdxl": (13, 53, 116, 193, 310, 443, 587, 730, 845, 999),
}

# name -> sigmas (steps, low, high, [rho]) -> [steps], descending
SIGMA_GRIDS: dict[str, Callable[..., np.ndarray]] = {
    "karras": karras,
    "exponential": lambda steps, low, high: polyexponential(steps, low, high, 1.0),
    "polyexponential": polyexponential,
    "vp": vp,
}


ALL = (*GRIDS, *FLOAT_GRIDS, *SIGMA_GRIDS, *LISTS)


def time_grid(
    kind: str | Sequence[float], steps: int, schedule: Schedule, *, rho: float | None = None
) -> np.ndarray:
    """Ascending timesteps [steps] of any grid.

    Args:
      kind: A name of ALL: GRIDS are int64, by `step_grid`, the others float64. Or a list of
        timesteps. Where a list has another length than `steps`, log sigma
        is interpolated along it, as for Align Your Steps (Sabour et al. 2024, arXiv:2404.14507).
      steps: From 1 to T.
      schedule: The forward process.
      rho: Exponent of "karras" and "polyexponential".
    """
    total = schedule.timesteps
    if not isinstance(kind, str):
        return _listed(np.sort(np.asarray(kind, np.float64)), steps, schedule)
    _check(kind, ALL, steps, total)
    if rho is not None and kind not in ("karras", "polyexponential"):
        raise RequestError(f"step grid {kind!r} has no rho")
    if kind in GRIDS:
        return step_grid(kind, steps, total)
    if kind in FLOAT_GRIDS:
        return FLOAT_GRIDS[kind](steps, total)
    if kind in LISTS:
        return _listed(np.asarray(LISTS[kind]) / 999 * (total - 1), steps, schedule)
    low, high = (float(sigma) for sigma in t_to_sigma(schedule, np.array([0, total - 1])))
    options = {} if rho is None else {"rho": rho}
    return sigma_to_t(schedule, SIGMA_GRIDS[kind](steps, low, high, **options))[::-1]


def _listed(given: np.ndarray, steps: int, schedule: Schedule) -> np.ndarray:
    last, count = schedule.timesteps - 1, len(given) if given.ndim == 1 else 0
    if not count or (np.diff(given) <= 0).any() or given[0] < 0 or given[-1] > last:
        raise RequestError(f"a list of timesteps needs distinct numbers from 0 to {last}")
    if count == steps:
        return given
    if steps < 1:
        raise RequestError(f"steps must be at least 1, not {steps}")
    places = np.linspace(0, count - 1, steps) if steps > 1 else np.array([count - 1.0])
    logs = np.interp(places, np.arange(count), np.log(t_to_sigma(schedule, given)))
    return sigma_to_t(schedule, np.exp(logs))


def _check(kind: str, known: Sequence[str] | dict, steps: int, total: int) -> None:
    if kind not in known:
        raise RequestError(f"step grid {kind!r} does not exist{did_you_mean(kind, known)}")
    if not 1 <= steps <= total:
        raise RequestError(f"steps must be from 1 to {total}, not {steps}")
