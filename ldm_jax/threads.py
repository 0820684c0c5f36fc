"""Several calls of a compiled program at once, for a single CPU.

XLA computes small products and convolutions, and most of what lies between, on one core, so that two halves of a batch side by side are done before
the whole would be.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parts_for(rows: int) -> int:
    """Into how many equal parts to cut so many rows: as many as there are cores, or the most below that divide them."""
    return max(d for d in range(1, cores() + 1) if rows % d == 0)


def cut(rows: Any, parts: int) -> list[Any]:
    """``rows``, a pytree of arrays [n, ...], in ``parts`` equal parts."""
    size = len(jax.tree.leaves(rows)[0]) // parts
    return [jax.tree.map(lambda a, i=i: a[i * size : (i + 1) * size], rows) for i in range(parts)]


def on_threads(call: Callable[[Any], Any], pieces: list[Any]) -> Any:
    """``call`` of each of the ``pieces``, on a thread of its own; what they return, pytrees of arrays [n, ...], as numpy arrays joined in order.

    ``call`` should run a program that is compiled already: a `jax.jit` would be compiled by every thread, under that thread's settings of jax.
    """
    with ThreadPoolExecutor(len(pieces)) as pool:
        done = list(pool.map(lambda piece: jax.device_get(call(piece)), pieces))
    return jax.tree.map(lambda *a: np.concatenate(a), *done)
