"""Random access to the files of a folder, a zip or a tar, and the base of sources of files."""

import logging
import lzma
import os
import posixpath
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from ldm_jax.data.decode import PICTURE_SUFFIXES, describe
from ldm_jax.data.sources.base import Handles, Rows
from ldm_jax.data.sources.tables import TABLES, encoding_of
from ldm_jax.errors import DataError
from ldm_jax.io.paths import exists, is_bucket, is_folder, listing, local_copy, read_bytes

_LOG = logging.getLogger(__name__)

MAX_BYTES = 2**29  # of one file
# Files beside pictures that need no warning.
_TEXT_SUFFIXES = (
    *(".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".md", ".npy", ".npz"),
    *(".xml", ".html", ".yaml", ".yml", ".log", ".py", ".cls", ".db", ".ini"),
)
# Files with the caption of the picture beside them.
CAPTION_SUFFIXES = (".txt", ".caption")
# Encodings of names in zip archives that were written without the UTF-8 flag.
_NAME_ENCODINGS = ("utf-8", "cp932", "gbk", "big5", "euc-kr", "cp1252", "cp1251")


class Member(NamedTuple):
    """A file inside a tar: where its bytes are, and its modification time."""

    offset: int
    size: int
    time: int


def tar_members(path: str) -> Iterator[tuple[str, Member]]:
    """Yields (name, member) of each file in a tar, in its order, reading only the headers.

    The files of a tar inside the tar are named "inner/name". Links are the file they point to.

    Raises:
      DataError: The file is no tar, or a compressed one, which has no random access.
    """
    count = 0
    try:
        with open(path, "rb") as file:
            for found in _scan_tar(file, path, 0, os.path.getsize(path), ""):
                count += 1
                yield found
    except (DataError, MemoryError, GeneratorExit):
        raise
    except Exception as error:  # tarfile raises several classes on damaged headers
        if not count:
            raise DataError(
                f"{path} is not a plain tar archive ({describe(error)}): "
                "unpack it first if it is compressed"
            ) from None
        _LOG.warning("%s is damaged after %d files (%s)", path, count, describe(error))


def _scan_tar(
    file: IO[bytes], path: str, start: int, end: int, prefix: str
) -> Iterator[tuple[str, Member]]:
    file.seek(start)
    seen: dict[str, Member] = {}
    # tarfile counts offsets from the beginning of the file object.
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            name = posixpath.normpath(info.name)
            if info.islnk() or info.issym():
                folder = posixpath.dirname(name) if info.issym() else ""
                target = posixpath.normpath(posixpath.join(folder, info.linkname))
                if target in seen:
                    yield prefix + name, seen[target]
                elif name.lower().endswith(PICTURE_SUFFIXES):
                    _LOG.warning("%s: %s links to no file before it: skipped", path, name)
            elif info.issparse():
                _LOG.warning("%s: %s is stored as a sparse file: skipped", path, name)
            elif info.isfile() and name.endswith(".tar"):
                inside = info.offset_data, min(end, info.offset_data + info.size)
                yield from _scan_tar(file, path, *inside, f"{prefix}{name.removesuffix('.tar')}/")
            elif info.isfile():
                seen[name] = Member(info.offset_data, info.size, int(info.mtime))
                yield prefix + name, seen[name]
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  (bounds its memory)
        # tarfile ends at a damaged header, and at one of zeros, as at the end of the archive.
        at: int = archive.offset  # pyright: ignore[reportAttributeAccessIssue]
        if (found := _first_byte(file, at, end)) is not None:
            _LOG.warning("%s is damaged at byte %d: its other files are lost", path, found)


def _first_byte(file: IO[bytes], start: int, end: int) -> int | None:
    """Returns the position of the first byte that is not 0, in whole blocks; None without one."""
    file.seek(start)
    while (size := min(2**20, end - start)) > 0 and (data := file.read(size)):
        if rest := data.lstrip(b"\0"):
            return start + (len(data) - len(rest)) // 512 * 512
        start += len(data)
    return None


def read_at(file: Any, member: Member, path: str) -> bytes:
    """Reads a tar member; threads may share the file. Raises OSError."""
    if member.size > MAX_BYTES:
        raise OSError(f"{member.size} bytes are too large for one file")
    if member.offset + member.size > os.fstat(file.fileno()).st_size:
        raise OSError(f"{path} ends before this file does")
    return os.pread(file.fileno(), member.size, member.offset)


def open_raw(path: str) -> Any:
    """Opens a file for `read_at`."""
    return open(path, "rb", buffering=0)


def _is_tar(path: str) -> bool:
    """Whether a file is a tar, of whatever compression."""
    try:
        return tarfile.is_tarfile(path)
    except (EOFError, zlib.error, lzma.LZMAError):  # of a damaged compressed one
        return True


def _open_zip(path: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zipfile raises several classes on damaged directories
        raise DataError(f"{path} is a damaged zip archive ({describe(error)})") from None


class Files:
    """The files of a folder, a .zip or a .tar, on this machine or in a bucket. Picklable.

    A file in a folder of a bucket is read from there each time; an archive is copied once.

    Attributes:
      names: Names of the files, with "/", relative to ``path``; without hidden ones.

    Raises:
      DataError: The path is missing, or neither of them.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = self._local = os.fspath(path)
        if not exists(self.path):
            raise DataError(
                f"{self.path} does not exist: give the path of a folder or .zip archive of pictures"
            )
        if is_bucket(self.path) and not is_folder(self.path):
            self._local = os.fspath(local_copy(self.path))  # archives are read at any place
        if is_bucket(self._local):
            self.kind, self._handles, listed = "bucket", None, _objects(self.path)
        elif os.path.isdir(self._local):
            self.kind, self._handles, listed = "folder", None, _walk(self.path)
        elif zipfile.is_zipfile(self._local):
            self.kind, self._handles = "zip", Handles(_open_zip)
            listed = _zip_names(self._handles(self._local))
        elif _is_tar(self._local):
            self.kind, self._handles, listed = "tar", Handles(open_raw), tar_members(self._local)
        else:
            raise DataError(
                f"{self.path} is not a zip archive (nor a folder): "
                "give a folder or .zip of pictures"
            )
        self.names: dict[str, Any] = {}
        self._aliases: dict[str, str | None] | None = None
        for name, member in listed:
            if not name.startswith("__MACOSX/") and not posixpath.basename(name).startswith("."):
                if name in self.names:
                    _LOG.warning("%s: %s is there twice: the later one is read", path, name)
                self.names[name] = member

    def pictures(self, under: str = "") -> list[str]:
        """Returns the names of the pictures in one of its folders, sorted.

        Arrays (.npy) are pictures where there are no others.
        """
        under = f"{under.strip('/')}/" if under.strip("./") else ""
        inside = [name for name in self.names if name.startswith(under)]
        pictures = {name for name in inside if name.lower().endswith(PICTURE_SUFFIXES)}
        pictures = pictures or {name for name in inside if name.lower().endswith(".npy")}
        unread = Counter(posixpath.splitext(name)[1].lower() for name in {*inside} - pictures)
        if others := [
            f"{n} {s or 'files'}" for s, n in sorted(unread.items()) if s not in _TEXT_SUFFIXES
        ]:
            _LOG.warning("%s: files that are no pictures: %s", self.path, ", ".join(others))
        return sorted(pictures)

    def find(self, name: str) -> str | None:
        """Returns the file that a list means by ``name``.

        That is the file of exactly this name, else the only one of this name when Unicode
        composition, case, backslashes and the encoding of an archive are disregarded. In a folder
        it may also be an absolute path, or one that leads out of the folder.
        """
        exact = posixpath.normpath(name)
        if exact in self.names:
            return exact
        if self.kind == "folder" and os.path.isfile(os.path.join(self.path, name)):
            self.names[name] = name
            return name
        if self._aliases is None:
            self._aliases = {}
            for known, member in self.names.items():
                for key in {_fold(known), *(_fold(n) for n in _decodings(known, member))}:
                    self._aliases[key] = known if key not in self._aliases else None
        return self._aliases.get(_fold(name))

    def read(self, name: str) -> bytes:
        """Reads a file; OSError where it is damaged, encrypted, too large or not there."""
        try:
            if self.kind == "folder":
                path = os.path.join(self.path, self.names.get(name, name))
                if os.path.exists(path) and not os.path.isfile(path):
                    raise OSError("not a regular file")
                if os.path.getsize(path) > MAX_BYTES:
                    raise OSError(f"{os.path.getsize(path)} bytes are too large for one file")
                return Path(path).read_bytes()
            if self.kind == "bucket":
                if (size := self.names[name][1]) > MAX_BYTES:
                    raise OSError(f"{size} bytes are too large for one file")
                return read_bytes(f"{self.path}/{self.names[name][0]}")
            assert self._handles is not None
            if self.kind == "tar":
                return read_at(self._handles(self._local), self.names[name], self.path)
            info = self._handles(self._local).getinfo(self.names[name])
            if info.file_size > MAX_BYTES:
                raise OSError(f"{info.file_size} bytes are too large for one file")
            return self._handles(self._local).read(info.filename)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # zipfile and its decompressors raise nearly every class
            raise OSError(describe(error)) from error

    def read_table(self, name: str) -> bytes:
        """Reads a file that the whole data set depends on; raises DataError."""
        try:
            return self.read(name)
        except OSError as error:
            reason = error.strerror or describe(error)
            raise DataError(f"{self.path}: {name} cannot be read: {reason}") from None

    def stamp(self, name: str) -> int:
        """Returns what changes with the file: its checksum in a zip, time in a tar, else size."""
        if self.kind == "tar":
            return self.names[name].time
        if self.kind == "bucket":
            return self.names[name][1]
        if self._handles is not None:
            return self._handles(self._local).getinfo(self.names[name]).CRC
        return os.path.getsize(os.path.join(self.path, name))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_aliases": None}


def _walk(top: str) -> Iterator[tuple[str, str]]:
    """Yields the files of a folder, through links, each folder once."""
    seen = set()
    for folder, folders, files in os.walk(top, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inner = os.path.relpath(folder, top).replace(os.sep, "/")
        for name in files:
            name = posixpath.normpath(f"{inner}/{name}")
            yield name, name


def _objects(top: str) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yields name -> (object, bytes) of the files in a folder of a bucket."""
    for name, info in sorted(listing(top).items()):
        if not any(part.startswith(".") for part in name.split("/")):
            yield posixpath.normpath(name), (name, info["size"])


def _zip_names(archive: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")  # as old Windows programs write it
        if not name.endswith("/"):
            yield posixpath.normpath(name), info.filename


def _decodings(name: str, member: Any) -> Iterator[str]:
    """Yields what a name of a zip without the UTF-8 flag reads as in other encodings."""
    if name.isascii() or not isinstance(member, str):
        return
    try:
        raw = member.encode("cp437")
    except UnicodeEncodeError:
        return
    for encoding in _NAME_ENCODINGS:
        try:
            yield raw.decode(encoding)
        except UnicodeDecodeError:
            continue


def _fold(name: str) -> str:
    name = unicodedata.normalize("NFC", name).replace("\\", "/").casefold()
    return posixpath.normpath(name).lstrip("/")


class FileRows(Rows):
    """Base of sources whose rows name files of one `Files`.

    A subclass sets ``path``, ``_files`` and ``rows`` and then calls ``_resolve``. "file_name" names
    the picture; the ``_columns`` name further files, whose bytes replace the name in an item.
    """

    _files: Files
    _columns: tuple[str, ...] = ()
    _prefix: str = ""  # of the names in the rows

    def stamp(self, index: int) -> int:
        """Returns a number that changes with the picture's file."""
        return self._files.stamp(self._member(self.rows[index]["file_name"]))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the row with the picture's encoded bytes as "image"; raises OSError."""
        row = self.rows[index]
        others = {column: self._files.read(self._member(row[column])) for column in self._columns}
        return {**row, **others, "image": self._files.read(self._member(row["file_name"]))}

    def _member(self, file_name: str) -> str:
        return self._renamed.get(file_name) or posixpath.normpath(self._prefix + file_name)

    def _resolve(self, listed_in: str = "", missing: str = "error") -> None:
        """Finds the files that the rows name.

        Args:
          listed_in: The list of the files, for messages.
          missing: "error", or "skip" to leave out rows whose files are missing, with a warning.

        Raises:
          DataError: There is no row, or a row names no file or one that is missing.
        """
        if missing not in ("error", "skip"):
            raise DataError(f"data.missing is {missing!r}: choose 'error' or 'skip'")
        self._renamed: dict[str, str] = {}
        columns, lost = ("file_name", *self._columns), []
        for number, row in enumerate(self.rows, start=1):
            for column in columns:
                name = row.get(column)
                if not isinstance(name, str) or not name.strip():
                    raise DataError(
                        f"{self.path}: row {number} of {listed_in or 'its files'} has "
                        f"{column}={name!r}, which names no file"
                    )
                absolute = posixpath.isabs(name)
                found = self._files.find(name if absolute else self._prefix + name)
                if found is None:
                    lost.append((number - 1, name))
                elif found != posixpath.normpath(self._prefix + name):
                    self._renamed[name] = found
        if lost:
            total = len(self.rows) * len(columns)
            message = f"{len(lost)} of {total} files listed in {listed_in} are missing"
            first = f"(first: {lost[0][1]})"
            if missing == "error":
                raise DataError(
                    f"{self.path}: {message} {first}: add them, or set data.missing='skip'"
                )
            _LOG.warning("%s: %s %s: skipped", self.path, message, first)
            gone = {index for index, _ in lost}
            self.rows = [row for index, row in enumerate(self.rows) if index not in gone]
        if not self.rows:
            raise DataError(
                f"{self.path}: no picture found ({', '.join(s[1:] for s in PICTURE_SUFFIXES)})"
            )


def stem(name: str) -> str:
    """Returns a file's path without its last suffix."""
    return posixpath.splitext(name)[0]


def read_texts(files: Files, names: Sequence[str]) -> list[str]:
    """Returns the captions in the .txt or .caption files beside pictures, "" without one."""
    texts: list[str] = []
    damaged: list[str] = []
    some = any(name.lower().endswith(CAPTION_SUFFIXES) for name in files.names)
    for name in names:
        beside = (files.find(f"{stem(name)}{suffix}") for suffix in CAPTION_SUFFIXES if some)
        found = next(filter(None, beside), None)
        data = files.read_table(found) if found else b""
        texts.append(data.decode(encoding_of(data), errors="replace").strip())
        if found and "\ufffd" in texts[-1]:
            damaged.append(found)
    if damaged:
        message = "%s: %d captions are not UTF-8, letters are lost (first: %s)"
        _LOG.warning(message, files.path, len(damaged), damaged[0])
    if 0 < (without := texts.count("")) < len(texts):
        _LOG.warning("%s: %d of %d pictures have no caption", files.path, without, len(texts))
    tables = [name for name in files.names if name.lower().endswith(tuple(TABLES))]
    if without == len(texts) and tables:
        message = "%s: no picture has a caption, and %s is not read: call it metadata%s, or use "
        message += "the source 'table'"
        _LOG.warning(message, files.path, tables[0], posixpath.splitext(tables[0])[1].lower())
    return texts
