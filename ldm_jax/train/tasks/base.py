"""What the training loop needs to know of a task."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import ConfigError, did_you_mean
from ldm_jax.train.state import (
    TrainState,
    apply_gradients,
    averaged,
    mean_over_devices,
    scan_parts,
)

Batches = Callable[[int], Iterable[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Cache:
    """What a task keeps of every picture, so that training need not encode it again.

    Attributes:
      key: The settings and digests that the records depend on.
      fields: dtype and shape of each array of a record.
      encode: ``encode(params, image uint8 [b, H, W, 3]) -> moments [b, flips, h, w, c]``, pure.
      params: The first argument of ``encode``.
      host_arrays: The other arrays [b, ...] of a loader's batch.
    """

    key: dict[str, Any]
    fields: dict[str, dict[str, Any]]
    encode: Callable[[Any, jax.Array], jax.Array]
    params: Any
    host_arrays: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]


class Task:
    """A kind of training: one subclass in one file, registered in `ldm_jax.train.tasks.TASKS`.

    An instance is immutable. `from_config` builds it from a config; `with_measured` returns a copy
    that knows what was measured on the data. A subclass overrides `loss`, or `make_step` and
    `evaluate` together, and whatever else differs from the defaults here.

    Attributes:
      config: The config, with all fields and the final learning rate.
      watched: Metrics that are read after every step, for `problem` and `warning`.
      headline: Metrics of a validation that the log shows.
      bins: Metrics of a validation that belong to a part of it each, such as some timesteps.
      free_settings: Settings of this task that a resumed run may change.
      exported_part: The name of the only exported part, where parameters are not split by part.
      any_size: Whether batches of different sizes can be trained on.
      any_pixels: Whether pictures may be others than 8-bit RGB.
    """

    config: Any
    watched: ClassVar[tuple[str, ...]] = ("loss", "grad_norm")
    headline: ClassVar[tuple[str, ...]] = ("loss",)
    bins: ClassVar[tuple[str, ...]] = ()
    free_settings: ClassVar[tuple[str, ...]] = ()
    exported_part: ClassVar[str] = ""
    any_size: ClassVar[bool] = False
    any_pixels: ClassVar[bool] = False

    # ------------------------------------------------------------------------------ construction

    @staticmethod
    def defaults() -> dict[str, Any]:
        """Returns the config fields that this task adds to those of every training."""
        return {}

    @classmethod
    def complete_config(cls, config: Any) -> None:
        """Fills in, in place, what a directory that the config names gives, such as a model.

        Raises ConfigError where a field of the config contradicts it.
        """

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Raises ConfigError for a setting that would fail only later."""

    @classmethod
    def from_config(cls, config: Any, weights: bool = True) -> "Task":
        """Builds the task.

        Args:
          config: A config of `ldm_jax.configs.common.base`; it is not changed.
          weights: False reads no file and puts shapes in the place of arrays, for planning.
        """
        raise NotImplementedError

    def measure(self, batches: Batches) -> dict[str, Any]:
        """Measures on the data, once per run, what the first step needs; JSON values.

        Args:
          batches: ``batches(n)`` gives the loader's first n batches.
        """
        return {}

    def with_measured(self, measured: Mapping[str, Any]) -> "Task":
        """Returns the task with the values of `measure`, from now or from the resumed run."""
        return self

    def check_rows(self, loader: Any) -> None:
        """Raises DataError where the rows of a loader of pictures cannot teach the task."""

    # -------------------------------------------------------------------------------- parameters

    @property
    def frozen(self) -> Any:
        """Arrays that the step reads and never changes; an argument of the compiled step."""
        return {}

    def init(self, key: jax.Array) -> Any:
        """Returns fresh parameters; compiled by the caller."""
        raise NotImplementedError

    @property
    def decays(self) -> Callable[[Any], Any] | None:
        """What `make_optimizer` decays by ``optim.weight_decay``; None: all parameters."""
        return None

    def extra(self, key: jax.Array) -> dict[str, Any]:
        """Returns what the state carries beside parameters; compiled by the caller."""
        return {}

    def adopt(self, config: dict[str, Any], params: Any) -> tuple["Task", Any]:
        """Takes over a model directory for ``config.init``.

        Returns:
          The task, with what it takes from the directory's config, and a tree of parameters by
          the names of `init`; those that the task does not train are left out.
        """
        return self, params

    def weights(self, state: TrainState) -> Any:
        """Returns the part of a state that `evaluate`, `preview` and `export` read."""
        return averaged(state)

    # --------------------------------------------------------------------------------- the steps

    def loss(
        self, params: Any, frozen: Any, batch: Any, step: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (loss [], metrics) of one batch, pure; metrics has "loss"."""
        raise NotImplementedError

    def make_step(self, tx: Any, parts: int) -> Callable[..., tuple[TrainState, dict]]:
        """Makes ``step(state, frozen, batch, *, axis_name=None) -> (state, metrics)``, pure.

        Args:
          tx: The optimiser, an `optax.GradientTransformation`.
          parts: Pieces that the batch is split into, to save memory.
        """

        def step(
            state: TrainState, frozen: Any, batch: Any, *, axis_name: str | None = None
        ) -> tuple[TrainState, dict]:
            grad = jax.grad(
                lambda p, piece: self.loss(p, frozen, piece, state.step, True), has_aux=True
            )
            _, results = scan_parts(lambda _, b: (None, grad(state.params, b)), None, batch, parts)
            grads, metrics = mean_over_devices(results, axis_name)
            ema = self.config.ema, self.config.ema_warmup
            return apply_gradients(state, grads, metrics, tx, *ema)

        return step

    def evaluate(self, weights: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        """Returns the metrics of one batch, pure; a batch always draws the same noise."""
        return self.loss(weights, frozen, batch, jnp.int32(0), False)[1]

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Returns what is recorded of a validation, from the means of `evaluate`."""
        return means

    def batch_at(self, raw: dict[str, Any], step: int) -> dict[str, Any]:
        """Returns a loader's batch as it is trained on at a step, such as in another size."""
        return raw

    def host_batch(self, raw: dict[str, Any], first_row: int = 0) -> dict[str, Any]:
        """Returns the arrays that the step takes, from a loader's batch.

        Args:
          raw: The loader's batch.
          first_row: The place of its first row in the global batch.
        """
        rows = first_row + np.arange(len(raw["image"]), dtype=np.int32)
        return {"image": raw["image"], "row": rows}

    def example_batch(self, cached: bool = False) -> dict[str, Any]:
        """Returns a `host_batch` of one row, made without data.

        Args:
          cached: As it comes from a latent cache instead of pictures.
        """
        if cached:
            self.cache()
        return self.host_batch(
            {"image": np.zeros((1, *self.config.data.size, 3), np.uint8), "caption": [""]}
        )

    def cache(self, dtype: str = "float16") -> Cache:
        """Returns what a latent cache of this task holds; ConfigError where it cannot have one."""
        raise ConfigError(
            f"task {self.config.task!r} trains on pictures, not on latents: leave data.cache empty"
        )

    # ---------------------------------------------------------------------------------- watching

    def problem(self, metrics: Mapping[str, float]) -> str:
        """Says why a step's `watched` metrics mean that training diverged; "" where they do not."""
        return not_finite(metrics, "loss", "grad_norm")

    def is_suspect(self, metrics: Mapping[str, float]) -> bool:
        """Whether a step is close to a `problem` and must not be saved."""
        return False

    def warning(self, metrics: Mapping[str, float]) -> str:
        """Returns a warning for the log, shown once until it clears; "" for none."""
        return ""

    @property
    def max_rollbacks(self) -> int:
        """How often a diverged run may return to its last checkpoint."""
        return 0

    def rollbacks(self, state: TrainState) -> int:
        """Returns how often the run of this state has returned to a checkpoint."""
        return 0

    def recover(self, state: TrainState, rollbacks: int) -> TrainState:
        """Returns a checkpoint's state to continue from after ``rollbacks`` rollbacks."""
        return state

    # ----------------------------------------------------------------------------------- results

    def preview(self, weights: Any, frozen: Any, raw: dict[str, Any]) -> np.ndarray:
        """Returns a picture uint8 [H, W, 3] of the progress, from a held-out loader's batch."""
        raise NotImplementedError

    def sampling_model(self) -> Any:
        """Returns the `LatentDiffusion` that is trained; None for a task without one."""
        return None

    def export(self, weights: Any) -> tuple[dict[str, Any], Any]:
        """Returns (config, params) of the model directory."""
        raise NotImplementedError


def not_finite(metrics: Mapping[str, float], loss: str, norm: str, owner: str = "") -> str:
    """Says that a loss or the norm of its gradient is not finite; "" where both are, or none is."""
    if loss not in metrics or np.isfinite([metrics[loss], metrics[norm]]).all():
        return ""
    return f"the {owner}loss is {metrics[loss]} and its gradient's norm {metrics[norm]}"


def check_choices(config: Any, choices: Mapping[str, Iterable[str]]) -> None:
    """Raises ConfigError for a setting ("loss.kind") that is not among its choices."""
    settings = flatten(plain(config))
    for name, known in choices.items():
        if settings[name] not in known:
            value = settings[name]
            raise ConfigError(f"{name} {value!r} does not exist{did_you_mean(value, known)}")


def plain(config: Any) -> dict[str, Any]:
    """Returns a ConfigDict as the plain dict that its JSON gives."""
    return json.loads(config.to_json_best_effort())


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as {"a.b.c": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def preview_rows(*kinds: np.ndarray | None, columns: int = 8) -> list[np.ndarray]:
    """Arranges pictures of several kinds for a preview.

    Args:
      *kinds: uint8 [n, H, W, 3] each; None is left out.
      columns: Pictures in a row.

    Returns:
      Rows of pictures, the kinds of the same pictures one above the other.
    """
    given = [kind for kind in kinds if kind is not None]
    starts = range(0, len(given[0]) if given else 0, columns)
    return [kind[i : i + columns] for i in starts for kind in given]


def check_cacheable(config: Any, conditioner: Any) -> None:
    """Raises ConfigError where a latent cache cannot hold pictures or conditions of a config."""
    if config.data.crop == "random":
        raise ConfigError(
            "data.crop='random' makes a new picture each time: "
            "a latent cache needs 'center' or 'none'"
        )
    if not conditioner.cached:
        raise ConfigError(
            "a latent cache holds captions, classes and vectors only: leave data.cache empty, "
            "this condition is made of the pictures"
        )
