"""Reads checkpoints without PyTorch: zip and legacy .ckpt/.pth/.bin, .safetensors, sharded ones.

The first bytes of a file decide its format, not its name. Nothing in it is run, imported or
unpacked to disk, and every length is checked against the file before memory is allocated. Formats:

- zip: torch.save since 1.6. ``ROOT/data.pkl`` is a pickle whose persistent ids ("storage", class,
  key, device, numel) stand for the bytes of ``ROOT/data/KEY``; ``ROOT/byteorder`` is "little" or
  "big" (torch/serialization.py). `ldm_jax.convert.reader.archive` reads the container.
- legacy: torch.save before 1.6. Pickles of a magic number, a protocol number, system facts, the
  object and the list of storage keys; then for each key its element count (int64) and its bytes.
- safetensors: a length (uint64), that many bytes of JSON, the arrays
  (huggingface.co/docs/safetensors). The safetensors library is not used: it maps the file, and
  mapped pages count as memory of the process, and its NumPy side lacks bfloat16 and float8.
- an index (``*.index.json`` of diffusers and transformers): {"weight_map": {name: file beside it}}.
"""

import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np

from ldm_jax.convert.reader.archive import Entry, read_entry, zip_entries
from ldm_jax.convert.reader.lazy import (
    MIB,
    TORCH_DTYPES,
    File,
    LazyTensor,
    Storage,
    decoded,
    shown,
    sizes,
)
from ldm_jax.convert.reader.pickles import MAX_OPS, MAX_PICKLE, Unpickler
from ldm_jax.convert.reader.rebuild import Standin, StorageClass
from ldm_jax.errors import ReaderError
from ldm_jax.io.paths import local_copy

__all__ = ["Checkpoint", "LazyTensor", "ReaderError", "Standin", "open_checkpoint"]

MAX_JSON = 16 * MIB  # a safetensors header or an index; Stable Diffusion's is 0.1 MiB
MAX_SHARDS = 256
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch/serialization.py

# What people take for a checkpoint by mistake.
_MISTAKEN = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run git lfs pull",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\x89HDF": "an HDF5 file, which is not supported",
    b"<": "a web page, not a checkpoint: the download failed",
}


