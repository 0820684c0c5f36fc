"""The optimiser: AdamW, Adafactor or Muon with warm-up, decay and clipping, from a config."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from ldm_jax.errors import ConfigError, did_you_mean

KINDS = ("adamw", "adafactor", "muon")


def learning_rate(config: Any, steps: int) -> optax.Schedule:
    """Returns the learning rate by step.

    Args:
      config: The config's "optim". Over ``warmup`` steps the rate rises to ``lr``; then ``decay``
        is "constant", or "cosine" or "linear" to ``final`` * lr at the last step. "cycles_cosine"
        and "cycles_linear" are the original's schedules instead, see `cycles`.
      steps: The number of steps of the run.
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
        known = [*decays, "cycles_cosine", "cycles_linear"]
        raise ConfigError(
            f"optim.decay {config.decay!r} does not exist{did_you_mean(config.decay, known)}"
        )
    if not config.warmup:
        return decays[config.decay]
    # Warm-up counts from 1, so that the first step learns.
    warm = optax.linear_schedule(config.lr / config.warmup, config.lr, max(config.warmup - 1, 1))
    return optax.join_schedules([warm, decays[config.decay]], [config.warmup])


def cycles(config: Any, shape: str) -> optax.Schedule:
    """Returns the factor of the learning rate as in the original's ldm/lr_scheduler.py.

    LambdaWarmUpCosineScheduler2 and LambdaLinearScheduler, and with one cycle
    LambdaWarmUpCosineScheduler. A cycle rises from ``start`` to ``high`` over ``warmup`` steps and
    falls to ``low`` at its end, where the last one stays. The linear fall is measured from the
    cycle's beginning, as in the original.

    Args:
      config: One number per cycle of ``lengths`` and ``warmup`` (steps), ``start``, ``high`` and
        ``low`` (factors).
      shape: "cosine" or "linear".
    """
    names = ("lengths", "warmup", "start", "high", "low")
    table = {name: np.atleast_1d(np.asarray(config[name], np.float32)) for name in names}
    lengths, warmups = table["lengths"], table["warmup"]
    sizes = {len(values) for values in table.values()}
    if len(sizes) != 1 or 0 in sizes or (lengths <= 0).any() or (warmups >= lengths).any():
        raise ConfigError(
            f"optim.cycles: {', '.join(names)} need one number for each cycle, and a warmup that "
            "is less than the length"
        )
    ends = np.cumsum(lengths)

    def factor(step: Any) -> jax.Array:
        # The last step of a cycle is step 0 of the next.
        i = jnp.minimum(jnp.searchsorted(ends, jnp.float32(step)), len(ends) - 1)
        length, warmup, start, high, low = (jnp.asarray(table[name])[i] for name in names)
        n = jnp.minimum(step - (jnp.asarray(ends)[i] - length), length)
        rising = start + (high - start) * n / jnp.maximum(warmup, 1)
        if shape == "cosine":
            angle = jnp.pi * (n - warmup) / (length - warmup)
            falling = low + 0.5 * (high - low) * (1 + jnp.cos(angle))
        else:
            falling = low + (high - low) * (length - n) / length
        return jnp.where(n < warmup, rising, falling)

    return factor


def with_scaled_rate(config: Any, batch_size: int) -> Any:
    """Returns "optim" with lr times the global batch size where ``scale_lr`` is set."""
    if not config.scale_lr:
        return config
    config = config.copy_and_resolve_references()
    config.lr = config.lr * batch_size
    return config


def describe_rate(config: Any, batch_size: int) -> str:
    """Describes the learning rate for the log."""
    text = f"learning rate {with_scaled_rate(config, batch_size).lr:.4g}"
    return (
        f"{text} = {config.lr:.4g} x {batch_size} pictures in a batch" if config.scale_lr else text
    )


def make_optimizer(
    config: Any, steps: int, decays: Callable[[Any], Any] | None = None
) -> optax.GradientTransformation:
    """Builds the optimiser of a config's "optim".

    Clipping by global norm (``clip``; 0 for none), then AdamW (Loshchilov & Hutter 2019,
    arXiv:1711.05101), Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) or Muon (Jordan 2024).
    ``mu_dtype`` is the type of the first moments. Adafactor keeps the second moments of a matrix
    as a row and a column; its learning rate is not relative to the size of the parameters. Muon
    orthogonalises the momentum of matrices and of convolutions, read as matrices [h w in, out],
    and scales it to the size of AdamW's updates (arXiv:2502.16982), so that learning rate and
    weight decay are AdamW's; biases, scales and tables of embeddings take AdamW with Nesterov's
    momentum.

    Args:
      config: The config's "optim".
      steps: The number of steps of the run.
      decays: ``decays(params)`` is a tree of booleans, True where ``weight_decay`` applies; None:
        everywhere. What Muon leaves to AdamW then does not decay.
    """
    rate = learning_rate(config, steps)
    if config.kind == "adafactor":
        chosen = optax.adafactor(
            rate,
            multiply_by_parameter_scale=False,
            weight_decay_rate=config.weight_decay or None,
            weight_decay_mask=decays,
            momentum=config.b1 or None,
            dtype_momentum=config.mu_dtype,
        )
    elif config.kind == "muon":
        chosen = optax.contrib.muon(
            rate,
            beta=0.95,
            weight_decay=config.weight_decay,
            weight_decay_mask=decays,
            mu_dtype=config.mu_dtype,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay if decays is None else 0.0,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
    else:
        moments = {"b1": config.b1, "b2": config.b2, "mu_dtype": config.mu_dtype}
        chosen = optax.adamw(rate, weight_decay=config.weight_decay, mask=decays, **moments)
    return optax.chain(optax.clip_by_global_norm(config.clip), chosen) if config.clip else chosen


def _matrices(params: Any) -> Any:
    """Which axes of a parameter are a matrix's inputs and outputs; None for those of AdamW."""

    def axes(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if getattr(path[-1], "key", "") != "kernel" or leaf.ndim < 2:
            return None
        inputs = tuple(range(leaf.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)
