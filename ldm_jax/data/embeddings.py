"""Databases of embeddings: .npz files in the layout of the original, which are shards of one.

A file holds "embedding" [n, d], "img_id" [n] names of the pictures and "patch_coords" [n, 4], the
part of the picture (left, top, right, bottom) in pixels. `ldm-data embed` writes a folder of them
with embeddings.json (`EmbeddingInfo`); a shard appears under its name when it is whole.
"""

import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.errors import DataError
from ldm_jax.io.atomic import atomic_path, write_atomic
from ldm_jax.io.paths import as_path, exists, local_copy, read_bytes

_NAME = "embeddings.json"


@dataclasses.dataclass(frozen=True)
class EmbeddingInfo:
    """The content of embeddings.json.

    Attributes:
      key: What the embeddings depend on: setting -> value, or hash.
      dim: Length of a vector.
      count: Pictures; those that cannot be read have no vector.
      shard_size: Pictures of a shard; the last one has the rest.
      dtype: Of the vectors on disk, "float16" or "float32".
    """

    key: dict[str, Any]
    dim: int
    count: int
    shard_size: int
    dtype: str = "float32"
    format: int = 1

    def shards(self) -> list[tuple[str, range]]:
        """Returns (file name, places of its pictures) of each shard."""
        size, total = self.shard_size, math.ceil(self.count / self.shard_size)
        return [
            (f"embeddings-{i:05d}-of-{total:05d}.npz", range(self.count)[i * size : (i + 1) * size])
            for i in range(total)
        ]


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """All vectors of a database, in the order of its files.

    Attributes:
      vectors: [n, d], of the type on disk.
      names: Names of the pictures, [n]; several vectors may be of one.
      coords: int64 [n, 4], the parts of the pictures; None where a file has none.
    """

    vectors: np.ndarray
    names: np.ndarray
    coords: np.ndarray | None


def begin_embeddings(folder: str | os.PathLike[str], info: EmbeddingInfo) -> None:
    """Begins a folder of embeddings, or resumes one of the same description.

    Raises:
      DataError: The folder holds anything else.
    """
    folder = as_path(folder)
    if exists(folder / _NAME):
        found, wanted = _description(folder), json.loads(json.dumps(dataclasses.asdict(info)))
        different = [k for k, v in wanted["key"].items() if found.get("key", {}).get(k) != v]
        different += [k for k, v in wanted.items() if k != "key" and found.get(k) != v]
        if different:
            raise DataError(
                f"{folder} was begun with another {different[0].removesuffix(' sha256')}: embed "
                "into a new folder"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty and holds no embeddings: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / _NAME, json.dumps(dataclasses.asdict(info), indent=1) + "\n")


def write_embeddings(file: Path, found: Embeddings) -> None:
    """Writes a shard, which appears when it is whole."""
    with atomic_path(file) as temporary, temporary.open("wb") as opened:
        # NumPy would add .npz to a name without it.
        arrays: dict[str, Any] = {"embedding": found.vectors, "img_id": found.names}
        arrays |= {} if found.coords is None else {"patch_coords": found.coords}
        np.savez(opened, **arrays)


def is_whole(file: Path) -> bool:
    """Whether a shard is there and its archive is not cut off."""
    if not exists(file):
        return False
    try:
        with zipfile.ZipFile(local_copy(file)) as archive:
            return "embedding.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def embedding_files(path: str | os.PathLike[str]) -> list[Path]:
    """Returns the .npz files of a database: ``path`` itself, or those of a folder, sorted.

    Raises:
      DataError: There are none, or embeddings.json names some that are missing.
    """
    path = local_copy(path)
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.npz"))
    if (path / _NAME).exists():
        info = EmbeddingInfo(**_description(path))
        lost = [name for name, _ in info.shards() if not is_whole(path / name)]
        if lost:
            raise DataError(
                f"{path} is not whole: {len(lost)} of {len(info.shards())} shards are missing "
                f"(first: {lost[0]}): run ldm-data embed again to complete it"
            )
    if not files:
        raise DataError(
            f"{path} is no database of embeddings: give a folder of ldm-data embed, or .npz files "
            "with an array 'embedding'"
        )
    return files


def read_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """Reads a database, all files of it; see `embedding_files`.

    Raises:
      DataError: A file is damaged, or the files do not fit together.
    """
    vectors: list[np.ndarray] = []
    names: list[np.ndarray] = []
    coords: list[np.ndarray] = []
    for file in embedding_files(path):
        arrays = _arrays(file)
        found = arrays["embedding"]
        if found.ndim != 2 or found.dtype.kind != "f":
            raise DataError(
                f"{file}: 'embedding' is {found.dtype} {found.shape}, not floats [n, d]"
            )
        if vectors and found.shape[1] != vectors[0].shape[1]:
            raise DataError(
                f"{file} has vectors of {found.shape[1]} numbers, the files before it of "
                f"{vectors[0].shape[1]}"
            )
        n = len(found)
        ids = arrays.get("img_id", np.array([f"{file.stem}-{i}" for i in range(n)]))
        for name, array in arrays.items():
            if len(array) != n:
                raise DataError(f"{file}: {len(array)} rows of {name!r}, {n} of 'embedding'")
        vectors.append(found)
        names.append(ids.astype(str))
        if "patch_coords" in arrays:
            coords.append(arrays["patch_coords"].astype(np.int64))
    whole = len(coords) == len(vectors)
    return Embeddings(
        np.concatenate(vectors), np.concatenate(names), np.concatenate(coords) if whole else None
    )


def stamp_of(path: str | os.PathLike[str]) -> tuple[Any, ...]:
    """Returns what changes with the files of a database."""
    files = embedding_files(path)
    return tuple((os.fspath(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)


def _arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            known = ("embedding", "img_id", "patch_coords")
            arrays = {name: archive[name] for name in known if name in archive}
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # NumPy and zipfile raise nearly every class on damaged files
        raise DataError(f"{file} is no .npz file of arrays ({error})") from None
    if "embedding" not in arrays:
        raise DataError(f"{file} has no array 'embedding': it is no database of embeddings")
    return arrays


def _description(folder: Path) -> Mapping[str, Any]:
    file = folder / _NAME
    try:
        content = json.loads(read_bytes(file))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): embed into a new folder") from None
    if not isinstance(content, dict) or content.get("format") != 1:
        raise DataError(f"{file} is not of format 1: embed into a new folder")
    return content
