"""Log-likelihood of data by the probability-flow ODE."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint

from ldm_jax.diffusion.schedule import Array


def sigma_to_angle(sigma: Array, xp: Any = np) -> Array:
    """Time 2 atan(sigma) / pi in [0, 1] of v-diffusion (Salimans & Ho 2022, arXiv:2202.00512)."""
    return xp.arctan(sigma) / np.pi * 2


def angle_to_sigma(t: Array, xp: Any = np) -> Array:
    """The inverse of `sigma_to_angle`."""
    return xp.tan(t * np.pi / 2)


def log_likelihood(
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    x: Array,
    probe: Array,
    sigma_min: float,
    sigma_max: float,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> jax.Array:
    """Log p(x) in nats by the instantaneous change of variables, with an adaptive Dormand-Prince.

    Song et al. 2021 (arXiv:2011.13456), section 4.3, with Hutchinson's estimate of the divergence.
    The prior is N(0, sigma_max^2).

    Args:
      denoise: (y [b, ...], sigma []) -> x0, with y of noise sigma (not scaled by sqrt(abar)).
      x: Data [b, ...] at `sigma_min`.
      probe: Rademacher probe, -1 or 1, [b, ...].
      sigma_min: Noise where the ODE begins.
      sigma_max: Noise of the prior.
      rtol: Relative tolerance of the solver.
      atol: Absolute tolerance.

    Returns:
      [b].
    """
    x, axes = jnp.asarray(x), tuple(range(1, np.ndim(x)))

    def field(state: tuple[jax.Array, jax.Array], sigma: jax.Array) -> Any:
        d, tangent = jax.jvp(lambda y: (y - denoise(y, sigma)) / sigma, state[:1], (probe,))
        return d, (probe * tangent).sum(axes)

    start = x, jnp.zeros(x.shape[:1], x.dtype)
    ends = jnp.asarray([sigma_min, sigma_max], x.dtype)
    prior, change = (a[-1] for a in odeint(field, start, ends, rtol=rtol, atol=atol))
    return jax.scipy.stats.norm.logpdf(prior, scale=sigma_max).sum(axes) + change
