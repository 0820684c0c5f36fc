"""Layers that every network shares."""

import flax.errors
import jax
import jax.numpy as jnp
import pytest

from ldm_jax.nn.layers import Conv, Dense, GroupNorm, LayerNorm, as_many

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
