"""The latent diffusion stage: the UNet and its text encoder learn to undo noise on the latents of a frozen first stage."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax.conditioning.base import Hybrid, joined_of
from ldm_jax.diffusion import objective as obj
from ldm_jax.diffusion.schedule import q_sample
from ldm_jax.models.ldm import LatentDiffusion, masked_condition, to_float
from ldm_jax.train.state import TrainState, accumulate, descend, normal_rows, over_devices, row_keys

# Purposes of a row's random numbers: each key is used once.
POSTERIOR, TIMESTEP, NOISE, CAPTION, OFFSET = range(5)


def make_loss(
    model: LatentDiffusion, config: Any, seed: int
) -> Callable[..., tuple[jax.Array, dict]]:
    """``loss(params, frozen, batch, step, train) -> (loss, metrics)``; see `make_step` for ``frozen`` and ``batch``."""
    schedule = model.schedule
    elbo = obj.elbo_weights(model.objective, schedule)
    weights = (
        obj.min_snr_weights(model.objective, schedule, config.min_snr_gamma)
        if config.min_snr_gamma
        else None
    )

    def loss(
        params: Any, frozen: Any, batch: Any, step: jax.Array, train: bool = True
    ) -> tuple[jax.Array, dict]:
        first_stage = frozen["first_stage"]
        keys = row_keys(seed, step, batch["row"])
        moments = jax.lax.stop_gradient(read_moments(first_stage, batch))
        shape = (*moments.shape[1:3], first_stage.channels)
        spread = normal_rows(keys, POSTERIOR, shape) if config.posterior == "sample" else None
        z = first_stage.latents(moments, spread)

        def uniform(purpose: int) -> jax.Array:
            return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, purpose)))(keys)

        # An evaluation looks at all timesteps alike.
        t = draw_timesteps(
            uniform(TIMESTEP), schedule.timesteps, config.timestep_shift if train else 1.0
        )
        noise = normal_rows(keys, NOISE, shape)
        if config.offset_noise:
            noise = noise + config.offset_noise * normal_rows(
                keys, OFFSET, (1, 1, first_stage.channels)
            )
        encoded = conditions(model, first_stage, batch)
        if train and config.caption_dropout:
            drop = uniform(CAPTION) < config.caption_dropout
            text = isinstance(model.conditioner, Hybrid)  # which is dropped without the picture
            left = jax.tree.map(
                lambda null, e: jnp.where(drop.reshape(-1, *(1,) * (e.ndim - 1)), null, e),
                frozen["null"],
                encoded["text"] if text else encoded,
            )
            encoded = encoded | {"text": left} if text else left
        rngs = {"dropout": jax.random.fold_in(jax.random.key(seed), step)} if train else None
        conditioner = frozen["conditioner"] if "conditioner" in frozen else params["conditioner"]
        cond = model.conditioner(conditioner, encoded, train=train, rngs=rngs)
        out = model.apply(params, q_sample(schedule, z, t, noise), t, cond, train=train, rngs=rngs)
        per_sample = obj.pointwise(
            config.kind, out, obj.target(model.objective, schedule, z, noise, t)
        )
        logvar = (
            params["logvar"]
            if "logvar" in params
            else jnp.full(schedule.timesteps, config.logvar_init)
        )
        return obj.diffusion_loss(
            per_sample,
            t,
            elbo=elbo,
            simple_weight=config.simple_weight,
            elbo_weight=config.elbo_weight,
            weights=weights,
            logvar=logvar,
        )

    return loss


def draw_timesteps(u: jax.Array, timesteps: int, shift: float) -> jax.Array:
    """``u`` [b], uniform in [0, 1) -> timesteps int32 [b]; with ``shift`` s > 1 more of them are high: s u / (1 + (s - 1) u) of all (Esser et al.
    2024, equation 23). Half of them lie above s / (1 + s) of all.
    """
    at = shift * u / (1 + (shift - 1) * u)
    return jnp.minimum((at * timesteps).astype(jnp.int32), timesteps - 1)


def conditions(model: LatentDiffusion, first_stage: Any, batch: Any) -> Any:
    """The batch's "encoded" conditions; those of inpainting are masks, and become the masked pictures' latents by the first stage."""
    joined, encoded = joined_of(model.conditioner), batch["encoded"]
    if joined is None or not joined.masked:
        return encoded
    beside = isinstance(model.conditioner, Hybrid)
    mask = encoded["joined"] if beside else encoded
    told = jax.lax.stop_gradient(
        masked_condition(first_stage, to_float(batch["image"]), mask, joined.of)
    )
    return encoded | {"joined": told} if beside else told


def read_moments(first_stage: Any, batch: Any) -> jax.Array:
    """What a batch has of the first stage: "moments" of the latent cache, or those of its "image"."""
    if "moments" in batch:
        return batch["moments"].astype(jnp.float32)
    return first_stage.moments(to_float(batch["image"]))


def make_step(
    model: LatentDiffusion,
    tx: optax.GradientTransformation,
    config: Any,
    *,
    seed: int,
    ema: float,
    parts: int,
) -> Callable[..., tuple[TrainState, dict]]:
    """``step(state, frozen, batch, *, axis_name=None) -> (state, metrics)``, pure.

    ``frozen`` holds "first_stage", "null", the host-encoded null condition of one row, and "conditioner", its parameters where they are not
    trained: arguments, since a constant would be baked into the program. ``batch`` holds "image" uint8 [b, H, W, 3] (or "moments" [b, h, w, c] of
    the latent cache), "encoded" conditions [b, ...] and "row" int32 [b], each row's place in the global batch.
    """
    loss = make_loss(model, config, seed)

    def step(
        state: TrainState, frozen: Any, batch: Any, *, axis_name: str | None = None
    ) -> tuple[TrainState, dict]:
        grads, metrics = accumulate(
            lambda p, b: loss(p, frozen, b, state.step), state.params, batch, parts
        )
        grads, metrics = over_devices((grads, metrics), axis_name)
        return descend(state, grads, metrics, tx, ema)

    return step


def scale_factor(first_stage: Any, batches: list[dict[str, np.ndarray]], seed: int) -> float:
    """1 / standard deviation of the unscaled latents (posterior samples) of all ``batches``, each with "image" or "moments".

    Rombach et al. 2022, section G, from many batches instead of the first alone. ``first_stage`` has scale 1.
    """

    @jax.jit
    def measure(first_stage: Any, batch: Any, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        moments = read_moments(first_stage, batch)
        b, h, w, _ = moments.shape
        noise = normal_rows(
            row_keys(seed, step, jnp.arange(b)), POSTERIOR, (h, w, first_stage.channels)
        )
        z = first_stage.latents(moments, noise)
        return z.mean(), jnp.square(z).mean()

    arrays = [{k: batch[k] for k in ("image", "moments") if k in batch} for batch in batches]
    each = np.array([measure(first_stage, batch, i) for i, batch in enumerate(arrays)], np.float64)
    mean, square = each.mean(0)
    return float(1.0 / np.sqrt(square - mean**2))
