"""Gradients written by hand, and programs that are traced without them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.grids import time_grid
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.kernels.vjp import forward_only, own_gradient
from ldm_jax.models.ldm import apply, build, init_params
from ldm_jax.nn.layers import shapes_of
from ldm_jax.sampling.program import Form, Plan, Rows, generate

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


@pytest.fixture(scope="module")
def model():
    built = build(CONFIG, None, None)
    return built.replace(params=jax.jit(lambda key: init_params(built, key))(jax.random.key(0)))


def by_hand(function, *args) -> int:
    """How many gradients written by hand its program has."""
    return str(jax.make_jaxpr(function)(*args)).count("custom_vjp_call")


def test_a_gradient_of_ours_is_there_unless_only_values_are_wanted():
    doubled = own_gradient(lambda x, by: (x * by, x), lambda by, x, dy: (7 * dy,), (1,))

    def forward(x):
        with forward_only():
            return doubled(x, 3.0)

    assert jax.grad(lambda x: doubled(x, 3.0))(2.0) == 7.0
    assert jax.grad(forward)(2.0) == 3.0
    assert doubled(2.0, 3.0) == forward(2.0) == 6.0


def test_primal_is_for_where_nothing_is_differentiated():
    function = own_gradient(lambda x: (x, None), lambda _, dy: (dy,), primal=lambda x: x + 1)
    assert function(1.0) == 2.0
    assert jax.value_and_grad(function)(1.0) == (1.0, 1.0)


def test_sampling_has_none_of_them_and_what_is_differentiated_after_it_has(model):
    sampler, seeds = SAMPLERS["ddim"], np.arange(1, dtype=np.uint32)
    plan = Plan(sampler.nodes(model.schedule, time_grid("uniform", 2, model.schedule)))
    rows = Rows(seeds, model.conditioner.encode_null(1))
    assert (
        by_hand(
            lambda model, rows: generate(model, sampler, plan, rows, Form((16, 16))), model, rows
        )
        == 0
    )

    cond = jnp.zeros((1, 3, 8))
    z, t = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1,))
    unet, params = model.unet, model.params["unet"]

    with forward_only():
        assert by_hand(lambda params: apply(unet, params, z, t, cond), params) == 0
    assert by_hand(lambda params: apply(unet, params, z, t, cond), params) > 10


def test_shapes_of_fresh_parameters_are_those_that_fresh_parameters_have(model):
    def make(key):
        return init_params(model, key)

    key = jax.random.key(0)
    shapes, made = shapes_of(make, key), jax.jit(make)(key)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), made
    )
    assert np.std(made["unet"]["input_blocks_0_0"]["kernel"]) > 0
    assert "random_bits" in str(jax.make_jaxpr(make)(key))
    assert "random_bits" not in str(jax.make_jaxpr(lambda key: shapes_of(make, key) and 0)(key))
