"""The noise schedule of a checkpoint from the betas that it stores."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_jax.diffusion.schedule import BETA_SCHEDULES, make_betas
from ldm_jax.errors import TargetError


def schedule_params(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(timesteps, linear_start ..., what was assumed) from the stored betas, which the result reproduces.

    Raises TargetError where they are those of no known schedule.
    """
    if "betas" not in tensors and "alphas_cumprod" not in tensors:
        given = {
            "beta_schedule": "linear",
            "timesteps": 1000,
            "linear_start": 0.0015,
            "linear_end": 0.0195,
        }
        return given, [
            "beta_schedule linear from 0.0015 to 0.0195 in 1000 timesteps: the file has no schedule"
        ]
    if "betas" in tensors:
        stored = np.asarray(tensors["betas"])
        # As far as a number of this precision tells one from the next; the smallest half-precision numbers tell less.
        digits, rtol = 9, 1e-5 if stored.dtype.itemsize > 2 else 1e-2
    else:
        abar = np.asarray(tensors["alphas_cumprod"]).astype(np.float64)
        stored = 1 - abar / np.append(1.0, abar[:-1])
        digits, rtol = 3, 1e-3
    start, end = (_meant(stored[i], digits) for i in (0, -1))
    for kind in BETA_SCHEDULES:
        ends = {"linear_start": start, "linear_end": end}
        if kind == "sqrt":
            ends = {"linear_start": _meant(start**2, 6), "linear_end": _meant(end**2, 6)}
        params = {"timesteps": len(stored), **({} if kind == "cosine" else ends)}
        with np.errstate(invalid="ignore"):
            betas = make_betas(kind, **params)
        if np.allclose(betas, stored.astype(np.float64), rtol=rtol, atol=1e-7):
            return {"beta_schedule": kind, **params}, []
    raise TargetError(
        "its betas are those of no known schedule; give the original's YAML with --config"
    )


def _meant(value: Any, digits: int) -> float:
    """The number with the fewest digits, at most ``digits``, that is ``value`` in its precision."""
    rounded = (float(f"{float(value):.{n}g}") for n in range(1, digits + 1))
    return next(
        (number for number in rounded if np.asarray(number, np.asarray(value).dtype) == value),
        float(f"{float(value):.{digits}g}"),
    )
