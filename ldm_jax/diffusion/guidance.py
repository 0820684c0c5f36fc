"""From a network to the function that samplers call: guidance, then x0 and eps."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.objective import Prediction, get_objective
from ldm_jax.diffusion.schedule import Array, Schedule, level, lift

# (x [b, ...], t [b], condition pytree) -> output [b, ...]
Model = Callable[[jax.Array, jax.Array, Any], jax.Array]
# (x [b, ...], t [] or [b]) -> output [b, ...], or (guided, null) outputs
Denoiser = Callable[[jax.Array, jax.Array], Any]
# (eps [b, ...], x [b, ...], t [] or [b]) -> eps
Correct = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Predict(Protocol):
    """What samplers step with; made by `predictor`."""

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        at: tuple[Array, Array] | None = None,
        eps: jax.Array | None = None,
    ) -> Prediction:
        """Calls the model.

        Args:
          x: State [b, ...].
          t: Timestep, [] or [b].
          at: (sqrt(abar), sqrt(1 - abar)) of x, of samplers that stop between the timesteps; by
            default the schedule's at `t`.
          eps: If given, the model is not called: x0 is read off this eps.
        """
        ...


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
    renoise_null: bool = False,
) -> Denoiser:
    """Classifier-free guidance, null + scale * (cond - null), in one forward of 2 b rows.

    Ho & Salimans 2022, arXiv:2207.12598.

    Args:
      model: The network.
      cond: Condition, a pytree of [b, ...].
      null: The condition guided away from, of the same shapes.
      scale: [] or [b], traced.
      interval: (first, last) timestep that is guided (Kynkaanniemi et al. 2024, arXiv:2404.07724).
      rescale: phi in [0, 1], [] or [b]: moves the standard deviation of the guided output towards
        that of the conditional one (Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16).
      skip: Outside the interval, run a forward of b rows.
      repeat: Repeat x for both conditions. Otherwise the model gets x [b] under conditions
        [2 b, ...] and repeats it itself where they first matter, as `UNet` does.
      renoise_null: CFG++ (Chung et al. 2024, arXiv:2406.08070), scale in [0, 1]: samplers that
        step with eps (`DDIM`, `TCD`) take that of the null condition. Returns both outputs.
    """
    both = jax.tree.map(lambda n, c: jnp.concatenate([n, c]), null, cond)

    def guided(x: jax.Array, t: jax.Array) -> Any:
        when = jnp.full(x.shape[:1], t)
        twice = (jnp.concatenate([x, x]), jnp.concatenate([when, when])) if repeat else (x, when)
        out = model(*twice, both)
        out_null, out_cond = jnp.split(out, 2)
        s = jnp.asarray(scale, out.dtype)
        if interval is not None:
            s = jnp.where((interval[0] <= t) & (t <= interval[1]), s, 1.0)
        guided = out_null + lift(s, x) * (out_cond - out_null)
        if rescale is None:
            return (guided, out_null) if renoise_null else guided
        axes = tuple(range(1, x.ndim))
        ratio = out_cond.std(axes, keepdims=True) / guided.std(axes, keepdims=True)
        guided = guided * (1 + lift(rescale, x) * (ratio - 1))
        return (guided, out_null) if renoise_null else guided

    def denoise(x: jax.Array, t: jax.Array) -> Any:
        if interval is None or not skip or renoise_null:
            return guided(x, t)
        # One answer for the whole batch, so that lax.cond runs one branch only.
        within = jnp.any((interval[0] <= t) & (t <= interval[1]))
        return jax.lax.cond(within, guided, unguided(model, cond), x, t)

    return denoise


def classifier_gradient(
    classifier: Callable[[jax.Array, jax.Array], jax.Array],
    labels: Array,
    scale: Array,
    schedule: Schedule,
) -> Correct:
    """Classifier guidance: eps - scale * sqrt(1 - abar_t) * grad_x log p(label | x_t).

    Dhariwal & Nichol 2021, arXiv:2105.05233, algorithm 2, whatever the model predicts.

    Args:
      classifier: (x [b, ...], t [b]) -> logits [b, n], trained on noisy images as `EncoderUNet`.
      labels: int [b].
      scale: [] or [b].
      schedule: The forward process.

    Returns:
      A `correct` for `predictor`.
    """

    def log_prob(x: jax.Array, t: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(classifier(x, jnp.full(x.shape[:1], t)))
        # Rows are independent, so the gradient of the sum holds the gradient of each.
        return jnp.take_along_axis(logs, jnp.asarray(labels)[:, None], axis=1).sum()

    def correct(eps: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        return eps - lift(scale, x) * level(schedule, t, x)[1] * jax.grad(log_prob)(x, t)

    return correct


def dynamic_threshold(ratio: float = 0.995, bound: float = 1.0) -> Callable[[jax.Array], jax.Array]:
    """Dynamic thresholding of x0 (Saharia et al. 2022, arXiv:2205.11487, section 2.3).

    Args:
      ratio: Quantile of |x0| of each sample to which it is clipped, and by which it is divided.
      bound: The least value of that quantile.
    """

    def threshold(x0: jax.Array) -> jax.Array:
        axes = tuple(range(1, x0.ndim))
        limit = jnp.maximum(jnp.quantile(jnp.abs(x0), ratio, axis=axes, keepdims=True), bound)
        return jnp.clip(x0, -limit, limit) / limit

    return threshold


def predictor(
    denoise: Denoiser,
    schedule: Schedule,
    objective: str,
    *,
    clip: bool = False,
    correct: Correct | None = None,
    quantize: Callable[[jax.Array], jax.Array] | None = None,
) -> Predict:
    """Reads x0 and eps off a network's output.

    Args:
      denoise: The guided network.
      schedule: The forward process.
      objective: What the network predicts, a key of OBJECTIVES.
      clip: Bound x0 to [-1, 1], for models in pixel space; eps is left alone.
      correct: Changes eps before x0 is read off it.
      quantize: Maps x0, e.g. to its nearest codes or by `dynamic_threshold`; eps is left alone.
    """
    of_model, of_eps = get_objective(objective), get_objective("eps")

    def predict(
        x: jax.Array,
        t: jax.Array,
        at: tuple[Array, Array] | None = None,
        eps: jax.Array | None = None,
    ) -> Prediction:
        a, s = level(schedule, t, x) if at is None else (lift(at[0], x), lift(at[1], x))
        if eps is None:
            out = denoise(x, t)
            out, null = out if isinstance(out, tuple) else (out, None)
            eps, x0 = of_model.read(out, x, a, s)
            if correct is not None:
                eps, x0 = of_eps.read(correct(eps, x, t), x, a, s)
            eps = eps if null is None else of_model.read(null, x, a, s).eps
        else:
            x0 = of_eps.read(eps, x, a, s).x0
        x0 = jnp.clip(x0, -1.0, 1.0) if clip else x0
        return Prediction(eps, x0 if quantize is None else quantize(x0))

    return predict
