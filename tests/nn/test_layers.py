"""Shared layers."""

import dataclasses
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.kernels import REFERENCE, for_platform
from ldm_jax.nn.layers import Conv, Dense, GroupNorm, LayerNorm, repeat_batch, with_kernels
from ldm_jax.nn.resnet import Upsample

X = jnp.ones((2, 4, 4, 32))


@pytest.mark.parametrize(
    "layer",
    [Dense(8), Conv(8), GroupNorm(1e-5), LayerNorm()],
    ids=["dense", "conv", "group_norm", "layer_norm"],
)
def test_given_parameters_have_their_shapes_compared_without_an_initialiser(layer, monkeypatch):
    variables = layer.init(jax.random.key(0), X)
    wrong = jax.tree.map(lambda a: jnp.zeros((*a.shape, 1)), variables)
    with pytest.raises(flax.errors.ScopeParamShapeError, match="shape"):
        layer.apply(wrong, X)
    monkeypatch.setattr(jax, "eval_shape", None)  # which Flax calls for each
    assert layer.apply(variables, X).shape[:3] == X.shape[:3]


@pytest.mark.fast
def test_repeat_batch_repeats_whole_batches():
    a = jnp.arange(3)
    assert repeat_batch(a, jnp.zeros((6, 2))).tolist() == [0, 1, 2, 0, 1, 2]
    assert repeat_batch(a, jnp.zeros((3, 2))) is a


@dataclasses.dataclass(frozen=True)
class Holder:
    """A module held by another, as conditioners hold theirs."""

    inner: Any
    size: int = 3


@pytest.mark.fast
def test_kernels_reach_every_module_and_leave_the_rest():
    cpu, norm = for_platform("cpu"), nn.LayerNorm()
    changed = with_kernels(Holder(Holder(Dense(8))), cpu)
    assert changed == Holder(Holder(Dense(8, kernels=cpu)))
    assert with_kernels(changed, REFERENCE) == Holder(Holder(Dense(8)))
    for other in (Holder(norm), norm, None, 3):
        assert with_kernels(other, cpu) is other


@pytest.mark.fast
@pytest.mark.parametrize("size", [(8, 8), (2, 3)], ids=["many pixels", "few"])
def test_doubling_and_convolving_is_one_convolution_for_a_tpu(size):
    module, x = Upsample(), jax.random.normal(jax.random.key(0), (2, *size, 8))
    variables = module.init(jax.random.key(1), x)
    dy = jax.random.normal(jax.random.key(2), (2, 2 * size[0], 2 * size[1], 8))

    def results(kernels):
        apply = module.clone(kernels=kernels).apply
        y, back = jax.vjp(apply, variables, x)
        traced = str(jax.make_jaxpr(apply)(variables, x))
        return jax.tree.leaves((y, back(dy))), "lhs_dilation=(2, 2)" in traced

    (plain, never), (ours, dilated) = results(REFERENCE), results(for_platform("tpu"))
    assert (never, dilated) == (False, size == (8, 8))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
