"""The first stage: an autoencoder learns to reconstruct (L1 or L2, a perceptual distance where its weights are at hand, KL)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldm_jax.latent import apply, to_float
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.train.state import TrainState, accumulate, apply_gradients, normal_rows, row_keys

Perceptual = Callable[[Any, jax.Array, jax.Array], jax.Array]  # (its parameters, a, b [b, H, W, 3]) -> distance [b]


def reconstruction_loss(
    x: jax.Array, y: jax.Array, kl: jax.Array, distance: jax.Array | None, config: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The generator's part of the original's LPIPSWithDiscriminator, without the adversary: x, y [b, H, W, c], kl [b], distance [b].

    nll = sum over pixels of (error + perceptual_weight * distance) / exp(logvar) + logvar, and loss = mean over b of nll + kl_weight * kl. The
    distance is added at every pixel, so it counts H * W * c times; that is the original's weighting.
    """
    diff = x - y
    error = jnp.abs(diff) if config.kind == "l1" else jnp.square(diff)
    parts = {"rec_loss": error.mean(), "mse": jnp.square(diff).mean(), "kl_loss": kl.mean()}
    if distance is not None:
        error = error + config.perceptual_weight * distance[:, None, None, None]
        parts["perceptual"] = distance.mean()
    nll = error / jnp.exp(config.logvar_init) + config.logvar_init
    parts["nll_loss"] = nll.sum((1, 2, 3)).mean()
    loss = parts["nll_loss"] + config.kl_weight * parts["kl_loss"]
    return loss, parts | {"loss": loss}


def make_loss(
    module: AutoencoderKL, config: Any, seed: int, perceptual: Perceptual | None
) -> Callable[..., tuple[jax.Array, dict]]:
    """``loss(params, frozen, batch, step, train) -> (loss, metrics)``; see `make_step`."""

    def loss(params: Any, frozen: Any, batch: Any, step: jax.Array, train: bool = True) -> tuple[jax.Array, dict]:
        x = to_float(batch["image"])
        _, h, w, _ = x.shape
        f = module.downsampling
        noise = (
            normal_rows(row_keys(seed, step, batch["row"]), 0, (h // f, w // f, module.embed_dim)) if train else None
        )
        rngs = {"dropout": jax.random.fold_in(jax.random.key(seed), step)} if train else None
        y, posterior = apply(module, params, x, noise, train, rngs=rngs)
        distance = None if perceptual is None else perceptual(frozen["perceptual"], x, y)
        return reconstruction_loss(x, y, posterior.kl(), distance, config)

    return loss


def make_step(
    module: AutoencoderKL,
    tx: optax.GradientTransformation,
    config: Any,
    *,
    seed: int,
    ema: float,
    parts: int,
    perceptual: Perceptual | None = None,
) -> Callable[..., tuple[TrainState, dict]]:
    """``step(state, frozen, batch, *, axis_name=None) -> (state, metrics)``, pure.

    ``frozen`` holds the perceptual network's parameters under "perceptual"; ``batch`` "image" uint8 [b, H, W, 3] and "row" int32 [b].
    """
    loss = make_loss(module, config, seed, perceptual)

    def step(state: TrainState, frozen: Any, batch: Any, *, axis_name: str | None = None) -> tuple[TrainState, dict]:
        grads, metrics = accumulate(lambda p, b: loss(p, frozen, b, state.step), state.params, batch, parts)
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        metrics["grad_norm"] = optax.global_norm(grads)
        return apply_gradients(state, grads, tx, ema), metrics

    return step
