"""The latent diffusion stage: the UNet and its text encoder learn to undo noise on the latents of a frozen first stage."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax.diffusion import objective as obj
from ldm_jax.diffusion.schedule import q_sample
from ldm_jax.latent import LatentDiffusion, to_float
from ldm_jax.train.state import TrainState, accumulate, descend, normal_rows, over_devices, row_keys

# Purposes of a row's random numbers: each key is used once.
POSTERIOR, TIMESTEP, NOISE, CAPTION = range(4)


def make_loss(model: LatentDiffusion, config: Any, seed: int) -> Callable[..., tuple[jax.Array, dict]]:
    """``loss(params, frozen, batch, step, train) -> (loss, metrics)``; see `make_step` for ``frozen`` and ``batch``."""
    schedule = model.schedule
    elbo = obj.elbo_weights(model.objective, schedule)
    weights = obj.min_snr_weights(model.objective, schedule, config.min_snr_gamma) if config.min_snr_gamma else None

    def loss(params: Any, frozen: Any, batch: Any, step: jax.Array, train: bool = True) -> tuple[jax.Array, dict]:
        first_stage = frozen["first_stage"]
        keys = row_keys(seed, step, batch["row"])
        x = to_float(batch["image"])
        f = first_stage.downsampling
        shape = (x.shape[1] // f, x.shape[2] // f, first_stage.channels)
        z = jax.lax.stop_gradient(first_stage.encode(x, normal_rows(keys, POSTERIOR, shape)))

        def uniform(purpose: int) -> jax.Array:
            return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, purpose)))(keys)

        t = jnp.minimum((uniform(TIMESTEP) * schedule.timesteps).astype(jnp.int32), schedule.timesteps - 1)
        noise = normal_rows(keys, NOISE, shape)
        encoded = batch["encoded"]
        if train and config.caption_dropout:
            drop = uniform(CAPTION) < config.caption_dropout
            encoded = jax.tree.map(
                lambda null, e: jnp.where(drop.reshape(-1, *(1,) * (e.ndim - 1)), null, e), frozen["null"], encoded
            )
        rngs = {"dropout": jax.random.fold_in(jax.random.key(seed), step)} if train else None
        cond = model.conditioner(params["conditioner"], encoded, train=train, rngs=rngs)
        out = model.apply(params, q_sample(schedule, z, t, noise), t, cond, train=train, rngs=rngs)
        per_sample = obj.pointwise(config.kind, out, obj.target(model.objective, schedule, z, noise, t))
        logvar = params["logvar"] if "logvar" in params else jnp.full(schedule.timesteps, config.logvar_init)
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


def make_step(
    model: LatentDiffusion, tx: optax.GradientTransformation, config: Any, *, seed: int, ema: float, parts: int
) -> Callable[..., tuple[TrainState, dict]]:
    """``step(state, frozen, batch, *, axis_name=None) -> (state, metrics)``, pure.

    ``frozen`` holds "first_stage" and "null", the host-encoded null condition of one row: arguments, since a constant would be baked into the
    program. ``batch`` holds "image" uint8 [b, H, W, 3], "encoded" conditions [b, ...] and "row" int32 [b], each row's place in the global batch.
    """
    loss = make_loss(model, config, seed)

    def step(state: TrainState, frozen: Any, batch: Any, *, axis_name: str | None = None) -> tuple[TrainState, dict]:
        grads, metrics = accumulate(lambda p, b: loss(p, frozen, b, state.step), state.params, batch, parts)
        grads, metrics = over_devices((grads, metrics), axis_name)
        return descend(state, grads, metrics, tx, ema)

    return step


def scale_factor(first_stage: Any, batches: list[np.ndarray], seed: int) -> float:
    """1 / standard deviation of the unscaled latents (posterior samples) of all ``batches``, each uint8 [b, H, W, 3].

    Rombach et al. 2022, section G, from many batches instead of the first alone. ``first_stage`` has scale 1.
    """
    f = first_stage.downsampling

    @jax.jit
    def moments(first_stage: Any, image: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        b, h, w, _ = image.shape
        noise = normal_rows(row_keys(seed, step, jnp.arange(b)), POSTERIOR, (h // f, w // f, first_stage.channels))
        z = first_stage.encode(to_float(image), noise)
        return z.mean(), jnp.square(z).mean()

    each = np.array([moments(first_stage, image, i) for i, image in enumerate(batches)], np.float64)
    mean, square = each.mean(0)
    return float(1.0 / np.sqrt(square - mean**2))
