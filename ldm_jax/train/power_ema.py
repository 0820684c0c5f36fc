"""Averages of the parameters whose length is chosen after training.

Karras et al. 2024, arXiv:2312.02696, section 3 and appendix C. A run keeps a few averages with
power functions as profiles, and snapshots of them. Any other profile is a linear combination of
the snapshots' profiles, by least squares.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax.errors import CheckpointError, ConfigError
from ldm_jax.io.checkpoint import load_model, read_config, save_model
from ldm_jax.io.paths import as_path, exists

FOLDER = "averages"  # of a run: model directories STEP-STD
_NAME = re.compile(r"(\d+)-(\d*\.\d+)")


class PowerAverages(NamedTuple):
    """State of `power_averages`.

    Attributes:
      steps: Updates so far, int32 [].
      averages: A tree like the parameters for each standard deviation.
    """

    steps: jax.Array
    averages: tuple[Any, ...]


class Profile(NamedTuple):
    """A power function t^g on [0, step], normalised.

    Attributes:
      step: The last step.
      std: Its relative standard deviation: of the steps, as a part of all.
    """

    step: int
    std: float


def exponent_of(std: float) -> float:
    """Returns g of a profile t^g with this relative standard deviation.

    Raises:
      ConfigError: It is not between 0 and 0.28, that of nearly equal weights.
    """
    if not 0 < std <= 0.28:
        raise ConfigError(f"power_ema: a standard deviation of {std:g}: give 0.01 to 0.28")
    t = std**-2
    return float(max(np.roots([1, 7, 16 - t, 12 - t]).real))


def power_averages(stds: Sequence[float]) -> optax.GradientTransformation:
    """Returns a transformation that keeps averages of the parameters and changes no update.

    It is the last of a chain: the average follows the parameters after the update.

    Args:
      stds: The relative standard deviations of the profiles.
    """
    exponents = [exponent_of(std) for std in stds]

    def init(params: Any) -> PowerAverages:
        return PowerAverages(
            jnp.zeros((), jnp.int32), tuple(jax.tree.map(jnp.copy, params) for _ in exponents)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, PowerAverages]:
        new, step = optax.apply_updates(params, updates), state.steps + 1
        before = jnp.log1p(-1 / step.astype(jnp.float32))  # log of (t - 1) / t; -inf at first
        averages = []
        for average, g in zip(state.averages, exponents, strict=True):
            rate = -jnp.expm1((g + 1) * before)
            averages.append(jax.tree.map(lambda a, p, r=rate: a + r * (p - a), average, new))
        return updates, PowerAverages(step, tuple(averages))

    return optax.GradientTransformation(init, update)


def with_averages(tx: optax.GradientTransformation, config: Any) -> optax.GradientTransformation:
    """Returns an optimiser that also keeps the averages of a config's "power_ema"."""
    return optax.chain(tx, power_averages(config.stds)) if config.stds else tx


def save_snapshots(
    workdir: Path, config: Any, state: Any, step: int, export: Callable[[Path, Any], None]
) -> None:
    """Writes a model directory for each average of a state.

    Args:
      workdir: The run folder.
      config: The config's "power_ema".
      state: The training state.
      step: Its step.
      export: ``export(folder, state)`` writes the model of a state's average.
    """
    for std, average in zip(config.stds, state.opt_state[-1].averages, strict=True):
        folder = workdir / FOLDER / f"{step:08d}-{std:g}"
        export(folder, dataclasses.replace(state, ema=average))


# ------------------------------------------------------------------------------ reconstruction


def overlaps(left: Sequence[Profile], right: Sequence[Profile]) -> np.ndarray:
    """Returns the integrals of the products of profiles, float64 [m, n]."""
    table = np.empty((len(left), len(right)))
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            first, last = (a, b) if a.step <= b.step else (b, a)
            g, h = exponent_of(first.std), exponent_of(last.std)
            scale = (g + 1) * (h + 1) / ((g + h + 1) * last.step)
            table[i, j] = scale * (first.step / last.step) ** h
    return table


def combination(known: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Returns weights of known profiles that approximate another, and the relative error."""
    a, b = overlaps(known, known), overlaps(known, [wanted])[:, 0]
    weights = np.linalg.lstsq(a, b, rcond=1e-12)[0]
    norm = overlaps([wanted], [wanted])[0, 0]
    rest = norm - 2 * weights @ b + weights @ a @ weights
    return weights, float(np.sqrt(max(rest, 0.0) / norm))


def reconstruct(
    run: str | Path, out: str | Path, std: float, step: int | None = None
) -> dict[str, str]:
    """Writes the model directory ``out`` of the average with another profile.

    Args:
      run: A run folder whose config had "power_ema.stds".
      out: The new model directory.
      std: The relative standard deviation of the profile.
      step: Its last step; None: that of the newest snapshot.

    Returns:
      {label: text} about what was combined.

    Raises:
      CheckpointError: There are no snapshots, or ``out`` is there already.
      ConfigError: The standard deviation is out of range.
    """
    exponent_of(std)
    folder, out = as_path(run) / FOLDER, as_path(out)
    if exists(out):
        raise CheckpointError(f"{out} is already there; give a new name or remove it first")
    found = {}
    for path in sorted(folder.iterdir()) if exists(folder) else ():
        if match := _NAME.fullmatch(path.name):
            found[Profile(int(match[1]), float(match[2]))] = path
    if not found:
        raise CheckpointError(f"{folder} holds no averages: train with power_ema.stds=(0.05,0.1)")
    step = max(known.step for known in found) if step is None else step
    found = {known: path for known, path in found.items() if known.step <= step}
    if not found:
        raise CheckpointError(f"{folder} holds no averages up to step {step}")
    weights, error = combination(list(found), Profile(step, std))
    paths = list(found.values())
    config, first = load_model(paths[-1])
    total = jax.tree.map(lambda leaf: np.zeros(np.shape(leaf), np.float64), first)
    same = jax.tree.map(lambda leaf: True, first)
    for weight, path in zip(weights, paths, strict=True):
        if read_config(path).get("trained_steps") is None:
            raise CheckpointError(f"{path} is no snapshot of a run")
        params = load_model(path)[1]
        total = jax.tree.map(
            lambda t, p, w=weight: t + w * np.asarray(p, np.float64), total, params
        )
        same = jax.tree.map(lambda s, p, f: s and np.array_equal(p, f), same, params, first)
    # What was not trained is the same everywhere; the weights' sum is 1 only nearly.
    params = jax.tree.map(
        lambda s, t, f: f if s else t.astype(np.asarray(f).dtype), same, total, first
    )
    config.pop("format", None)
    save_model(out, {**config, "trained_steps": step}, params, dtype=None)
    return {
        "written": f"{out}: std {std:g} at step {step}",
        "combined": f"{len(paths)} snapshots, weights from {weights.min():.3g} to "
        f"{weights.max():.3g}",
        "error": f"{100 * error:.2g} % of the profile",
    }
