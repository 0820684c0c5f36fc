"""Reusing what a network's deep layers found: DeepCache (Ma et al. 2023, arXiv:2312.00858)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.guidance import Predict

# (*args, deep features or None to compute them) -> (output, deep features)
Network = Callable[..., tuple[jax.Array, Any]]


@dataclasses.dataclass
class FeatureCache:
    """Every ``interval``-th call of a network is a full one; those between take its deep features and run the layers around them alone.

    Guidance, the predictor and the samplers lie between `sample`, whose scan carries the features, and the network, and need not know of them: while
    a step is traced they lie here. So a cache serves one `sample` in one trace, and in a step it must be called once, as it is but in adaptive ones.
    """

    interval: int
    deep: Any = dataclasses.field(default=None, init=False)
    fresh: jax.Array | None = dataclasses.field(default=None, init=False)

    def empty(self, predict: Predict, x: jax.Array) -> Any:
        """Zeros in the shape of the features that a call of ``predict`` at ``x`` [b, ...] leaves: what the first step is begun with."""

        def first(x: jax.Array) -> Any:
            self.deep = None
            predict(x, jnp.zeros((), jnp.int32))
            return self.deep

        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(first, x))

    def begin(self, deep: Any, call: jax.Array) -> None:
        """A step with the features ``deep``: the ``call``-th [] of the run, from 0."""
        self.deep, self.fresh = deep, call % self.interval == 0

    def call(self, network: Network, *args: Any) -> jax.Array:
        """The output of ``network(*args, deep)``, whose features stay here."""
        if self.deep is None:
            out, self.deep = network(*args, None)
            return out
        # One number for the whole batch: only the branch that is taken runs.
        out, self.deep = jax.lax.cond(
            self.fresh,
            lambda deep, *args: network(*args, None),
            lambda deep, *args: network(*args, deep),
            self.deep,
            *args,
        )
        return out
