"""The optimiser: AdamW or Adafactor with warm-up, decay and clipping, from a config."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

KINDS = ("adamw", "adafactor")


def learning_rate(config: Any, steps: int) -> optax.Schedule:
    """Warm-up over ``config.warmup`` steps to ``config.lr``, then "constant", or "cosine" or "linear" to ``config.final`` * lr at ``steps``.

    "cycles_cosine" and "cycles_linear" are the original's schedules instead: see `cycles`.
    """
    if config.decay in ("cycles_cosine", "cycles_linear"):
        factor = cycles(config.cycles, config.decay.removeprefix("cycles_"))
        return lambda step: config.lr * factor(step)
    rest = max(steps - config.warmup, 1)
    decays = {
        "constant": optax.constant_schedule(config.lr),
        "cosine": optax.cosine_decay_schedule(config.lr, rest, config.final),
        "linear": optax.linear_schedule(config.lr, config.lr * config.final, rest),
    }
    if config.decay not in decays:
        known = ", ".join([*decays, "cycles_cosine", "cycles_linear"])
        raise ValueError(f"optim.decay {config.decay!r} does not exist (have {known})")
    if not config.warmup:
        return decays[config.decay]
    # The first step already learns: warm-up counts from 1.
    warm = optax.linear_schedule(config.lr / config.warmup, config.lr, max(config.warmup - 1, 1))
    return optax.join_schedules([warm, decays[config.decay]], [config.warmup])


def cycles(config: Any, shape: str) -> optax.Schedule:
    """What the learning rate is multiplied by in the original (ldm/lr_scheduler.py): the multi-cycle LambdaWarmUpCosineScheduler2 and
    LambdaLinearScheduler, and with one cycle LambdaWarmUpCosineScheduler.

    ``config`` has a number for each cycle: ``lengths`` in steps, ``warmup`` of them from factor ``start`` to ``high``, then down to ``low`` along
    half a cosine, or linearly; the linear one falls as if from the cycle's beginning, as in the original. After the last cycle its end stays.
    """
    names = ("lengths", "warmup", "start", "high", "low")
    table = {name: np.atleast_1d(np.asarray(config[name], np.float32)) for name in names}
    sizes = {len(values) for values in table.values()}
    if (
        len(sizes) != 1
        or 0 in sizes
        or (table["lengths"] <= 0).any()
        or (table["warmup"] >= table["lengths"]).any()
    ):
        raise ValueError(
            f"optim.cycles: {', '.join(names)} need one number for each cycle, and warmup less than its length"
        )
    ends = np.cumsum(table["lengths"])

    def factor(step: Any) -> jax.Array:
        # A cycle's last step is that at which the next begins to count.
        i = jnp.minimum(jnp.searchsorted(ends, jnp.float32(step)), len(ends) - 1)
        length, warmup, start, high, low = (jnp.asarray(table[name])[i] for name in names)
        n = jnp.minimum(step - (jnp.asarray(ends)[i] - length), length)
        rising = start + (high - start) * n / jnp.maximum(warmup, 1)
        if shape == "cosine":
            falling = low + 0.5 * (high - low) * (
                1 + jnp.cos(jnp.pi * (n - warmup) / (length - warmup))
            )
        else:
            falling = low + (high - low) * (length - n) / length
        return jnp.where(n < warmup, rising, falling)

    return factor


def scaled(config: Any, batch_size: int) -> Any:
    """The optimiser's config with the learning rate that is meant: times the global batch's size where ``scale_lr`` is on (the original's way)."""
    if not config.scale_lr:
        return config
    config = config.copy_and_resolve_references()
    config.lr = config.lr * batch_size
    return config


def told_rate(config: Any, batch_size: int) -> str:
    """The learning rate that is meant, for people."""
    meant = f"learning rate {scaled(config, batch_size).lr:.4g}"
    return (
        f"{meant} = {config.lr:.4g} x {batch_size} pictures in a batch"
        if config.scale_lr
        else meant
    )


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm (``config.clip``; 0 for none), then AdamW (Loshchilov & Hutter 2019) or Adafactor (Shazeer & Stern 2018).

    ``config.mu_dtype`` is the type of the first moments. Adafactor keeps its second moments as a row and a column for each matrix, and takes the
    learning rate as it is, not relative to the parameters' size.
    """
    rate = learning_rate(config, steps)
    if config.kind == "adafactor":
        momentum = {"momentum": config.b1 or None, "dtype_momentum": config.mu_dtype}
        decay = config.weight_decay or None
        chosen = optax.adafactor(
            rate, multiply_by_parameter_scale=False, weight_decay_rate=decay, **momentum
        )
    else:
        moments = {"b1": config.b1, "b2": config.b2, "mu_dtype": config.mu_dtype}
        chosen = optax.adamw(rate, weight_decay=config.weight_decay, **moments)
    return optax.chain(optax.clip_by_global_norm(config.clip), chosen) if config.clip else chosen
