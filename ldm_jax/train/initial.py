"""A run that begins with the parameters of another model."""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from ldm_jax.errors import ConfigError
from ldm_jax.io.checkpoint import find_model, load_model
from ldm_jax.train.state import ExtendedState, TrainState
from ldm_jax.train.tasks.base import Task

LOG = logging.getLogger(__name__)


def begin_with(path: str, task: Task, like: Any, strict: bool = True) -> dict[str, Any]:
    """Parameters, of the model directory at ``path``, that a state trains (shapes ``like``); ConfigError where one is missing or of another shape.

    ``logvar`` of the loss alone may be missing: not every model has learnt one. Not ``strict``, whatever does not fit is left out, to begin anew:
    so a model learns another kind of condition. A convolution that reads more channels than it did is filled up with zeros, which makes it
    the old one at first, whatever is joined to its input.
    """
    given, wanted = _by_name(task.adopt(*load_model(find_model(path)))), _by_name(like)
    taken = {}
    for name, leaf in wanted.items():
        if name in given and given[name].shape == leaf.shape:
            taken[name] = given[name]
        elif (
            name in given and not strict and (wider := _wider(given[name], leaf.shape)) is not None
        ):
            taken[name] = wider
    wrong = [
        f"{name} {tuple(given[name].shape)}, not {tuple(wanted[name].shape)}"
        if name in given
        else f"no {name}"
        for name in wanted
        if name not in taken and name != "logvar"
    ]
    if not wrong:
        return taken
    what = f"{path} has {wrong[0]}{f' and {len(wrong) - 1} more that do not fit' if len(wrong) > 1 else ''}"
    if strict:
        raise ConfigError(
            f"init: {what}: give the model that it is in config.model, or begin that anew with init_strict=False"
        )
    if not taken:
        raise ConfigError(f"init: {what}: nothing of it fits config.model")
    LOG.info("begins with %d of %d arrays of %s; anew, as %s", len(taken), len(wanted), path, what)
    return taken


def _wider(kernel: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """A convolution's kernel [h, w, in, out] with zeros for more input channels; None where ``shape`` is anything else."""
    kernel = np.asarray(kernel)
    if kernel.ndim != 4 or len(shape) != 4 or shape[2] < kernel.shape[2]:
        return None
    if (*shape[:2], shape[3]) != (*kernel.shape[:2], kernel.shape[3]):
        return None
    return np.pad(kernel, ((0, 0), (0, 0), (0, shape[2] - kernel.shape[2]), (0, 0)))


def _by_name(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def adopted(state: TrainState, given: dict[str, Any]) -> TrainState:
    """``state`` with these parameters, and its average beginning at them."""

    def placed(tree: Any) -> Any:
        leaves = [
            jax.device_put(np.asarray(given[name], leaf.dtype), leaf.sharding)
            if name in given
            else leaf
            for name, leaf in _by_name(tree).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    state = dataclasses.replace(
        state, params=placed(state.params), ema=state.ema and placed(state.ema)
    )
    if (
        isinstance(state, ExtendedState)
        and "usage" in state.extra
        and any(name.startswith("quantize/") for name in given)
    ):
        usage = state.extra[
            "usage"
        ]  # codes that were trained are in use until they are seen not to be
        usage = jax.device_put(np.ones(usage.shape, usage.dtype), usage.sharding)
        state = dataclasses.replace(state, extra=state.extra | {"usage": usage})
    return state
