"""The optimiser: AdamW or Adafactor with warm-up, decay and clipping, from a config."""

from typing import Any

import optax

KINDS = ("adamw", "adafactor")


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
    """Clipping by global norm (``config.clip``; 0 for none), then AdamW (Loshchilov & Hutter 2019) or Adafactor (Shazeer & Stern 2018).

    ``config.mu_dtype`` is the type of the first moments. Adafactor keeps its second moments as a row and a column for each matrix, and takes the
    learning rate as it is, not relative to the parameters' size.
    """
    rate = learning_rate(config, steps)
    if config.kind == "adafactor":
        momentum = {"momentum": config.b1 or None, "dtype_momentum": config.mu_dtype}
        decay = config.weight_decay or None
        chosen = optax.adafactor(rate, multiply_by_parameter_scale=False, weight_decay_rate=decay, **momentum)
    else:
        moments = {"b1": config.b1, "b2": config.b2, "mu_dtype": config.mu_dtype}
        chosen = optax.adamw(rate, weight_decay=config.weight_decay, **moments)
    return optax.chain(optax.clip_by_global_norm(config.clip), chosen) if config.clip else chosen
