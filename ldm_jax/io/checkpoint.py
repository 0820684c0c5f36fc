"""Model directories and training checkpoints, both written by Orbax.

A model directory describes itself: ``config.json`` says what the model is, ``params/`` has its
arrays. Nothing else is needed to load it.
"""

import contextlib
import inspect
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.distributed.processes import barrier, is_first
from ldm_jax.errors import CheckpointError, StorageError, did_you_mean
from ldm_jax.io import orbax_s3
from ldm_jax.io.paths import (
    absolute_path,
    as_path,
    check_writable,
    describe_problem,
    exists,
    is_bucket,
    local_copy,
    move_tree,
    remove_tree,
    storage_problem,
)
from ldm_jax.io.resources import reason, release_memory

FORMAT = 1
ALIGNMENT = 64  # bytes; JAX copies arrays at other addresses
PACKAGE = Path(__file__).parent.parent
ASSETS = PACKAGE / "assets"


def find_model(name: str | Path) -> Path:
    """Finds a model by name.

    Args:
      name: The path of a model directory or a checkpoint, a "pkg:..." path inside the package, or
        the name of a model that ships with it. An existing path has precedence. A model in a bucket
        is copied to this machine.
    """
    if is_bucket(name):
        return local_copy(name)
    if str(name).startswith("pkg:"):
        name = PACKAGE / str(name)[4:]
    if Path(name).exists():
        return Path(name)
    shipped = sorted(path.parent.name for path in ASSETS.glob("*/config.json"))
    if str(name) not in shipped:
        raise CheckpointError(
            f"model {str(name)!r} is neither a path nor a model that ships with ldm_jax"
            f"{did_you_mean(name, shipped)}"
        )
    return ASSETS / str(name)


# ---------------------------------------------------------------------------- model directories


def save_model(
    path: str | Path, config: dict[str, Any], params: Any, dtype: str | None = "float32"
) -> None:
    """Writes a model directory, whole or not at all.

    Args:
      path: A new or empty folder; else CheckpointError.
      config: Of ``config.json``.
      params: The arrays.
      dtype: Type of the stored floating-point arrays; None keeps theirs.
    """
    path = absolute_path(path)
    ocp = _orbax(path)
    if path.exists() and any(path.iterdir()):
        raise CheckpointError(f"{path} is not empty; give a new folder or remove it first")
    # Written beside its place and renamed, so that a killed run leaves no incomplete model. All
    # processes write to the same temporary folder. In a bucket nothing is renamed: a model is
    # whole when its config.json is there, which comes last.
    in_bucket = is_bucket(path)
    partial = path if in_bucket else path.with_name(f".{path.name}.partial")
    first = is_first()
    if first and in_bucket:
        check_writable(path)
    elif first:
        remove_tree(partial)
        partial.mkdir(parents=True)
    barrier("model folder")
    if dtype is not None:
        params = jax.tree.map(
            lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, params
        )
    # By default Orbax copies a host's arrays, to save in the background, and buffers files of
    # 2 GiB: a large model would be in memory three times.
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, handlers.ArrayHandler()),
    )
    args = ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=64 << 20)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with drop_late_errors(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(partial / "params", args=args)
    if first:
        text = json.dumps({"format": FORMAT, **config}, indent=1) + "\n"
        (partial / "config.json").write_text(text)
        if not in_bucket:
            os.replace(partial, path)
    barrier("model written")


def load_model(path: str | Path) -> tuple[dict[str, Any], Any]:
    """Reads a model directory.

    Returns:
      (config, params), params as numpy arrays of the stored types.

    Raises:
      CheckpointError: The folder is no model directory, or is damaged.
    """
    path = absolute_path(path)
    config, ocp = read_config(path), _orbax(path)
    if not (path / "params").is_dir():
        raise CheckpointError(
            f"{path} has a config.json but no params folder; copy the model directory whole"
        )
    try:
        with drop_late_errors(), ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path / "params").item_metadata
        if metadata is None:
            raise ValueError("its list of arrays cannot be read")
        return config, _read_in_groups(ocp, path / "params", metadata.tree)
    except Exception as error:  # of many kinds, from Orbax and its storage
        if reason(error) == "memory":
            raise
        _refuse(error, path)
        raise CheckpointError(
            f"{path / 'params'} cannot be read (damaged or incomplete?): {first_line(error)}"
        ) from None


def _read_in_groups(ocp: Any, path: Any, tree: Any, most: int = 2**30) -> Any:
    """Reads a tree of arrays, about ``most`` bytes at a time, as aligned numpy arrays.

    Orbax holds what it reads at the same time more than once, and the C library keeps it.
    """
    leaves, structure = jax.tree.flatten(tree)
    groups, room = [[]], most
    for i, leaf in enumerate(leaves):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if groups[-1] and size > room:
            groups.append([])
            room = most
        groups[-1].append(i)
        room -= size
    read: list[Any] = [None] * len(leaves)
    with drop_late_errors(), ocp.PyTreeCheckpointer() as checkpointer:
        for group in groups:
            # What is `ocp.PLACEHOLDER` is not read.
            wanted = [leaf if i in group else ocp.PLACEHOLDER for i, leaf in enumerate(leaves)]
            item = structure.unflatten(wanted)
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            found = jax.tree.leaves(checkpointer.restore(path, item, restore_args=as_numpy))
            for i in group:
                read[i], found[i] = aligned(found[i]), None
            del found
            release_memory()
    return structure.unflatten(read)


