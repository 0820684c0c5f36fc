"""Precomputed vectors as the context: CLIP's of a prompt, or of retrieved neighbours."""

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.conditioning.base import Cond, Conditioner, Names, RowCondition, as_list, column_of
from ldm_jax.errors import DataError, RequestError, UnreadablePicture


@dataclasses.dataclass(frozen=True)
class RowVectors(RowCondition):
    """``count`` of the vectors in a ``column``, float32 [count, dim].

    A row holds a list of lists of ``dim`` numbers, one such list, or the bytes of a .npy file
    [m, dim]. Of more than ``count`` a random choice is taken, in their order.
    """

    column: str
    count: int
    dim: int

    def read(self, row: dict[str, Any]) -> None:
        """Decodes a .npy file."""
        value = column_of(row, self.column)
        if isinstance(value, bytes):
            try:
                row[self.column] = np.load(io.BytesIO(value), allow_pickle=False)
            except Exception as error:  # NumPy raises nearly every kind on damaged files
                raise UnreadablePicture("its vectors are no .npy file") from error

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: Any, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns the row's vectors."""
        vectors = vectors_of(row, self.column, self.dim)
        if len(vectors) < self.count:
            raise DataError(
                f"{self.column}: {row.get('file_name', 'a row')} has {len(vectors)} vectors, "
                f"model.conditioner.count is {self.count}"
            )
        if len(vectors) == self.count:
            return vectors
        return vectors[np.sort(rng.choice(len(vectors), self.count, replace=False))]


def vectors_of(row: Mapping[str, Any], column: str, dim: int) -> np.ndarray:
    """Returns the vectors of a row, float32 [m, dim]; raises DataError where they do not fit."""
    name, value = row.get("file_name", "a row"), column_of(row, column)
    try:
        vectors = np.atleast_2d(np.asarray(value, np.float32))
    except (TypeError, ValueError):
        raise DataError(
            f"{column}: {name} holds no list of vectors, lists of {dim} numbers each"
        ) from None
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise DataError(
            f"{column}: {name} has vectors of the shape {vectors.shape}, not (m, {dim}), "
            "model.conditioner.dim"
        )
    if not np.isfinite(vectors).all():
        raise DataError(f"{column}: {name} has vectors that are not finite")
    return vectors


@dataclasses.dataclass(frozen=True)
class Embeddings(Conditioner):
    """Precomputed vectors as the context (the original's retrieval-augmented models).

    Attributes:
      dim: Length of a vector.
      count: Vectors of a picture in training and in `encode_null`; sampling takes any number.
    """

    dim: int
    count: int = 1

    field = "embeddings"
    argument = "embeddings"

    def __post_init__(self) -> None:
        if min(self.dim, self.count) < 1:
            raise ValueError(f"dim {self.dim} and count {self.count} must be at least 1")

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what reads the vectors of a row."""
        return RowVectors(
            **settings, count=fields.get("count", cls.count), dim=fields.get("dim", 0)
        )

    def encode(self, values: Sequence[Any]) -> np.ndarray:
        """Returns float32 [b, m, dim] of arrays [m, dim], or [dim], all of one shape."""
        shapes = {np.shape(one) for one in values}
        if len(shapes) > 1:
            listed = " and ".join(map(str, sorted(shapes)))
            raise ValueError(f"embeddings of the shapes {listed}: every picture needs equally many")
        vectors = np.asarray(values, np.float32)
        vectors = vectors[:, None] if vectors.ndim == 2 else vectors
        if vectors.ndim != 3 or vectors.shape[-1] != self.dim or not vectors.size:
            raise ValueError(f"embeddings of shape {vectors.shape[1:]}, expected (m, {self.dim})")
        if not np.isfinite(vectors).all():
            raise ValueError("embeddings must be finite numbers")
        return vectors

    def encode_null(self, n: int) -> np.ndarray:
        """Returns zeros."""
        return np.zeros((n, self.count, self.dim), np.float32)

    def null_row(self, encoded: Any = None) -> np.ndarray:
        """Returns as many zero vectors as ``encoded`` has."""
        return self.encode_null(1) if encoded is None else np.zeros_like(encoded[:1])

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Returns the vectors as the context."""
        return Cond(crossattn=encoded)

    def parse(self, value: Any, canvas: Any, geometry: Any) -> list[np.ndarray]:
        """Reads vectors, arrays or paths of .npy files."""
        found = [read_embeddings(one, self.dim) for one in as_list(value)]
        if len({len(vectors) for vectors in found}) > 1:
            counts = " and ".join(str(len(v)) for v in found)
            raise RequestError(f"embeddings of {counts} vectors: every picture needs equally many")
        return found

    def cache_fields(self) -> dict[str, dict[str, Any]]:
        """Returns the vectors of a row; of more than ``count`` one choice is kept."""
        return {"condition": {"dtype": "float32", "shape": (self.count, self.dim)}}

    def cache_key(self) -> dict[str, Any]:
        """Returns the vectors' shape."""
        return {"vectors": [self.count, self.dim]}


def read_embeddings(value: Any, dim: int) -> np.ndarray:
    """Reads a request's vectors [m, dim], or a single one [dim]: float32 [m, dim]."""
    path = isinstance(value, str | Path)
    name = f"embeddings {value}" if path else "embeddings"
    try:
        vectors = np.load(value, allow_pickle=False) if path else value
        vectors = np.atleast_2d(np.asarray(vectors, np.float32))
    except OSError as error:
        raise RequestError(f"{name} cannot be read: {error.strerror or error}") from None
    except Exception:  # NumPy raises nearly every kind on damaged or other files
        form = "no .npy file of numbers" if path else "no array of numbers"
        raise RequestError(f"{name}: this is {form}") from None
    if vectors.ndim != 2 or vectors.shape[1] != dim or not len(vectors):
        raise RequestError(
            f"{name} of shape {vectors.shape}: give vectors of this model's {dim} numbers, "
            f"(m, {dim})"
        )
    if not np.isfinite(vectors).all():
        raise RequestError(f"{name} must be finite numbers")
    return vectors
