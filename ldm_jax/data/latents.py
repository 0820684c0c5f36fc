"""The latent cache: encoded pictures and tokenized captions of a data set, in ArrayRecord shards.

A folder with cache.json (`CacheInfo`) and PART-00000-of-00010.array_record. A record is one
picture: its arrays, one after another, then its caption in UTF-8 (format 1), or a JSON object of
its caption and its text columns (format 2). Format 3 has a part PART-HxW for each aspect-ratio
bucket of a part. A shard appears under its name when it is whole.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16)
import numpy as np

from ldm_jax.data.captions import CAPTION_SETTINGS, Captions, make_captions
from ldm_jax.data.order import Place
from ldm_jax.data.sources import Source, Subset
from ldm_jax.data.sources.base import Handles
from ldm_jax.data.stream import Batches, Stream
from ldm_jax.errors import DataError, StorageError
from ldm_jax.io.atomic import atomic_path, write_atomic
from ldm_jax.io.paths import as_path, exists, local_copy, read_bytes

_NAME = "cache.json"
_RESUME = "run the encode command again to complete it"


@dataclasses.dataclass(frozen=True)
class CacheInfo:
    """The content of cache.json.

    Attributes:
      key: What the latents depend on: setting -> value, or hash. Another value: other latents.
      fields: Name -> {"dtype", "shape"} of a record's arrays, in their order.
      parts: Name -> number of pictures.
      shard_size: Pictures in a shard; the last one of a part has the rest.
      format: 2 where records have text columns, else 1; 3 with aspect-ratio buckets.
      columns: The text columns of a record, from which other captions can be made.
      moments: Shapes of the moments by part, in format 3, in place of that in ``fields``.
    """

    key: dict[str, Any]
    fields: dict[str, dict[str, Any]]
    parts: dict[str, int]
    shard_size: int
    format: int = 1
    columns: Sequence[str] = ()
    moments: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))  # JSON has lists

    def buckets(self, part: str) -> list[str]:
        """Returns the parts of the buckets of ``part``, in the order of their sizes."""
        pattern = re.compile(rf"{re.escape(part)}-\d+x\d+")
        return [name for name in self.parts if pattern.fullmatch(name)]

    def fields_of(self, part: str) -> dict[str, dict[str, Any]]:
        """Returns ``fields`` with the shape that the moments have in a part."""
        if part not in self.moments:
            return self.fields
        moments = {**self.fields["moments"], "shape": self.moments[part]}
        return {**self.fields, "moments": moments}

    def shards(self, part: str) -> list[tuple[str, range]]:
        """Returns (file name, indices of the pictures in it) of each shard of a part."""
        count, size = self.parts[part], self.shard_size
        total = math.ceil(count / size)
        return [
            (f"{part}-{i:05d}-of-{total:05d}.array_record", range(count)[i * size : (i + 1) * size])
            for i in range(total)
        ]


def bucket_part(part: str, size: tuple[int, int]) -> str:
    """Returns the name of a bucket's part; the names sort as the sizes (H, W) do."""
    return f"{part}-{size[0]:05d}x{size[1]:05d}"


def read_info(folder: str | os.PathLike[str]) -> CacheInfo:
    """Reads the description of a cache; DataError where there is none, or of another format."""
    file = as_path(folder) / _NAME
    try:
        content = json.loads(read_bytes(file))
    except FileNotFoundError:
        raise DataError(
            f"{folder} is no latent cache: make one with python -m ldm_jax.data encode"
        ) from None
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): encode into a new folder") from None
    if not isinstance(content, dict) or content.get("format") not in (1, 2, 3):
        raise DataError(f"{file} is not of format 1, 2 or 3: encode into a new folder")
    return CacheInfo(**content)


