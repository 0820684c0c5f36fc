"""Step grids of the samplers."""

import numpy as np
import pytest

from ldm_jax.diffusion.grids import ALL, SIGMA_GRIDS, time_grid, vp_sigma
from ldm_jax.diffusion.samplers import step_grid
from ldm_jax.diffusion.schedule import make_schedule, t_to_sigma

pytestmark = pytest.mark.fast

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


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("total", [T, 7])
def test_every_grid_has_as_many_ascending_steps_within_the_schedule(kind, total):
    schedule = make_schedule("linear", total, 0.0015, 0.0195)
    for steps in {min(steps, total) for steps in (1, 2, 3, 7, 20, 50, total)}:
        grid = time_grid(kind, steps, schedule)
        assert len(grid) == steps
        assert (np.diff(grid) > 0).all()
        assert grid[0] >= 0
        assert grid[-1] <= total - 1


@pytest.mark.parametrize("kind", ["linspace", "linspace_ends", "beta", "ays", "distilled"])
def test_grids_of_few_steps_begin_at_the_last_timestep(kind):
    schedule = make_schedule("linear", T, 0.0015, 0.0195)
    assert all(time_grid(kind, steps, schedule)[-1] == T - 1 for steps in (1, 2, 4, 10))


def test_linear_quadratic_is_linear_and_then_bends():
    grid = time_grid("linear_quadratic", 20, make_schedule("linear", T, 0.0015, 0.0195))[::-1]
    strides = -np.diff(grid)
    np.testing.assert_allclose(strides[:10], 0.025 / 10 * (T - 1))
    np.testing.assert_allclose(np.diff(strides[11:]), np.diff(strides[11:])[0])
    assert strides[-1] > strides[10] > strides[9] * 0.99


def test_the_grid_of_the_vp_sde_is_even_in_its_time():
    low, high = vp_sigma(np.array([1e-3, 1.0]))
    sigmas = SIGMA_GRIDS["vp"](9, low, high)
    np.testing.assert_allclose(sigmas, vp_sigma(np.linspace(1, 1e-3, 9)), rtol=1e-9)


def test_rho_bends_a_grid_and_is_refused_elsewhere():
    schedule = make_schedule("linear", T, 0.0015, 0.0195)
    low, high = t_to_sigma(schedule, [0, T - 1])
    sigmas = t_to_sigma(schedule, time_grid("karras", 5, schedule, rho=3.0))
    np.testing.assert_allclose(sigmas ** (1 / 3), np.linspace(low ** (1 / 3), high ** (1 / 3), 5))
    with pytest.raises(ValueError, match="'uniform' has no rho"):
        time_grid("uniform", 5, schedule, rho=3.0)
