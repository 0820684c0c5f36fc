"""Every sampler on every grid, of every config's schedule and of the demo; LDM_JAX_SWEEP=1 runs it.

The tables are a few minutes of work on one core, the pictures of the demo some ten minutes.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_finite import COUNTS, OTHERS, of_configs, tables

import ldm_jax
from ldm_jax.diffusion.grids import ALL, time_grid
from ldm_jax.diffusion.guidance import predictor
from ldm_jax.diffusion.samplers import SAMPLERS, initial_noise
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.sampling.pipeline import OFFERED

pytestmark = pytest.mark.skipif(
    os.environ.get("LDM_JAX_SWEEP") != "1", reason="minutes of work: LDM_JAX_SWEEP=1 runs it"
)
STEPS = 5
COLOURS = 20  # of a picture, at least


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("arguments", [*of_configs(), *OTHERS], ids=str)
def test_tables_of_all_step_counts_are_finite(arguments, kind):
    schedule = make_schedule(**arguments)
    total = schedule.timesteps
    if total == 1 and kind.startswith("ays"):
        pytest.skip("these grids have two timesteps at least")
    with np.errstate(all="raise", under="ignore"):
        for steps in sorted({min(count, total) for count in (*COUNTS, total)}):
            for name, leaf in tables(schedule, kind, steps):
                assert np.isfinite(leaf).all(), (name, steps)


@pytest.fixture(scope="module")
def demo():
    """(schedule, noise [1, h, w, c], predict, decode) of the demo, the network compiled once."""
    pipe = ldm_jax.load("emoji", devices=1)
    model, stage = pipe.model, pipe.model.first_stage
    encoded = model.conditioner.encode(["red apple, noto style"])
    null = model.conditioner.null_row(encoded)

    @jax.jit
    def denoise(x, t):
        return model.denoiser(encoded, null, jnp.float32([5.0]))(x, t)

    size = pipe.defaults.size[0] // stage.downsampling
    noise = initial_noise(jax.random.split(jax.random.key(0), 1), (size, size, stage.channels))
    return (
        pipe._schedule,
        noise,
        predictor(denoise, model.schedule, model.objective),
        jax.jit(stage.decode),
    )


@pytest.mark.parametrize("name", OFFERED)
def test_pictures_of_the_demo_are_finite_and_have_colours(demo, name):
    schedule, x, predict, decode = demo
    sampler = SAMPLERS[name]
    for kind in ALL:
        nodes = sampler.nodes(schedule, time_grid(kind, STEPS, schedule))
        carry, state = sampler.init(x), x
        for i in range(len(jax.tree.leaves(nodes)[0])):
            node = jax.tree.map(lambda a, i=i: jnp.asarray(a)[i], nodes)
            drawn = jax.random.normal(jax.random.key(i), (max(sampler.draws, 1), *x.shape))
            carry, state, _ = sampler.step(carry, node, state, predict, drawn)
        pixels = np.asarray(decode(state))
        assert np.isfinite(pixels).all(), kind
        eight_bit = np.clip((pixels + 1) * 127.5, 0, 255).astype(np.uint8)
        assert len(np.unique(eight_bit)) >= COLOURS, kind
