"""Where a sampler stops: ascending timesteps, of the schedule or (floats) between them."""

from collections.abc import Callable, Sequence

import numpy as np

from ldm_jax.diffusion.schedule import Schedule, sigma_to_t, t_to_sigma


def _uniform(steps: int, total: int) -> np.ndarray:
    grid = np.arange(steps) * total // steps
    return grid + (
        grid[-1] + 1 < total
    )  # the original's +1, except where it would leave the schedule


# name -> ascending timesteps [steps] within 0 .. total - 1, before they are made distinct
GRIDS: dict[str, Callable[[int, int], np.ndarray]] = {
    "uniform": _uniform,
    "quad": lambda steps, total: (np.linspace(0, np.sqrt(total * 0.8), steps) ** 2).astype(int) + 1,
    "trailing": lambda steps, total: (
        np.round(np.arange(1, steps + 1) * total / steps).astype(int) - 1
    ),  # Lin et al. 2023, arXiv:2305.08891
    "leading": lambda steps, total: np.arange(steps) * (total // steps),
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


def karras(steps: int, low: float, high: float, rho: float = 7.0) -> np.ndarray:
    """Sigmas [steps], descending: sigma^(1/rho) is linear (Karras et al. 2022, arXiv:2206.00364, eq. 5)."""
    return np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho


def polyexponential(steps: int, low: float, high: float, rho: float = 2.0) -> np.ndarray:
    """Sigmas [steps], descending: log sigma is linear in the rho-th power of a ramp; with rho > 1 denser at little noise."""
    return np.exp(np.linspace(1, 0, steps) ** rho * np.log(high / low) + np.log(low))


# name -> sigmas(steps, low, high) [steps], descending
SIGMA_GRIDS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "karras": karras,
    "exponential": lambda steps, low, high: polyexponential(
        steps, low, high, 1.0
    ),  # linear in log sigma, or in log SNR
    "polyexponential": polyexponential,
}


def time_grid(kind: str | Sequence[float], steps: int, schedule: Schedule) -> np.ndarray:
    """Ascending timesteps [steps] of any grid: int64 by `step_grid`, float64 for those in sigma, which span the schedule.

    ``kind`` may also be a list of timesteps; where it has another length than ``steps``, log sigma is interpolated along it, as for the
    lists of Align Your Steps (Sabour et al. 2024, arXiv:2404.14507).
    """
    total = schedule.timesteps
    if not isinstance(kind, str):
        given = np.sort(np.asarray(kind, np.float64))
        if (
            given.ndim != 1
            or not len(given)
            or len(np.unique(given)) < len(given)
            or given[0] < 0
            or given[-1] > total - 1
        ):
            raise ValueError(f"a list of timesteps needs distinct numbers from 0 to {total - 1}")
        if len(given) == steps:
            return given
        places = (
            np.linspace(0, len(given) - 1, steps) if steps > 1 else np.array([len(given) - 1.0])
        )
        logs = np.log(t_to_sigma(schedule, given))
        return sigma_to_t(schedule, np.exp(np.interp(places, np.arange(len(given)), logs)))
    if kind not in SIGMA_GRIDS:
        if kind not in GRIDS:
            raise ValueError(
                f"step grid {kind!r} does not exist (have {', '.join([*GRIDS, *SIGMA_GRIDS])})"
            )
        return step_grid(kind, steps, total)
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be from 1 to {total}, not {steps}")
    low, high = t_to_sigma(schedule, np.array([0, total - 1]))
    return sigma_to_t(schedule, SIGMA_GRIDS[kind](steps, float(low), float(high)))[::-1]
