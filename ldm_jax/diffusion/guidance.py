"""From a network to the function that samplers call: guidance on its output, then reading x0 and eps off it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.objective import Prediction, get_objective, read
from ldm_jax.diffusion.schedule import Array, Schedule, at

Model = Callable[[jax.Array, jax.Array, Any], jax.Array]  # (x [b, ...], t [b], condition pytree) -> output [b, ...]
Denoiser = Callable[[jax.Array, jax.Array], jax.Array]  # (x [b, ...], t []) -> output [b, ...]
Predict = Callable[[jax.Array, jax.Array], Prediction]  # (x [b, ...], t []) -> Prediction


def unguided(model: Model, cond: Any) -> Denoiser:
    """The model under one condition."""
    return lambda x, t: model(x, jnp.full(x.shape[:1], t), cond)


def classifier_free(model: Model, cond: Any, null: Any, scale: Array) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): null + scale * (cond - null), both in one forward of 2 b rows.

    ``cond`` and ``null`` are pytrees of [b, ...]; ``scale`` is traced, [] or [b].
    """
    both = jax.tree.map(lambda n, c: jnp.concatenate([n, c]), null, cond)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        out = model(jnp.concatenate([x, x]), jnp.full(2 * x.shape[0], t), both)
        out_null, out_cond = jnp.split(out, 2)
        s = jnp.asarray(scale, out.dtype)
        return out_null + s.reshape(s.shape + (1,) * (x.ndim - s.ndim) if s.ndim else ()) * (out_cond - out_null)

    return denoise


def predictor(
    denoise: Denoiser,
    schedule: Schedule,
    objective: str,
    *,
    clip: bool = False,
    correct: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
    quantize: Callable[[jax.Array], jax.Array] | None = None,
) -> Predict:
    """What samplers step with. ``correct(eps, x, t)`` changes eps before x0 is read off it; ``clip`` bounds x0 to [-1, 1] (pixel-space
    models) and ``quantize`` maps x0 onto a codebook, both leaving eps as it is."""

    def predict(x: jax.Array, t: jax.Array) -> Prediction:
        eps, x0 = read(objective, schedule, denoise(x, t), x, t)
        if correct is not None:
            a, s = at(schedule.sqrt_alphas_cumprod, t, x), at(schedule.sqrt_one_minus_alphas_cumprod, t, x)
            eps, x0 = get_objective("eps").read(correct(eps, x, t), x, a, s)
        x0 = jnp.clip(x0, -1.0, 1.0) if clip else x0
        return Prediction(eps, x0 if quantize is None else quantize(x0))

    return predict
