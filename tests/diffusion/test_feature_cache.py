"""Work that is shared: reused deep features (DeepCache), and both halves of a guided batch."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.conditioning.base import Cond
from ldm_jax.diffusion.guidance import classifier_free
from ldm_jax.diffusion.samplers import SAMPLERS, initial_noise
from ldm_jax.distributed.flops import count_flops
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import RequestError
from ldm_jax.kernels import for_platform
from ldm_jax.models.unet import layout
from ldm_jax.sampling.program import SamplingConfig

pytestmark = pytest.mark.compile

RED, BLUE = "red apple", "blue boat"
RNG = np.random.default_rng(0)
REQUEST = {"seeds": [5, 6], "guidance": 3.0}


def by_hand(
    model, prompts: list[str], seeds: list[int], guidance: float, full: list[bool], depth: int
) -> np.ndarray:
    """DDIM as a plain loop: pixels [b, h, w, 3]; ``full`` marks steps of the whole network."""
    nodes = SAMPLERS["ddim"].nodes(jax.device_get(model.schedule), np.array([1, 26, 51, 76]))
    condition = jax.jit(lambda tokens: model.conditioner(model.params["conditioner"], tokens))
    cond = condition(
        np.concatenate([model.conditioner.encode(["", ""]), model.conditioner.encode(prompts)])
    )
    whole = jax.jit(lambda x, t, cond: model.apply(model.params, x, t, cond, depth=depth))
    shallow = jax.jit(
        lambda x, t, cond, deep: model.apply(model.params, x, t, cond, depth=depth, deep=deep)
    )
    x, deep = (
        np.asarray(
            initial_noise(jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32)), (8, 8, 4))
        ),
        None,
    )
    abar = np.asarray(model.schedule.alphas_cumprod)
    for i, t in enumerate(nodes.t):
        both, times = np.concatenate([x, x]), np.full(4, t)
        if full[i]:
            out, deep = whole(both, times, cond)
        else:
            out, _ = shallow(both, times, cond, deep)
        null, prompted = np.split(np.asarray(out), 2)
        eps = null + guidance * (prompted - null)
        x0 = (x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t])
        x = nodes.x0[i] * x0 + nodes.eps[i] * eps
    return np.asarray(jax.jit(model.first_stage.decode)(x))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Relative to the spread of ``b``."""
    return float(np.abs(a - b).max() / b.std())


def test_interval_2_is_a_full_call_and_then_a_shallow_one(exact_pipe):
    depth = 2
    made = exact_pipe([RED, BLUE], **REQUEST, cache_interval=2, cache_depth=depth)
    expected = by_hand(
        exact_pipe.model, [RED, BLUE], [5, 6], 3.0, [True, False, True, False], depth
    )
    assert difference(made, expected) < 1e-4
    # The reuse has an effect.
    assert difference(made, exact_pipe([RED, BLUE], **REQUEST)) > 0.01


def test_interval_1_changes_no_bit_and_no_program(pipe, compilations):
    plain = pipe([RED, BLUE], **REQUEST)
    before = len(compilations)
    assert (pipe([RED, BLUE], **REQUEST, cache_interval=1, cache_depth=2) == plain).all()
    assert len(compilations) == before


def test_prompts_seeds_and_guidance_compile_nothing(pipe, compilations):
    pipe([RED, BLUE], **REQUEST, cache_interval=3)
    before = len(compilations)
    pipe([BLUE, RED], seeds=[1, 2], guidance=1.5, eta=0.3, cache_interval=3)
    assert len(compilations) == before


def test_image_to_image_begins_with_a_full_call(exact_pipe):
    """A strength below 1 skips the first rows of the scan; the first call made is a full one."""
    image, settings = (
        RNG.integers(0, 256, (16, 16, 3), np.uint8),
        {"seeds": 5, "guidance": 3.0, "strength": 0.3},
    )
    one_step = exact_pipe(RED, image=image, **settings, cache_interval=2)
    assert difference(one_step, exact_pipe(RED, image=image, **settings)) < 1e-5


def test_a_multistep_sampler_takes_it(exact_pipe):
    made = exact_pipe(RED, sampler="unipc", cache_interval=2)  # it remembers, and corrects itself
    assert difference(made, exact_pipe(RED, sampler="unipc")) > 0.001
    assert np.isfinite(made).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_interval": 0}, "cache_interval must be at least 1, not 0"),
        ({"cache_depth": 0}, "cache_depth must be from 1 to 4, not 0"),
        ({"cache_interval": 2, "cache_depth": 5}, "cache_depth must be from 1 to 4, not 5"),
        (
            {"cache_interval": 2, "sampler": "dpm_adaptive"},
            "dpm_adaptive chooses its own steps: leave cache_interval",
        ),
    ],
)
def test_impossible_requests_are_one_line_errors(pipe, settings, message):
    assert len(layout(pipe.model.unet).input) == 4
    with pytest.raises(RequestError, match=message):
        pipe.stream(RED, **settings)


