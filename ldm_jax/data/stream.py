"""Batches as a deterministic stream, addressed by the global step: the base of the loaders."""

import atexit
import contextlib
import gc
import weakref
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from ldm_jax.data.order import SAMPLE, TEXT, Grouped, Order, Place, Ungrouped
from ldm_jax.errors import DataError

_ENDLESS = 2**48  # steps: Grain needs a length

# Streams that have worker processes.
_OPEN: weakref.WeakSet[Generator[dict[str, Any], None, None]] = weakref.WeakSet()


class Stream:
    """Reads batches with Grain.

    Batch ``k`` depends only on the arguments and on ``k``: not on the number of workers or threads,
    nor on where the iteration started. Every epoch is another permutation of all samples; a batch
    may straddle two epochs, and data shorter than a batch repeat inside it. With several processes
    each gets its rows of the same global batch. With groups, all samples of a batch are of one
    group, see `ldm_jax.data.order.Grouped`.

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
      drop_remainder: Leave out the last partial batch of `batches`, with groups that of each.
      groups: Indices of the samples of each group, ascending; a sample may be in several.

    Attributes:
      count: Number of samples; one in several groups counts in each.
      notes: Facts about the data for the log, one line each.

    Raises:
      DataError: An argument does not fit.
    """

    notes: Sequence[str] = ()

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
        groups: Sequence[np.ndarray] | None = None,
    ):
        if groups is not None:
            count = sum(map(len, groups))
            if window:
                raise DataError(f"{path}: data that are read in order cannot be grouped")
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
        self._window, self._shuffle, self._groups = window, shuffle, groups
        self._options: dict[str, Any] = {
            "batch_size": batch_size,
            "seed": seed,
            "process_index": process_index,
            "process_count": process_count,
        }

    def _order(self, finite: bool) -> Order:
        """Returns the order of the training batches, or that of one pass."""
        size, seed = self.batch_size, self._options["seed"]
        shuffle = self._shuffle and not finite
        if self._groups is None:
            return Ungrouped(self.count, size, seed=seed, window=self._window, shuffle=shuffle)
        passes = {"finite": finite, "drop_remainder": self.drop_remainder}
        return Grouped(self._groups, size, seed=seed, shuffle=shuffle, **passes)

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
        return self._open(self._make_batches(finite=False, order=self._order(False), **options))

    def batches(
        self, n: int | None = None, start: int = 0
    ) -> Generator[dict[str, Any], None, None]:
        """Returns one pass in the data's order, without shuffling or draws, for validation.

        Yields:
          At most ``n`` batches from batch ``start`` on, as in `iterate`, with "valid" bool [B]:
          False for the rows that fill up the last batch and for replacements of what cannot be
          read. Every process gets the same number.
        """
        order = self._order(finite=True)
        left = max(0, order.steps(self.drop_remainder) - start)
        length = left if n is None else max(0, min(n, left))
        options = self._options | {"first": start, "length": length}
        return self._open(self._make_batches(finite=True, order=order, **options))

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
      order: The samples of each batch.
      batch_size: Rows of a global batch.
      seed: Seed of each sample's draws.
      process_index: Place of the process.
      process_count: Processes that share a batch.
      first: Step of the batch at index 0.
      length: Number of batches.
      finite: For a single pass: batches get "valid", and nothing is drawn for captions.
    """

    def __init__(
        self,
        *,
        order: Order,
        batch_size: int,
        seed: int,
        process_index: int,
        process_count: int,
        first: int,
        length: int,
        finite: bool = False,
    ):
        if first < 0:
            raise DataError(f"the first step is {first}: give 0 or a positive number")
        self._order, self._seed = order, seed
        self._batch_size, self._rows = batch_size, batch_size // process_count
        self._offset = process_index * self._rows
        self._first, self._length, self.finite = first, length, finite

    def sample(
        self, wanted: Place, rng: np.random.Generator, text_rng: np.random.Generator | None
    ) -> dict[str, Any]:
        """Returns the sample at the index ``wanted.sample`` of the data.

        Args:
          wanted: The sample, and its group. Where another one replaces it, "valid" is False.
          rng: The sample's own generator.
          text_rng: Its generator for the caption; None in a finite pass.
        """
        raise NotImplementedError

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Makes a batch of samples."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, rows = self._first + int(index), range(self._offset, self._offset + self._rows)
        samples = [self._row(step, row) for row in rows]
        batch = self.collate(samples)
        if self.finite:
            batch["valid"] = np.array([s["valid"] for s in samples], bool)
        return batch

    def _row(self, step: int, row: int) -> dict[str, Any]:
        """Returns the sample of a row of the global batch at ``step``."""
        wanted = self._order.place(step, row)
        # Samples are numbered over all epochs and processes.
        number = step * self._batch_size + row
        rng = np.random.default_rng([self._seed, SAMPLE, number])
        text_rng = np.random.default_rng([self._seed, TEXT, number])
        sample = self.sample(wanted, rng, None if self.finite else text_rng)
        return sample | {"valid": wanted.fresh and sample["valid"]}
