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
    """Arrays only; optimiser and modules stay outside. ``ema`` is None where no average is kept."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


@flax.struct.dataclass
class ExtendedState(TrainState):
    """With what else a task carries from step to step, by name: a discriminator with its statistics and optimiser, an averaged codebook.

    A class of its own, since a field that is None would be a part of every checkpoint as well.
    """

    extra: dict[str, Any]


def create_state(
    params: Any, tx: optax.GradientTransformation, ema: bool, extra: dict[str, Any] | None = None
) -> TrainState:
    """Step 0, with the average starting at the parameters."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    state = TrainState(jnp.zeros((), jnp.int32), params, average, tx.init(params))
    return (
        ExtendedState(state.step, state.params, state.ema, state.opt_state, extra)
        if extra
        else state
    )


def extra_of(state: TrainState) -> dict[str, Any]:
    """What the state carries beside its parameters; empty where there is nothing."""
    return state.extra if isinstance(state, ExtendedState) else {}


def averaged(state: TrainState) -> Any:
    """The parameters to evaluate, show and export: their average where one is kept."""
    return state.params if state.ema is None else state.ema


def ema_decay(updates: jax.Array, decay: float) -> jax.Array:
    """min(decay, (1 + n) / (10 + n)) after n updates: a short memory at first (the original's LitEma)."""
    n = updates.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def ema_update(ema: Any, params: Any, updates: jax.Array, decay: float) -> Any:
    """Ema <- ema - (1 - d) (ema - params), with d of `ema_decay` after ``updates`` updates, this one counted."""
    rate = 1.0 - ema_decay(updates, decay)
    return jax.tree.map(lambda e, p: e - rate * (e - p), ema, params)


def apply_gradients(
    state: TrainState, grads: Any, tx: optax.GradientTransformation, decay: float
) -> TrainState:
    """The next state; ``extra`` is left as it is."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    ema = None if state.ema is None else ema_update(state.ema, params, step, decay)
    return dataclasses.replace(state, step=step, params=params, ema=ema, opt_state=opt_state)


def in_parts(
    run: Callable[[Any, Any], tuple[Any, Any]], carry: Any, batch: Any, parts: int
) -> tuple[Any, Any]:
    """(last carry, mean results) of ``run(carry, piece) -> (carry, results)``, over a batch cut into ``parts`` that follow one another.

    Part i takes rows i, i + parts, ..., so that a batch split over devices stays split.
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


def accumulate(
    loss_fn: Callable[[Any, Any], tuple[jax.Array, dict]], params: Any, batch: Any, parts: int
) -> tuple[Any, dict]:
    """Mean gradients and metrics of ``loss_fn(params, batch) -> (loss, metrics)``, the batch cut into ``parts``; see `in_parts`."""
    grad_fn = jax.grad(loss_fn, has_aux=True)
    return in_parts(lambda _, piece: (None, grad_fn(params, piece)), None, batch, parts)[1]


def over_devices(results: Any, axis_name: str | None) -> Any:
    """Means over the devices of a pmap; under jit they are over the whole batch already."""
    return results if axis_name is None else jax.lax.pmean(results, axis_name)


def descend(
    state: TrainState, grads: Any, metrics: dict, tx: optax.GradientTransformation, ema: float
) -> tuple[TrainState, dict]:
    """One update by gradients that are those of the whole batch, and the metrics with their norm."""
    return apply_gradients(state, grads, tx, ema), metrics | {"grad_norm": optax.tree.norm(grads)}


def row_keys(seed: int, step: jax.Array, rows: jax.Array) -> jax.Array:
    """One key per row of the global batch at a step: what a row draws depends neither on devices nor on the batch's split."""
    at_step = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(at_step, row))(rows)


def normal_rows(keys: jax.Array, purpose: int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal [b, *shape], a row per key."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, purpose), shape))(keys)
