"""The training state, its exponential moving average, and one update of both."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Arrays only: optimiser and modules stay outside. ``ema`` is None where it is switched off."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


@flax.struct.dataclass
class ExtendedState(TrainState):
    """A state with further arrays of the task, by name: a discriminator, an averaged codebook.

    A separate class, because a field that is None would be part of every checkpoint.
    """

    extra: dict[str, Any]


def create_state(
    params: Any, tx: optax.GradientTransformation, ema: bool, extra: dict[str, Any] | None = None
) -> TrainState:
    """Returns the state at step 0, with the average equal to the parameters."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    fields = jnp.zeros((), jnp.int32), params, average, tx.init(params)
    return ExtendedState(*fields, extra) if extra else TrainState(*fields)


def extra_of(state: TrainState) -> dict[str, Any]:
    """Returns the arrays of a state beside its parameters; {} where there are none."""
    return state.extra if isinstance(state, ExtendedState) else {}


def averaged(state: TrainState) -> Any:
    """Returns the parameters to evaluate and export: the average, where there is one."""
    return state.params if state.ema is None else state.ema


def ema_update(ema: Any, params: Any, updates: jax.Array | None, decay: float) -> Any:
    """Returns ema - (1 - d) (ema - params), as LitEma of the original.

    Args:
      ema: The average.
      params: The parameters after this update.
      updates: The number n of updates, this one included; None for a constant d.
      decay: The largest d; d = min(decay, (1 + n) / (10 + n)) forgets the start quickly.
    """
    if updates is None:
        rate: Any = 1.0 - decay
    else:
        n = updates.astype(jnp.float32)
        rate = 1.0 - jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda e, p: e - rate * (e - p), ema, params)


def apply_gradients(
    state: TrainState,
    grads: Any,
    metrics: dict,
    tx: optax.GradientTransformation,
    decay: float,
    warmup: bool = True,
) -> tuple[TrainState, dict]:
    """Returns the next state, and the metrics with the norm of ``grads``; ``extra`` is kept.

    Without ``warmup`` the average has its full decay from the first step.
    """
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params, step = optax.apply_updates(state.params, updates), state.step + 1
    ema = (
        None
        if state.ema is None
        else ema_update(state.ema, params, step if warmup else None, decay)
    )
    state = dataclasses.replace(state, step=step, params=params, ema=ema, opt_state=opt_state)
    return state, metrics | {"grad_norm": optax.tree.norm(grads)}


def scan_parts(
    run: Callable[[Any, Any], tuple[Any, Any]], carry: Any, batch: Any, parts: int
) -> tuple[Any, Any]:
    """Runs ``run(carry, piece) -> (carry, results)`` over a batch in ``parts`` pieces, in turn.

    Piece i has rows i, i + parts, ..., so that a batch split over devices stays split.

    Returns:
      The last carry and the mean results.
    """
    if parts == 1:
        return run(carry, batch)
    pieces = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 1, 0), batch
    )

    def body(so_far: Any, piece: Any) -> tuple[Any, None]:
        carry, total = so_far
        carry, results = run(carry, piece)
        return (carry, jax.tree.map(jnp.add, total, results)), None

    shapes = jax.eval_shape(run, carry, jax.tree.map(lambda a: a[0], pieces))[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (carry, total), _ = jax.lax.scan(body, (carry, zeros), pieces)
    return carry, jax.tree.map(lambda a: a / parts, total)


def mean_over_devices(results: Any, axis_name: str | None) -> Any:
    """Averages over the devices of a pmap; under jit, results are of the whole batch already."""
    return results if axis_name is None else jax.lax.pmean(results, axis_name)


def row_keys(seed: int, step: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns one key per row of the global batch at a step, however the batch is split."""
    at_step = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(at_step, row))(rows)


def normal_rows(keys: jax.Array, purpose: int, shape: tuple[int, ...]) -> jax.Array:
    """Draws standard normal [b, *shape], one row per key; each purpose has its own numbers."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, purpose), shape))(keys)
