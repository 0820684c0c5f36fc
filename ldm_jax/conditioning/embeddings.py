"""Vectors as the context: CLIP's of a prompt, or of retrieved neighbours.

Retrieval-augmented diffusion (Blattmann et al. 2022, arXiv:2204.11824) is trained on the neighbours
of each picture in a database, and samples from the vector of a prompt and its neighbours.
"""

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.conditioning.base import Cond, Conditioner, Names, RowCondition, as_list, column_of
from ldm_jax.conditioning.clip_vector import ClipVector
from ldm_jax.conditioning.neighbors import Database, normalize, open_database
from ldm_jax.errors import DataError, RequestError, UnreadablePicture
from ldm_jax.io.checkpoint import find_model, load_model
from ldm_jax.io.paths import local_copy
from ldm_jax.models.clip import CLIP, clip_from_config


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
class RowNeighbors(RowCondition):
    """The ``count`` nearest neighbours of a row in a database, float32 [count, dim].

    They are searched for each batch, by one program over the devices, and are normalised. Vectors
    of the row's own picture in the database are left out.

    Attributes:
      database: A folder of `ldm-data embed`, or the original's .npz files.
      count: The number of neighbours.
      dim: Length of a vector.
      column: The column of the row's own vector, as of `RowVectors`; or
      clip: A CLIP model directory, which embeds the picture as it is trained on.
    """

    database: str
    count: int
    dim: int
    column: str = ""
    clip: str = ""

    def __post_init__(self) -> None:
        if bool(self.column) == bool(self.clip):
            raise ValueError("a database needs either column or clip, for the vectors to search by")

    def read(self, row: dict[str, Any]) -> None:
        """Decodes a .npy file."""
        if self.column:
            RowVectors(self.column, 1, self.dim).read(row)

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: Any, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns the vector to search by; zeros where CLIP makes it of the batch."""
        if self.clip:
            return np.zeros(self.dim, np.float32)
        return RowVectors(self.column, 1, self.dim)(row, image, view, rng)[0]

    def check(self) -> None:
        """Opens the database and the CLIP model."""
        found = self._open()
        if found.index.dim != self.dim:
            raise DataError(
                f"data.condition.database {self.database} has vectors of {found.index.dim} "
                f"numbers, model.conditioner.dim is {self.dim}"
            )
        if self.clip and open_clip(self.clip).model.text.projection_dim != self.dim:
            raise DataError(
                f"data.condition.clip {self.clip} makes vectors of another length than "
                f"model.conditioner.dim, {self.dim}"
            )

    def _open(self) -> Database:
        return open_database(self.database)

    def complete(self, batch: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
        """Searches for the neighbours of a batch: float32 [b, count, dim]."""
        queries = batch["condition"]
        if self.clip:
            queries = open_clip(self.clip).embed(batch["image"])
        return self._open().others(queries, self.count, names)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageEncoder:
    """A CLIP model whose image tower runs on the devices of this process.

    Attributes:
      model: The towers.
      params: Their parameters, on each device.
      mesh: The devices.
    """

    model: CLIP
    params: Any
    mesh: Mesh

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Embeds pictures uint8 [b, H, W, 3]: float32 [b, d]."""
        split = len(images) % self.mesh.size == 0
        spec = PartitionSpec(self.mesh.axis_names) if split else PartitionSpec()
        rows = jax.device_put(images, NamedSharding(self.mesh, spec))
        return np.asarray(_embed(self.model, self.params, rows))


@lru_cache(maxsize=1)
def open_clip(path: str) -> ImageEncoder:
    """Returns the encoder of a CLIP model directory; the last one is kept."""
    config, params = load_model(find_model(path))
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    placed = jax.device_put({"vision": params["vision"]}, NamedSharding(mesh, PartitionSpec()))
    return ImageEncoder(clip_from_config(config), placed, mesh)


@partial(jax.jit, static_argnums=0)
def _embed(model: CLIP, params: Any, images: jax.Array) -> jax.Array:
    """Embeds pictures uint8 [b, H, W, 3]: float32 [b, d]."""
    return model.encode_image(params, images.astype(jnp.float32) / 127.5 - 1)


