"""Two loaders whose rows share each batch: pictures to learn, and others to keep."""

from collections.abc import Generator
from contextlib import closing
from typing import Any

import numpy as np


class MixedLoader:
    """Batches of two halves: rows of ``first``, then rows of ``second``.

    A batch has "weight" float32 [b], the weights of its rows in the loss, such that the mean over
    the batch is the mean loss of the first half plus ``weight`` times that of the second. What is
    not drawn at random, such as `batches` for validation, is of ``first`` alone.

    Args:
      first: A loader of half of the batch.
      second: Another one, with batches of the same arrays.
      weight: The weight of the second one's loss.
    """

    def __init__(self, first: Any, second: Any, weight: float):
        self.first, self.second, self.weight = first, second, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.first, name)

    def iterate(self, start_step: int = 0) -> Generator[dict[str, Any], None, None]:
        """Yields the training batches from ``start_step`` on, endlessly."""
        with (
            closing(self.first.iterate(start_step)) as first,
            closing(self.second.iterate(start_step)) as second,
        ):
            for one, other in zip(first, second, strict=True):
                batch = {name: _joined(one[name], other[name]) for name in one if name in other}
                half = len(one["caption"])
                batch["weight"] = np.repeat(np.array([2.0, 2.0 * self.weight], np.float32), half)
                yield batch


def _joined(one: Any, other: Any) -> Any:
    return np.concatenate([one, other]) if isinstance(one, np.ndarray) else [*one, *other]
