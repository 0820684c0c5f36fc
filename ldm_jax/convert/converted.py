"""The result of a conversion, whatever the family, and the report that is written about it."""

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ldm_jax.convert.reader.lazy import LazyTensor
from ldm_jax.errors import ConversionError
from ldm_jax.models.build import DTYPES

# The first stage of a latent model whose file has none; building it names the missing part.
MISSING = "missing"


class Converted(NamedTuple):
    """A checkpoint as a model here.

    Attributes:
      config: The model config, as JSON holds it.
      params: The parameters by part, as numpy arrays.
      entries: For each parameter {"source", "path", "shape", "dtype", "sha256"}; the last three
        describe the stored array.
      left_out: For each other array {"source", "shape", "dtype", "why"}.
      assumed: A line for each thing that had to be guessed or that differs here.
      lacks: A line for each part that the file lacks.
      about: Further facts for the report.
    """

    config: dict[str, Any]
    params: dict[str, Any]
    entries: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    assumed: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    about: Mapping[str, Any] = MappingProxyType({})


def describe(name: str, tensor: LazyTensor) -> dict[str, Any]:
    """The name, shape and dtype of a stored array, for a report."""
    return {"source": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype)}


def sha256(array: np.ndarray) -> str:
    """The digest of an array's bytes in C order, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


class Taking:
    """Reads tensors one at a time: casts them, and collects their digests and non-finite names."""

    def __init__(self, dtype: str | None):
        self.dtype = dtype
        self.digests: dict[str, str] = {}
        self.not_finite: list[str] = []

    def read(self, name: str, tensor: LazyTensor) -> np.ndarray:
        """Returns the values, in ``dtype`` where they are floating-point."""
        array = tensor.numpy()
        self.digests[name] = sha256(array)
        if array.dtype.kind not in "fV":  # NumPy counts bfloat16 and float8 among its kind "V"
            return array
        if not _finite(array):
            self.not_finite.append(name)
        return array if self.dtype is None else array.astype(DTYPES[self.dtype], copy=False)

    def lazy(self, name: str, tensor: LazyTensor) -> LazyTensor:
        """Returns the tensor with `read` as its reader."""
        floats = self.dtype is not None and tensor.dtype.kind in "fV"
        dtype = np.dtype(DTYPES[self.dtype]) if floats and self.dtype else tensor.dtype
        return LazyTensor(tensor.shape, dtype, lambda: self.read(name, tensor))

    def check(self, where: str) -> None:
        """Raises ConversionError if any array read so far holds NaN or infinity."""
        ConversionError.check(where, not_finite=self.not_finite)


def _finite(array: np.ndarray) -> bool:
    # Sums are several times faster than isfinite; an overflow of finite values is checked again.
    if array.dtype in (np.float32, np.float64):
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(array.sum()):
                return True
    if array.dtype == ml_dtypes.float8_e4m3fn or array.dtype.itemsize == 1:
        array = array.astype(np.float32)
    return bool(np.isfinite(array).all())


def report_of(source: Path, converted: Converted, dtype: str | None) -> str:
    """The report of a conversion as JSON text."""
    report = {
        "source": source.name,
        "ldm_jax": metadata.version("ldm_jax"),
        "dtype": dtype or "as stored",
        "assumed": list(converted.assumed),
        "lacks": list(converted.lacks),
        **converted.about,
        "entries": converted.entries,
        "left_out": converted.left_out,
    }
    return json.dumps(report, indent=1, default=str) + "\n"  # YAML has dates
