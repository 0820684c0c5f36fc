"""Batches of pictures and captions as a deterministic stream, addressed by the global step."""

import atexit
import contextlib
import gc
import logging
import threading
import weakref
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from ldm_jax.data.sources import DataError, Source
from ldm_jax.data.transforms import UnreadablePicture, caption_template, to_rgb

_LOG = logging.getLogger(__name__)
_MAX_BROKEN_IN_A_ROW = 1000
_ENDLESS = 2**48  # steps: Grain needs a length
_RESERVED = ("image", "caption", "index", "valid")
_SKIPPED = "_skipped"

# Purposes of random numbers: one stream each, so that none repeats another.
_STREAM_ORDER, _STREAM_SAMPLE = 0, 1

_OPEN: weakref.WeakSet[Generator[dict[str, Any], None, None]] = weakref.WeakSet()  # streams that have workers

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Loader:
    """Reads batches of a source with Grain.

    Batch ``k`` depends only on the arguments and on ``k``: not on the number of workers or threads, nor on where
    the iteration started. Every epoch is another permutation of all pictures; a batch may straddle two epochs, and
    data shorter than a batch repeat inside it. With several processes each gets its rows of the same global batch.

    A picture that cannot be read is replaced by the next readable one in index order, so that positions stay exact;
    each such file is named once in a warning and in ``broken``.

    Args:
      source: see ``ldm_jax.data.sources``.
      transform: (uint8 [h, w, 3], generator) -> uint8 [H, W, 3], equal sizes for all pictures; ``ImageTransform``.
      batch_size: rows per global batch, over all processes.
      seed: of order, crops and flips.
      caption: template over the row's columns, see ``caption_template``; None gives "".
      columns: further metadata columns to put into the batches, as lists.
      shuffle: False keeps the source's order in every epoch.
      num_workers: processes that read and decode; 0 uses threads of this process. With workers, a script needs
        the usual ``if __name__ == "__main__":``.
      read_threads: threads per process that prepare one batch each.
      prefetch: batches to prepare ahead, per process.
      process_index: this process' place among ``process_count``.
      process_count: processes that share each global batch, ``batch_size / process_count`` rows each.
      drop_remainder: leave out the last partial batch of ``batches``.

    Raises:
      DataError: an argument does not fit.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        seed: int = 0,
        caption: str | None = "{text}",
        columns: Sequence[str] = (),
        shuffle: bool = True,
        num_workers: int = 0,
        read_threads: int = 2,
        prefetch: int = 4,
        process_index: int = 0,
        process_count: int = 1,
        drop_remainder: bool = False,
    ):
        if len(source) == 0:
            raise DataError(f"{source.path}: the source has no pictures")
        if batch_size < 1 or batch_size % process_count:
            raise DataError(f"batch_size {batch_size} must be a positive multiple of the {process_count} processes")
        if not 0 <= process_index < process_count:
            raise DataError(f"process_index {process_index} must lie in [0, {process_count})")
        if seed < 0:
            raise DataError(f"seed is {seed}: give 0 or a positive number")
        for column in columns:
            if column in _RESERVED:
                raise DataError(f"column {column!r} cannot be asked for: batches use that name themselves")
        self.source, self.batch_size, self.drop_remainder = source, batch_size, drop_remainder
        self.broken: dict[str, str] = {}
        self._workers = {"num_workers": num_workers, "read_threads": read_threads, "prefetch": prefetch}
        self._spec: dict[str, Any] = {
            "source": source,
            "transform": transform,
            "batch_size": batch_size,
            "seed": seed,
            "caption": caption,
            "columns": tuple(columns),
            "shuffle": shuffle,
            "process_index": process_index,
            "process_count": process_count,
        }

    def iterate(self, start_step: int = 0) -> Generator[dict[str, Any], None, None]:
        """The endless stream of training batches from ``start_step`` on.

        Close it, or use ``contextlib.closing``, to end the workers; it also closes when garbage collected.

        Yields:
          "image" uint8 [B, H, W, 3], "caption" list of B str, "index" int64 [B] (the pictures' places in the
          source), and each requested column as a list of B values; B = batch_size / process_count.

        Raises:
          DataError: no picture can be read, or the caption or a column does not fit the rows.
        """
        return self._open(_Batches(**self._spec, first=start_step, length=_ENDLESS))

    def batches(self, n: int | None = None) -> Generator[dict[str, Any], None, None]:
        """One pass in the source's order, without shuffling or augmentation, for validation.

        Yields:
          Batches as ``iterate`` does, with "valid" bool [B]: False for the rows that fill up the last batch and for
          stand-ins of unreadable pictures. At most ``n`` batches; the same number in every process.
        """
        count = len(self.source) // self.batch_size if self.drop_remainder else -(-len(self.source) // self.batch_size)
        count = count if n is None else min(n, count)
        deterministic = getattr(self._spec["transform"], "deterministic", None)
        spec = dict(self._spec, shuffle=False)
        if deterministic is not None:
            spec["transform"] = deterministic()
        return self._open(_Batches(**spec, first=0, length=count, finite=True))

    def _open(self, batches: "_Batches") -> Generator[dict[str, Any], None, None]:
        stream = self._run(batches)
        if self._workers["num_workers"] > 0:
            _OPEN.add(stream)
        return stream

    def _run(self, batches: "_Batches") -> Generator[dict[str, Any], None, None]:
        iterator = _grain_iterator(batches, **self._workers)
        try:
            for batch in iterator:
                for name, why in batch.pop(_SKIPPED):
                    self._note_broken(name, why)
                # Workers hand over shared memory, which is gone with the array: a plain copy is safe to keep.
                yield {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
        finally:
            iterator.close()
            del iterator
            if self._workers["num_workers"] > 0:
                gc.collect()  # batches not consumed hang in reference cycles, and hold shared memory

    def _note_broken(self, name: str, why: str) -> None:
        if name not in self.broken:
            self.broken[name] = why
            _LOG.warning("skipped unreadable picture %s (%s): %d so far", name, why, len(self.broken))


def _grain_iterator(batches: "_Batches", *, num_workers: int, read_threads: int, prefetch: int) -> Any:
    import grain
    from absl import flags

    # Grain's workers read absl flags, which an ordinary script never parses; the defaults are what it wants.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    threads = max(1, min(read_threads, prefetch))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(1, prefetch))
    dataset: Any = grain.MapDataset.source(batches).to_iter_dataset(options)
    if num_workers > 0:
        # A dataset element is a whole batch, so that the workers' round robin keeps the order of batches.
        atexit.unregister(_close_open)  # once only, and after Grain's own hooks: the last registered runs first
        atexit.register(_close_open)
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2))
    return iter(dataset)


def _close_open() -> None:
    """Ends streams still open when Python exits, while Grain can still free its shared memory."""
    for stream in list(_OPEN):
        with contextlib.suppress(ValueError):  # another thread is inside it
            stream.close()


class _Batches:
    """Random access over the batches of one process: Grain's data source. Picklable."""

    def __init__(
        self,
        *,
        source: Source,
        transform: Transform,
        batch_size: int,
        seed: int,
        caption: str | None,
        columns: tuple[str, ...],
        shuffle: bool,
        process_index: int,
        process_count: int,
        first: int,
        length: int,
        finite: bool = False,
    ):
        if first < 0:
            raise DataError(f"the first step is {first}: give 0 or a positive number")
        self._source, self._transform, self._seed = source, transform, seed
        self._caption, self._columns, self._shuffle = caption, columns, shuffle
        self._batch_size, self._rows = batch_size, batch_size // process_count
        self._offset = process_index * self._rows
        self._first, self._length, self._finite = first, length, finite
        self._broken: dict[int, str] = {}
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_orders": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = (self._first + int(index)) * self._batch_size + self._offset
        return self._collate([self._sample(number) for number in range(start, start + self._rows)])

    def _collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "image": np.stack([s["image"] for s in samples]),
            "caption": [s["caption"] for s in samples],
            "index": np.array([s["index"] for s in samples], np.int64),
            _SKIPPED: [skip for s in samples for skip in s[_SKIPPED]],
        }
        if self._finite:
            batch["valid"] = np.array([s["valid"] for s in samples], bool)
        return batch | {column: [s["row"][column] for s in samples] for column in self._columns}

    def _sample(self, number: int) -> dict[str, Any]:
        """The sample with a global number, counted over all epochs and processes."""
        epoch, place = divmod(number, len(self._source))
        wanted = int(self._order(epoch)[place]) if self._shuffle else place
        index, row, skipped = self._readable(wanted)
        rng = np.random.default_rng([self._seed, _STREAM_SAMPLE, number])
        for column in self._columns:
            if column not in row:
                known = ", ".join(key for key in row if key != "image")
                raise DataError(f"{self._source.path}: there is no column {column!r}: there are {known}")
        return {
            "image": self._transform(row.pop("image"), rng),
            "caption": "" if self._caption is None else caption_template(self._caption, row),
            "index": index,
            "row": row,
            "valid": epoch == 0 and index == wanted,
            _SKIPPED: skipped,
        }

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._orders:
                rng = np.random.default_rng([self._seed, _STREAM_ORDER, epoch])
                # Two epochs are in use around a border; a batch longer than the data walks through several.
                self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) <= 1}
                self._orders[epoch] = rng.permutation(len(self._source)).astype(np.int64)
            return self._orders[epoch]

    def _readable(self, wanted: int) -> tuple[int, dict[str, Any], list[tuple[str, str]]]:
        skipped: list[tuple[str, str]] = []
        for index in self._candidates(wanted):
            if index not in self._broken:
                try:
                    row = self._source[index]
                    row["image"] = to_rgb(row["image"])
                    return index, row, skipped
                except DataError:
                    raise
                except (UnreadablePicture, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
                    self._broken[index] = " ".join(str(error).split()) or type(error).__name__
            skipped.append((self._source.name(index), self._broken[index]))
        name, why = skipped[0]
        raise DataError(f"no readable picture in {self._source.path} (tried {len(skipped)}; first: {name}: {why})")

    def _candidates(self, wanted: int) -> Iterator[int]:
        count = len(self._source)
        return ((wanted + i) % count for i in range(min(count, _MAX_BROKEN_IN_A_ROW)))
