"""WebDataset: samples as files of one name in tar shards."""

import logging
import os
import posixpath
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ldm_jax.data.decode import PICTURE_SUFFIXES
from ldm_jax.data.sources.base import Handles, Rows, find_shards
from ldm_jax.data.sources.files import Member, open_raw, read_at, tar_members
from ldm_jax.data.sources.tables import encoding_of, parse_json, with_text
from ldm_jax.errors import DataError

_LOG = logging.getLogger(__name__)
_METADATA = (".json", ".txt", ".cls", ".caption")

_Sample = tuple[str, dict[str, Member]]  # key, extension -> file


class WebDataset(Rows):
    """Tar shards in which the files of a sample follow one another: 000.jpg, 000.txt, 000.json ...

    Reading is random access through an index, made once from the headers of the shards. Columns:
    "text" from .txt or the JSON's caption, "label" from .cls, and those of the .json. Samples
    without a picture are left out, with a warning. A key ends at the first dot of the file's name,
    as in WebDataset, or at the last one where the rest would not be the extension of a picture.

    Args:
      path: A shard, a folder of shards, or a pattern such as "data/train-*.tar".
      image: The picture's extension, such as "jpg"; "" takes the first that is a picture.
      text: The column of captions in the .json; "" finds "text", "caption" and other usual names.

    Raises:
      DataError: There is no shard or no picture, a shard is compressed, or a .json is malformed.
    """

    def __init__(self, path: str | os.PathLike[str], *, image: str = "", text: str = ""):
        self.path, self._handles = os.fspath(path), Handles(open_raw)
        self._pictures: list[tuple[str, Member]] = []
        rows: list[dict[str, Any]] = []
        captions: list[str] = []
        wanted = (f".{image.lower().lstrip('.')}",) if image else PICTURE_SUFFIXES
        for shard in find_shards(self.path, ".tar"):
            samples = _samples(shard, wanted)
            pictures = [next((s for s in files if s in wanted), None) for _, files in samples]
            if without := pictures.count(None):
                first = next(k for (k, _), p in zip(samples, pictures, strict=True) if p is None)
                message = "%s: %d samples without a picture (%s) are left out (first: %s)"
                _LOG.warning(message, shard, without, image or "data.image", first)
            for (key, files), picture in zip(samples, pictures, strict=True):
                if picture is not None:
                    row, caption = self._read_columns(shard, key, files)
                    name = f"{os.path.basename(shard)}/{key}{picture}"
                    rows.append(row | {"file_name": name})
                    captions.append(caption)
                    self._pictures.append((shard, files[picture]))
        if not rows:
            raise DataError(f"{self.path}: no picture found ({', '.join(s[1:] for s in wanted)})")
        self.rows = with_text(rows, self.path, text)
        for row, caption in zip(self.rows, captions, strict=True):
            row["text"] = caption or row["text"]

    def _read_columns(
        self, shard: str, key: str, files: dict[str, Member]
    ) -> tuple[dict[str, Any], str]:
        """Returns the columns of a sample's .json and .cls, and the caption of its .txt."""
        where = f"{os.path.basename(shard)}/{key}"
        try:
            data = {
                s: read_at(self._handles(shard), files[s], shard) for s in _METADATA if s in files
            }
        except OSError as error:
            raise DataError(f"{where} cannot be read: {error}") from None
        texts = {s: d.decode(encoding_of(d), errors="replace").strip() for s, d in data.items()}
        row = parse_json(data[".json"], f"{where}.json") if ".json" in data else {}
        if not isinstance(row, dict):
            raise DataError(f"{where}.json is not a JSON object")
        row = {k: v for k, v in row.items() if k not in ("file_name", "image")}
        if label := texts.get(".cls"):
            row["label"] = int(label) if label.isdecimal() else label
        return row, texts.get(".txt") or texts.get(".caption") or ""

    def stamp(self, index: int) -> int:
        """Returns the file's time in its shard."""
        return self._pictures[index][1].time

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the row with the picture's encoded bytes as "image"; raises OSError."""
        shard, member = self._pictures[index]
        return {**self.rows[index], "image": read_at(self._handles(shard), member, shard)}


def _samples(shard: str, wanted: tuple[str, ...]) -> list[_Sample]:
    """Groups the files of a shard into samples, in the order of their first files."""
    files = [(*_split(name), member) for name, member in tar_members(shard)]
    whole = {key for key, extension, _ in files if extension in wanted}
    suffixes = {*wanted, *_METADATA}
    longer = [_at_last_dot(key, extension) for key, extension, _ in files]
    companions = Counter(key for key, extension in longer if extension in suffixes)
    split: list[tuple[str, str, Member]] = []
    for (key, extension, member), (long_key, last) in zip(files, longer, strict=True):
        # "photo.v1.jpg" and "photo.v1.txt" are a sample "photo.v1"; "1.seg.png" is a part of "1".
        own = last in suffixes and (key not in whole or companions[long_key] > 1)
        own = own and extension not in wanted
        split.append((long_key, last, member) if own else (key, extension, member))
    samples = _group(split, shard)
    parts = Counter(
        extension
        for _, extensions in samples
        for extension in extensions
        if extension not in wanted and extension.endswith(PICTURE_SUFFIXES)
    )
    if parts:
        listed = ", ".join(f"{n} {extension}" for extension, n in parts.items())
        _LOG.warning("%s: pictures of other extensions are not read: %s", shard, listed)
    return samples


def _at_last_dot(key: str, extension: str) -> tuple[str, str]:
    """Splits "key" + ".v1.jpg" into "key.v1", ".jpg"."""
    rest, last = posixpath.splitext(extension)
    return key + rest, last


def _split(name: str) -> tuple[str, str]:
    """Splits "folder/key.extension" at the first dot of its base name."""
    folder, file = posixpath.split(name)
    key, _, extension = file.partition(".")
    return posixpath.join(folder, key), f".{extension.lower()}"


def _group(files: Iterable[tuple[str, str, Member]], shard: str) -> list[_Sample]:
    samples: list[_Sample] = []
    latest: dict[str, dict[str, Member]] = {}
    twins = []
    for key, extension, member in files:
        if key not in latest or extension in latest[key]:
            twins += [key] if key in latest else []
            latest[key] = {}
            samples.append((key, latest[key]))
        latest[key][extension] = member
    if twins:
        message = "%s: %d keys are there twice (first: %s): each is a sample of its own"
        _LOG.warning(message, shard, len(twins), twins[0])
    return samples
