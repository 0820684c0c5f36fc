"""The timesteps at which samplers stop."""

import numpy as np
import pytest

from ldm_jax.diffusion.samplers import step_grid

T = 1000


@pytest.mark.parametrize("kind", ["uniform", "quad", "trailing"])
def test_any_count_gives_as_many_distinct_ascending_steps_of_the_schedule(kind):
    grids = [step_grid(kind, steps, T) for steps in range(1, T + 1)]
    assert [len(grid) for grid in grids] == list(range(1, T + 1))
    assert all((np.diff(grid) > 0).all() for grid in grids)
    assert min(grid[0] for grid in grids) >= 0
    assert max(grid[-1] for grid in grids) < T


@pytest.mark.parametrize("steps", [s for s in range(1, T + 1) if T % s == 0])
def test_uniform_grid_is_the_originals_where_that_exists(steps):
    original = np.arange(0, T, T // steps) + 1
    grid = step_grid("uniform", steps, T)
    if original[-1] < T:
        assert (
            grid.tolist()
            == original.tolist()
            == step_grid("uniform", steps, T, compat=True).tolist()
        )
    else:  # of the counts that divide T, only T itself leaves the schedule
        assert steps == T
        assert grid.tolist() == list(range(T))


def test_trailing_grid_begins_at_pure_noise():
    assert all(step_grid("trailing", steps, T)[-1] == T - 1 for steps in (1, 2, 7, 50, T))


def test_compat_keeps_the_originals_count_even_where_it_is_off():
    assert step_grid("uniform", 7, T, compat=True).tolist() == [
        1,
        143,
        285,
        427,
        569,
        711,
        853,
        995,
    ]
    assert len(step_grid("uniform", 7, T)) == 7


def test_compat_refuses_where_the_original_crashes():
    with pytest.raises(ValueError, match="reaches timestep 1000 of 1000"):
        step_grid("uniform", T, T, compat=True)


@pytest.mark.parametrize(("steps", "total"), [(0, T), (T + 1, T), (-1, T), (2, 1)])
def test_counts_outside_the_schedule_are_refused(steps, total):
    with pytest.raises(ValueError, match=f"steps must be from 1 to {total}, not {steps}"):
        step_grid("uniform", steps, total)


def test_unknown_grid_names_what_exists():
    with pytest.raises(ValueError, match=r"'linear' does not exist.*uniform, quad, trailing"):
        step_grid("linear", 5, T)
