"""Infers the noise schedule of a checkpoint from the betas that it stores."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_jax.diffusion.schedule import BETA_SCHEDULES, make_betas
from ldm_jax.errors import TargetError


def schedule_params(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns ({timesteps, linear_start, ...}, what was assumed); it reproduces the stored betas.

    Raises:
      TargetError: The betas are of no known schedule.
    """
    if "betas" not in tensors and "alphas_cumprod" not in tensors:
        given = {
            "beta_schedule": "linear",
            "timesteps": 1000,
            "linear_start": 0.0015,
            "linear_end": 0.0195,
        }
        return given, [
            "beta_schedule linear from 0.0015 to 0.0195 in 1000 timesteps: none in the file"
        ]
    if "betas" in tensors:
        stored = np.asarray(tensors["betas"])
        # The precision of the stored numbers; the smallest half-precision ones have less.
        digits, rtol = 9, 1e-5 if stored.dtype.itemsize > 2 else 1e-2
    else:
        abar = np.asarray(tensors["alphas_cumprod"]).astype(np.float64)
        stored = 1 - abar / np.append(1.0, abar[:-1])
        digits, rtol = 3, 1e-3
    start, end = (_roundest(stored[i], digits) for i in (0, -1))
    for kind in BETA_SCHEDULES:
        ends = {"linear_start": start, "linear_end": end}
        if kind == "sqrt":
            ends = {"linear_start": _roundest(start**2, 6), "linear_end": _roundest(end**2, 6)}
        params = {"timesteps": len(stored), **({} if kind == "cosine" else ends)}
        with np.errstate(invalid="ignore"):
            betas = make_betas(kind, **params)
        if np.allclose(betas, stored.astype(np.float64), rtol=rtol, atol=1e-7):
            return {"beta_schedule": kind, **params}, []
    raise TargetError(
        "its betas are those of no known schedule; give the original's YAML with --config"
    )


def _roundest(value: Any, digits: int) -> float:
    """Returns the number with the fewest digits that rounds to ``value`` in its precision."""
    rounded = (float(f"{float(value):.{n}g}") for n in range(1, digits + 1))
    return next(
        (number for number in rounded if np.asarray(number, np.asarray(value).dtype) == value),
        float(f"{float(value):.{digits}g}"),
    )
