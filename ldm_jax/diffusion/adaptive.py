"""DPM-Solver with adaptive steps: the one sampler whose number of steps is not known before."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.guidance import Predict
from ldm_jax.diffusion.schedule import Array, Schedule, lift, log_sigmas, t_to_sigma
from ldm_jax.diffusion.tableau import check_options, keywords, phi, to_precision
from ldm_jax.errors import RequestError


class AdaptiveNode(NamedTuple):
    """A single row: [1] each, `log_sigmas` [1, T]. All are traced.

    Attributes:
      start: Sigma where sampling begins.
      stop: Sigma where it ends.
      log_sigmas: Log sigma of the model's timesteps.
      rtol: Relative tolerance of a step, as atol, h_init and safety of the controller.
    """

    start: Array
    stop: Array
    log_sigmas: Array
    rtol: Array
    atol: Array
    h_init: Array
    safety: Array


class State(NamedTuple):
    """Of the controller: [b] each, but y and low, the last accepted step's, [b, ...]."""

    y: jax.Array
    low: jax.Array
    lam: jax.Array
    h: jax.Array
    accepted: jax.Array
    attempts: jax.Array


@dataclasses.dataclass(frozen=True)
class DPMAdaptive:
    """DPM-Solver-23 (Lu et al. 2022, arXiv:2206.00927, appendix C): order 3 with an embedded 2.

    Attributes:
      per_image: Every image has its own steps, so that it does not depend on its batch; False gives
        a batch one error, as k-diffusion does.
      limit: Greatest number of attempts, each of three calls of the model. Finished images wait.
    """

    adaptive = True
    order = 3
    draws = 0
    blend_after = False
    renoises = False

    per_image: bool = True
    limit: int = 1000

    @property
    def options(self) -> dict[str, float]:
        """Keywords of `nodes`, and their defaults."""
        return keywords(self.table)

    def nodes(self, schedule: Schedule, timesteps: np.ndarray, **controls: float) -> AdaptiveNode:
        """From the last of the timesteps to 0; those between do not matter."""
        check_options(self.options, controls)
        start, stop = t_to_sigma(schedule, np.array([timesteps[-1], 0.0]))
        return self.table(start, stop, log_sigmas(schedule), **controls)

    def table(
        self,
        start: float,
        stop: float,
        log_sigmas: np.ndarray,
        *,
        rtol: float = 0.05,
        atol: float = 0.0078,
        h_init: float = 0.05,
        safety: float = 0.81,
    ) -> AdaptiveNode:
        """The row between two sigmas; the controller's settings are those of k-diffusion."""
        controls = {"rtol": rtol, "atol": atol, "h_init": h_init, "safety": safety}
        for name in ("h_init", "safety"):
            if controls[name] <= 0:
                raise RequestError(f"dpm_adaptive: {name} must be above 0, not {controls[name]}")
        if min(rtol, atol) < 0 or rtol == atol == 0:
            raise RequestError(
                f"dpm_adaptive: rtol {rtol} and atol {atol} must be at least 0, and one above"
            )
        node = AdaptiveNode(np.float64(start), np.float64(stop), log_sigmas, **controls)
        return to_precision(jax.tree.map(lambda a: np.asarray(a)[None], node))

    def init(self, x: jax.Array) -> None:
        """Nothing is carried: the single row is the whole run."""
        return None

    def step(
        self,
        carry: Any,
        node: AdaptiveNode,
        x: jax.Array,
        predict: Predict,
        noise: jax.Array | None,
    ) -> tuple[Any, jax.Array, jax.Array]:
        """The whole run; an image that is not finished after `limit` attempts is NaN."""
        x, state = self.run(predict, x, node)
        unfinished = state.lam < -jnp.log(node.stop) - 1e-5
        x = jnp.where(lift(unfinished, x), jnp.nan, x)
        return carry, x, x

    def run(self, predict: Predict, x: jax.Array, node: AdaptiveNode) -> tuple[jax.Array, State]:
        """Integrates from `x` [b, ...] at the first sigma of a row (fields [], log_sigmas [T]).

        Returns:
          (x at the last sigma, the state with the number of steps).
        """
        axes = tuple(range(1 if self.per_image else 0, x.ndim))
        end, times = -jnp.log(node.stop), jnp.arange(node.log_sigmas.shape[0], dtype=x.dtype)

        def eps_at(y: jax.Array, lam: jax.Array) -> jax.Array:
            t = jnp.interp(-lam, node.log_sigmas, times)
            a = jax.nn.sigmoid(2 * lam) ** 0.5
            x0 = predict(lift(a, y) * y, t, (a, jnp.exp(-lam) * a)).x0
            return (y - x0) * lift(jnp.exp(lam), y)

        def attempt(s: State) -> State:
            h = jnp.minimum(s.h, end - s.lam)
            zero = jnp.zeros_like(h)

            def psi(k: int, part: float) -> jax.Array:  # z phi_k(z)
                return part * h * phi(k, part * h, jnp)

            def row(
                part: float, *w: jax.Array
            ) -> jax.Array:  # weights of m in y at lambda + part h
                return -jnp.exp(-(s.lam + part * h)) * jnp.stack([*w, *[zero] * (3 - len(w))])

            # Algorithm 2 of the paper, r1 = 1/3 and r2 = 2/3, and DPM-Solver-2 with the same r1.
            third = [
                row(1 / 3, psi(1, 1 / 3)),
                row(2 / 3, psi(1, 2 / 3) - 2 * psi(2, 2 / 3), 2 * psi(2, 2 / 3)),
                row(1.0, psi(1, 1.0) - 1.5 * psi(2, 1.0), zero, 1.5 * psi(2, 1.0)),
            ]
            second = row(1.0, -0.5 * psi(1, 1.0), 1.5 * psi(1, 1.0))

            def combined(w: jax.Array, m: jax.Array) -> jax.Array:
                return s.y + sum(lift(w[j], s.y) * m[j] for j in range(3))

            def stage(carry: Any, inputs: Any) -> tuple[Any, None]:
                u, m = carry
                index, part, w = inputs
                m = m.at[index].set(eps_at(u, s.lam + part * h))
                return (combined(w, m), m), None

            parts = (jnp.arange(3), jnp.asarray([0.0, 1 / 3, 2 / 3], h.dtype), jnp.stack(third))
            (high, m), _ = jax.lax.scan(stage, (s.y, jnp.zeros((3, *s.y.shape), s.y.dtype)), parts)
            low = combined(second, m)
            scale = jnp.maximum(node.atol, node.rtol * jnp.maximum(jnp.abs(low), jnp.abs(s.low)))
            error = jnp.sqrt(jnp.mean(jnp.square((low - high) / scale), axes))
            # An integral controller with the limiter of Soederlind & Wang 2006: at most 1 + pi/2
            # times the last step.
            factor = 1 + jnp.arctan((error + 1e-8) ** (-1 / self.order) - 1)
            done = s.lam >= end - 1e-5
            accept = (factor >= node.safety) & ~done
            return State(
                jnp.where(lift(accept, x), high, s.y),
                jnp.where(lift(accept, x), low, s.low),
                jnp.where(accept, s.lam + h, s.lam),
                jnp.where(done, s.h, h * factor),
                s.accepted + accept,
                s.attempts + ~done,
            )

        rows = x.shape[:1]
        y = x * jnp.sqrt(1 + node.start**2)
        lam, h = jnp.full(rows, -jnp.log(node.start)), jnp.full(rows, node.h_init)
        zero = jnp.zeros(rows, jnp.int32)
        state = jax.lax.while_loop(
            lambda s: jnp.any((s.lam < end - 1e-5) & (s.attempts < self.limit)),
            attempt,
            State(y, y, lam, h, zero, zero),
        )
        return state.y / jnp.sqrt(1 + node.stop**2), state
