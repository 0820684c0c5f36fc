"""The optimiser: AdamW with warm-up, decay and clipping, from a config."""

from typing import Any

import optax


def learning_rate(config: Any, steps: int) -> optax.Schedule:
    """Warm-up over ``config.warmup`` steps to ``config.lr``, then "constant", or "cosine" or "linear" to ``config.final`` * lr at ``steps``."""
    rest = max(steps - config.warmup, 1)
    decays = {
        "constant": optax.constant_schedule(config.lr),
        "cosine": optax.cosine_decay_schedule(config.lr, rest, config.final),
        "linear": optax.linear_schedule(config.lr, config.lr * config.final, rest),
    }
    if config.decay not in decays:
        raise ValueError(f"optim.decay {config.decay!r} does not exist (have {', '.join(decays)})")
    if not config.warmup:
        return decays[config.decay]
    # The first step already learns: warm-up counts from 1.
    warm = optax.linear_schedule(config.lr / config.warmup, config.lr, max(config.warmup - 1, 1))
    return optax.join_schedules([warm, decays[config.decay]], [config.warmup])


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm (``config.clip``; 0 for none), then AdamW (Loshchilov & Hutter 2019)."""
    adam = optax.adamw(learning_rate(config, steps), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), adam) if config.clip else adam