class Checkpoint:
    """An open checkpoint; close it, or use it in a ``with`` statement.

    Attributes:
      format: "zip", "legacy" or "safetensors" (for a sharded one, its shards').
      tensors: The state dict: name -> LazyTensor.
      place: The key under which the state dict was found; "" at the top level.
      averages: A second state dict of averaged weights under "ema" or "params_ema", or {}.
      tree: All that was saved, in plain containers (epoch, global_step, ...); {} for safetensors.
      standins: "module.Class" -> number of inert stand-ins for that class or its objects.
      metadata: The container's own facts (byte order, version; safetensors' __metadata__).
      variant: The variant in the file's name ("fp16"), where a folder was opened; else "".
    """

    def __init__(
        self, path: Path, format: str, files: list[File], tensors: Mapping[str, LazyTensor]
    ):
        self.path, self.format, self.tensors = path, format, tensors
        self.tree: Any = {}
        self.place, self.variant = "", ""
        self.averages: Mapping[str, LazyTensor] = {}
        self.standins: dict[str, int] = {}
        self.metadata: dict[str, Any] = {}
        self._files = files

    def close(self) -> None:
        """Closes the files; what was read stays."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.format} checkpoint {self.path.name}: {len(self.tensors)} tensors>"


def open_checkpoint(path: str | Path, *, variant: str | None = None) -> Checkpoint:
    """Opens a checkpoint file, the index of a sharded one, or a folder that holds one of either.

    Names, shapes and all that is not a tensor are read; `LazyTensor.numpy` reads values.

    Args:
      path: The file or folder.
      variant: Which of a folder's variants to open ("fp16", "non_ema"); None takes full precision,
        or the only variant there is.

    Raises:
      ReaderError: The file cannot be read, is damaged, is of no known kind, or would run code when
        unpickled. No other error is raised.
    """
    path = local_copy(path)
    try:
        file, found = _inside(path, variant) if path.is_dir() else (path, "")
        checkpoint = _open(file)
        checkpoint.variant = found
        return checkpoint
    except ReaderError as error:
        raise ReaderError(f"{shown(str(path), 1000)[1:-1]}: {error}") from None
    except OSError as error:  # a path that the system does not take, a folder that may not be read
        raise ReaderError(f"{shown(str(path))[1:-1]}: cannot be opened: {error.strerror}") from None


# model.safetensors, model.fp16.safetensors, model.safetensors.index.json,
# model.safetensors.index.fp16.json, model.fp16.safetensors.index.json; and a shard of one of them.
_FILE = re.compile(
    r".+?(?:\.(?P<variant>[\w-]+?))?(?P<shard>-\d+-of-\d+)?"
    r"\.(?P<ending>safetensors|bin|ckpt|pt|pth)(?P<index>\.index(?:\.(?P<late>[\w-]+))?\.json)?"
)


def _inside(folder: Path, wanted: str | None) -> tuple[Path, str]:
    """Returns (the checkpoint of a folder, its variant).

    Safetensors come before pickles, then full precision before variants, then indexes before single
    files.
    """
    if (folder / "model_index.json").is_file():
        raise ReaderError(
            "a pipeline folder; open one of its components (unet, vae, text_encoder, ...)"
        )
    found: dict[tuple[int, bool], dict[str, list[Path]]] = {}
    variants: set[str] = set()
    endings = ("safetensors", "bin", "ckpt", "pt", "pth")
    for file in sorted(folder.iterdir()):
        match = _FILE.fullmatch(file.name)
        if not match or match["shard"] or not file.is_file():
            continue
        variant = match["variant"] or match["late"] or ""
        variants.add(variant)
        key = (endings.index(match["ending"]), not match["index"])
        found.setdefault(key, {}).setdefault(variant, []).append(file)
    if wanted is not None and wanted not in variants:
        names = ", ".join(sorted(variants - {""})) or "none"
        raise ReaderError(f"has no variant {shown(wanted)} (variants: {names})")
    for choice in ([""] if wanted is None else [wanted], sorted(variants - {""})):
        for key in sorted(found):
            files = [file for name in choice for file in found[key].get(name, [])]
            if len(files) > 1:
                ending = "*.index.json" if not key[1] else f"*.{endings[key[0]]}"
                raise ReaderError(f"holds {len(files)} files {ending}; open one of them")
            if files:
                return files[0], next(name for name in choice if found[key].get(name))
        if wanted is not None:
            break
    raise ReaderError("a folder without a checkpoint")


def _open(path: Path, *, shard: bool = False) -> Checkpoint:
    file = File(path)
    try:
        checkpoint = _reader_of(file, shard)(path, file)
        _check_total(file, checkpoint)
        return checkpoint
    except BaseException:
        file.close()
        raise


def _reader_of(file: File, shard: bool) -> Callable[[Path, File], Checkpoint]:
    head = file.read(0, min(file.size, 512))
    if not head:
        raise ReaderError("the file is empty")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _open_zip
    if len(head) > 8 and head[8:9] == b"{" and head[5:8] == bytes(3):
        return _open_safetensors
    if (head[0] == 0x80 and head[1:2] < b"\x06") or head.startswith(f"L{MAGIC}L\n".encode()):
        return _open_legacy
    if head.lstrip()[:1] == b"{" and not shard:
        return _open_index
    for start, meaning in _MISTAKEN.items():
        if head.startswith(start):
            raise ReaderError(meaning)
    if head[257:262] == b"ustar":
        raise ReaderError(
            "a tar archive, as PyTorch wrote before version 0.1.10, which is not supported"
        )
    raise ReaderError(
        "not a checkpoint: it begins like none of zip, legacy PyTorch and safetensors"
    )


def _check_total(file: File, checkpoint: Checkpoint) -> None:
    """Raises ReaderError if the tensors would take far more memory than the file has bytes."""
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    if total > 4 * file.size + 512 * MIB:
        raise ReaderError(
            f"its tensors would take {total // MIB} MiB, the file has {file.size // MIB}"
        )


# Where training code puts a state dict, the most usual first; averages come after the weights.
_PLACES = ("state_dict", "model_state_dict", "model", "net", "network", "params", "module")
_AVERAGES = ("ema", "params_ema", "model_ema", "ema_state_dict", "ema_model")


def _find_state_dict(checkpoint: Checkpoint, tree: Any) -> None:
    """Sets the tensors by name, and what lies beside them, from the tree that was saved."""
    if not isinstance(tree, dict):
        saved = f"a {type(tree).__name__}"
        if isinstance(tree, Standin):
            saved = f"an object of {tree.name}"
        raise ReaderError(f"holds {saved}, not a state dict; save model.state_dict() instead")
    if any(isinstance(key, int) and isinstance(tree[key], list | tuple) for key in tree):
        raise ReaderError("a hypernetwork, which is not a model and is not supported")
    checkpoint.tree = tree
    checkpoint.averages = next(filter(None, map(_tensors_of, map(tree.get, _AVERAGES))), {})
    for place in (*_PLACES, *_AVERAGES, "string_to_param"):
        if tensors := _tensors_of(tree.get(place)):
            checkpoint.tensors, checkpoint.place = tensors, place
            break
    else:
        checkpoint.tensors = _tensors_of(tree)
        if not checkpoint.tensors and "state_dict" not in tree:
            raise ReaderError(
                "holds no state dict: no tensors at the top level or under one of "
                + ", ".join(map(repr, (*_PLACES, *_AVERAGES)))
            )
    if checkpoint.averages is checkpoint.tensors:
        checkpoint.averages = {}
    if names := [name for name in checkpoint.tensors if not isinstance(name, str)]:
        raise ReaderError(f"a tensor's name is no text but {shown(names[0])}")


def _tensors_of(value: Any) -> dict[str, LazyTensor]:
    """The tensors of a dict, or of a module that holds parameters by name."""
    if isinstance(value, Standin) and isinstance(value.state, dict):
        value = value.state.get("_parameters")
    items = value.items() if isinstance(value, dict) else ()
    return {name: item for name, item in items if isinstance(item, LazyTensor)}


# ---------------------------------------------------------------------------------------------- zip


def _open_zip(path: Path, file: File) -> Checkpoint:
    entries = zip_entries(file)
    roots = [
        name.split("/")[0]
        for name in entries
        if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(roots) != 1:
        raise ReaderError(f"a zip archive with {len(roots) or 'no'} data.pkl: not a checkpoint")
    root = roots[0]
    if f"{root}/constants.pkl" in entries:
        raise ReaderError("a TorchScript program (torch.jit.save), not a checkpoint")

    def content(name: str, limit: int) -> bytes:
        entry = entries.get(f"{root}/{name}", Entry(0, 0, 0, False))
        if entry.size > limit:
            raise ReaderError(f"its {name} announces {entry.size} bytes, more than {limit}")
        if entry.deflated:
            return file.inflate(entry.start, entry.packed, entry.size)
        return file.read(entry.start, entry.size)

    order = content("byteorder", 16).decode("ascii", "replace").strip() or "little"
    if order not in ("little", "big"):
        raise ReaderError(f"its byte order is {shown(order)}, neither little nor big")
    storages: dict[str, Storage] = {}

    def persistent(reference: tuple) -> Storage:
        match reference:
            case ("storage", StorageClass(dtype=dtype), str() as key, _, int() as numel) if (
                0 <= numel < 1 << 48
            ):
                pass
            case _:
                raise ReaderError("its pickle refers to something that is no storage")
        if key in storages and (storages[key].dtype, storages[key].numel) == (dtype, numel):
            return storages[key]
        if key in storages:
            raise ReaderError(f"the storage {shown(key)} is used in two ways")
        if (entry := entries.get(f"{root}/data/{key}")) is None:
            raise ReaderError(f"the storage {shown(key)} is missing")
        storage = Storage(dtype, numel, partial(read_entry, file, entry), order == "big")
        if storage.nbytes != entry.size:
            raise ReaderError(
                f"storage {shown(key)} has {entry.size} bytes, its tensors need {storage.nbytes}"
            )
        storages[key] = storage
        return storage

    standins: Counter[str] = Counter()
    pickle = _Bounded(content("data.pkl", MAX_PICKLE))
    tree = Unpickler(pickle, persistent, standins).load()
    if pickle.left:
        raise ReaderError(f"its pickle is followed by {pickle.left} bytes that belong to nothing")
    checkpoint = Checkpoint(path, "zip", [file], {})
    _find_state_dict(checkpoint, tree)
    checkpoint.standins = dict(standins)
    version = content("version", 64).decode("ascii", "replace").strip()
    checkpoint.metadata = {"version": version, "byteorder": order}
    return checkpoint


# ------------------------------------------------------------------------------------------- legacy


class _Bounded:
    """A stream over bytes or a file that ends after MAX_PICKLE bytes and never reads short."""

    def __init__(self, source: bytes | File, start: int = 0):
        self.source, self.at = source, start
        self.size = len(source) if isinstance(source, bytes) else source.size
        self.limit = min(self.size, start + MAX_PICKLE + 1)
        self._buffer, self._buffer_start = (
            (source, 0) if isinstance(source, bytes) else (b"", start)
        )

    @property
    def left(self) -> int:
        return self.size - self.at

    def tell(self) -> int:
        return self.at

    def read(self, n: int, /) -> bytes:
        if n < 0 or self.at + n > self.limit:
            raise ReaderError("its pickle ends too soon: truncated or damaged")
        if self.at - self._buffer_start + n > len(self._buffer):
            self._look_ahead(max(n, MIB))
        begin = self.at - self._buffer_start
        self.at += n
        return self._buffer[begin : begin + n]

    def readline(self) -> bytes:
        # Only protocol 0 has lines: names, numbers and short texts, which fit into 1 MiB.
        end = self._buffer.find(b"\n", self.at - self._buffer_start)
        if end < 0:
            self._look_ahead(MIB)
            end = self._buffer.find(b"\n", self.at - self._buffer_start)
        length = self._buffer_start + end + 1 - self.at
        if end < 0 or length > MIB:
            raise ReaderError("its pickle is damaged: a line has no end")
        return self.read(length)

    def _look_ahead(self, n: int) -> None:
        if isinstance(self.source, File):
            self._buffer, self._buffer_start = (
                self.source.read(self.at, min(n, self.size - self.at)),
                self.at,
            )


def _open_legacy(path: Path, file: File) -> Checkpoint:
    stream, standins = _Bounded(file), Counter()

    def pickled(persistent: Callable[[tuple], Any] | None = None, max_ops: int = 1000) -> Any:
        # Each pickle has the whole limit of bytes for itself.
        stream.limit = min(stream.size, stream.at + MAX_PICKLE + 1)
        return Unpickler(stream, persistent, standins, max_ops).load()

    if (magic := pickled()) != MAGIC:
        raise ReaderError(f"a plain pickle ({shown(magic)}), not a checkpoint of torch.save")
    protocol, system = pickled(), pickled()
    if protocol != PROTOCOL or not isinstance(system, dict):
        raise ReaderError("a legacy checkpoint of an unknown version")
    storages: dict[str, Storage] = {}

    def persistent(reference: tuple) -> Any:
        match reference:
            case (
                "module",
                Standin() as cls,
                *_,
            ):  # a class with its source code beside it, for whoever wants to compare
                return cls
            case ("storage", StorageClass(dtype=dtype), str() as key, _, int() as numel, view) if (
                0 <= numel < 1 << 48
            ):
                pass
            case _:
                raise ReaderError("its pickle refers to something that is no storage")
        storage = storages.setdefault(
            key, Storage(dtype, numel, None, system.get("little_endian") is False)
        )
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise ReaderError(f"the storage {shown(key)} is used in two ways")
        match view:
            case None:
                return storage
            case (_, int() as offset, int() as size) if min(offset, size) >= 0:
                return storage.part(offset, size)
        raise ReaderError(f"the storage {shown(key)} is cut in an unknown way")

    tree, keys = pickled(persistent, MAX_OPS), pickled(max_ops=MAX_OPS // 4)
    # Only texts are compared: comparing shared nested lists could take for ever.
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not texts or sorted(keys) != sorted(storages):
        raise ReaderError("a legacy checkpoint whose list of storages does not fit its tensors")
    at, order = stream.at, "<" if system.get("little_endian") is not False else ">"
    for key in keys:
        storage = storages[key]
        count = struct.unpack(f"{order}q", file.read(at, 8))[0]
        if count != storage.numel:
            raise ReaderError(
                f"the storage {shown(key)} has {count} elements, its tensors need {storage.numel}"
            )
        storage.read = partial(_read_run, file, at + 8, storage.nbytes)
        at += 8 + storage.nbytes
    if at != file.size:
        problem = (
            f"ends {at - file.size} bytes too soon: truncated?"
            if at > file.size
            else "is longer than its storages"
        )
        raise ReaderError(f"the file {problem}")
    checkpoint = Checkpoint(path, "legacy", [file], {})
    _find_state_dict(checkpoint, tree)
    checkpoint.standins, checkpoint.metadata = dict(standins), system
    return checkpoint


def _read_run(file: File, begin: int, length: int, start: int, out: np.ndarray) -> None:
    if start + out.size > length:
        raise ReaderError("a tensor reaches beyond its storage")
    file.fill(begin + start, out)


# -------------------------------------------------------------------------------------- safetensors

_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


def _json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object without repeated names; ReaderError otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        new = dict(pairs)
        if len(new) != len(pairs):
            twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
            raise ReaderError(f"{what} names {shown(twice)} twice")
        return new

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except ReaderError:
        raise
    except (ValueError, RecursionError):
        raise ReaderError(f"{what} is no JSON: truncated or damaged") from None
    if not isinstance(value, dict):
        raise ReaderError(f"{what} is no JSON object")
    return value


def _open_safetensors(path: Path, file: File) -> Checkpoint:
    length = struct.unpack("<Q", file.read(0, 8))[0]
    if length > MAX_JSON:
        raise ReaderError(f"its header announces {length} bytes, more than {MAX_JSON}")
    header = _json(file.read(8, length), "its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ReaderError("its __metadata__ is something else than texts")
    tensors, spans = {}, []
    for name, entry in header.items():
        match entry:
            case {
                "dtype": str() as code,
                "shape": list() as shape,
                "data_offsets": [int() as begin, int() as end],
                **rest,
            }:
                pass
            case _:
                raise ReaderError(f"its header does not describe the tensor {shown(name)} properly")
        if code not in _SAFETENSORS or rest:
            raise ReaderError(
                f"the tensor {shown(name)} has the dtype {shown(code)}, which is not supported"
            )
        shape, dtype = sizes(shape, "shape"), TORCH_DTYPES[_SAFETENSORS[code]]
        if (
            type(begin) is not int
            or type(end) is not int
            or end - begin != prod(shape) * dtype.itemsize
        ):
            raise ReaderError(
                f"the {shown(end - begin)} bytes of tensor {shown(name)} do not fit {list(shape)}"
            )
        spans.append((begin, end, name))
        tensors[name] = LazyTensor(
            shape, dtype, partial(_read_plain, file, 8 + length + begin, shape, dtype)
        )
    # As the format asks: the arrays cover the rest of the file, without overlaps or holes.
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            problem = "overlaps another" if begin < at else "leaves a hole before it"
            raise ReaderError(f"the tensor {shown(name)} {problem}")
        at = end
    if 8 + length + at != file.size:
        raise ReaderError(
            f"its tensors take {shown(at)} bytes, the file has {file.size - 8 - length}: truncated"
        )
    checkpoint = Checkpoint(path, "safetensors", [file], tensors)
    checkpoint.metadata = metadata
    return checkpoint


def _read_plain(file: File, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    raw = np.empty(prod(shape) * dtype.itemsize, np.uint8)
    file.fill(start, raw)
    return decoded(raw, dtype).reshape(shape)


def _open_index(path: Path, file: File) -> Checkpoint:
    """A sharded checkpoint by its index."""
    if file.size > MAX_JSON:
        raise ReaderError("a JSON file too large for an index")
    index = _json(file.read(0, file.size), "the file")
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ReaderError("a JSON file without a weight_map: not the index of a checkpoint")
    shards: dict[str, Checkpoint] = {}
    checkpoint = Checkpoint(path, "safetensors", [file], {})
    try:
        for shard in dict.fromkeys(names.values()):
            if len(shards) >= MAX_SHARDS:
                raise ReaderError(f"more than {MAX_SHARDS} shards")
            if (
                shard in (".", "..")
                or not shard.isprintable()
                or any(c in shard for c in "/\\:")
                or not shard
            ):
                raise ReaderError(
                    f"the shard {shown(shard)} is not the name of a file beside the index"
                )
            try:
                shards[shard] = _open(path.parent / shard, shard=True)
            except ReaderError as error:
                raise ReaderError(f"shard {shown(shard)}: {error}") from None
            checkpoint._files += shards[shard]._files
        missing = [name for name, shard in names.items() if name not in shards[shard].tensors]
        extra = [
            name for shard in shards for name in shards[shard].tensors if names.get(name) != shard
        ]
        if missing or extra:
            raise ReaderError(
                f"index and shards differ: {len(missing)} tensors missing, {len(extra)} not in the"
                f" index (first: {shown((missing + extra)[0])})"
            )
    except BaseException:
        checkpoint.close()
        raise
    checkpoint.tensors = {name: shards[shard].tensors[name] for name, shard in names.items()}
    standins: Counter[str] = Counter()
    for opened in shards.values():
        checkpoint.format = opened.format
        standins.update(opened.standins)
    checkpoint.standins = dict(standins)
    metadata = index.get("metadata")
    checkpoint.metadata = metadata if isinstance(metadata, dict) else {}
    return checkpoint