@dataclasses.dataclass(frozen=True)
class Embeddings(Conditioner):
    """Vectors as the context (the original's retrieval-augmented models).

    Attributes:
      dim: Length of a vector.
      count: Vectors of a picture in training and in `encode_null`; sampling takes any number.
      encoder: CLIP's text tower, with which a request may have prompts in place of vectors.
    """

    dim: int
    count: int = 1
    encoder: ClipVector | None = None

    field = "embeddings"
    argument = "embeddings"
    options = ("neighbors", "database")

    def __post_init__(self) -> None:
        if min(self.dim, self.count) < 1:
            raise ValueError(f"dim {self.dim} and count {self.count} must be at least 1")
        if self.encoder is not None and self.encoder.module.projection_dim != self.dim:
            raise ValueError(
                f"CLIP makes vectors of {self.encoder.module.projection_dim} numbers, the model "
                f"takes {self.dim}"
            )

    @classmethod
    def from_config(cls, dtype: Any = jnp.float32, **fields: Any) -> Conditioner:
        """Builds it; "encoder" holds the fields of a `ClipVector`."""
        if isinstance(fields.get("encoder"), Mapping):
            inner = {k: v for k, v in fields["encoder"].items() if k != "kind"}
            inner = {k: tuple(v) if isinstance(v, list) else v for k, v in inner.items()}
            fields["encoder"] = ClipVector.from_config(dtype, **inner)
        return super().from_config(dtype, **fields)

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what reads the vectors of a row, or searches for its neighbours."""
        kind = RowNeighbors if "database" in settings else RowVectors
        return kind(**settings, count=fields.get("count", cls.count), dim=fields.get("dim", 0))

    @classmethod
    def with_clip(cls, fields: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields with an encoder of prompts."""
        completed = {**fields, "encoder": {**text, "kind": "clip_vector"}}
        cls.from_config(**{k: v for k, v in completed.items() if k != "kind"})
        return completed

    def init(self, key: jax.Array) -> dict:
        """Returns fresh parameters of the encoder."""
        return {} if self.encoder is None else self.encoder.init(key)

    def with_kernels(self, kernels: Any) -> "Embeddings":
        """Returns the conditioner whose encoder uses ``kernels``."""
        if self.encoder is None:
            return self
        encoder: Any = self.encoder.with_kernels(kernels)
        return dataclasses.replace(self, encoder=encoder)

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

    def check_request(self, request: Any) -> None:
        """Takes prompts in place of vectors where there is an encoder."""
        if request.prompts is not None:
            if self.encoder is None:
                raise RequestError(
                    "this model is conditioned on embeddings, not prompts: give the CLIP model "
                    "that makes them by --clip (clip=)"
                )
            if request.embeddings is not None:
                raise RequestError("give prompts or embeddings, not both")
            request = dataclasses.replace(request, prompts=None, embeddings=request.prompts)
        super().check_request(request)
        if (request.neighbors or 0) < 0:
            raise RequestError(f"neighbors must be at least 0, not {request.neighbors}")
        if bool(request.neighbors) != (request.database is not None):
            raise RequestError("neighbors and database belong together: give both, or neither")

    def resolve(self, params: Any, request: Any, mesh: jax.sharding.Mesh) -> Any:
        """Makes vectors of the prompts, and adds the neighbours of each vector."""
        if request.prompts is not None:
            assert self.encoder is not None
            tokens = self.encoder.encode(as_list(request.prompts))
            # Of one row a time, so that a vector does not depend on the other prompts.
            made = [_vector(self.encoder, params, row[None]) for row in tokens]
            vectors = [np.asarray(one, np.float32)[0] for one in made]
        elif request.neighbors:
            vectors = self.parse(request.embeddings, None, None)
        else:
            return request
        if request.neighbors:
            if len(vectors[0]) != 1:
                raise RequestError(
                    f"neighbours are those of one vector: the embeddings have {len(vectors[0])}"
                )
            try:
                queries = normalize(np.concatenate(vectors))
                index = open_database(request.database, mesh).index
                found = index.search(queries, request.neighbors).vectors
            except DataError as error:
                raise RequestError(f"database {request.database}: {error}") from None
            vectors = list(np.concatenate([queries[:, None], found], axis=1))
        return dataclasses.replace(
            request, prompts=None, embeddings=vectors, neighbors=None, database=None
        )

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


@partial(jax.jit, static_argnums=0)
def _vector(encoder: ClipVector, params: Any, tokens: jax.Array) -> jax.Array | None:
    return encoder(params, tokens).crossattn


def read_embeddings(value: Any, dim: int) -> np.ndarray:
    """Reads a request's vectors [m, dim], or a single one [dim]: float32 [m, dim]."""
    path = isinstance(value, str | Path)
    name = f"embeddings {value}" if path else "embeddings"
    try:
        vectors = np.load(local_copy(value), allow_pickle=False) if path else value
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