def test_the_unet_with_its_own_deep_feature_is_the_unet(pipe):
    model = pipe.model
    x, t = jnp.asarray(RNG.standard_normal((1, 8, 8, 4)), jnp.float32), jnp.array([50])
    cond = Cond(crossattn=jnp.asarray(RNG.standard_normal((1, 12, 16)), jnp.float32))
    apply = jax.jit(partial(model.apply, model.params), static_argnames="depth")
    plain = apply(x, t, cond)
    for depth in (1, 4):
        out, deep = apply(x, t, cond, depth=depth)
        again, kept = apply(x, t, cond, depth=depth, deep=deep)
        assert difference(np.asarray(out), np.asarray(plain)) < 1e-5
        assert difference(np.asarray(again), np.asarray(plain)) < 1e-5
        assert (kept == deep).all()
    with pytest.raises(ValueError, match="depth 5 must be from 0 to 4"):
        apply(x, t, cond, depth=5)


# ------------------------------------------------------------------------------ what is compiled in


def test_decoding_settings_reach_the_program(pipe):
    form = pipe.config(pipe.settings(decode_batch=2, tile=8), (16, 16), 4, (0, 1))
    assert form == SamplingConfig((16, 16), progress=(0, 1), decode_batch=2, tile=8)


def test_outside_the_guidance_interval_half_the_rows_run():
    rows = []

    def model(x, t, cond):
        jax.debug.callback(lambda x: rows.append(len(x)), x)
        return cond * x

    interval = (np.float32(10.0), np.float32(20.0))
    cond, null, x = (
        np.full((2, 1), 3.0, np.float32),
        np.ones((2, 1), np.float32),
        np.ones((2, 1), np.float32),
    )
    out = {}
    for skip in (True, False):
        denoise = jax.jit(
            classifier_free(model, cond, null, np.float32(2.0), interval=interval, skip=skip)
        )
        out[skip] = [np.asarray(denoise(x, np.float32(t)))[0, 0] for t in (25, 15, 5)]
        jax.effects_barrier()
    assert rows == [2, 4, 2, 4, 4, 4]
    assert out[True] == out[False] == [3.0, 5.0, 3.0]


def test_a_picture_outside_every_interval_is_unguided_with_the_cache_too(exact_pipe):
    # The interval lies outside the schedule.
    late, cache = ({"guidance_interval": (200.0, 300.0)}, {"cache_interval": 2})
    assert (
        difference(
            exact_pipe(RED, guidance=3.0, **late, **cache), exact_pipe(RED, guidance=1.0, **cache)
        )
        < 1e-4
    )


# --------------------------------------------------------------------- before the condition is read


def test_two_contexts_of_a_picture_share_what_lies_before_the_first_cross_attention(pipe):
    model = pipe.model
    x, t = jnp.asarray(RNG.standard_normal((3, 8, 8, 4)), jnp.float32), jnp.array([5, 50, 90])
    cond = Cond(crossattn=jnp.asarray(RNG.standard_normal((6, 12, 16)), jnp.float32))
    apply = jax.jit(partial(model.apply, model.params), static_argnames="depth")
    (shared, deep), (twice, deep_twice) = (
        apply(x, t, cond, depth=1),
        apply(jnp.concatenate([x, x]), jnp.concatenate([t, t]), cond, depth=1),
    )
    assert shared.shape == (6, 8, 8, 4)
    assert difference(np.asarray(shared), np.asarray(twice)) < 1e-5
    assert difference(np.asarray(deep), np.asarray(deep_twice)) < 1e-5
    again, _ = apply(x, t, cond, depth=1, deep=deep)
    assert difference(np.asarray(again), np.asarray(twice)) < 1e-5


def test_a_guided_call_computes_less_than_two_where_its_rows_stay_together(pipe):
    model, cond = pipe.model, Cond(crossattn=jnp.ones((2, 12, 16)))

    def flops(denoise) -> int:
        return count_flops(
            jax.make_jaxpr(denoise)(jnp.zeros((2, 8, 8, 4)), jnp.zeros(())).jaxpr
        ).total()

    plain = dataclasses.replace(model, conditioner=lambda params, cond: cond)
    guided = flops(plain.denoiser(cond, cond, jnp.ones(())))
    assert 1.5 < guided / flops(plain.denoiser(cond)) < 1.95


def test_rows_sharded_or_with_differing_conditions_are_repeated_at_once(pipe):
    model, devices = pipe.model, make_mesh(2)
    context, picture = jnp.ones((2, 12, 16)), jnp.ones((2, 8, 8, 4))
    assert model.shares_rows(Cond(crossattn=context))
    for cond in (
        Cond(concat=picture),
        Cond(context, concat=picture),
        Cond(context, vector=jnp.zeros(2, jnp.int32)),
    ):
        assert not model.shares_rows(cond)
    for options in ({"mesh": devices}, {"cores": devices}):
        divided = model.with_kernels(for_platform("cpu", **options))
        assert not divided.shares_rows(Cond(crossattn=context))
    assert model.with_kernels(for_platform("gpu")).shares_rows(Cond(crossattn=context))
