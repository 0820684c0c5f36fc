"""The order of samples: which one is a given row of a given batch.

An order is a pure function of its arguments, so that every process computes the same one, and a
resumed run continues it.
"""

import bisect
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

# Purposes of random numbers, each with a stream of its own.
ORDER, SAMPLE, TEXT, PLAN = range(4)


class Place(NamedTuple):
    """A row of a batch.

    Attributes:
      sample: Its index in the data.
      group: The group of the batch; 0 where there are no groups.
      fresh: Whether the sample appears for the first time, if every pass is taken whole.
    """

    sample: int
    group: int
    fresh: bool


class Order(Protocol):
    """The samples of all batches."""

    def steps(self, drop_remainder: bool) -> int:
        """Returns the number of batches of one pass."""
        ...

    def place(self, step: int, row: int) -> Place:
        """Returns the sample of a row of the global batch at ``step``."""
        ...


class _Remembered:
    """Keeps what was computed for the last epochs. Thread-safe; copies by pickle start empty."""

    def __init__(self) -> None:
        self._kept: dict[int, Any] = {}
        self._lock = threading.Lock()

    def _make(self, epoch: int) -> Any:
        raise NotImplementedError

    def __call__(self, epoch: int) -> Any:
        with self._lock:
            if epoch not in self._kept:
                # Two epochs are in use around a border; a batch longer than the data needs several.
                self._kept = {e: kept for e, kept in self._kept.items() if abs(e - epoch) <= 1}
                self._kept[epoch] = self._make(epoch)
            return self._kept[epoch]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_kept": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


class _Permutations(_Remembered):
    """A permutation of ``count`` numbers for each epoch.

    Args:
      count: How many.
      window: Numbers are only permuted inside windows of this length; 0: all.
      seed: Seed, and what distinguishes the streams that share it.
    """

    def __init__(self, count: int, window: int, *seed: int):
        super().__init__()
        self._count, self._window, self._seed = count, window or count, seed

    def _make(self, epoch: int) -> np.ndarray:
        seed, *stream = self._seed
        rng = np.random.default_rng([seed, ORDER, epoch, *stream])
        starts = range(0, self._count, self._window)
        sizes = [min(self._window, self._count - start) for start in starts]
        order = [s + rng.permutation(n) for s, n in zip(starts, sizes, strict=True)]
        return np.concatenate(order).astype(np.int64)


class Ungrouped:
    """Every epoch is another permutation of all samples; a batch may straddle two epochs.

    Args:
      count: Number of samples.
      batch_size: Rows of a global batch.
      seed: Of the permutations.
      window: As of `ldm_jax.data.stream.Stream`.
      shuffle: False keeps the data's order.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int, window: int, shuffle: bool):
        self._count, self._batch_size = count, batch_size
        self._permutation = _Permutations(count, window, seed) if shuffle else None

    def steps(self, drop_remainder: bool) -> int:
        """Returns the number of batches of one pass."""
        return (self._count + (0 if drop_remainder else self._batch_size - 1)) // self._batch_size

    def place(self, step: int, row: int) -> Place:
        """Returns the sample of a row."""
        epoch, at = divmod(step * self._batch_size + row, self._count)
        if self._permutation is not None:
            at = int(self._permutation(epoch)[at])
        return Place(at, 0, epoch == 0)


class Grouped:
    """Every batch has samples of one group.

    Each group is a stream of its own, another permutation of its samples in each of its epochs; a
    batch may straddle two of them. In n epochs of all data, with batches of B, a group of m samples
    has floor(n m / B) batches: what is left of a group at the end of an epoch comes first in the
    next one. Inside an epoch the batches of all groups are permuted.

    Args:
      groups: The indices of each group's samples, ascending.
      batch_size: Rows of a global batch, B.
      seed: Of the permutations.
      shuffle: False keeps the data's order in each group, and spreads the batches of a group
        evenly.
      finite: For one pass: a group whose size is no multiple of B ends in a batch that is filled up
        by its first samples.
      drop_remainder: In a finite pass, leave that batch out.
    """

    def __init__(
        self,
        groups: Sequence[np.ndarray],
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        finite: bool = False,
        drop_remainder: bool = False,
    ):
        self.groups = [np.asarray(group, np.int64) for group in groups]
        self._counts = np.array([len(group) for group in self.groups], np.int64)
        self._batch_size, self._finite = batch_size, finite
        self._ends = _Ends(self._counts, batch_size, finite and not drop_remainder)
        self._plan = _Plan(self._ends, seed if shuffle else None)
        self._permutations = [
            _Permutations(len(group), 0, seed, number + 1) if shuffle else None
            for number, group in enumerate(self.groups)
        ]

    def steps(self, drop_remainder: bool) -> int:
        """Returns the number of batches of one pass."""
        return _Ends(self._counts, self._batch_size, not drop_remainder).total(1)

    def place(self, step: int, row: int) -> Place:
        """Returns the sample of a row; in a finite pass ``step`` lies in the pass."""
        epoch = 0 if self._finite else self._ends.epoch_of(step)
        groups, batches = self._plan(epoch)
        at = step - self._ends.total(epoch)
        group, number = int(groups[at]), int(batches[at]) * self._batch_size + row
        epoch, place = divmod(number, int(self._counts[group]))
        permutation = self._permutations[group]
        if permutation is not None:
            place = int(permutation(epoch)[place])
        return Place(int(self.groups[group][place]), group, epoch == 0)


class _Ends:
    """The number of batches up to the end of each epoch.

    Args:
      counts: Samples of each group.
      batch_size: Rows of a batch.
      fill: Whether the rest of a group is a batch of its own.
    """

    def __init__(self, counts: np.ndarray, batch_size: int, fill: bool):
        self._counts, self._batch_size = counts, batch_size
        self._more = batch_size - 1 if fill else 0

    def by_group(self, epochs: int) -> np.ndarray:
        """Returns the batches of each group in the first ``epochs`` epochs."""
        return (epochs * self._counts + (self._more if epochs else 0)) // self._batch_size

    def total(self, epochs: int) -> int:
        """Returns the batches of all groups in the first ``epochs`` epochs."""
        return int(self.by_group(epochs).sum())

    def epoch_of(self, step: int) -> int:
        """Returns the epoch of the batch ``step``: the last one that begins at it or before."""
        # Rounding costs less than a batch in each group.
        batches, samples = step + 1 + len(self._counts), int(self._counts.sum())
        most = -(-batches * self._batch_size // samples)
        return bisect.bisect_right(range(most + 1), step, key=self.total) - 1


class _Plan(_Remembered):
    """The (groups, numbers of the batch in its group) of an epoch's batches, int64 [n] each."""

    def __init__(self, ends: _Ends, seed: int | None):
        super().__init__()
        self._ends, self._seed = ends, seed

    def _make(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        first = self._ends.by_group(epoch)
        counts = self._ends.by_group(epoch + 1) - first
        groups = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(groups)) - np.repeat(np.cumsum(counts) - counts, counts)
        if self._seed is None:
            order = np.argsort((number + 0.5) / counts[groups], kind="stable")
        else:
            rng = np.random.default_rng([self._seed, PLAN, epoch])
            groups = rng.permutation(groups)
            # The batches of a group stay in their order: sorted by group, they are counted.
            order = np.empty(len(groups), np.int64)
            order[np.argsort(groups, kind="stable")] = np.arange(len(groups))
            return groups, number[order] + first[groups]
        return groups[order], number[order] + first[groups[order]]
