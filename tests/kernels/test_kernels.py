"""Kernels alone decide what a program computes, and the reference ones are plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import kernels as package
from ldm_jax.diffusion.grids import time_grid
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.kernels import PORTABLE, REFERENCE, for_platform
from ldm_jax.kernels.vjp import own_gradient
from ldm_jax.models.build import build, init_params
from ldm_jax.models.unet import UNet
from ldm_jax.sampling.inputs import Inputs
from ldm_jax.sampling.program import SamplingConfig, Steps, generate

pytestmark = pytest.mark.compile

CONFIG = {
    "kind": "latent_diffusion",
    "objective": "eps",
    "schedule": {
        "beta_schedule": "linear",
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "timesteps": 1000,
    },
    "first_stage": {"kind": "identity"},
    "conditioner": {"kind": "embeddings", "dim": 8, "count": 3},
    "unet": {
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "channel_mult": (1,),
        "num_res_blocks": 1,
        "attention_resolutions": (1,),
        "num_heads": 1,
        "use_spatial_transformer": True,
        "context_dim": 8,
    },
}
PLATFORMS = ("cpu", "gpu", "tpu")


@pytest.fixture(scope="module")
def model():
    built = build(CONFIG, None, None)
    return built.replace(params=jax.jit(lambda key: init_params(built, key))(jax.random.key(0)))


def inputs(n: int = 1, side: int = 16):
    """x, t, context of a UNet."""
    rng = np.random.default_rng(0)
    x, context = rng.standard_normal((n, side, side, 3)), rng.standard_normal((n, 3, 8))
    return jnp.float32(x), jnp.full(n, 7.0), jnp.float32(context)


def by_hand(function, *args) -> int:
    """The number of custom gradients in its program."""
    return str(jax.make_jaxpr(function)(*args)).count("custom_vjp_call")


# ------------------------------------------------------------------------------- without any set-up


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_network_uses_the_reference_forms_by_default_on_every_platform(model, platform):
    """No loop over chunks or bands, barrier, erf, kernel or custom gradient."""
    unet = UNet(**CONFIG["unet"])

    def loss(params, *args):
        return unet.apply({"params": params}, *args).sum()

    # 24x24: long enough for attention in chunks, 2 rows: enough pixels for bands.
    args = model.params["unet"], *inputs(2, 24)
    traced = jax.jit(jax.grad(loss)).trace(*args)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    for sign in ("while", "custom_call", "optimization_barrier", "chlo.erf ", "case"):
        assert sign not in text, sign
    assert by_hand(jax.grad(loss), *args) == 0
    # Which is a test that can fail: the CPU's forms have them.
    ours = UNet(**CONFIG["unet"], kernels=for_platform("cpu"))
    text = jax.jit(jax.grad(lambda p, *a: ours.apply({"params": p}, *a).sum())).lower(*args)
    assert "while" in text.as_text()


def test_a_plain_network_is_differentiated_in_every_way(model):
    x, t, context = inputs()
    params = jax.tree.map(lambda a: a + 0.02, model.params["unet"])  # the last layer starts at zero
    apply = jax.jit(model.unet.apply)

    def loss(x):
        return jnp.square(apply({"params": params}, x, t, context)).sum()

    direction = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    value, slope = jax.jvp(loss, (x,), (direction,))
    gradient, curvature = jax.jvp(jax.grad(loss), (x,), (direction,))
    np.testing.assert_allclose(value, loss(x), rtol=1e-5)
    np.testing.assert_allclose(jnp.vdot(gradient, direction), slope, rtol=1e-3)
    h = 1e-2
    apart = (jax.grad(loss)(x + h * direction) - jax.grad(loss)(x - h * direction)) / (2 * h)
    assert jnp.abs(curvature - apart).max() < 2e-2 * jnp.abs(apart).max()


# -------------------------------------------------------------------------------- with a platform's


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_platform_s_forms_have_the_values_and_gradients_of_the_plain_ones(model, platform):
    params = jax.tree.map(lambda a: a + 0.02, model.params["unet"])

    def results(kernels):
        unet = model.unet.clone(kernels=kernels)

        def loss(params, x, t, context):
            y = unet.apply({"params": params}, x, t, context)
            return jnp.sin(y).sum(), y

        (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, *inputs(1, 8))
        return [y, *jax.tree.leaves(grads)]

    for ours, plain in zip(results(for_platform(platform)), results(REFERENCE), strict=True):
        scale = float(jnp.abs(plain).max()) + 1e-6
        assert float(jnp.abs(ours - plain).max()) < 1e-4 * scale + 1e-5


def test_sampling_is_traced_without_hand_written_gradients_and_training_with_them(model):
    sampler, seeds = SAMPLERS["ddim"], np.arange(1, dtype=np.uint32)
    plan = Steps(sampler.nodes(model.schedule, time_grid("uniform", 2, model.schedule)))
    rows = Inputs(seeds, model.conditioner.encode_null(1))

    def images(model, rows):
        kernels = for_platform("cpu", differentiable=False)
        return generate(model.with_kernels(kernels), sampler, plan, rows, SamplingConfig((16, 16)))

    assert by_hand(images, model, rows) == 0
    unet = model.unet.clone(kernels=for_platform("cpu"))
    assert by_hand(lambda p: unet.apply({"params": p}, *inputs()), model.params["unet"]) > 10


def test_portable_kernels_are_the_cpu_s_where_a_program_is_lowered_for_it(model):
    unet, args = model.unet.clone(kernels=PORTABLE), inputs(1, 16)
    program = jax.jit(lambda p, *args: unet.apply({"params": p}, *args))
    texts = {
        platform: program.trace(model.params["unet"], *args)
        .lower(lowering_platforms=(platform,))
        .as_text()
        for platform in ("cpu", "tpu")
    }
    assert "while" in texts["cpu"]  # attention in chunks
    assert "while" not in texts["tpu"]
    found = program(model.params["unet"], *args)
    expected = model.unet.apply({"params": model.params["unet"]}, *args)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_results_do_not_depend_on_the_table(pipe, monkeypatch):
    """Without kernels/cpu.py: the same pictures."""
    pipeline = type(pipe)(pipe.model, devices=1)
    expected = pipe("red apple", seeds=[3])
    for platform in PLATFORMS:
        monkeypatch.setitem(package._PLATFORMS, platform, package.Kernels)
    found = pipeline("red apple", seeds=[3])
    assert np.abs(found.astype(int) - expected).max() <= 1


# ------------------------------------------------------------------------ gradients written by hand


def test_a_hand_written_gradient_is_used_unless_none_is_wanted():
    doubled = own_gradient(lambda x, by: (x * by, x), lambda by, x, dy: (7 * dy,), (1,))
    assert jax.grad(lambda x: doubled(x, 3.0))(2.0) == 7.0
    assert jax.grad(lambda x: doubled(x, 3.0, differentiable=False))(2.0) == 3.0
    assert doubled(2.0, 3.0) == doubled(2.0, 3.0, differentiable=False) == 6.0


def test_primal_is_for_where_nothing_is_differentiated():
    function = own_gradient(lambda x: (x, None), lambda _, dy: (dy,), primal=lambda x: x + 1)
    assert function(1.0) == 2.0
    assert jax.value_and_grad(function)(1.0) == (1.0, 1.0)