def claim(folder: str | os.PathLike[str], info: CacheInfo) -> None:
    """Begins a cache, or resumes one of the same description.

    Raises:
      DataError: The folder holds anything else.
    """
    folder, info = as_path(folder), CacheInfo(**json.loads(json.dumps(dataclasses.asdict(info))))
    if (folder / _NAME).exists():
        found = read_info(folder)
        check_key(folder, found, info.key)
        if found != info:
            raise DataError(
                f"{folder} was begun with another dtype, shard size or data: "
                "encode into a new folder"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty and holds no latent cache: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    content = dataclasses.asdict(info)
    if info.format == 1:
        del content["columns"]
    if info.format < 3:
        del content["moments"]
    write_atomic(folder / _NAME, json.dumps(content, indent=1) + "\n")


def check_key(folder: str | os.PathLike[str], info: CacheInfo, key: Mapping[str, Any]) -> None:
    """Compares the entries of ``key`` with what a cache was made from.

    Settings of captions need not agree where the cache has text columns to make them from.

    Raises:
      DataError: Names the first entry that differs.
    """
    free = {f"data.{name}" for name in CAPTION_SETTINGS} if info.columns else set()
    for name, value in json.loads(json.dumps(dict(key))).items():
        newer = name not in info.key and not value  # a setting that older caches do not know
        if name not in free and not newer and info.key.get(name) != value:
            subject = name.removesuffix(" sha256")
            difference = f"{name}={info.key.get(name)!r}, not {value!r}"
            difference = difference if subject == name else f"another {subject}"
            raise DataError(
                f"the latent cache {folder} was made with {difference}: encode into a new folder"
            )


def text_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the columns that a cache keeps: of texts, numbers, or lists of them."""
    plain = str, int, float, bool, type(None)
    columns = dict.fromkeys(key for row in rows for key in row)
    return [
        column
        for column in columns
        if all(
            isinstance(value := row.get(column), plain)
            or (isinstance(value, list) and all(isinstance(item, plain) for item in value))
            for row in rows
        )
    ]


def write_shard(
    file: Path,
    records: Iterable[tuple[Mapping[str, np.ndarray], str | tuple[str, Mapping[str, Any]]]],
    info: CacheInfo,
) -> None:
    """Writes a shard, which appears when it is whole.

    Args:
      file: The shard.
      records: (arrays, text) of each picture; the text is its caption, or for a cache of format 2
        its caption and its row.
      info: The description of the cache.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    with atomic_path(file) as temporary:
        # Groups of one record: training reads single pictures in random order.
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        for arrays, text in records:
            parts = [
                np.ascontiguousarray(arrays[name], field["dtype"]).tobytes()
                for name, field in info.fields.items()
            ]
            if not isinstance(text, str):
                columns = {name: text[1].get(name) for name in info.columns}
                text = json.dumps({"caption": text[0], "columns": columns})
            writer.write(b"".join(parts) + text.encode())
        writer.close()


def count_records(file: Path) -> int | None:
    """Returns the number of records in a shard; None where it is missing or damaged."""
    if not (exists(file) and file.is_file()):
        return None
    local = local_copy(file)
    try:
        reader = _open_shard(str(local))
        count = reader.num_records()
        reader.close()
        return count
    except Exception:  # array_record raises several classes on damaged files
        return None


def _open_shard(file: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(file, "readahead_buffer_size:0")


class LatentSource:
    """One part of a cache: an item has "moments" [flips, h, w, c], further fields and "caption".

    In a cache of format 2 it has also "columns", the dict of the row's text columns. Picklable.

    Raises:
      DataError: A shard is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], part: str):
        self.path, self.info = os.fspath(folder), read_info(folder)
        if part not in self.info.parts:
            raise DataError(
                f"the latent cache {folder} has no part {part!r}: it has "
                f"{', '.join(self.info.parts)}"
            )
        self._shards, self._readers = self.info.shards(part), Handles(_open_shard)
        self._fields = self.info.fields_of(part)
        lost = [n for n, rows in self._shards if count_records(as_path(folder) / n) != len(rows)]
        if lost:
            raise DataError(
                f"the latent cache {folder} is not whole: {len(lost)} of {len(self._shards)} "
                f"shards of {part!r} are missing or damaged (first: {lost[0]}): {_RESUME}"
            )
        shards = (as_path(folder) / name for name, _ in self._shards)
        self._files = [os.fspath(local_copy(shard)) for shard in shards]

    def __len__(self) -> int:
        return self._shards[-1][1].stop

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, place = divmod(index, self.info.shard_size)
        data = self._readers(self._files[shard]).read([place])[0]
        row: dict[str, Any] = {}
        at = 0
        for name, field in self._fields.items():
            dtype, shape = np.dtype(field["dtype"]), tuple(field["shape"])
            row[name] = np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape)
            at += dtype.itemsize * math.prod(shape)
        text = data[at:].decode()
        return row | ({"caption": text} if self.info.format == 1 else json.loads(text))


class LatentBuckets:
    """All buckets of a part of a cache, one after another, as `LatentSource` reads a part.

    Attributes:
      groups: The indices of each bucket's records.
    """

    def __init__(self, folder: str | os.PathLike[str], part: str):
        self.path, self.info = os.fspath(folder), read_info(folder)
        self._sources = [LatentSource(folder, name) for name in self.info.buckets(part)]
        ends = np.cumsum([len(source) for source in self._sources])
        self.groups = np.split(np.arange(ends[-1]), ends[:-1])

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def __getitem__(self, index: int) -> dict[str, Any]:
        for source in self._sources:
            if index < len(source):
                return source[index]
            index -= len(source)
        raise IndexError(index)


class LatentLoader(Stream):
    """Reads batches of a latent cache in the order in which `Loader` reads the pictures.

    A batch has "moments" [B, h, w, c], "caption" list of B str, "index" int64 [B] and the further
    fields of the cache. With aspect-ratio buckets a batch is of one bucket.

    Args:
      folder: The cache.
      part: The part of the data.
      flip: Mirror every second picture, on average: the same ones as ``ImageTransform(flip=True)``.
      caption: As of `Loader`; None uses the captions of the cache. Where other captions are drawn
        or made, a batch has no "encoded" tokens.
      **options: Those of `Stream`.

    Raises:
      DataError: The cache is not whole, or has no mirrored pictures or not the captions' columns.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        part: str,
        *,
        flip: bool = False,
        caption: str | Sequence[str] | Captions | None = None,
        **options: Any,
    ):
        buckets = read_info(folder).buckets(part)
        source = LatentBuckets(folder, part) if buckets else LatentSource(folder, part)
        self.source, self._flip, info = source, flip, source.info
        if buckets:
            listed = ", ".join(f"{name}: {info.parts[name]}" for name in buckets)
            self.notes = [f"{len(buckets)} buckets in the latent cache (height x width: {listed})"]
        if flip and info.fields["moments"]["shape"][0] != 2:
            raise DataError(
                f"the latent cache {folder} was made without data.flip: "
                "encode into a new folder with it"
            )
        self.captions = make_captions(caption)
        if self.captions is not None and not self.captions.random:
            cached = [info.key.get("data.caption")]
            if cached == [*self.captions.templates] or not info.columns:
                self.captions = None
        if self.captions is not None and not info.columns:
            raise DataError(
                f"the latent cache {folder} has no columns to draw captions from: "
                "encode into a new folder"
            )
        groups = getattr(source, "groups", None)
        super().__init__(path=source.path, count=len(source), groups=groups, **options)

    def _make_batches(self, *, finite: bool, **options: Any) -> Batches:
        flip = self._flip and not finite
        return _LatentBatches(self.source, flip, self.captions, finite=finite, **options)


class _LatentBatches(Batches):
    def __init__(
        self,
        source: LatentSource | LatentBuckets,
        flip: bool,
        captions: Captions | None,
        **options: Any,
    ):
        super().__init__(**options)
        self._source, self._flip, self._captions = source, flip, captions

    def sample(
        self, wanted: Place, rng: np.random.Generator, text_rng: np.random.Generator | None
    ) -> dict[str, Any]:
        row = self._source[wanted.sample]
        columns = row.pop("columns", {})
        if self._captions is not None:
            row["caption"] = self._captions(columns, text_rng)
            row.pop("encoded", None)
        mirror = self._flip and rng.random(4)[3] < 0.5  # the draws of ImageTransform
        moments, valid = row["moments"][int(mirror)], bool(row.pop("valid")[0])
        return row | {"moments": moments, "index": wanted.sample, "valid": valid}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        names = [name for name in samples[0] if name not in ("caption", "valid")]
        batch: dict[str, Any] = {name: np.stack([s[name] for s in samples]) for name in names}
        return batch | {"caption": [s["caption"] for s in samples]}


def fingerprint(source: Source) -> str:
    """Returns a sha256 of a source's metadata and of its files' sizes, times or checksums.

    Pictures are not read.
    """
    digest = hashlib.sha256()
    inner, indices = source, range(len(source))
    if isinstance(source, Subset):
        inner, indices = source.source, source.indices
    stamp = getattr(inner, "stamp", None)
    rows: Sequence[dict[str, Any]] = inner.rows
    for i in indices:
        item = [rows[i], stamp(i) if stamp else None]
        digest.update(json.dumps(item, sort_keys=True, default=str).encode())
    return digest.hexdigest()
