"""Every sampler on every grid has finite tables, whatever the schedule and the number of steps."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ldm_jax.diffusion.grids import ALL, time_grid
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.diffusion.schedule import make_schedule

CONFIGS = Path(__file__).parents[2] / "configs"
COUNTS = (1, 2, 3, 7, 20, 50)
FEW = COUNTS[:4]  # for the schedules of OTHERS, after the first
# More than the configs' schedules: other shapes, short ones, and one that ends at pure noise.
OTHERS = [
    {"beta_schedule": "cosine"},
    {"beta_schedule": "sqrt_linear", "linear_start": 1e-4, "linear_end": 0.02},
    {"linear_start": 0.00085, "linear_end": 0.012, "zero_terminal_snr": True},
    {"beta_schedule": "cosine", "timesteps": 7, "cosine_s": 0.02},
    {"timesteps": 400, "linear_start": 0.0015, "linear_end": 0.0195, "v_posterior": 0.6},
    {"timesteps": 1},
    {"beta_schedule": "flow"},
    {"given_betas": [0.0015, 0.1, 0.2]},
]


def of_configs() -> list[dict]:
    """The distinct schedules of all configs."""
    found = set()
    for path in sorted(CONFIGS.glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        model = module.get_config().get("model", {}) if hasattr(module, "get_config") else {}
        if "schedule" in model:
            found.add(json.dumps(model.schedule.to_dict(), sort_keys=True))
    assert len(found) >= 3
    return [json.loads(each) for each in sorted(found)]


def tables(schedule, kind, steps):
    """(sampler's name, leaf) of every array of every sampler."""
    grid = time_grid(kind, steps, schedule)
    for name, sampler in SAMPLERS.items():
        etas = (0.0, 1.0) if "eta" in sampler.options else (None,)
        for eta in etas:
            options = {} if eta is None else {"eta": eta}
            for leaf in jax.tree.leaves(sampler.nodes(schedule, grid, **options)):
                yield name, leaf


@pytest.mark.parametrize("kind", [*ALL, (0, 1.5, 300, 998.5)], ids=str)
@pytest.mark.parametrize("arguments", [*of_configs(), *OTHERS], ids=str)
def test_tables_are_finite(arguments, kind):
    schedule = make_schedule(**arguments)
    total = schedule.timesteps
    if not isinstance(kind, str):
        kind = sorted({min(t, total - 1) for t in kind})
    with np.errstate(all="raise", under="ignore"):
        counts = FEW if arguments in OTHERS[1:] else COUNTS
        for steps in sorted({min(count, total) for count in counts}):
            if total == 1 and str(kind).startswith("ays"):
                continue  # these grids have two timesteps at least, and are refused
            for name, leaf in tables(schedule, kind, steps):
                assert np.isfinite(leaf).all(), (name, steps)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("name", SAMPLERS)
def test_tables_over_all_timesteps_are_finite(name, kind):
    schedule = make_schedule(linear_start=0.00085, linear_end=0.012)
    nodes = SAMPLERS[name].nodes(schedule, time_grid(kind, schedule.timesteps, schedule))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nodes))
