"""Batches as a deterministic stream, addressed by the global step: the base of the loaders."""

import atexit
import contextlib
import gc
import threading
import weakref
from collections.abc import Generator
from typing import Any

import numpy as np

from ldm_jax.errors import DataError

_ENDLESS = 2**48  # steps: Grain needs a length

# Purposes of random numbers, each with a stream of its own.
_STREAM_ORDER, _STREAM_SAMPLE, _STREAM_TEXT = 0, 1, 2

# Streams that have worker processes.
_OPEN: weakref.WeakSet[Generator[dict[str, Any], None, None]] = weakref.WeakSet()


class Stream:
    """Reads batches with Grain.

    Batch ``k`` depends only on the arguments and on ``k``: not on the number of workers or threads,
    nor on where the iteration started. Every epoch is another permutation of all samples; a batch
    may straddle two epochs, and data shorter than a batch repeat inside it. With several processes
    each gets its rows of the same global batch.

    Args:
      path: Name of the data in messages.
      count: Number of samples.
      batch_size: Rows of a global batch, over all processes.
      seed: Seed of the order and of each sample's draws.
      window: Shuffle only inside windows of this many samples, for data that are read in order; 0
        shuffles all.
      shuffle: False keeps the data's order in every epoch.
      num_workers: Processes that read; 0 uses threads of this process. With workers, a script needs
        the usual ``if __name__ == "__main__":``.
      read_threads: Threads of each process that prepare one batch each.
      prefetch: Batches that each process prepares ahead.
      process_index: This process' place among ``process_count``.
      process_count: Processes that share each global batch, in equal parts.
      drop_remainder: Leave out the last partial batch of `batches`.

    Raises:
      DataError: An argument does not fit.
    """

    def __init__(
        self,
        *,
        path: str,
        count: int,
        batch_size: int,
        seed: int = 0,
        window: int = 0,
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
                f"batch_size {batch_size} must be a positive multiple of the "
                f"{process_count} processes"
            )
        if not 0 <= process_index < process_count:
            raise DataError(f"process_index {process_index} must lie in [0, {process_count})")
        if seed < 0:
            raise DataError(f"seed is {seed}: give 0 or a positive number")
        self.count, self.batch_size, self.drop_remainder = count, batch_size, drop_remainder
        self._workers = {
            "num_workers": num_workers,
            "read_threads": read_threads,
            "prefetch": prefetch,
        }
        self._options: dict[str, Any] = {
            "count": count,
            "batch_size": batch_size,
            "seed": seed,
            "window": window,
            "shuffle": shuffle,
            "process_index": process_index,
            "process_count": process_count,
        }

    def _make_batches(self, *, finite: bool, **options: Any) -> "Batches":
        """Builds the batches of a pass with the options of `Batches`."""
        raise NotImplementedError

    def _receive(self, batch: dict[str, Any]) -> None:
        """Takes out of a batch what is for the loader alone."""

    def iterate(self, start_step: int = 0) -> Generator[dict[str, Any], None, None]:
        """Returns the endless stream of training batches from ``start_step`` on.

        Close it, or use ``contextlib.closing``, to end the workers; garbage collection closes it,
        too.

        Raises:
          DataError: Nothing can be read, or the settings do not fit the data.
        """
        options = self._options | {"first": start_step, "length": _ENDLESS}
        return self._open(self._make_batches(finite=False, **options))

    def batches(
        self, n: int | None = None, start: int = 0
    ) -> Generator[dict[str, Any], None, None]:
        """Returns one pass in the data's order, without shuffling or draws, for validation.

        Yields:
          At most ``n`` batches from batch ``start`` on, as in `iterate`, with "valid" bool [B]:
          False for the rows that fill up the last batch and for replacements of what cannot be
          read. Every process gets the same number.
        """
        rest = 0 if self.drop_remainder else self.batch_size - 1
        left = max(0, (self.count + rest) // self.batch_size - start)
        length = left if n is None else max(0, min(n, left))
        options = self._options | {"shuffle": False, "first": start, "length": length}
        return self._open(self._make_batches(finite=True, **options))

    def _open(self, batches: "Batches") -> Generator[dict[str, Any], None, None]:
        stream = self._run(batches)
        if self._workers["num_workers"] > 0:
            _OPEN.add(stream)
        return stream

    def _run(self, batches: "Batches") -> Generator[dict[str, Any], None, None]:
        iterator = _grain_iterator(batches, **self._workers)
        try:
            for batch in iterator:
                self._receive(batch)
                # Workers hand over shared memory that is gone with the array: a copy is safe.
                yield {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
        finally:
            iterator.close()
            del iterator
            if self._workers["num_workers"] > 0:
                gc.collect()  # reference cycles keep unused batches, and their shared memory


def _grain_iterator(
    batches: "Batches", *, num_workers: int, read_threads: int, prefetch: int
) -> Any:
    import grain
    from absl import flags

    # Grain's workers read absl flags, which an ordinary script never parses; it needs the defaults.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    threads = max(1, min(read_threads, prefetch))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(1, prefetch))
    dataset: Any = grain.MapDataset.source(batches).to_iter_dataset(options)
    if num_workers > 0:
        # An element is a whole batch, so that the workers' round robin keeps the order of batches.
        # Registered once and last: Python runs the hooks in reverse, so it runs before Grain's own.
        atexit.unregister(_close_open)
        atexit.register(_close_open)
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        )
    return iter(dataset)


def _close_open() -> None:
    """Ends open streams when Python exits, while Grain can still free its shared memory."""
    for stream in list(_OPEN):
        with contextlib.suppress(ValueError):  # another thread is inside it
            stream.close()


class Batches:
    """Random access to the batches of one process: Grain's data source. Picklable.

    Subclasses define a `sample`, and how samples `collate` to a batch.

    Args:
      first: Step of the batch at index 0.
      length: Number of batches.
      finite: For a single pass: batches get "valid", and nothing is drawn for captions.
    """

    def __init__(
        self,
        *,
        count: int,
        batch_size: int,
        seed: int,
        window: int,
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
        self._window = window or count
        self._batch_size, self._rows = batch_size, batch_size // process_count
        self._offset = process_index * self._rows
        self._first, self._length, self.finite = first, length, finite
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def sample(
        self, wanted: int, rng: np.random.Generator, text_rng: np.random.Generator | None
    ) -> dict[str, Any]:
        """Returns the sample at index ``wanted`` of the data.

        Args:
          wanted: Index of the sample. Where another one replaces it, "valid" is False.
          rng: The sample's own generator.
          text_rng: Its generator for the caption; None in a finite pass.
        """
        raise NotImplementedError

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Makes a batch of samples."""
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
        if self.finite:
            batch["valid"] = np.array([s["valid"] for s in samples], bool)
        return batch

    def _numbered(self, number: int) -> dict[str, Any]:
        """Returns the sample with a global number, counted over all epochs and processes."""
        epoch, place = divmod(number, self._count)
        wanted = int(self._order(epoch)[place]) if self._shuffle else place
        rng = np.random.default_rng([self._seed, _STREAM_SAMPLE, number])
        text_rng = np.random.default_rng([self._seed, _STREAM_TEXT, number])
        sample = self.sample(wanted, rng, None if self.finite else text_rng)
        return sample | {"valid": epoch == 0 and sample["valid"]}

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._orders:
                rng = np.random.default_rng([self._seed, _STREAM_ORDER, epoch])
                # Two epochs are in use around a border; a batch longer than the data needs several.
                self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) <= 1}
                starts = range(0, self._count, self._window)
                sizes = [min(self._window, self._count - start) for start in starts]
                order = [s + rng.permutation(n) for s, n in zip(starts, sizes, strict=True)]
                self._orders[epoch] = np.concatenate(order).astype(np.int64)
            return self._orders[epoch]
