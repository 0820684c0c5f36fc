"""Reuse of deep features between steps: DeepCache (Ma et al. 2023, arXiv:2312.00858)."""

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
    """Runs the full network every `interval` calls, and its outer layers alone in between.

    The scan of `sample` carries the features. Guidance, the predictor and the sampler lie between
    it and the network and do not know of them: while a step is traced, the features lie here. A
    cache therefore serves one `sample` in one trace, and each step calls it once.
    """

    interval: int
    deep: Any = dataclasses.field(default=None, init=False)
    fresh: jax.Array | None = dataclasses.field(default=None, init=False)

    def empty(self, predict: Predict, x: jax.Array) -> Any:
        """Zeros in the shape of the features of a call of `predict` at `x` [b, ...]."""

        def first(x: jax.Array) -> Any:
            self.deep = None
            predict(x, jnp.zeros((), jnp.int32))
            return self.deep

        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(first, x))

    def begin(self, deep: Any, call: jax.Array) -> None:
        """Enters a step with the features `deep`; `call` [] counts the run's calls from 0."""
        self.deep, self.fresh = deep, call % self.interval == 0

    def call(self, network: Network, *args: Any) -> jax.Array:
        """The output of ``network(*args, deep)``; its features stay here."""
        if self.deep is None:
            out, self.deep = network(*args, None)
            return out
        # A condition on one number for the whole batch, so that only one branch runs.
        out, self.deep = jax.lax.cond(
            self.fresh,
            lambda deep, *args: network(*args, None),
            lambda deep, *args: network(*args, deep),
            self.deep,
            *args,
        )
        return out
