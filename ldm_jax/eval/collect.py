"""One pass over a set of pictures: features of each, over devices and hosts, resumable."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from ldm_jax.errors import EvaluationError
from ldm_jax.eval.metrics import RunningMoments
from ldm_jax.eval.pictures import Images, Pictures
from ldm_jax.io.atomic import atomic_path, write_atomic


class Measure(Protocol):
    """What is computed of each picture."""

    def __call__(self, images: Images, start: int, /) -> dict[str, np.ndarray]:
        """Arrays [n, ...] by name, of the pictures from ``start`` on."""
        ...


class Collected:
    """The measures of a set of pictures. The methods are collective: every process calls them.

    Args:
      rows: This process's arrays [n, ...] by name.
      index: int64 [n], the places of its pictures in the set.
    """

    def __init__(self, rows: Mapping[str, np.ndarray], index: np.ndarray):
        self._rows, self._index = dict(rows), index
        self._whole: dict[str, np.ndarray] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> np.ndarray:
        """A measure of all pictures, in the set's order."""
        if name not in self._whole:
            parts = _all_processes({"index": self._index, "rows": self._rows[name]})
            index = np.concatenate([part["index"] for part in parts])
            rows = np.concatenate([part["rows"] for part in parts])
            self._whole[name] = rows[np.argsort(index, kind="stable")]
        return self._whole[name]

    def moments(self, name: str) -> RunningMoments:
        """Mean and covariance of a measure; processes exchange moments only, not the rows."""
        rows = self._rows[name]
        own = RunningMoments(rows.shape[1])
        for start in range(0, len(rows), 4096):
            own.update(rows[start : start + 4096])
        total = RunningMoments(rows.shape[1])
        state = {"count": np.array([own.count]), "mean": own.mean, "scatter": own.scatter}
        for part in _all_processes(state):
            other = RunningMoments(len(own.mean))
            other.count, other.mean = int(part["count"][0]), part["mean"]
            other.scatter = part["scatter"]
            total.merge(other)
        return total

    def pixels_hash(self) -> str:
        """SHA-256 over the pixels of all pictures in order, whatever they were encoded in."""
        return hashlib.sha256(self["digest"].tobytes()).hexdigest()

    def sizes(self) -> str:
        """The size of the pictures, or the range of them."""
        shapes = sorted(f"{h}x{w}" for h, w in {tuple(shape) for shape in self["shape"]})
        return shapes[0] if len(shapes) == 1 else f"{len(shapes)} sizes"


def collect(
    pictures: Pictures,
    measures: Mapping[str, Measure],
    *,
    batch: int = 64,
    folder: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    title: str = "pictures",
    progress: bool = True,
) -> Collected:
    """Reads all pictures once and measures them; the arrays are named "measure/name".

    Args:
      pictures: The set.
      measures: By name.
      batch: Pictures at a time. Batches are dealt out to the processes in turn.
      folder: Where each batch's result is kept, so that a stopped run resumes; None keeps none.
      identity: What the results depend on: a folder of another identity is refused.
      title: The name in the progress bar.
      progress: Show a progress bar in the first process.
    """
    if folder is not None:
        _check_identity(folder, {"batch": batch, "count": pictures.count, **(identity or {})})
    starts = range(0, pictures.count, batch)
    if len(starts) < jax.process_count():
        raise EvaluationError(
            f"{pictures.count} pictures in batches of {batch} are too few for "
            f"{jax.process_count()} processes: lower --batch"
        )
    mine = starts[jax.process_index() :: jax.process_count()]
    parts = []
    hidden = not progress or jax.process_index() > 0
    with tqdm(total=pictures.count, desc=title, unit="picture", disable=hidden) as bar:
        for start in mine:
            stop = min(start + batch, pictures.count)
            file = None if folder is None else folder / f"rows_{start:09d}.npz"
            if file is not None and file.is_file():
                with np.load(file) as stored:
                    part = dict(stored)
            else:
                part = _measure(pictures, measures, start, stop)
                if file is not None:
                    with atomic_path(file) as temporary:
                        np.savez(temporary, **part)  # pyright: ignore[reportArgumentType]
            parts.append(part)
            bar.update((stop - start) * jax.process_count())
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Collected(rows, rows.pop("index"))


def _measure(
    pictures: Pictures, measures: Mapping[str, Measure], start: int, stop: int
) -> dict[str, np.ndarray]:
    images = pictures.read(start, stop)
    digests = [hashlib.sha256(f"{i.shape}".encode() + i.tobytes()).digest() for i in images]
    part = {
        "index": np.arange(start, stop, dtype=np.int64),
        "digest": np.frombuffer(b"".join(digests), np.uint8).reshape(len(images), 32),
        "shape": np.array([image.shape[:2] for image in images], np.int64),
    }
    for name, measure in measures.items():
        part |= {f"{name}/{key}": value for key, value in measure(images, start).items()}
    return part


def _check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    text, note = json.dumps(identity, indent=1, sort_keys=True) + "\n", folder / "identity.json"
    folder.mkdir(parents=True, exist_ok=True)
    if note.is_file() and note.read_text() != text:
        raise EvaluationError(f"{folder} holds another evaluation: give another --out")
    if not note.is_file() and jax.process_index() == 0:
        write_atomic(note, text)


def _all_processes(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The arrays of every process; they may differ in their first dimension only."""
    if jax.process_count() == 1:
        return [dict(arrays)]
    from jax.experimental import multihost_utils

    counts = multihost_utils.process_allgather(
        np.array([len(a) for a in arrays.values()], np.int32)
    )
    parts: list[dict[str, np.ndarray]] = [{} for _ in counts]
    for k, (name, array) in enumerate(arrays.items()):
        padded = np.zeros((counts[:, k].max(), *array.shape[1:]), array.dtype)
        padded[: len(array)] = array
        # As bytes: JAX would round float64 and int64 to 32 bits.
        shared = multihost_utils.process_allgather(np.ascontiguousarray(padded).view(np.uint8))
        for part, row, count in zip(parts, np.asarray(shared), counts[:, k], strict=True):
            part[name] = np.ascontiguousarray(row).view(array.dtype)[:count]
    return parts