def aligned(array: np.ndarray, dtype: Any = None) -> np.ndarray:
    """Returns an array in a type, where `jax.device_put` takes it to a CPU without a copy."""
    dtype = np.dtype(dtype or array.dtype)
    if array.dtype == dtype and not array.ctypes.data % ALIGNMENT and array.flags.c_contiguous:
        return array
    size = array.size * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    out = memory[start : start + size].view(dtype).reshape(array.shape)
    out[...] = array
    return out


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads the ``config.json`` of a model directory."""
    file = as_path(path) / "config.json"
    if not exists(file) or not file.is_file():
        raise CheckpointError(f"{path} is no model directory: it has no config.json")
    try:
        config = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    version = config.get("format") if isinstance(config, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"{file}: format {version!r} is not {FORMAT}; use a newer ldm_jax")
    return config


def _refuse(error: Exception, path: Path) -> None:
    """Raises StorageError where a bucket has refused to be read."""
    if is_bucket(path) and (problem := storage_problem(error)) not in (None, "missing"):
        raise StorageError(describe_problem(problem, path)) from None


def _orbax(path: str | Path) -> Any:
    """Returns the package, which can use ``path``."""
    import orbax.checkpoint as ocp

    if str(path).startswith(orbax_s3.S3):
        orbax_s3.enable()
    return ocp


# ------------------------------------------------------------------------- training checkpoints


class TrainingCheckpoints:
    """The checkpoints of a run, one per step: the arrays of a state, and a JSON object.

    Writing is asynchronous and atomic: a killed run finds its last complete step. A save waits up
    to ``patience`` seconds to be complete: with short steps the next save could be due before, and
    a run that is killed then would lose all steps between two saves, and again after it resumes.

    Args:
      workdir: The run folder; the checkpoints are in ``workdir/checkpoints``.
      keep: The number of newest steps to keep.
      restore_step: Resume from this step; later ones are moved to a folder beside.
      options: Of `orbax.checkpoint.CheckpointManagerOptions`.
    """

    patience = 5.0
    folder = "checkpoints"

    def __init__(
        self, workdir: str | Path, keep: int = 3, *, restore_step: int | None = None, **options: Any
    ):
        self.path = absolute_path(workdir) / self.folder
        self._ocp = ocp = _orbax(self.path)
        if restore_step is not None:
            self._set_aside(restore_step, self.steps_in(workdir))
        # Without the limit all that is read is in memory beside what is made of it.
        handlers = {
            "state": ocp.StandardCheckpointHandler(restore_concurrent_gb=1),
            "info": ocp.JsonCheckpointHandler(),
        }
        manager_options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, **options)
        try:
            self._manager = ocp.CheckpointManager(
                self.path, options=manager_options, item_handlers=handlers
            )
        except ValueError as error:  # a damaged file beside the arrays
            raise CheckpointError(f"{self.path} cannot be read: {first_line(error)}") from None

    @classmethod
    def steps_in(cls, workdir: str | Path) -> list[int]:
        """Returns the saved steps of a run folder."""
        folder = as_path(workdir) / cls.folder
        names = (path.name for path in folder.glob("*"))
        steps = sorted(int(name) for name in names if name.isdigit())
        if is_bucket(folder):  # a step that a killed run has begun lacks its commit file
            ocp = _orbax(folder)
            steps = [s for s in steps if ocp.utils.is_checkpoint_finalized(folder / str(s))]
        return steps

    def _set_aside(self, step: int, steps: list[int]) -> None:
        if step not in steps:
            raise CheckpointError(
                f"{self.path} has no checkpoint of step {step}{did_you_mean(step, steps)}"
            )
        aside = self.path.with_name(f"{self.path.name}_after_{step}")
        if is_first():
            for later in (later for later in steps if later > step):
                aside.mkdir(exist_ok=True)
                remove_tree(aside / str(later))
                move_tree(self.path / str(later), aside / str(later))
        barrier("later checkpoints")

    def latest(self) -> int | None:
        """Returns the newest complete step, or None; waits for one that is being written."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def save(
        self, step: int, state: Any, info: dict[str, Any], metrics: dict[str, float] | None = None
    ) -> None:
        """Saves a step, in the background after `patience`; an existing step is kept."""
        if step in self._manager.all_steps():
            return
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state), info=self._ocp.args.JsonSave(info)
        )
        self._manager.save(step, args=args, metrics=metrics, force=True)
        until = time.monotonic() + self.patience
        while self._manager.is_saving_in_progress() and time.monotonic() < until:
            time.sleep(0.005)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a step.

        Args:
          step: The step.
          like: A state, or its shapes with shardings: the arrays are placed as these are.

        Returns:
          (state, JSON object).

        Raises:
          CheckpointError: The step is damaged, or of a state with other arrays.
        """
        try:
            return self._read(step, like)
        except CheckpointError as error:
            whole = self._newest_whole(step, like)
            if whole is None:
                raise
            raise CheckpointError(
                f"{error}; the checkpoint of step {whole} is whole: "
                f"resume from it with --restore_step={whole}"
            ) from None

    def _newest_whole(self, step: int, like: Any) -> int | None:
        """Returns the newest readable step before ``step``."""
        for older in sorted((s for s in self._manager.all_steps() if s < step), reverse=True):
            with contextlib.suppress(CheckpointError):
                self._read(older, like)
                return older
        return None

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        self._check_names(step, like)
        args = self._ocp.args
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, like)
        items = args.Composite(state=args.StandardRestore(abstract), info=args.JsonRestore())
        try:
            with drop_late_errors():
                restored = self._manager.restore(step, args=items)
            return restored["state"], restored["info"]
        except Exception as error:  # of many kinds, from Orbax and its storage
            _refuse(error, self.path)
            raise CheckpointError(
                f"{self.path / str(step)} is damaged or incomplete: {first_line(error)}"
            ) from None

    def _check_names(self, step: int, like: Any) -> None:
        """Raises CheckpointError that says how the arrays of a step differ from ``like``."""
        tree = self._ocp.tree
        try:
            kept = self._manager.item_metadata(step)["state"].tree
        except Exception:  # damaged: reading it says how
            return
        there, here = (
            {
                "/".join(k): tuple(v.shape)
                for k, v in tree.to_flat_dict(part).items()
                if hasattr(v, "shape")
            }
            for part in (kept, tree.serialize_tree(like, keep_empty_nodes=True))
        )
        reshaped = [k for k in here if k in there and here[k] != there[k]]
        differing = {
            "lacks": [k for k in here if k not in there],
            "has in addition": [k for k in there if k not in here],
            "has in another shape": [f"{k} {there[k]}, not {here[k]}" for k in reshaped],
        }
        texts = [
            f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for what, names in differing.items()
            if names
        ]
        if texts:
            raise CheckpointError(
                f"{self.path / str(step)} was written by another version: of the state's arrays "
                f"it {'; it '.join(texts)}. Resume with the version that wrote it, or start in "
                "another --workdir"
            )

    def close(self) -> None:
        """Waits for what is being written."""
        try:
            self._manager.wait_until_finished()
        finally:
            self._manager.close()


class BestCheckpoints(TrainingCheckpoints):
    """The best validations of a run, in ``workdir/best``, written as the other checkpoints are.

    Each has the validated weights (averaged parameters, an averaged codebook), from which no run
    can resume, and all means, so that a resumed run may choose another metric.

    Args:
      workdir: The run folder.
      keep: The number of steps to keep.
      metric: Which of the means is compared.
      mode: "max" or "min": which value is the best.
    """

    folder = "best"

    def __init__(self, workdir: str | Path, keep: int, metric: str, mode: str):
        self.keep, self.metric, self._sign = keep, metric, 1.0 if mode == "max" else -1.0
        super().__init__(workdir, keep, best_fn=self._score, best_mode="max")

    def _score(self, means: dict[str, float]) -> float:
        """Returns the metric, higher is better; what is not finite is worst."""
        score = self._sign * means.get(self.metric, math.nan)
        return score if math.isfinite(score) else -math.inf

    def best(self) -> int | None:
        """Returns the best step, or None; waits for one that is being written."""
        self._manager.wait_until_finished()
        return self._manager.best_step()

    def offer(self, step: int, weights: Any, info: dict[str, Any], means: dict[str, float]) -> bool:
        """Saves a validated step if it is among the best; an existing step is kept.

        Returns:
          Whether it is the best of all. Of two that are equal the earlier one is better.
        """
        self._manager.wait_until_finished()
        steps, score = self._manager.all_steps(), self._score(means)
        others = [self._score(self._manager.metrics(other) or {}) for other in steps]
        better = sum(other >= score for other in others)
        if step in steps or score == -math.inf or better >= self.keep:
            return False
        self.save(step, weights, info, means)
        return score > max(others, default=-math.inf)


# --------------------------------------------------------------------------- errors of libraries


@contextlib.contextmanager
def drop_late_errors() -> Iterator[None]:
    """Silences the reads that end after another one has failed.

    Orbax reads arrays in parallel. When one fails, the threads and tasks of the others print
    tracebacks at times of their own, so that the filter stays after an error.
    """
    shown, log = sys.unraisablehook, logging.getLogger("asyncio")
    level = log.level

    def hook(args: Any) -> None:
        late = inspect.iscoroutine(args.object) or str(args.exc_value) == "Event loop is closed"
        if not late:
            shown(args)

    sys.unraisablehook = hook
    log.setLevel(logging.CRITICAL)
    yield
    sys.unraisablehook = shown
    log.setLevel(level)


def first_line(error: BaseException) -> str:
    """Returns the first line of the message of an error's cause, at most 200 characters of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text.split(" See full TensorStore details")[0][:200]
