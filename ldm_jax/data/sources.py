"""Random access sources of pictures with metadata: folders, zip archives and TensorFlow Datasets.

A source has ``len(source)``; ``source.rows``, a list with one metadata dict per picture (no pixels);
``source[i]``, that dict with the picture under ``"image"`` (encoded bytes, or a uint8 array [H, W, C]); and
``source.path`` and ``source.name(i)``, for messages. Sources can be pickled: worker processes open their own files.
"""

import glob
import json
import os
import posixpath
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA_NAME = "metadata.jsonl"


class DataError(ValueError):
    """Wrong data or data settings; the message is one line that says what to do."""


class Source(Protocol):
    """What the loader needs of a source (see the module's text)."""

    path: str

    @property
    def rows(self) -> Sequence[dict[str, Any]]: ...

    def name(self, index: int, /) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class ImageFolder:
    """Pictures of a folder or a .zip archive, optionally described by a ``metadata.jsonl``.

    Each line of ``metadata.jsonl`` (at the root, or in the one top folder) is a JSON object with ``file_name``,
    relative to the metadata file, usually ``text``, and any further columns; pictures it does not list are left out.
    Without it every picture is found recursively, sorted by name, with text "".

    Args:
      path: the folder or the .zip archive.

    Raises:
      DataError: the path is missing or not a zip, there is no picture, or the metadata is wrong.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._zip: tuple[int, zipfile.ZipFile] | None = None
        if not os.path.exists(self.path):
            raise DataError(f"{self.path} does not exist: give the path of a folder or .zip archive of pictures")
        self._is_zip = not os.path.isdir(self.path)
        if self._is_zip and not zipfile.is_zipfile(self.path):
            raise DataError(f"{self.path} is not a zip archive (nor a folder): give a folder or .zip of pictures")
        names = self._names()
        self._prefix, self.rows = "", []
        metadata = _find_metadata(names)
        if metadata is None:
            pictures = sorted(name for name in names if name.lower().endswith(PICTURE_SUFFIXES))
            self.rows = [{"file_name": name, "text": ""} for name in pictures]
        else:
            self._prefix = metadata[: -len(METADATA_NAME)]
            self.rows = _parse_metadata(self._read(metadata), f"{self.path}: {metadata}")
            missing = [r["file_name"] for r in self.rows if self._member(r["file_name"]) not in names]
            if missing:
                raise DataError(
                    f"{self.path}: {len(missing)} of {len(self.rows)} pictures listed in {metadata} are missing "
                    f"(first: {missing[0]}): add them or remove their lines"
                )
        if not self.rows:
            raise DataError(f"{self.path}: no picture found ({', '.join(s[1:] for s in PICTURE_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """The picture's name, for messages."""
        return self.rows[index]["file_name"]

    def stamp(self, index: int) -> int:
        """What changes with the picture's file: its checksum in an archive, its size in a folder."""
        member = self._member(self.rows[index]["file_name"])
        return self._archive().getinfo(member).CRC if self._is_zip else os.path.getsize(os.path.join(self.path, member))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the row with the picture's encoded bytes as "image"; raises OSError and zip errors."""
        row = self.rows[index]
        return {**row, "image": self._read(self._member(row["file_name"]))}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}

    def _member(self, file_name: str) -> str:
        return posixpath.normpath(self._prefix + file_name)

    def _archive(self) -> zipfile.ZipFile:
        # A handle inherited through fork shares its file offset with the parent, so each process opens its own.
        if self._zip is None or self._zip[0] != os.getpid():
            self._zip = (os.getpid(), zipfile.ZipFile(self.path))
        return self._zip[1]

    def _names(self) -> set[str]:
        if self._is_zip:
            names = [info.filename for info in self._archive().infolist() if not info.is_dir()]
        else:
            names = [n.replace(os.sep, "/") for n in glob.glob("**", root_dir=self.path, recursive=True)]
        return {n for n in names if not n.startswith("__MACOSX/") and not posixpath.basename(n).startswith(".")}

    def _read(self, name: str) -> bytes:
        return self._archive().read(name) if self._is_zip else Path(self.path, name).read_bytes()


def _find_metadata(names: set[str]) -> str | None:
    if METADATA_NAME in names:
        return METADATA_NAME
    tops = {name.split("/")[0] for name in names}
    nested = f"{next(iter(tops))}/{METADATA_NAME}" if len(tops) == 1 else ""
    return nested if nested in names else None


