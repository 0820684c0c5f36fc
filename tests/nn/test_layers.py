"""Layers that every network shares."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.distributed.parallel import Target, compiled_for
from ldm_jax.nn.layers import Conv, Dense, GroupNorm, LayerNorm, as_many
from ldm_jax.nn.resnet import Upsample

X = jnp.ones((2, 4, 4, 32))


@pytest.mark.parametrize(
    "layer",
    [Dense(8), Conv(8, (3, 3)), GroupNorm(1e-5), LayerNorm()],
    ids=["dense", "conv", "group_norm", "layer_norm"],
)
def test_given_parameters_have_their_shapes_compared_without_an_initialiser(layer, monkeypatch):
    variables = layer.init(jax.random.key(0), X)
    wrong = jax.tree.map(lambda a: jnp.zeros((*a.shape, 1)), variables)
    with pytest.raises(flax.errors.ScopeParamShapeError, match="shape"):
        layer.apply(wrong, X)
    monkeypatch.setattr(jax, "eval_shape", None)  # which Flax calls for each
    assert layer.apply(variables, X).shape[:3] == X.shape[:3]


def test_as_many_repeats_whole_batches():
    a = jnp.arange(3)
    assert as_many(a, jnp.zeros((6, 2))).tolist() == [0, 1, 2, 0, 1, 2]
    assert as_many(a, jnp.zeros((3, 2))) is a


@pytest.mark.parametrize("size", [(8, 8), (2, 3)], ids=["many pixels", "few"])
def test_doubling_and_convolving_is_one_convolution_for_a_tpu(size):
    module, x = Upsample(), jax.random.normal(jax.random.key(0), (2, *size, 8))
    variables = module.init(jax.random.key(1), x)
    dy = jax.random.normal(jax.random.key(2), (2, 2 * size[0], 2 * size[1], 8))

    def results(told):
        with compiled_for(told):
            y, back = jax.vjp(module.apply, variables, x)
            traced = str(jax.make_jaxpr(module.apply)(variables, x))
        return jax.tree.leaves((y, back(dy))), "lhs_dilation=(2, 2)" in traced

    (plain, never), (ours, dilated) = results(None), results(Target("tpu"))
    assert (never, dilated) == (False, size == (8, 8))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
