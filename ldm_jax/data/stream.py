"""Batches as a deterministic stream, addressed by the global step: what the loaders of pictures and of latents share."""

import atexit
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from ldm_jax.errors import DataError

_ENDLESS = 2**48  # steps: Grain needs a length

# Purposes of random numbers: one stream each, so that none repeats another.
_STREAM_ORDER, _STREAM_SAMPLE = 0, 1

_OPEN: weakref.WeakSet[Generator[dict[str, Any], None, None]] = (
    weakref.WeakSet()
)  # streams that have workers


class Stream:
    """Reads batches with Grain; the base of the loaders.

    Batch ``k`` depends only on the arguments and on ``k``: not on the number of workers or threads, nor on where
    the iteration started. Every epoch is another permutation of all samples; a batch may straddle two epochs, and
    data shorter than a batch repeat inside it. With several processes each gets its rows of the same global batch.

    Args:
      make: ``make(**options) -> Batches`` with the options of `Batches` that are not given here.
      path: what the data are called in messages.
      count: samples in the data.
      batch_size: rows per global batch, over all processes.
      seed: of the order and of what a sample draws.
      shuffle: False keeps the data's order in every epoch.
      num_workers: processes that read; 0 uses threads of this process. With workers, a script needs the usual
        ``if __name__ == "__main__":``.
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
        make: Callable[..., "Batches"],
        *,
        path: str,
        count: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        read_threads: int = 2,
        prefetch: int = 4,
        process_index: int = 0,
        process_count: int = 1,
        drop_remainder: bool = False,
    ):
        if count == 0:
            raise DataError(f"{path}: there is nothing in it")
        if batch_size < 1 or batch_size % process_count:
            raise DataError(
                f"batch_size {batch_size} must be a positive multiple of the {process_count} processes"
            )
        if not 0 <= process_index < process_count:
            raise DataError(f"process_index {process_index} must lie in [0, {process_count})")
        if seed < 0:
            raise DataError(f"seed is {seed}: give 0 or a positive number")
        self.count, self.batch_size, self.drop_remainder = count, batch_size, drop_remainder
        self._make = make
        self._workers = {
            "num_workers": num_workers,
            "read_threads": read_threads,
            "prefetch": prefetch,
        }
        self._options: dict[str, Any] = {
            "count": count,
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
            "process_index": process_index,
            "process_count": process_count,
        }

    def iterate(self, start_step: int = 0) -> Generator[dict[str, Any], None, None]:
        """The endless stream of training batches from ``start_step`` on.

        Close it, or use ``contextlib.closing``, to end the workers; it also closes when garbage collected.

        Raises:
          DataError: nothing can be read, or the settings do not fit the data.
        """
        return self._open(self._make(**self._options, first=start_step, length=_ENDLESS))

    def batches(
        self, n: int | None = None, start: int = 0
    ) -> Generator[dict[str, Any], None, None]:
        """One pass in the data's order, without shuffling or augmentation, for validation.

        Yields:
          Batches as ``iterate`` does, with "valid" bool [B]: False for the rows that fill up the last batch and for
          stand-ins of what cannot be read. At most ``n`` batches, from batch ``start`` on; the same number in every
          process.
        """
        count = (
            self.count // self.batch_size
            if self.drop_remainder
            else -(-self.count // self.batch_size)
        )
        count = max(0, count - start) if n is None else max(0, min(n, count - start))
        options = self._options | {"shuffle": False}
        return self._open(self._make(**options, first=start, length=count, finite=True))

    def note(self, batch: dict[str, Any]) -> None:
        """Takes out of a batch what is for the loader alone."""

    def _open(self, batches: "Batches") -> Generator[dict[str, Any], None, None]:
        stream = self._run(batches)
        if self._workers["num_workers"] > 0:
            _OPEN.add(stream)
        return stream

    def _run(self, batches: "Batches") -> Generator[dict[str, Any], None, None]:
        iterator = _grain_iterator(batches, **self._workers)
        try:
            for batch in iterator:
                self.note(batch)
                # Workers hand over shared memory, which is gone with the array: a plain copy is safe to keep.
                yield {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
        finally:
            iterator.close()
            del iterator
            if self._workers["num_workers"] > 0:
                gc.collect()  # batches not consumed hang in reference cycles, and hold shared memory


def _grain_iterator(
    batches: "Batches", *, num_workers: int, read_threads: int, prefetch: int
) -> Any:
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
        atexit.unregister(
            _close_open
        )  # once only, and after Grain's own hooks: the last registered runs first
        atexit.register(_close_open)
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        )
    return iter(dataset)


def _close_open() -> None:
    """Ends streams still open when Python exits, while Grain can still free its shared memory."""
    for stream in list(_OPEN):
        with contextlib.suppress(ValueError):  # another thread is inside it
            stream.close()


class Batches:
    """Random access over the batches of one process: Grain's data source. Picklable.

    Subclasses say what a sample is (`sample`) and how samples make a batch (`collate`).
    """

    def __init__(
        self,
        *,
        count: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        process_index: int,
        process_count: int,
        first: int,
        length: int,
        finite: bool = False,
    ):
        if first < 0:
            raise DataError(f"the first step is {first}: give 0 or a positive number")
        self._count, self._seed, self._shuffle = count, seed, shuffle
        self._batch_size, self._rows = batch_size, batch_size // process_count
        self._offset = process_index * self._rows
        self._first, self._length, self.finite = first, length, finite
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def sample(self, wanted: int, rng: np.random.Generator) -> dict[str, Any]:
        """The sample at place ``wanted`` of the data; ``rng`` is its own. Where it is another one's stand-in, "valid" is False."""
        raise NotImplementedError

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples -> a batch."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_orders": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = (self._first + int(index)) * self._batch_size + self._offset
        samples = [self._numbered(number) for number in range(start, start + self._rows)]
        batch = self.collate(samples)
        return (
            batch | {"valid": np.array([s["valid"] for s in samples], bool)}
            if self.finite
            else batch
        )

    def _numbered(self, number: int) -> dict[str, Any]:
        """The sample with a global number, counted over all epochs and processes."""
        epoch, place = divmod(number, self._count)
        wanted = int(self._order(epoch)[place]) if self._shuffle else place
        sample = self.sample(wanted, np.random.default_rng([self._seed, _STREAM_SAMPLE, number]))
        return sample | {"valid": epoch == 0 and sample["valid"]}

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._orders:
                rng = np.random.default_rng([self._seed, _STREAM_ORDER, epoch])
                # Two epochs are in use around a border; a batch longer than the data walks through several.
                self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) <= 1}
                self._orders[epoch] = rng.permutation(self._count).astype(np.int64)
            return self._orders[epoch]
