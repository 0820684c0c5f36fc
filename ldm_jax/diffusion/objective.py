"""What the network predicts (eps, x0 or v), how to read x0 and eps off it, and the losses on it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.schedule import Array, Schedule, at, level


class Prediction(NamedTuple):
    """The denoiser's estimate at x_t, in both forms: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps."""

    eps: jax.Array
    x0: jax.Array


class Objective(NamedTuple):
    """One parameterisation, with a = sqrt(abar_t) and s = sqrt(1 - abar_t).

    ``target(x0, eps, a, s)`` is what the network learns; ``read(out, xt, a, s)`` turns its output into a Prediction.
    """

    target: Callable[[Array, Array, Array, Array], Array]
    read: Callable[[Array, Array, Array, Array], Prediction]


OBJECTIVES = {
    # Ho et al. 2020
    "eps": Objective(
        lambda x0, eps, a, s: eps, lambda out, xt, a, s: Prediction(out, (xt - s * out) / a)
    ),
    "x0": Objective(
        lambda x0, eps, a, s: x0, lambda out, xt, a, s: Prediction((xt - a * out) / s, out)
    ),
    # Salimans & Ho 2022, arXiv:2202.00512: v = a eps - s x0. Needs no division, so it holds where abar_t = 0.
    "v": Objective(
        lambda x0, eps, a, s: a * eps - s * x0,
        lambda out, xt, a, s: Prediction(a * out + s * xt, a * xt - s * out),
    ),
}


def get_objective(name: str) -> Objective:
    """The Objective of that name; ValueError names what exists."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r} does not exist (have {', '.join(OBJECTIVES)})")
    return OBJECTIVES[name]


def target(objective: str, schedule: Schedule, x0: Array, eps: Array, t: Array) -> Array:
    """What the network should return for x_t made of ``x0`` and ``eps`` [b, ...] at ``t`` [b]."""
    a, s = (
        at(schedule.sqrt_alphas_cumprod, t, x0),
        at(schedule.sqrt_one_minus_alphas_cumprod, t, x0),
    )
    return get_objective(objective).target(x0, eps, a, s)


def read(objective: str, schedule: Schedule, out: Array, xt: Array, t: Array) -> Prediction:
    """The Prediction in the network's output ``out`` at ``xt`` [b, ...] and ``t``, [] or [b], int or float."""
    return get_objective(objective).read(out, xt, *level(schedule, t, xt))


def elbo_weights(objective: str, schedule: Schedule) -> np.ndarray:
    """Weights [T], float32, that turn the mean squared error of step t into its term of the variational bound (the original's lvlb_weights).

    The x0 form divides by (2 * 1 - abar_t) literally, as the original does; v has weight one. Index 0 repeats index 1, which would be infinite.
    """
    betas, abar = np.asarray(schedule.betas), np.asarray(schedule.alphas_cumprod)
    if objective == "eps":
        with np.errstate(divide="ignore"):
            weights = betas**2 / (
                2 * np.asarray(schedule.posterior_variance) * (1 - betas) * (1 - abar)
            )
    elif objective == "x0":
        weights = 0.5 * np.sqrt(abar) / (2.0 * 1 - abar)
    elif objective == "v":
        weights = np.ones_like(betas)
    else:
        get_objective(objective)
        raise AssertionError
    weights[0] = weights[1]
    return weights.astype(np.float32)


def min_snr_weights(objective: str, schedule: Schedule, gamma: float) -> np.ndarray:
    """Weights [T], float32, of Hang et al. 2023 (arXiv:2303.09556): min(SNR, gamma), over SNR for eps and over SNR + 1 for v."""
    abar = np.asarray(schedule.alphas_cumprod, np.float64)
    snr = abar / (1 - abar)
    over = {"eps": snr, "x0": np.ones_like(snr), "v": snr + 1}[objective]
    return (np.minimum(snr, gamma) / over).astype(np.float32)


def pointwise(kind: str, prediction: Array, truth: Array) -> Array:
    """Mean over everything but the batch of the "l1" or "l2" distance: [b, ...] -> [b], float32."""
    diff = prediction.astype(jnp.float32) - truth
    if kind not in ("l1", "l2"):
        raise ValueError(f"loss_type {kind!r} is not one of l1, l2")
    return (jnp.abs(diff) if kind == "l1" else jnp.square(diff)).mean(tuple(range(1, diff.ndim)))


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
    """The training loss from per-sample errors [b] at timesteps ``t`` [b], with its parts.

    loss = simple_weight * mean(w_t e / exp(logvar_t) + logvar_t) + elbo_weight * mean(elbo_t e). ``logvar`` [T] is the (learned) log variance of
    each timestep, or None for pixel-space DDPM, which ignores it; ``elbo`` [T] are `elbo_weights`; ``weights`` [T] e.g. `min_snr_weights`.
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
