"""Lazy arrays of a file: a storage is a run of bytes, a tensor a strided view of one.

Reading uses ``seek`` and ``readinto`` instead of a memory map: mapped pages count as the process's
memory as long as the map lives, so a conversion would hold the file beside its own arrays.
"""

import os
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ldm_jax.errors import ReaderError

MIB = 1 << 20


def shown(value: object, limit: int = 80) -> str:
    """Formats a value of a file for a message: printable ASCII, one line, ``limit`` characters."""
    if isinstance(value, int) and abs(value) >> 70:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        value = value[:limit]
    text = ascii(
        value if isinstance(value, str | bytes | int | float | type(None)) else type(value).__name__
    )
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


# PyTorch's names of dtypes (torch.float32) and of the storage classes in pickles.
TORCH_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "float64": np.float64,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "int64": np.int64,
        "int32": np.int32,
        "int16": np.int16,
        "int8": np.int8,
        "uint64": np.uint64,
        "uint32": np.uint32,
        "uint16": np.uint16,
        "uint8": np.uint8,
        "bool": np.bool_,
        "complex64": np.complex64,
        "complex128": np.complex128,
    }.items()
}
STORAGE_CLASSES: dict[str, np.dtype | None] = {
    "DoubleStorage": TORCH_DTYPES["float64"],
    "FloatStorage": TORCH_DTYPES["float32"],
    "HalfStorage": TORCH_DTYPES["float16"],
    "BFloat16Storage": TORCH_DTYPES["bfloat16"],
    "LongStorage": TORCH_DTYPES["int64"],
    "IntStorage": TORCH_DTYPES["int32"],
    "ShortStorage": TORCH_DTYPES["int16"],
    "CharStorage": TORCH_DTYPES["int8"],
    "ByteStorage": TORCH_DTYPES["uint8"],
    "BoolStorage": TORCH_DTYPES["bool"],
    "ComplexFloatStorage": TORCH_DTYPES["complex64"],
    "ComplexDoubleStorage": TORCH_DTYPES["complex128"],
    "UntypedStorage": None,  # counted in bytes; each tensor on it has its own dtype
}


class File:
    """A regular file, read in pieces from any thread. A short read raises ReaderError."""

    def __init__(self, path: Path):
        if not path.exists():
            raise ReaderError("there is no such file")
        if not path.is_file():  # a named pipe would block for ever
            raise ReaderError("not a regular file")
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - lives as long as the checkpoint
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise ReaderError(f"cannot be opened: {error.strerror}") from None
        self._lock = threading.Lock()
        self._expanded: tuple[int, bytes] = (-1, b"")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def fill(self, start: int, out: np.ndarray) -> None:
        """Reads the bytes from ``start`` on into ``out`` (uint8 [n])."""
        if start < 0 or start + out.size > self.size:
            raise ReaderError(
                f"the file ends at byte {self.size}, {shown(start + out.size)} are needed: cut?"
            )
        with self._lock:
            try:
                self._file.seek(start)
                view, done = out.data, 0
                while done < out.size and (n := self._file.readinto(view[done:])):
                    done += n
            except ValueError:
                raise ReaderError("the checkpoint has been closed") from None
            except OSError as error:
                raise ReaderError(f"cannot be read: {error.strerror}") from None
        if done < out.size:
            raise ReaderError(f"the file ended {out.size - done} bytes too soon while it was read")

    def read(self, start: int, count: int) -> bytes:
        """Returns the ``count`` bytes from ``start`` on."""
        if count > self.size:  # checked before the allocation
            raise ReaderError(
                f"{shown(count)} bytes are announced, the file has {self.size}: truncated?"
            )
        out = np.empty(count, np.uint8)
        self.fill(start, out)
        return out.tobytes()

    def inflate(self, start: int, packed: int, size: int) -> bytes:
        """Expands ``packed`` deflated bytes to exactly ``size``; the last result is cached."""
        if self._expanded[0] != start:
            decompressor = zlib.decompressobj(-15)
            try:
                # One byte more than announced: a bomb is detected without being expanded.
                data = decompressor.decompress(self.read(start, packed), size + 1)
            except zlib.error:
                raise ReaderError("a compressed entry is damaged") from None
            if len(data) != size or not decompressor.eof:
                raise ReaderError(
                    f"a compressed entry does not expand to the {size} bytes that it announces"
                )
            self._expanded = (start, data)
        return self._expanded[1]


