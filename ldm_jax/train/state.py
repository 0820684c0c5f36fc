"""The training state, its exponential moving average, and one update of both."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Arrays only; optimiser and modules stay outside. ``ema`` is None where no average is kept."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def create_state(params: Any, tx: optax.GradientTransformation, ema: bool) -> TrainState:
    """Step 0, with the average starting at the parameters."""
    return TrainState(
        jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params) if ema else None, tx.init(params)
    )


def ema_decay(updates: jax.Array, decay: float) -> jax.Array:
    """min(decay, (1 + n) / (10 + n)) after n updates: a short memory at first (the original's LitEma)."""
    n = updates.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def ema_update(ema: Any, params: Any, updates: jax.Array, decay: float) -> Any:
    """ema <- ema - (1 - d) (ema - params), with d of `ema_decay` after ``updates`` updates, this one counted."""
    rate = 1.0 - ema_decay(updates, decay)
    return jax.tree.map(lambda e, p: e - rate * (e - p), ema, params)


def apply_gradients(state: TrainState, grads: Any, tx: optax.GradientTransformation, decay: float) -> TrainState:
    """The next state."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    ema = None if state.ema is None else ema_update(state.ema, params, step, decay)
    return TrainState(step, params, ema, opt_state)


def accumulate(
    loss_fn: Callable[[Any, Any], tuple[jax.Array, dict]], params: Any, batch: Any, parts: int
) -> tuple[Any, dict]:
    """Mean gradients and metrics of ``loss_fn(params, batch) -> (loss, metrics)``, the batch cut into ``parts`` that are run one after another.

    Part i takes rows i, i + parts, ..., so that a batch split over devices stays split.
    """
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if parts == 1:
        return grad_fn(params, batch)
    pieces = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 1, 0), batch)

    def body(total: Any, piece: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad_fn(params, piece)), None

    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(grad_fn, params, jax.tree.map(lambda a: a[0], pieces))
    )
    total, _ = jax.lax.scan(body, zeros, pieces)
    return jax.tree.map(lambda a: a / parts, total)


def row_keys(seed: int, step: jax.Array, rows: jax.Array) -> jax.Array:
    """One key per row of the global batch at a step: what a row draws depends neither on devices nor on the batch's split."""
    at_step = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(at_step, row))(rows)


def normal_rows(keys: jax.Array, purpose: int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal [b, *shape], a row per key."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, purpose), shape))(keys)
