"""A second model that takes over at the end of sampling (Podell et al. 2023, arXiv:2307.01952)."""

import dataclasses
from typing import Any

import numpy as np

from ldm_jax.conditioning.base import REQUEST_OPTIONS
from ldm_jax.diffusion.grids import time_grid
from ldm_jax.diffusion.samplers import SAMPLERS, padded
from ldm_jax.errors import RequestError
from ldm_jax.models.ldm import LatentDiffusion
from ldm_jax.sampling.program import Steps
from ldm_jax.sampling.request import Request

SWITCH = 0.8  # where the request gives none


def check_pair(model: LatentDiffusion, refiner: LatentDiffusion) -> None:
    """Raises RequestError where the latents of a model are not those of its refiner."""
    first, second = model.first_stage, refiner.first_stage
    if (first.channels, first.downsampling) != (second.channels, second.downsampling):
        raise RequestError(
            f"the refiner has latents of {second.channels} channels at 1/{second.downsampling}, "
            f"the model of {first.channels} at 1/{first.downsampling}: give another refiner"
        )
    if model.schedule.timesteps != refiner.schedule.timesteps:
        raise RequestError(
            f"the refiner has {refiner.schedule.timesteps} timesteps, the model "
            f"{model.schedule.timesteps}: give another refiner"
        )


def without_others(request: Request, model: LatentDiffusion, other: LatentDiffusion) -> Request:
    """Returns a request without the options that only the ``other`` model of a pair takes."""
    mine, theirs = model.conditioner.options, other.conditioner.options
    changes: Any = {name: None for name in REQUEST_OPTIONS if name in theirs and name not in mine}
    return dataclasses.replace(request, **changes)


def divide(steps: Steps, own: Request, schedule: Any, noise: dict[str, Any]) -> tuple[Any, Any]:
    """Divides the steps of a run between a model and its refiner.

    The model runs the steps from timesteps of at least T (1 - switch), the refiner the others.

    Args:
      steps: The tables of the whole run.
      own: The request with all settings.
      schedule: The forward process.
      noise: The sampler's options.

    Returns:
      (Steps of the model, Steps of the refiner).

    Raises:
      RequestError: The sampler cannot be divided there.
    """
    assert own.sampler is not None
    assert own.grid is not None
    assert own.steps is not None
    sampler, switch = SAMPLERS[own.sampler], SWITCH if own.switch is None else own.switch
    if sampler.adaptive:
        raise RequestError(f"{own.sampler} chooses its own steps: a refiner cannot take over")
    total = schedule.timesteps
    cutoff = round(total * (1 - switch))
    timesteps = time_grid(own.grid, own.steps, schedule)
    left = timesteps[timesteps < cutoff]
    rows = np.arange(len(steps.nodes.t))
    begins = np.asarray(getattr(steps.nodes, "begin", np.ones(len(rows), bool)))
    later = rows[begins & (np.asarray(steps.nodes.t) < cutoff)]
    if not len(left) or len(later) == len(rows[begins]) or not len(later):
        raise RequestError(
            f"switch {switch:g} leaves no step of {own.steps} to the model or to the refiner: "
            "change it, or take more steps"
        )
    # The refiner's own table: its first steps know no outputs of the other model.
    whole = sampler.nodes(schedule, left, **noise)
    if not np.isclose(np.asarray(whole.t)[0], np.asarray(steps.nodes.t)[later[0]], atol=1e-3):
        raise RequestError(f"a refiner cannot take over between the steps of {own.sampler}")
    first = steps._replace(nodes=type(steps.nodes)(*(_head(a, later[0]) for a in steps.nodes)))
    if steps.start is None:
        return first, Steps(whole, noise_dropout=steps.noise_dropout)
    assert own.strength is not None
    count = min(max(int(own.strength * len(timesteps)), 1), len(left))
    part = sampler.nodes(schedule, timesteps[:count], **noise)
    return first, Steps(*padded(part, len(whole.t)), noise_dropout=steps.noise_dropout)


def _head(column: Any, count: int) -> Any:
    return None if column is None else column[:count]