@dataclass(eq=False)
class Storage:
    """A run of ``numel`` elements of ``dtype`` (None: bytes).

    ``read(start, out)`` fills ``out`` from byte ``start`` on.
    """

    dtype: np.dtype | None
    numel: int
    read: Callable[[int, np.ndarray], None] | None = None
    swapped: bool = False  # written on a machine of the other byte order

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.numel * (self.dtype.itemsize if self.dtype else 1)

    def part(self, offset: int, numel: int) -> "Storage":
        """Returns elements ``offset`` to ``offset + numel`` as a storage that reads this one."""
        if offset + numel > self.numel:
            raise ReaderError("a view reaches beyond its storage")
        skip = offset * (self.dtype.itemsize if self.dtype else 1)
        # Looked up when reading: the legacy format locates the bytes only after the pickle.
        return Storage(
            self.dtype, numel, lambda start, out: self.fill(skip + start, out), self.swapped
        )

    def fill(self, start: int, out: np.ndarray) -> None:
        """Reads the bytes from ``start`` on into ``out`` (uint8 [n])."""
        if self.read is None:
            raise ReaderError("a storage has no bytes in the file")
        self.read(start, out)


class LazyTensor:
    """An array in a checkpoint, its values not yet read; ``dtype`` is NumPy's or ml_dtypes'."""

    __slots__ = ("_read", "dtype", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._read = shape, dtype, read

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """Reads the values: a new array in C order and native byte order."""
        return self._read()

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """Reads the values, for `numpy.asarray`."""
        return self._read().astype(dtype or self.dtype, copy=False)

    def become(self, other: "LazyTensor") -> None:
        """Takes over another tensor's contents: NumPy pickles an array before its contents."""
        self.shape, self.dtype, self._read = other.shape, other.dtype, other._read

    def __repr__(self) -> str:
        return f"LazyTensor({list(self.shape)}, {self.dtype})"


def sizes(values: Any, what: str) -> tuple[int, ...]:
    """Returns ``values`` as a tuple of at most 64 sizes (NumPy's limit), else ReaderError."""
    if not isinstance(values, tuple | list) or len(values) > 64:
        raise ReaderError(f"a tensor's {what} is no list of sizes")
    if not all(type(value) is int and 0 <= value < 1 << 48 for value in values):
        raise ReaderError(f"a tensor's {what} holds something else than sizes")
    # A zero size does not allow any other size: NumPy multiplies the rest.
    if what == "shape" and prod(value for value in values if value) >= 1 << 48:
        raise ReaderError("a tensor's shape is too large")
    return tuple(values)


def strided(
    storage: Storage, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None
) -> LazyTensor:
    """Returns the tensor at element ``offset`` of a storage; strides count elements of ``dtype``.

    Raises:
      ReaderError: It reaches beyond the storage, or strides of zero repeat it to a huge size.
    """
    shape, strides = sizes(shape, "shape"), sizes(strides, "strides")
    if dtype is None:
        raise ReaderError("a tensor on an untyped storage does not say its dtype")
    if type(offset) is not int or offset < 0 or len(shape) != len(strides):
        raise ReaderError("a tensor's offset or strides do not fit its shape")
    span = (
        1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if prod(shape)
        else 0
    )
    if (offset + span) * dtype.itemsize > storage.nbytes and span:
        raise ReaderError(
            f"a tensor of shape {list(shape)} reaches beyond its storage of {storage.nbytes} bytes"
        )
    if prod(shape) * dtype.itemsize > max(storage.nbytes, 128 * MIB):
        raise ReaderError(
            f"a tensor of shape {list(shape)} repeats a storage of {storage.nbytes} bytes"
        )

    def read() -> np.ndarray:
        raw = np.empty(span * dtype.itemsize, np.uint8)
        if span:
            storage.fill(offset * dtype.itemsize, raw)
        flat = decoded(raw, dtype, storage.swapped)
        view = np.lib.stride_tricks.as_strided(
            flat, shape, [step * dtype.itemsize for step in strides]
        )
        return np.array(view, order="C", copy=None if span else True)

    return LazyTensor(shape, dtype, read)


def decoded(raw: np.ndarray, dtype: np.dtype, swapped: bool = False) -> np.ndarray:
    """Returns bytes (uint8 [n]) as values of ``dtype`` in native byte order."""
    if swapped:
        word = dtype.itemsize // (2 if dtype.kind == "c" else 1)  # a complex number is two words
        raw = np.ascontiguousarray(raw.reshape(-1, word)[:, ::-1]).reshape(-1)
    # Any byte but 0 is true in PyTorch; as a NumPy bool it would equal neither True nor False.
    return raw != 0 if dtype.kind == "b" else raw.view(dtype)
