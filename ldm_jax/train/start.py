"""The start of a run from the parameters of another model (``config.init``)."""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from ldm_jax.errors import ConfigError
from ldm_jax.io.checkpoint import find_model, load_model
from ldm_jax.train.state import TrainState, extra_of
from ldm_jax.train.tasks.base import Task

LOG = logging.getLogger(__name__)


def load_start(
    path: str, task: Task, like: Any, strict: bool = True
) -> tuple[Task, dict[str, Any]]:
    """Reads the parameters that a run starts from.

    Args:
      path: A model directory.
      task: The task, which may take more than parameters from it.
      like: Shapes of the task's parameters.
      strict: Whether all must fit, but for "logvar", which not every model has learned. Else what
        does not fit starts fresh, and a convolution that reads more channels than before gets
        zeros for the new ones: it starts as the old one, whatever is joined to its input.

    Returns:
      The task, and the parameters by path.

    Raises:
      ConfigError: A parameter is missing or has another shape, or not one fits.
    """
    task, params = task.adopt(*load_model(find_model(path)))
    given, wanted, taken = _by_path(params), _by_path(like), {}
    for name, leaf in wanted.items():
        if name in given and given[name].shape == leaf.shape:
            taken[name] = given[name]
        elif name in given and not strict and _is_wider(leaf.shape, given[name].shape):
            new = leaf.shape[2] - given[name].shape[2]
            taken[name] = np.pad(np.asarray(given[name]), ((0, 0), (0, 0), (0, new), (0, 0)))
    wrong = [
        f"{name} {tuple(given[name].shape)}, not {tuple(wanted[name].shape)}"
        if name in given
        else f"no {name}"
        for name in wanted
        if name not in taken and name != "logvar"
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more that do not fit" if len(wrong) > 1 else ""
        difference = f"{path} has {wrong[0]}{more}"
        if strict:
            raise ConfigError(
                f"init: {difference}: describe that model in config.model, or start these "
                "parameters fresh with init_strict=False"
            )
        if not taken:
            raise ConfigError(f"init: {difference}: nothing of it fits config.model")
        LOG.info("starts from %d of %d arrays: %s", len(taken), len(wanted), difference)
    return task, taken


def _is_wider(shape: tuple[int, ...], old: tuple[int, ...]) -> bool:
    """Whether a kernel [h, w, in, out] differs from the old one by more input channels alone."""
    if len(shape) != 4 or len(old) != 4:
        return False
    return (*shape[:2], shape[3]) == (*old[:2], old[3]) and shape[2] > old[2]


def _by_path(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def with_parameters(state: TrainState, given: dict[str, Any]) -> TrainState:
    """Returns ``state`` with these parameters, its average starting at them."""

    def replace(tree: Any) -> Any:
        leaves = [
            jax.device_put(np.asarray(given[name], leaf.dtype), leaf.sharding)
            if name in given
            else leaf
            for name, leaf in _by_path(tree).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    ema = state.ema and replace(state.ema)
    state, extra = (
        dataclasses.replace(state, params=replace(state.params), ema=ema),
        extra_of(state),
    )
    if "usage" in extra and any(name.startswith("quantize/") for name in given):
        old = extra["usage"]  # trained codes are in use until shown otherwise
        usage = jax.device_put(np.ones(old.shape, old.dtype), old.sharding)
        state = dataclasses.replace(state, extra=extra | {"usage": usage})
    return state
