"""From a network to the function that samplers call: guidance on its output, then reading x0 and eps off it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.objective import Prediction, get_objective
from ldm_jax.diffusion.schedule import Array, Schedule, level, lift

Model = Callable[
    [jax.Array, jax.Array, Any], jax.Array
]  # (x [b, ...], t [b], condition pytree) -> output [b, ...]
Denoiser = Callable[
    [jax.Array, jax.Array], jax.Array
]  # (x [b, ...], t [] or [b]) -> output [b, ...]
Predict = Callable[
    ..., Prediction
]  # (x [b, ...], t [] or [b], its (sqrt(abar), sqrt(1 - abar)) or nothing) -> Prediction

Correct = Callable[
    [jax.Array, jax.Array, jax.Array], jax.Array
]  # (eps [b, ...], x [b, ...], t [] or [b]) -> eps


def unguided(model: Model, cond: Any) -> Denoiser:
    """The model under one condition."""
    return lambda x, t: model(x, jnp.full(x.shape[:1], t), cond)


def classifier_free(
    model: Model,
    cond: Any,
    null: Any,
    scale: Array,
    *,
    interval: tuple[Array, Array] | None = None,
    rescale: Array | None = None,
    skip: bool = True,
    repeat: bool = True,
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): null + scale * (cond - null), both in one forward of 2 b rows.

    ``cond`` and ``null`` are pytrees of [b, ...]; ``scale`` is traced, [] or [b], and so are the others. ``interval`` (first, last) guides within
    these timesteps alone (Kynkaanniemi et al. 2024, arXiv:2404.07724); outside them the forward has b rows, unless ``skip`` is off. ``rescale`` phi
    brings the result's standard deviation phi of the way back to that of the conditional output (Lin et al. 2023, arXiv:2305.08891, eq. 15-16).
    Without ``repeat`` the model gets x [b] under conditions [2 b, ...], and repeats it where they begin to matter, as `UNet` does.
    """
    both = jax.tree.map(lambda n, c: jnp.concatenate([n, c]), null, cond)

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        when = jnp.full(x.shape[:1], t)
        twice = (jnp.concatenate([x, x]), jnp.concatenate([when, when])) if repeat else (x, when)
        out = model(*twice, both)
        out_null, out_cond = jnp.split(out, 2)
        s = jnp.asarray(scale, out.dtype)
        if interval is not None:
            s = jnp.where((interval[0] <= t) & (t <= interval[1]), s, 1.0)
        guided = out_null + lift(s, x) * (out_cond - out_null)
        if rescale is None:
            return guided
        axes = tuple(range(1, x.ndim))
        ratio = out_cond.std(axes, keepdims=True) / guided.std(axes, keepdims=True)
        return guided * (1 + lift(rescale, x) * (ratio - 1))

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        if interval is None or not skip:
            return guided(x, t)
        # One answer for the whole batch: only the branch that is taken runs, at half the rows where no picture is guided.
        within = jnp.any((interval[0] <= t) & (t <= interval[1]))
        return jax.lax.cond(within, guided, unguided(model, cond), x, t)

    return denoise


def classifier_gradient(
    classifier: Callable[[jax.Array, jax.Array], jax.Array],
    labels: Array,
    scale: Array,
    schedule: Schedule,
) -> Correct:
    """Classifier guidance as a ``correct`` for `predictor`: eps - scale * sqrt(1 - abar_t) * grad_x log p(label | x_t) (Dhariwal & Nichol 2021,
    arXiv:2105.05233, algorithm 2), whatever the model predicts.

    ``classifier(x [b, ...], t [b])`` -> logits [b, n] was trained on noisy images, as `EncoderUNet` can be; ``labels`` int [b]; ``scale`` [] or [b].
    """

    def log_prob(x: jax.Array, t: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(classifier(x, jnp.full(x.shape[:1], t)))
        return jnp.take_along_axis(
            logs, jnp.asarray(labels)[:, None], axis=1
        ).sum()  # images do not see each other

    def correct(eps: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        return eps - lift(scale, x) * level(schedule, t, x)[1] * jax.grad(log_prob)(x, t)

    return correct


def predictor(
    denoise: Denoiser,
    schedule: Schedule,
    objective: str,
    *,
    clip: bool = False,
    correct: Correct | None = None,
    quantize: Callable[[jax.Array], jax.Array] | None = None,
) -> Predict:
    """What samplers step with. ``correct(eps, x, t)`` changes eps before x0 is read off it; ``clip`` bounds x0 to [-1, 1] (pixel-space
    models) and ``quantize`` maps x0 onto a codebook, both leaving eps as it is.

    Samplers that stop between the timesteps say what (sqrt(abar), sqrt(1 - abar)) is there; otherwise it is the schedule's at ``t``.
    """

    def predict(x: jax.Array, t: jax.Array, at: tuple[Array, Array] | None = None) -> Prediction:
        a, s = level(schedule, t, x) if at is None else (lift(at[0], x), lift(at[1], x))
        eps, x0 = get_objective(objective).read(denoise(x, t), x, a, s)
        if correct is not None:
            eps, x0 = get_objective("eps").read(correct(eps, x, t), x, a, s)
        x0 = jnp.clip(x0, -1.0, 1.0) if clip else x0
        return Prediction(eps, x0 if quantize is None else quantize(x0))

    return predict