def _parse_metadata(data: bytes, where: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:  # of JSON or of UTF-8
            raise DataError(f"{where}: line {number} is not JSON ({error}): one JSON object per line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: line {number} is not a JSON object: write {{'file_name': ..., 'text': ...}}")
        if not isinstance(row.get("file_name"), str):
            raise DataError(f"{where}: line {number} has no file_name: every row needs one")
        rows.append(row)
    if rows and not any("text" in row for row in rows):  # pictures described, but without captions
        rows = [{**row, "text": ""} for row in rows]
    return rows


class TFDS:
    """A prepared TensorFlow Datasets split, read without TensorFlow (array_record or parquet files).

    Strings arrive as ``str``; each class label column ``c`` comes with its name as ``c_name``.

    Args:
      path: a dataset name (``"name"``, ``"name/config"``, ``"name:1.0.0"``) or a version directory with its files.
      split: the split, slices such as ``"train[:90%]"`` included.
      image_key: the feature that holds the picture.
      columns: features to keep as metadata; None keeps all.
      data_dir: where named datasets lie; None for the TFDS default.
      download: download and prepare a named dataset that is not there; nothing is downloaded otherwise.

    Raises:
      DataError: the dataset, split or feature is missing, or its files have no random access.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str = "train",
        image_key: str = "image",
        columns: Sequence[str] | None = None,
        data_dir: str | None = None,
        download: bool = False,
    ):
        self.path = os.fspath(path)
        self._options = {"split": split, "image_key": image_key, "data_dir": data_dir, "download": download}
        self._columns = None if columns is None else list(columns)
        self._rows: list[dict[str, Any]] | None = None
        self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds

        image_key, split = self._options["image_key"], self._options["split"]
        try:
            if "://" in self.path or os.path.isdir(self.path):
                builder: Any = tfds.builder_from_directory(self.path)
            else:
                builder = tfds.builder(self.path, data_dir=self._options["data_dir"])
                if self._options["download"]:
                    builder.download_and_prepare(file_format="array_record")
                elif not builder.is_prepared():
                    raise DataError(
                        f"TFDS {self.path!r} is not in {builder.data_dir}: prepare it, or set download=True"
                    )
            features = dict(builder.info.features or {})
            skip = {image_key: tfds.decode.SkipDecoding()} if image_key in features else None
            self._data: Any = builder.as_data_source(split, decoders=skip)
        except DataError:
            raise
        except NotImplementedError as error:
            raise DataError(
                f"the files of TFDS {self.path!r} have no random access: prepare it with file_format='array_record'"
            ) from error
        except Exception as error:  # tfds raises many kinds, often with pages of text
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise DataError(f"cannot open TFDS {self.path!r}, split {split!r}: {reason}") from error
        wanted = [key for key in features if key != image_key] if self._columns is None else self._columns
        for key in (image_key, *wanted):
            if key not in features:
                raise DataError(f"TFDS {self.path!r} has no feature {key!r}: it has {', '.join(features)}")
        self._kept = wanted
        self._labels = {k: features[k].names for k in wanted if isinstance(features[k], tfds.features.ClassLabel)}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metadata of all pictures; the first use reads through the whole split, without decoding."""
        if self._rows is None:
            self._rows = [self._metadata(record) for record in self._data]
        return self._rows

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        """The picture's name, for messages: records have none of their own."""
        return f"{self.path}[{index}]"

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._data[index]
        return {**self._metadata(record), "image": record[self._options["image_key"]]}

    def _metadata(self, record: Mapping[str, Any]) -> dict[str, Any]:
        row = {key: _plain(record[key]) for key in self._kept}
        names = {f"{k}_name": labels[row[k]] for k, labels in self._labels.items() if 0 <= row[k] < len(labels)}
        return names | row

    def __getstate__(self) -> dict[str, Any]:
        # A worker only reopens what is prepared, and reads the metadata record by record.
        options = {**self._options, "download": False}
        return {"path": self.path, "_options": options, "_columns": self._columns, "_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _plain(value: Any) -> Any:
    """Bytes to str and numpy to Python values, inside lists and dicts as well."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


class Subset:
    """The pictures of ``source`` at ``indices``, in that order; ``rows`` and pictures stay in step."""

    def __init__(self, source: Source, indices: Sequence[int]):
        if isinstance(source, Subset):  # keeps chains of selections flat
            indices = [source.indices[i] for i in indices]
            source = source.source
        self.source, self.indices, self.path = source, list(indices), source.path

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows = self.source.rows
        return [rows[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """The picture's name, for messages."""
        return self.source.name(self.indices[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.indices[index]]


SOURCES: dict[str, Callable[..., Source]] = {"image_folder": ImageFolder, "tfds": TFDS}
