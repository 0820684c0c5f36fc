"""What the network predicts (eps, x0, v or flow), how x0 and eps follow from it, and the losses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.schedule import Array, Schedule, level
from ldm_jax.errors import ConfigError, did_you_mean


class Prediction(NamedTuple):
    """The estimates at x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps."""

    eps: jax.Array
    x0: jax.Array


class Objective(NamedTuple):
    """A parameterisation, with a = sqrt(abar_t), s = sqrt(1 - abar_t) and snr = (a / s)^2.

    Attributes:
      target: (x0, eps, a, s) -> what the network learns.
      read: (out, xt, a, s) -> the Prediction in its output.
      x0_error: snr -> the squared error of the output in units of that of x0.
    """

    target: Callable[[Array, Array, Array, Array], Array]
    read: Callable[[Array, Array, Array, Array], Prediction]
    x0_error: Callable[[Array], Array]


# eps: Ho et al. 2020, arXiv:2006.11239. v = a eps - s x0: Salimans & Ho 2022, arXiv:2202.00512; it
# divides by nothing, so it holds where abar_t = 0. flow = eps - x0, the velocity of rectified flow
# (Liu et al. 2022, arXiv:2209.03003) on the schedule "flow", where x_t is its state scaled to
# a^2 + s^2 = 1: Euler's method along the flow is then DDIM.
OBJECTIVES = {
    "eps": Objective(
        lambda x0, eps, a, s: eps,
        lambda out, xt, a, s: Prediction(out, (xt - s * out) / a),
        lambda snr: snr,
    ),
    "x0": Objective(
        lambda x0, eps, a, s: x0,
        lambda out, xt, a, s: Prediction((xt - a * out) / s, out),
        np.ones_like,
    ),
    "v": Objective(
        lambda x0, eps, a, s: a * eps - s * x0,
        lambda out, xt, a, s: Prediction(a * out + s * xt, a * xt - s * out),
        lambda snr: snr + 1,
    ),
    "flow": Objective(
        lambda x0, eps, a, s: eps - x0,
        lambda out, xt, a, s: Prediction((xt + a * out) / (a + s), (xt - s * out) / (a + s)),
        lambda snr: (np.sqrt(snr) + 1) ** 2,
    ),
}


def get_objective(name: str) -> Objective:
    """Returns OBJECTIVES[name]; ConfigError where there is none."""
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} does not exist{did_you_mean(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def target(objective: str, schedule: Schedule, x0: Array, eps: Array, t: Array) -> Array:
    """What the network should return for x_t made of `x0` and `eps` [b, ...] at `t` [b]."""
    return get_objective(objective).target(x0, eps, *level(schedule, t, x0))


def read(objective: str, schedule: Schedule, out: Array, xt: Array, t: Array) -> Prediction:
    """The Prediction in the output `out` at `xt` [b, ...] and `t`, [] or [b], int or float."""
    return get_objective(objective).read(out, xt, *level(schedule, t, xt))


def elbo_weights(objective: str, schedule: Schedule) -> np.ndarray:
    """Weights [T], float32, of the variational bound's terms (the original's lvlb_weights).

    They multiply the mean squared error of step t. The x0 form divides by (2 * 1 - abar_t)
    literally, as the original does; other objectives have weight 1. Index 0, which would be
    infinite, repeats index 1.
    """
    get_objective(objective)
    betas, abar = np.asarray(schedule.betas), np.asarray(schedule.alphas_cumprod)
    weights = np.ones_like(betas)
    if objective == "eps":
        variance = np.asarray(schedule.posterior_variance)
        # Not 1 - betas, which has few digits where a beta is near 1.
        alphas = abar / np.asarray(schedule.alphas_cumprod_prev)
        with np.errstate(divide="ignore"):
            weights = betas**2 / (2 * variance * alphas * (1 - abar))
    elif objective == "x0":
        weights = 0.5 * np.sqrt(abar) / (2.0 * 1 - abar)
    if schedule.timesteps > 1:
        weights[0] = weights[1]
    return np.where(np.isfinite(weights), weights, 1.0).astype(np.float32)


def min_snr_weights(objective: str, schedule: Schedule, gamma: float) -> np.ndarray:
    """Weights [T], float32, min(SNR, gamma) on x0's error (Hang et al. 2023, arXiv:2303.09556)."""
    abar = np.asarray(schedule.alphas_cumprod, np.float64)
    snr = np.maximum(abar / (1 - abar), 1e-12)
    return (np.minimum(snr, gamma) / get_objective(objective).x0_error(snr)).astype(np.float32)


def p2_weights(objective: str, schedule: Schedule, gamma: float, k: float = 1.0) -> np.ndarray:
    """Weights [T], float32, 1 / (k + SNR)^gamma on eps's error.

    Choi et al. 2022, arXiv:2204.00227, equation 8. The error of eps is the squared error of x0
    times the SNR.
    """
    abar = np.asarray(schedule.alphas_cumprod, np.float64)
    snr = np.maximum(abar / (1 - abar), 1e-12)
    weights = snr / (k + snr) ** gamma / get_objective(objective).x0_error(snr)
    return weights.astype(np.float32)


# Pointwise errors of a difference and a scale c. The pseudo-Huber loss is quadratic below c and
# linear above it (Song & Dhariwal 2023, arXiv:2310.14189, section 3.3); it has the curvature of l2.
POINTWISE = {
    "l1": lambda d, c: jnp.abs(d),
    "l2": lambda d, c: jnp.square(d),
    # 2 c (sqrt(d^2 + c^2) - c), without the difference of nearly equal numbers.
    "huber": lambda d, c: 2 * c * jnp.square(d) / (jnp.sqrt(jnp.square(d) + c**2) + c),
}


def pointwise(kind: str, prediction: Array, truth: Array, c: float = 0.1) -> Array:
    """Mean error of every sample by a loss of POINTWISE: [b, ...] -> [b], float32."""
    if kind not in POINTWISE:
        raise ConfigError(f"loss_type {kind!r} is not one of {', '.join(POINTWISE)}")
    diff = prediction.astype(jnp.float32) - truth
    return POINTWISE[kind](diff, c).mean(tuple(range(1, diff.ndim)))


def diffusion_loss(
    per_sample: Array,
    t: Array,
    *,
    elbo: Array,
    simple_weight: float = 1.0,
    elbo_weight: float = 0.0,
    weights: Array | None = None,
    logvar: Array | None = None,
) -> tuple[Array, dict[str, Any]]:
    """The training loss from the errors of a batch.

    simple_weight * mean(w_t e / exp(logvar_t) + logvar_t) + elbo_weight * mean(elbo_t e).

    Args:
      per_sample: Errors e [b].
      t: Timesteps [b].
      elbo: [T], of `elbo_weights`.
      simple_weight: See the formula.
      elbo_weight: See the formula.
      weights: w [T], as of `min_snr_weights`; None is 1.
      logvar: Log variance [T] of each timestep, learned or constant. None leaves its terms out, as
        the original's pixel-space DDPM does.

    Returns:
      (loss, its parts by name).
    """
    parts = {
        "loss_simple": per_sample.mean(),
        "loss_vlb": (jnp.asarray(elbo)[t] * per_sample).mean(),
    }
    simple = per_sample if weights is None else jnp.asarray(weights)[t] * per_sample
    if logvar is not None:
        simple = simple / jnp.exp(logvar[t]) + logvar[t]
        parts |= {"loss_gamma": simple.mean(), "logvar": logvar.mean()}
    loss = simple_weight * simple.mean() + elbo_weight * parts["loss_vlb"]
    return loss, parts | {"loss": loss}
