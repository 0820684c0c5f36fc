"""Normalisation of each platform equals plain formulas: values, gradients, residuals."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.kernels import REFERENCE, for_platform
from ldm_jax.nn.layers import Dense, LayerNorm

GROUPS, EPS = 4, 1e-5
DEVICES = {
    "reference": REFERENCE,
    "one cpu": for_platform("cpu"),
    "cpus": for_platform("cpu", make_mesh()),
    "gpu": for_platform("gpu"),
    "tpu": for_platform("tpu"),
}


def plain_group_norm(x, scale, bias, *, silu):
    x = x.astype(jnp.float32)
    y = x.reshape(len(x), -1, GROUPS, x.shape[-1] // GROUPS)
    y = (y - y.mean((1, 3), keepdims=True)) / jnp.sqrt(y.var((1, 3), keepdims=True) + EPS)
    y = y.reshape(x.shape) * scale + bias
    return nn.silu(y) if silu else y


def plain_layer_norm(x, scale, bias):
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(x.var(-1, keepdims=True) + EPS) * scale + bias


# name -> (the form of some kernels, the plain formula)
FORMS = {
    "group": (
        lambda kernels: lambda *a: kernels.group_norm(*a, GROUPS, EPS, False),
        partial(plain_group_norm, silu=False),
    ),
    "group and silu": (
        lambda kernels: lambda *a: kernels.group_norm(*a, GROUPS, EPS, True),
        partial(plain_group_norm, silu=True),
    ),
    "layer": (lambda kernels: lambda *a: kernels.layer_norm(*a, EPS), plain_layer_norm),
}


def inputs(*shape):
    rng = np.random.default_rng(0)
    x, scale, bias, dy = (
        rng.standard_normal(s).astype(np.float32) for s in (shape, shape[-1:], shape[-1:], shape)
    )
    return 3 + 2 * x, scale, bias, dy


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "shape", [(2, 5, 6, 16), (3, 7, 16), (3, 16)], ids=["picture", "tokens", "vectors"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_the_plain_form(device, name, shape, dtype):
    x, scale, bias, dy = inputs(*shape)
    x = jnp.asarray(x, dtype)

    def results(form):
        y, back = jax.vjp(form, x, scale, bias)
        return y, *back(dy)

    ours, plain = FORMS[name]
    found = results(ours(DEVICES[device]))
    for a, b in zip(found, results(plain), strict=True):
        assert a.dtype == b.dtype
        close = (
            {"rtol": 1e-4, "atol": 1e-5} if a.dtype == jnp.float32 else {"rtol": 2e-2, "atol": 2e-2}
        )
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), **close)


@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_group_does_not_spread_to_others(device):
    x, scale, bias, _ = inputs(2, 5, 6, 16)
    x[0, 0, 0, 5] = np.nan
    broken = np.isnan(DEVICES[device].group_norm(x, scale, bias, GROUPS, EPS, False))
    assert broken[0, :, :, 4:8].all()
    assert broken.sum() == broken[0, :, :, 4:8].size


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 1000,
        lambda x: x + 100 * np.arange(16),
        lambda x: x + 30 * (np.arange(32) == 18)[:, None, None],
    ],
    ids=["far from zero", "channels apart", "a row apart"],
)
def test_statistics_do_not_cancel(device, change):
    x = change(np.random.default_rng(0).standard_normal((2, 32, 32, 16))).astype(np.float32)
    groups = x.astype(np.float64).reshape(2, -1, GROUPS, 4)
    expected = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(
        groups.var((1, 3), keepdims=True) + EPS
    )
    scale, bias = np.ones(16, np.float32), np.zeros(16, np.float32)
    found = DEVICES[device].group_norm(x, scale, bias, GROUPS, EPS, False)
    np.testing.assert_allclose(
        found, expected.reshape(x.shape), rtol=1e-5, atol=1e-6 * np.abs(x).max()
    )


def test_layer_norm_is_flax_s():
    x, *_ = inputs(3, 7, 16)
    ours, flax = LayerNorm(), nn.LayerNorm(epsilon=1e-5)
    variables = ours.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
        jnp.shape, flax.init(jax.random.key(0), x)
    )
    variables = jax.tree.map(lambda a: a + 0.5 * jnp.arange(16.0), variables)
    np.testing.assert_allclose(
        ours.apply(variables, x), flax.apply(variables, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", FORMS)
def test_a_backward_pass_keeps_the_input_and_little_else(name):
    x, scale, bias, _ = inputs(1, 32, 32, 16)

    def kept(form):
        _, back = jax.vjp(form, jnp.asarray(x), scale, bias)
        return sum(a.nbytes for a in jax.tree.leaves(back))

    ours, plain = FORMS[name]
    ours, plain = kept(ours(for_platform("cpu"))), kept(plain)
    assert x.nbytes <= ours < 1.1 * x.nbytes < 2 * x.nbytes <= plain


def test_a_linear_layer_has_the_gradients_of_xla():
    x, *_ = inputs(2, 5, 6, 16)
    variables = nn.Dense(8).init(jax.random.key(0), x)

    def gradients(module):
        return jax.grad(lambda v, x: jnp.sin(module.apply(v, x)).sum(), (0, 1))(variables, x)

    both = gradients(Dense(8, kernels=for_platform("cpu"))), gradients(nn.Dense(8))
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
