"""The latent cache: what a frozen first stage and a tokenizer make of a data set, kept in ArrayRecord shards.

A folder with ``cache.json`` (its key, the arrays of a record, the parts) and ``PART-00000-of-00010.array_record``. A record is one
picture: its arrays, one after another, and its caption in UTF-8. A shard appears under its name when it is whole.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16)
import numpy as np

from ldm_jax.data.sources import Source, Subset
from ldm_jax.data.stream import Batches, Stream
from ldm_jax.errors import DataError

FORMAT = 1
_NAME = "cache.json"
_AGAIN = "run the encode command again, it goes on where it stopped"


@dataclasses.dataclass(frozen=True)
class CacheInfo:
    """What ``cache.json`` says.

    Attributes:
      key: what the latents depend on: setting -> value, or hash. Another value means other latents.
      fields: name -> {"dtype", "shape"} of a record's arrays, in their order.
      parts: name -> how many pictures.
      shard_size: pictures per shard; the last of a part has the rest.
    """

    key: dict[str, Any]
    fields: dict[str, dict[str, Any]]
    parts: dict[str, int]
    shard_size: int
    format: int = FORMAT

    def shards(self, part: str) -> list[tuple[str, range]]:
        """(file name, the pictures in it) of each shard of a part."""
        count = self.parts[part]
        total = math.ceil(count / self.shard_size)
        starts = range(0, count, self.shard_size)
        return [
            (
                f"{part}-{i:05d}-of-{total:05d}.array_record",
                range(start, min(start + self.shard_size, count)),
            )
            for i, start in enumerate(starts)
        ]


def read_info(folder: str | os.PathLike[str]) -> CacheInfo:
    """The description of a cache; DataError where there is none, or of another format."""
    file = Path(folder, _NAME)
    try:
        told = json.loads(file.read_text())
    except FileNotFoundError:
        raise DataError(
            f"{folder} is no latent cache: make one with python -m ldm_jax.data encode"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): encode into a new folder") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise DataError(f"{file} is not of format {FORMAT}: encode into a new folder")
    return CacheInfo(**told)


def claim(folder: str | os.PathLike[str], info: CacheInfo) -> None:
    """Begins a cache, or goes on with one of the same description; DataError where the folder holds anything else."""
    folder, info = Path(folder), CacheInfo(**json.loads(json.dumps(dataclasses.asdict(info))))
    if (folder / _NAME).exists():
        there = read_info(folder)
        check_key(folder, there, info.key)
        if there != info:
            raise DataError(
                f"{folder} was begun with another dtype, shard size or data: encode into a new folder"
            )
        return
    if folder.exists() and any(path.suffix != ".part" for path in folder.iterdir()):
        raise DataError(f"{folder} is not empty and holds no latent cache: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{_NAME}.part"
    partial.write_text(json.dumps(dataclasses.asdict(info), indent=1) + "\n")
    partial.replace(folder / _NAME)


def check_key(folder: str | os.PathLike[str], info: CacheInfo, key: Mapping[str, Any]) -> None:
    """DataError that names what differs, if the cache was made from anything but ``key``; only entries of ``key`` are compared."""
    key = json.loads(json.dumps(key))
    for name, value in key.items():
        if info.key.get(name) != value:
            what = name.removesuffix(" sha256")
            told = (
                f"another {what}"
                if what != name
                else f"{name}={info.key.get(name)!r}, not {value!r}"
            )
            raise DataError(
                f"the latent cache {folder} was made with {told}: encode into a new folder"
            )


def write_shard(
    file: Path, records: Iterable[tuple[Mapping[str, np.ndarray], str]], info: CacheInfo
) -> None:
    """Writes (arrays, caption) of one shard; the file appears when it is whole."""
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = file.with_name(f"{file.name}.part")
    # Groups of one record: training reads single pictures in random order.
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    for arrays, caption in records:
        parts = [
            np.ascontiguousarray(arrays[name], field["dtype"])
            for name, field in info.fields.items()
        ]
        writer.write(b"".join(part.tobytes() for part in parts) + caption.encode())
    writer.close()
    partial.replace(file)


def count_records(file: Path) -> int | None:
    """How many records a shard holds; None where it is missing or damaged."""
    from array_record.python.array_record_module import ArrayRecordReader

    if not file.is_file():
        return None
    try:
        reader = ArrayRecordReader(str(file))
        count = reader.num_records()
        reader.close()
        return count
    except Exception:  # its errors are of many kinds
        return None


class LatentSource:
    """One part of a cache by index: ``source[i]`` is {"moments" [flips, h, w, c], any further field, "caption"}. Picklable.

    Raises:
      DataError: a shard is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], part: str):
        self.path, self.info = os.fspath(folder), read_info(folder)
        if part not in self.info.parts:
            raise DataError(
                f"the latent cache {folder} has no part {part!r}: it has {', '.join(self.info.parts)}"
            )
        self._shards = self.info.shards(part)
        self._readers: dict[tuple[int, int], Any] = {}
        lost = [n for n, places in self._shards if count_records(Path(folder, n)) != len(places)]
        if lost:
            raise DataError(
                f"the latent cache {folder} is not whole: {len(lost)} of {len(self._shards)} shards of {part!r} are "
                f"missing or damaged (first: {lost[0]}): {_AGAIN}"
            )

    def __len__(self) -> int:
        return self._shards[-1][1].stop

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, place = divmod(index, self.info.shard_size)
        data = self._reader(shard).read([place])[0]
        row: dict[str, Any] = {}
        at = 0
        for name, field in self.info.fields.items():
            dtype, shape = np.dtype(field["dtype"]), tuple(field["shape"])
            size = dtype.itemsize * math.prod(shape)
            row[name] = np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape)
            at += size
        return row | {"caption": data[at:].decode()}

    def _reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        key = os.getpid(), shard  # as with zip archives, every process opens its own
        if key not in self._readers:
            self._readers[key] = ArrayRecordReader(
                os.path.join(self.path, self._shards[shard][0]), "readahead_buffer_size:0"
            )
        return self._readers[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}


