"""Folders and archives of pictures: described by a metadata.jsonl, sorted into class folders, or with maps of labels beside."""

import json
import os
import posixpath
from collections.abc import Sequence
from typing import Any

from ldm_jax.data.sources.base import PICTURE_SUFFIXES
from ldm_jax.data.sources.files import FileRows, Files, stem
from ldm_jax.errors import DataError

METADATA_NAME = "metadata.jsonl"


class ImageFolder(FileRows):
    """Pictures of a folder, a .zip or a .tar, optionally described by a ``metadata.jsonl``. (CelebA-HQ, FFHQ: plain folders.)

    Each line of ``metadata.jsonl`` (at the root, or in the one top folder) is a JSON object with ``file_name``,
    relative to the metadata file, usually ``text``, and any further columns; pictures it does not list are left out.
    Without it every picture is found recursively, sorted by name, with text "".

    Args:
      path: the folder or the archive.
      files: columns that name further files of a row, maps of labels say: ``source[i]`` has their bytes instead.

    Raises:
      DataError: the path is missing or no archive, there is no picture, or the metadata is wrong.
    """

    def __init__(self, path: str | os.PathLike[str], *, files: Sequence[str] = ()):
        self.path, self._columns, self._files = os.fspath(path), tuple(files), Files(path)
        self.rows = []
        metadata = _find_metadata(self._files.names)
        if metadata is None:
            self.rows = [{"file_name": name, "text": ""} for name in self._files.pictures()]
        else:
            self._prefix = metadata[: -len(METADATA_NAME)]
            self.rows = parse_json_lines(self._files.read(metadata), f"{self.path}: {metadata}")
        self._check_there(metadata or "")


def _find_metadata(names: set[str]) -> str | None:
    if METADATA_NAME in names:
        return METADATA_NAME
    tops = {name.split("/")[0] for name in names}
    nested = f"{next(iter(tops))}/{METADATA_NAME}" if len(tops) == 1 else ""
    return nested if nested in names else None


def parse_json_lines(
    data: bytes, where: str, key: str | None = "file_name"
) -> list[dict[str, Any]]:
    """Rows of a JSONL file, each with a string under ``key`` unless that is None; DataError names the line that is not as it should be."""
    rows = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:  # of JSON or of UTF-8
            raise DataError(
                f"{where}: line {number} is not JSON ({error}): one JSON object per line"
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{where}: line {number} is not a JSON object: write {{'file_name': ..., 'text': ...}}"
            )
        if key is not None and not isinstance(row.get(key), str):
            raise DataError(f"{where}: line {number} has no {key}: every row needs one")
        rows.append(row)
    if (
        key is not None and rows and not any("text" in row for row in rows)
    ):  # pictures described, but without captions
        rows = [{**row, "text": ""} for row in rows]
    return rows


class ClassFolders(FileRows):
    """A folder for each class, as ImageNet has them; in a folder, a .zip, a .tar, or ImageNet's tar of one tar for each class.

    Columns: "class", the folder's name; "label", its number in sorted order (ImageNet's own numbers); "text", its name in ``names``.

    Args:
      path: the folder or archive that holds the class folders.
      names: a text file of lines like "n01440764 tench, Tinca tinca"; without it "text" is the folder's name.

    Raises:
      DataError: the path is missing or no archive, or a picture lies outside of a class folder.
    """

    def __init__(self, path: str | os.PathLike[str], *, names: str = ""):
        self.path, self._files = os.fspath(path), Files(path)
        # What all of them lie in, a top folder of an archive say, is no class.
        pictures = self._files.pictures()
        folders = [posixpath.dirname(name) for name in pictures]
        top = posixpath.commonpath(folders) if len(set(folders)) > 1 and all(folders) else ""
        classes = [folder.removeprefix(top).strip("/").split("/")[0] for folder in folders]
        if any(not c for c in classes):
            outside = pictures[next(i for i, c in enumerate(classes) if not c)]
            raise DataError(
                f"{self.path}: {outside} lies in no class folder: use the source image_folder for plain folders"
            )
        numbers = {name: i for i, name in enumerate(sorted(set(classes)))}
        texts = _class_texts(names) if names else {}
        self.rows = [
            {"file_name": name, "class": c, "label": numbers[c], "text": texts.get(c, c)}
            for name, c in zip(pictures, classes, strict=True)
        ]
        self._check_there("")


def _class_texts(file: str) -> dict[str, str]:
    try:
        with open(file, encoding="utf-8") as opened:
            pairs = [line.split(maxsplit=1) for line in opened if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.names {file} cannot be read: {error}") from None
    if any(len(pair) != 2 for pair in pairs):
        raise DataError(f"data.names {file}: write lines like 'n01440764 tench, Tinca tinca'")
    return {folder: text.strip() for folder, text in pairs}


class LabelMaps(FileRows):
    """Pictures and maps of labels in two folders, as ADE20K's SceneParsing has them: images/training/a.jpg, annotations/training/a.png.

    Columns: "map", the map's bytes; "text" "".

    Args:
      path: the folder or archive that holds both.
      images: the pictures' folder in it.
      maps: the maps' folder, with files of the same names but for the suffix; maps without a picture are left out.

    Raises:
      DataError: the path is missing or no archive, a folder is empty, or a picture has no map.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, images: str = "images", maps: str = "annotations"
    ):
        self.path, self._columns, self._files = os.fspath(path), ("map",), Files(path)
        pictures = self._files.pictures(images)
        found = {stem(name[len(maps.strip("/")) :]): name for name in self._files.pictures(maps)}
        missing = [name for name in pictures if stem(name[len(images.strip("/")) :]) not in found]
        if missing:
            raise DataError(
                f"{self.path}: {len(missing)} of {len(pictures)} pictures in {images} have no map in {maps} (first: {missing[0]})"
            )
        self.rows = [
            {"file_name": name, "map": found[stem(name[len(images.strip("/")) :])], "text": ""}
            for name in pictures
        ]
        if not self.rows:
            raise DataError(
                f"{self.path}: no picture found in {images} ({', '.join(s[1:] for s in PICTURE_SUFFIXES)})"
            )
