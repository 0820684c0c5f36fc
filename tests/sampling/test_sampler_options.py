"""Every option of a sampler from a request: in its tables, its program, its picture's text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, pipeline_of

from ldm_jax.diffusion.adaptive import DPMAdaptive
from ldm_jax.diffusion.grids import time_grid
from ldm_jax.diffusion.objective import Prediction
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.errors import RequestError
from ldm_jax.sampling.pipeline import OFFERED
from ldm_jax.sampling.request import KINDS, Request, own_eta

STEPS = 4
# Values that differ from the defaults, and fit a run of few steps.
OTHER = {"churn": 2.0, "s_tmin": 0.1, "s_tmax": 5.0, "s_noise": 0.9, "order": 2.0, "restarts": 2.0}
OTHER |= {"restart_min": 0.2, "restart_max": 4.0, "rtol": 0.1, "atol": 0.02, "h_init": 0.1}
OTHER |= {"safety": 0.9, "timestep_scaling": 5.0, "r": 0.4}


@pytest.fixture(scope="module")
def small():
    return pipeline_of(SMALL)


def tables(pipe, **given):
    return pipe.steps(pipe.settings(steps=STEPS, **given)).nodes


def equal(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(
        x.shape == y.shape and (x == y).all() for x, y in zip(a, b, strict=True)
    )


@pytest.mark.fast
@pytest.mark.parametrize("name", OFFERED)
def test_every_option_reaches_the_tables(small, name):
    sampler, schedule = SAMPLERS[name], small._schedule
    grid = time_grid("uniform", STEPS, schedule)
    assert equal(tables(small, sampler=name), sampler.nodes(schedule, grid))
    further = [option for option in sampler.options if option not in ("eta", "temperature")]
    churn = {"churn": 2.0} if "churn" in sampler.options else {}  # without which the others rest
    for option in further:
        given = churn | {option: OTHER[option]}
        found = tables(small, sampler=name, sampler_options=given)
        assert equal(found, sampler.nodes(schedule, grid, **given))
        assert sampler.options[option] != OTHER[option]
    if "eta" in sampler.options:
        assert own_eta(name) == sampler.options["eta"]
        for eta in (0.0, 0.5):
            found = tables(small, sampler=name, eta=eta)
            assert equal(found, sampler.nodes(schedule, grid, eta=eta))
        if own_eta(name):
            assert not equal(tables(small, sampler=name, eta=0.0), tables(small, sampler=name))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampler": "euler", "sampler_options": {"chrn": 1}}, "has no 'chrn' (its options"),
        ({"sampler": "plms", "sampler_options": {"churn": 1}}, "the plms sampler has no 'churn'"),
        ({"sampler_options": {"eta": 1}}, "sampler_options: eta is a setting of its own"),
        ({"sampler": "euler", "sampler_options": {"churn": -1}}, "churn must be at least 0"),
        ({"sampler": "lms", "sampler_options": {"order": 5}}, "order must be from 1 to 4, not 5"),
        (
            {"sampler": "dpmpp_sde", "sampler_options": {"r": 0}},
            "r must be above 0 and up to 1, not 0",
        ),
        (
            {"sampler": "dpm_adaptive", "sampler_options": {"h_init": 0}},
            "dpm_adaptive: h_init must be above 0",
        ),
        ({"sampler_options": {"churn": float("inf")}}, "must be names with finite numbers"),
        ({"sampler_options": [1]}, "must be names with finite numbers"),
        ({"noise_dropout": 1.0}, "noise_dropout must be at least 0 and below 1, not 1.0"),
        ({"noise_dropout": 0.1}, "noise_dropout: ddim adds no noise at eta 0: give eta too"),
        ({"sampler": "plms", "noise_dropout": 0.1}, "the plms sampler adds no noise"),
        ({"renoise_null": 1}, "renoise_null must be True or False, not 1"),
        ({"renoise_null": True, "guidance": 2.0}, "takes a guidance from 0 to 1, not 2"),
        (
            {"renoise_null": True, "guidance": 0.5, "sampler": "dpmpp_2m"},
            "dpmpp_2m does not step with the model's noise; take ddim or ddim_x0 or tcd",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_an_option_that_does_not_fit_is_one_line(small, given, message):
    with pytest.raises(RequestError) as caught:
        small.stream("x", **given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.fast
def test_options_are_written_on_a_command_line():
    assert KINDS["named"].parse("churn=40, s_noise=1.003") == {"churn": 40.0, "s_noise": 1.003}
    assert [KINDS["switch"].parse(text) for text in ("true", "False")] == [True, False]
    for kind, text in (("named", "churn"), ("named", "churn=many"), ("switch", "yes please")):
        with pytest.raises(ValueError):  # noqa: PT011  (which the command turns into its line)
            KINDS[kind].parse(text)


@pytest.mark.fast
def test_a_models_own_options_are_for_its_own_sampler(small, monkeypatch):
    own = dataclasses.replace(
        small.defaults, sampler="euler", sampler_options={"churn": 3.0}, noise_dropout=0.1
    )
    monkeypatch.setattr(small, "defaults", own)
    chosen = small.settings()
    assert (chosen.sampler_options, chosen.noise_dropout) == ({"churn": 3.0}, 0.1)
    chosen = small.settings(sampler="lms")
    assert (chosen.sampler_options, chosen.noise_dropout) == (None, None)


@pytest.mark.fast
def test_pictures_of_version_0_1_are_made_again_with_their_noise():
    old = {"seed": 1, "sampler": "euler_ancestral", "eta": 0.0}
    assert Request.from_row(old).eta == 1.0
    assert Request.from_row({**old, "sampler_options": None}).eta == 0.0
    assert Request.from_row({**old, "sampler": "ddim"}).eta == 0.0
    assert Request.from_row({**old, "eta": 0.5}).eta == 0.5


@pytest.mark.fast
def test_adaptive_steps_that_reach_their_limit_make_no_picture():
    schedule = make_schedule(timesteps=100)
    node = DPMAdaptive().nodes(schedule, time_grid("uniform", 10, schedule))
    node = jax.tree.map(lambda a: jnp.asarray(a)[0], node)
    x = jnp.ones((2, 3, 3, 1))

    def predict(x, t, at):
        return Prediction(x, 0.5 * x)

    cut = DPMAdaptive(limit=2).step(None, node, x, predict, None)[1]
    whole = DPMAdaptive().step(None, node, x, predict, None)[1]
    assert np.isnan(cut).all()
    assert np.isfinite(whole).all()


@pytest.mark.compile
def test_dropout_and_renoising_change_the_picture(exact_pipe):
    def made(**given):
        return exact_pipe("red", seeds=3, steps=3, **given)

    noisy = made(sampler="ddpm", guidance=0.5)
    assert np.abs(made(sampler="ddpm", guidance=0.5, noise_dropout=0.5) - noisy).max() > 0.01
    np.testing.assert_allclose(
        made(sampler="ddpm", guidance=0.5, noise_dropout=0.0), noisy, rtol=1e-3, atol=1e-3
    )
    # CFG++ at scale 0 is the unguided model, as classifier-free guidance at 0 is.
    plain = made(guidance=0.0)
    np.testing.assert_allclose(made(guidance=0.0, renoise_null=True), plain, rtol=1e-3, atol=1e-3)
    half = made(guidance=0.5, renoise_null=True)
    assert np.abs(half - made(guidance=0.5)).max() > 0.01
    assert np.abs(half - plain).max() > 0.01
