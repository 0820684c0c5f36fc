"""Folders and archives of pictures: with metadata, in class folders, or with label maps."""

import logging
import os
import posixpath
from collections.abc import Sequence
from typing import Any

from ldm_jax.data.decode import PICTURE_SUFFIXES
from ldm_jax.data.sources.files import FileRows, Files, read_texts, stem
from ldm_jax.data.sources.tables import (
    FILE_COLUMNS,
    decode_text,
    find_columns,
    parse_table,
    read_bytes,
    with_text,
)
from ldm_jax.errors import DataError

_LOG = logging.getLogger(__name__)
_METADATA = tuple(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".tsv", ".parquet"))


class ImageFolder(FileRows):
    """Pictures of a folder, a .zip or a .tar, as CelebA-HQ and FFHQ are published.

    Metadata are read from each metadata.jsonl, metadata.csv, .tsv or .parquet in it. A row names a
    picture, relative to the metadata file, and has a caption and any further columns; pictures that
    no row names are left out. Without metadata every picture is found recursively, sorted by name;
    its caption is that of a .txt file beside it, or "".

    Args:
      path: The folder or archive.
      files: Columns that name further files of a row, such as label maps; an item has their bytes.
      image: The column of the pictures' names; "" finds "file_name" and other usual names.
      text: The column of captions; "" finds "text", "caption", "prompt" and other usual names.
      missing: "error", or "skip" to leave out rows whose files are missing.

    Raises:
      DataError: The path is missing or no archive, there is no picture, or the metadata are wrong.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        files: Sequence[str] = (),
        image: str = "",
        text: str = "",
        missing: str = "error",
    ):
        self.path, self._columns, self._files = os.fspath(path), tuple(files), Files(path)
        metadata = self._find_metadata()
        if not metadata:
            names = self._files.pictures()
            texts = read_texts(self._files, names)
            pairs = zip(names, texts, strict=True)
            self.rows = [{"file_name": name, "text": caption} for name, caption in pairs]
            self._resolve()
            return
        top = posixpath.commonpath([posixpath.dirname(name) or "." for name in metadata])
        self._prefix = "" if top in ("", ".") else f"{top}/"
        rows = [row for name in metadata for row in self._read_metadata(name, image)]
        where = f"{self.path}: {metadata[0]}"
        self.rows = with_text(rows, where, text)
        self._resolve(", ".join(metadata), missing)
        if not text and not any(row["text"] for row in self.rows):
            names = [self._member(row["file_name"]) for row in self.rows]
            for row, caption in zip(self.rows, read_texts(self._files, names), strict=True):
                row["text"] = caption
        named = {self._member(row[c]) for row in self.rows for c in ("file_name", *files)}
        if unnamed := [name for name in self._files.pictures() if name not in named]:
            message = "%s: %d pictures are not in %s and are left out (first: %s)"
            _LOG.warning(message, self.path, len(unnamed), ", ".join(metadata), unnamed[0])

    def _find_metadata(self) -> list[str]:
        """Returns the metadata files, one for each folder, outer folders first."""
        found: dict[str, str] = {}
        for name in sorted(self._files.names, key=lambda n: (n.count("/"), n)):
            folder, base = posixpath.split(name)
            if base.casefold() in _METADATA:
                best = min(found.get(folder, name), name, key=_metadata_rank)
                if folder in found:
                    _LOG.warning(
                        "%s: of the metadata in %r only %s is read", self.path, folder, best
                    )
                found[folder] = best
        return list(found.values())

    def _read_metadata(self, name: str, image: str) -> list[dict[str, Any]]:
        where = f"{self.path}: {name}"
        rows = parse_table(self._files.read_table(name), where)
        columns = dict.fromkeys(key for row in rows for key in row)
        column = (find_columns(columns, "image", image, FILE_COLUMNS, where) or ["file_name"])[0]
        folder = f"{posixpath.dirname(name)}/".removeprefix(self._prefix).lstrip("/")
        for number, row in enumerate(rows, start=1):
            for source, target in ((column, "file_name"), *((c, c) for c in self._columns)):
                value = row.get(source)
                if not isinstance(value, str):
                    raise DataError(f"{where}: row {number} has no {source}: every row needs one")
                row[target] = value if posixpath.isabs(value) else folder + value
        return rows


def _metadata_rank(name: str) -> int:
    return _METADATA.index(posixpath.basename(name).casefold())


class ClassFolders(FileRows):
    """A folder for each class, as in ImageNet, also as its tar of one tar for each class.

    Columns: "class", the folder's name; "label", its number in sorted order (ImageNet's own
    numbers); "text", its name in ``names``.

    Args:
      path: The folder or archive that holds the class folders.
      names: A text file of lines like "n01440764 tench, Tinca tinca"; without it "text" is the
        folder's name.

    Raises:
      DataError: The path is missing or no archive, or a picture lies outside of a class folder.
    """

    def __init__(self, path: str | os.PathLike[str], *, names: str = ""):
        self.path, self._files = os.fspath(path), Files(path)
        pictures = self._files.pictures()
        folders = [posixpath.dirname(name) for name in pictures]
        # The folder that holds all of them, such as an archive's top folder, is no class.
        top = posixpath.commonpath(folders) if len(set(folders)) > 1 and all(folders) else ""
        classes = [folder.removeprefix(top).strip("/").split("/")[0] for folder in folders]
        if "" in classes:
            raise DataError(
                f"{self.path}: {pictures[classes.index('')]} lies in no class folder: "
                "use the source image_folder for plain folders"
            )
        numbers = {name: i for i, name in enumerate(sorted(set(classes)))}
        texts = _class_texts(names) if names else {}
        self.rows = [
            {"file_name": name, "class": c, "label": numbers[c], "text": texts.get(c, c)}
            for name, c in zip(pictures, classes, strict=True)
        ]
        self._resolve()


def _class_texts(file: str) -> dict[str, str]:
    where = f"data.names {file}"
    lines = decode_text(read_bytes(file), where).splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise DataError(f"{where}: write lines like 'n01440764 tench, Tinca tinca'")
    return {folder: text.strip() for folder, text in pairs}


class LabelMaps(FileRows):
    """Pictures and label maps in two folders, as in ADE20K: images/a.jpg, annotations/a.png.

    Columns: "map", the map's bytes; "text" "".

    Args:
      path: The folder or archive that holds both.
      images: The folder of the pictures in it.
      maps: The folder of the maps, with files of the same names but for the suffix; maps without a
        picture are left out.

    Raises:
      DataError: The path is missing or no archive, a folder is empty, or a picture has no map.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, images: str = "images", maps: str = "annotations"
    ):
        self.path, self._columns, self._files = os.fspath(path), ("map",), Files(path)
        pictures = self._files.pictures(images)
        found = {stem(name[len(maps.strip("/")) :]): name for name in self._files.pictures(maps)}
        pairs = {name: found.get(stem(name[len(images.strip("/")) :])) for name in pictures}
        if lost := [name for name, label_map in pairs.items() if label_map is None]:
            raise DataError(
                f"{self.path}: {len(lost)} of {len(pictures)} pictures in {images} have no map in "
                f"{maps} (first: {lost[0]})"
            )
        if not pairs:
            suffixes = ", ".join(s[1:] for s in PICTURE_SUFFIXES)
            raise DataError(f"{self.path}: no picture found in {images} ({suffixes})")
        self.rows = [
            {"file_name": n, "map": found_map, "text": ""} for n, found_map in pairs.items()
        ]
        self._resolve()
