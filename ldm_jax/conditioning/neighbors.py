"""Nearest neighbours among embeddings, by one compiled program over the devices."""

import dataclasses
import os
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.data.embeddings import read_embeddings, stamp_of
from ldm_jax.errors import DataError, did_you_mean

METRICS = ("dot_product", "squared_l2")  # of normalised vectors, for which both order alike
_BATCH = 16  # queries of one call; their scores are [queries, vectors]
_BLOCK = 128  # vectors whose best score is compared first
_CHUNK = 1 << 16  # vectors normalised at a time


class Neighbors(NamedTuple):
    """What a search finds for b queries, in the order of falling similarity.

    Attributes:
      rows: Places in the database, int64 [b, k].
      vectors: Normalised embeddings, float32 [b, k, d].
      scores: Cosine similarities, float32 [b, k].
    """

    rows: np.ndarray
    vectors: np.ndarray
    scores: np.ndarray


class Index:
    """Searches vectors [n, d] by the cosine of the angle to a query, exactly unless ``recall`` < 1.

    The vectors are normalised and split over the devices; each finds its own best, from which the
    best of all are taken. Of equal scores the first in the database comes first.

    Args:
      vectors: [n, d], of any length but zero.
      mesh: The devices; None: those of this process.
      metric: Of `METRICS`.
      recall: Below 1: the expected share of the true neighbours (`jax.lax.approx_max_k`, Chern et
        al. 2022, arXiv:2206.14286), which is faster on a TPU alone.

    Raises:
      DataError: An argument does not fit.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        mesh: Mesh | None = None,
        *,
        metric: str = "dot_product",
        recall: float = 1.0,
    ):
        if metric not in METRICS:
            raise DataError(f"metric {metric!r} does not exist{did_you_mean(metric, METRICS)}")
        if not 0 < recall <= 1:
            raise DataError(f"recall is {recall}: give a number above 0 and up to 1")
        if vectors.ndim != 2 or not vectors.size:
            raise DataError(f"a database of the shape {vectors.shape}: give vectors [n, d]")
        if mesh is None:
            mesh = Mesh(np.array(jax.local_devices()), ("data",))
        self.size, self.dim = vectors.shape
        self.mesh, self.recall, axes = mesh, recall, mesh.axis_names
        each = -(-self.size // mesh.size)
        each = -(-each // _BLOCK) * _BLOCK
        rows = NamedSharding(mesh, PartitionSpec(axes))
        self._whole = NamedSharding(mesh, PartitionSpec())

        def part(at: Any) -> np.ndarray:
            start, stop = at[0].start or 0, at[0].stop or each * mesh.size
            padded = np.zeros((stop - start, self.dim), np.float32)
            for first in range(start, min(stop, self.size), _CHUNK):
                some = normalize(vectors[first : min(first + _CHUNK, stop)], first)
                padded[first - start : first - start + len(some)] = some
            return padded

        # One device's rows at a time: a normalised copy of the whole would double the memory.
        self._vectors = jax.make_array_from_callback((each * mesh.size, self.dim), rows, part)

    def search(self, queries: np.ndarray, k: int) -> Neighbors:
        """Finds the ``k`` nearest vectors of each query [b, d].

        Raises:
          DataError: There are fewer than ``k`` vectors, or the queries have another length.
        """
        if not 1 <= k <= self.size:
            raise DataError(f"{k} neighbours of a database of {self.size} vectors: give 1 to all")
        queries = np.asarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise DataError(
                f"queries of the shape {queries.shape}: the database has vectors of {self.dim} "
                "numbers, made by another network"
            )
        unit, found = normalize(queries), []
        for first in range(0, len(unit), _BATCH):
            part = unit[first : first + _BATCH]
            # Every call has one shape, so that it is compiled once.
            filled = np.concatenate([part, np.zeros((_BATCH - len(part), self.dim), np.float32)])
            arrays = _nearest(
                self._vectors,
                jax.device_put(filled, self._whole),
                k=k,
                size=self.size,
                mesh=self.mesh,
                recall=self.recall,
            )
            found.append([array[: len(part)] for array in jax.device_get(arrays)])
        if not found:
            raise DataError("no queries: give one at least")
        rows, best, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return Neighbors(rows.astype(np.int64), best, scores)


@dataclasses.dataclass(frozen=True, eq=False)
class Database:
    """An index and the names of the pictures that its vectors are of."""

    index: Index
    names: np.ndarray

    def others(self, queries: np.ndarray, k: int, names: Sequence[str]) -> np.ndarray:
        """Returns the ``k`` nearest vectors of each query [b, d] that are of other pictures.

        Args:
          queries: The vectors to search by.
          k: The number of neighbours.
          names: Of the pictures that the queries are of.

        Returns:
          float32 [b, k, d].

        Raises:
          DataError: There are fewer than ``k`` others.
        """
        size, wanted = self.index.size, k + 1
        while True:
            found = self.index.search(queries, min(wanted, size))
            other = self.names[found.rows] != np.asarray(names)[:, None]
            if (other.sum(1) >= k).all():
                # The first k of each row, in their order.
                places = np.argsort(~other, axis=1, kind="stable")[:, :k]
                return np.take_along_axis(found.vectors, places[:, :, None], axis=1)
            if wanted >= size:
                raise DataError(
                    f"the database has fewer than {k} vectors of other pictures: embed more, or "
                    "lower model.conditioner.count"
                )
            wanted = min(2 * wanted, size)


def open_database(path: str | os.PathLike[str], mesh: Mesh | None = None) -> Database:
    """Returns the index of a database on disk; the last one is kept until its files change.

    Raises:
      DataError: There is none, or it is damaged.
    """
    return _opened(os.fspath(path), stamp_of(path), mesh)


@lru_cache(maxsize=1)
def _opened(path: str, stamp: tuple[Any, ...], mesh: Mesh | None) -> Database:
    found = read_embeddings(path)
    return Database(Index(found.vectors, mesh), found.names)


def normalize(vectors: np.ndarray, first: int = 0) -> np.ndarray:
    """Returns ``vectors`` [n, d] divided by their norms, float32.

    Raises:
      DataError: One is zero, or not finite; the message counts from ``first``.
    """
    vectors = np.asarray(vectors, np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    if bad := np.flatnonzero(~np.isfinite(norms) | (norms == 0)).tolist():
        raise DataError(f"vector {first + bad[0]} is zero or not finite, and has no direction")
    return vectors / norms[:, None]


@partial(jax.jit, static_argnames=("k", "size", "mesh", "recall"))
def _nearest(
    vectors: jax.Array, queries: jax.Array, *, k: int, size: int, mesh: Mesh, recall: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (rows int32 [b, k], vectors float32 [b, k, d], scores float32 [b, k]).

    Args:
      vectors: Normalised [n, d], padded by zeros, split by rows over all axes of the mesh.
      queries: Normalised [b, d], on every device.
      k: The number of neighbours.
      size: The vectors that are no padding.
      mesh: The devices.
      recall: As of `Index`.
    """
    axes = mesh.axis_names
    local = len(vectors) // mesh.size
    count = min(k, local)

    def of_device(part: jax.Array, queries: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        start = jax.lax.axis_index(axes) * local
        # In this order the vectors are read as they lie in memory.
        scores = jnp.matmul(part, queries.T, precision="highest")
        real = start + jnp.arange(local) < size
        best, rows = _top(jnp.where(real[:, None], scores, -jnp.inf), count, recall)
        # Devices in order: of equal scores that of the first row stays in front.
        gather = partial(jax.lax.all_gather, axis_name=axes, axis=1, tiled=True)
        best, rows = gather(best), gather(rows + start)
        best, at = jax.lax.top_k(best, k)
        rows = jnp.take_along_axis(rows, at, axis=1)
        # Each device adds the vectors that it holds.
        mine = (rows >= start) & (rows < start + local)
        held = part[jnp.where(mine, rows - start, 0)]
        return rows, jax.lax.psum(jnp.where(mine[:, :, None], held, 0), axes), best

    split, whole = PartitionSpec(axes), PartitionSpec()
    search = jax.shard_map(
        of_device, mesh=mesh, in_specs=(split, whole), out_specs=(whole,) * 3, check_vma=False
    )
    return search(vectors, queries)


def _top(scores: jax.Array, k: int, recall: float) -> tuple[jax.Array, jax.Array]:
    """Returns the ``k`` largest of ``scores`` [n, b] and their places, [b, k] in falling order.

    The k largest lie in the k blocks with the largest maxima, so that only these are sorted.
    """
    n, b = scores.shape
    if recall < 1:
        best, places = jax.lax.approx_max_k(scores.T, k, recall_target=recall)
        return best, places
    if n // _BLOCK <= k:
        best, places = jax.lax.top_k(scores.T, k)
        return best, places
    blocks = scores.reshape(n // _BLOCK, _BLOCK, b)
    # In the order of the rows, so that of equal scores the first row comes first.
    chosen = jnp.sort(jax.lax.top_k(blocks.max(1).T, k)[1], axis=1)
    kept = blocks[chosen, :, jnp.arange(b)[:, None]].reshape(b, k * _BLOCK)
    best, at = jax.lax.top_k(kept, k)
    places = jnp.take_along_axis(chosen, at // _BLOCK, axis=1) * _BLOCK + at % _BLOCK
    return best, places
