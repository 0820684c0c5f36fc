"""What is kept on disk, all of it through Orbax: training states, and model directories.

A model directory describes itself: ``config.json`` says what the model is, ``params/`` holds its arrays. Nothing else is needed to load it.
"""

import difflib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.distributed.parallel import barrier, is_first
from ldm_jax.errors import CheckpointError

FORMAT = 1
ASSETS = Path(__file__).parent.parent / "assets"


def find_model(name: str | Path) -> Path:
    """The model directory (or checkpoint) of a path, of a "pkg:..." path inside the package, or of the name of a model that ships with it.

    A path that exists goes first.
    """
    if str(name).startswith("pkg:"):
        name = ASSETS.parent / str(name)[4:]
    if Path(name).exists():
        return Path(name)
    shipped = sorted(path.parent.name for path in ASSETS.glob("*/config.json"))
    if str(name) not in shipped:
        near = difflib.get_close_matches(str(name), shipped, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f" ({', '.join(shipped)})"
        raise CheckpointError(
            f"model {str(name)!r} is no folder, no file and none that ships with ldm_jax{hint}"
        )
    return ASSETS / str(name)


def save_model(
    path: str | Path, config: dict[str, Any], params: Any, dtype: str | None = "float32"
) -> None:
    """Writes a model directory, whole or not at all; floating-point arrays are stored as ``dtype`` (None: as they are).

    CheckpointError if something is already there.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    if path.exists() and any(path.iterdir()):
        raise CheckpointError(f"{path} is not empty; give a new folder or remove it first")
    # Written beside its place and renamed, so that a killed run leaves no half of a model.
    partial = path.with_name(f".{path.name}.partial")
    first = is_first()
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier("model folder")
    if dtype is not None:
        params = jax.tree.map(
            lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, params
        )
    # Orbax would copy a host's arrays first, for the sake of saving in the background, and hold what it writes until a file of 2 GiB is full: a large
    # model would be in memory three times.
    handlers = ocp.type_handlers
    as_they_lie = handlers.create_type_handler_registry(
        (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, handlers.ArrayHandler()),
    )
    args = ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=64 << 20)
    with ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(type_handler_registry=as_they_lie)
    ) as checkpointer:
        checkpointer.save(partial / "params", args=args)
    if first:
        (partial / "config.json").write_text(
            json.dumps({"format": FORMAT, **config}, indent=1) + "\n"
        )
        os.replace(partial, path)
    barrier("model written")


def load_model(path: str | Path) -> tuple[dict[str, Any], Any]:
    """(config, params) of a model directory; params are numpy arrays as stored. CheckpointError where it is not one or is damaged."""
    path = Path(path).absolute()
    config = read_config(path)
    import orbax.checkpoint as ocp

    if not (path / "params").is_dir():
        raise CheckpointError(
            f"{path} has a config.json but no params folder; copy the model directory whole"
        )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path / "params").item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return config, checkpointer.restore(path / "params", restore_args=as_numpy)
    except Exception as error:  # whatever a damaged file makes Orbax or its storage raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path / 'params'} cannot be read (damaged or incomplete?): {reason[:200]}"
        ) from None


def read_config(path: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a model directory."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} is no model directory: it has no config.json")
    try:
        config = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(
            f"{file}: format {config.get('format') if isinstance(config, dict) else None!r} is not {FORMAT}; use a newer ldm_jax"
        )
    return config


class TrainingCheckpoints:
    """Checkpoints of a run under ``workdir/checkpoints``, one a step: the state's arrays, and a JSON object beside them.

    Writing is asynchronous and atomic: a killed run finds its last complete step. ``keep`` newest steps stay.

    What is written within ``patience`` seconds is waited for. Steps may be so quick that the next save is due before: a run that is killed then would
    lose what lies between two saves, and once more. Larger states go on being written while the run does.
    """

    patience = 5.0

    folder = "checkpoints"

    def __init__(self, workdir: str | Path, keep: int = 3, **options: Any):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.path = Path(workdir).absolute() / self.folder
        # Else all that is read is in memory beside what is made of it.
        handlers = {
            "state": ocp.StandardCheckpointHandler(restore_concurrent_gb=1),
            "info": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, **options),
            item_handlers=handlers,
        )

    def latest(self) -> int | None:
        """The newest complete step, or None; waits for one that is being written."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def save(
        self, step: int, state: Any, info: dict[str, Any], metrics: dict[str, float] | None = None
    ) -> None:
        """Saves, in the background where that takes long; a step that is already there is left as it is."""
        if step not in self._manager.all_steps():
            args = self._ocp.args.Composite(
                state=self._ocp.args.StandardSave(state), info=self._ocp.args.JsonSave(info)
            )
            self._manager.save(step, args=args, metrics=metrics, force=True)
            until = time.monotonic() + self.patience
            while self._manager.is_saving_in_progress() and time.monotonic() < until:
                time.sleep(0.005)

    def info(self, step: int) -> dict[str, Any]:
        """The JSON object of a step."""
        return self._manager.restore(
            step, args=self._ocp.args.Composite(info=self._ocp.args.JsonRestore())
        )["info"]

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, placed as the arrays of ``like`` (or its ShapeDtypeStructs with shardings) are.

        CheckpointError where the step is damaged, or is a state of other arrays.
        """
        self._check(step, like)
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, like)
        args = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(abstract))
        try:
            return self._manager.restore(step, args=args)["state"]
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{self.path / str(step)} cannot be restored: {reason[:200]}"
            ) from None

    def _check(self, step: int, like: Any) -> None:
        """CheckpointError that says how the arrays of a step differ from those of ``like``."""
        tree = self._ocp.tree
        try:
            kept = self._manager.item_metadata(step)["state"].tree
        except Exception:  # damaged: reading it will say how
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
            "has beside them": [k for k in there if k not in here],
            "has in another shape": [f"{k} {there[k]}, not {here[k]}" for k in reshaped],
        }
        told = [
            f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for what, names in differing.items()
            if names
        ]
        if told:
            raise CheckpointError(
                f"{self.path / str(step)} was written by other code: of the state's arrays it {'; it '.join(told)}. "
                "Go on with the code that wrote it, or begin in another --workdir"
            )

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


class BestCheckpoints(TrainingCheckpoints):
    """The ``keep`` best of a run's validations under ``workdir/best``, one a step, written as the regular checkpoints are.

    Each holds what was validated (the averaged parameters, and an averaged codebook) and nothing to go on from; beside it all the means, so that a
    resumed run may ask for another ``metric``, the highest ("max") or lowest ("min") of which is the best.
    """

    folder = "best"

    def __init__(self, workdir: str | Path, keep: int, metric: str, mode: str):
        self.keep, self.metric, self._sign = keep, metric, 1.0 if mode == "max" else -1.0
        super().__init__(workdir, keep, best_fn=self._score, best_mode="max")

    def _score(self, means: dict[str, float]) -> float:
        """Higher is better; what is not finite is worst."""
        score = self._sign * means.get(self.metric, math.nan)
        return score if math.isfinite(score) else -math.inf

    def best(self) -> int | None:
        """The best step, or None; waits for one that is being written."""
        self._manager.wait_until_finished()
        return self._manager.best_step()

    def offer(self, step: int, weights: Any, info: dict[str, Any], means: dict[str, float]) -> bool:
        """Saves what was validated at ``step`` where it is among the best, and says whether it is the best of all.

        A step that is there already is left as it is; of two that are equal the earlier stays.
        """
        self._manager.wait_until_finished()
        there, score = self._manager.all_steps(), self._score(means)
        others = [self._score(self._manager.metrics(other) or {}) for other in there]
        if (
            step in there
            or score == -math.inf
            or sum(other >= score for other in others) >= self.keep
        ):
            return False
        self.save(step, weights, info, means)
        return score > max(others, default=-math.inf)