class LatentLoader(Stream):
    """Reads batches of a latent cache in the very order in which ``Loader`` reads the pictures; see `Stream`.

    A batch has "moments" [B, h, w, c], "caption" list of B str, "index" int64 [B] and the cache's further fields.

    Args:
      folder: of the cache.
      part: of the data.
      flip: take every second picture mirrored, on average, the same ones as ``ImageTransform(flip=True)``.
      options: those of `Stream`.

    Raises:
      DataError: the cache is not whole, or holds no mirrored pictures.
    """

    def __init__(
        self, folder: str | os.PathLike[str], part: str, *, flip: bool = False, **options: Any
    ):
        self.source = LatentSource(folder, part)
        if flip and self.source.info.fields["moments"]["shape"][0] != 2:
            raise DataError(
                f"the latent cache {folder} was made without data.flip: encode into a new folder with it"
            )

        def make(finite: bool = False, **rest: Any) -> Batches:
            return _LatentBatches(self.source, flip and not finite, finite=finite, **rest)

        super().__init__(make, path=self.source.path, count=len(self.source), **options)


class _LatentBatches(Batches):
    def __init__(self, source: LatentSource, flip: bool, **options: Any):
        super().__init__(**options)
        self._source, self._flip = source, flip

    def sample(self, wanted: int, rng: np.random.Generator) -> dict[str, Any]:
        row = self._source[wanted]
        mirror = self._flip and rng.random(4)[3] < 0.5  # the draws of ImageTransform
        return row | {
            "moments": row["moments"][int(mirror)],
            "index": wanted,
            "valid": bool(row.pop("valid")[0]),
        }

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        arrays = {
            name: np.stack([s[name] for s in samples])
            for name in samples[0]
            if name not in ("caption", "valid")
        }
        return arrays | {"caption": [s["caption"] for s in samples]}


def fingerprint(source: Source) -> str:
    """sha256 of a source's metadata and, for folders and archives, of its files' sizes or checksums: what can be had without reading pictures."""
    digest = hashlib.sha256()
    inner, indices = (
        (source.source, source.indices)
        if isinstance(source, Subset)
        else (source, range(len(source)))
    )
    stamp = getattr(inner, "stamp", None)
    rows: Sequence[dict[str, Any]] = inner.rows
    for i in indices:
        digest.update(
            json.dumps([rows[i], stamp(i) if stamp else None], sort_keys=True, default=str).encode()
        )
    return digest.hexdigest()
