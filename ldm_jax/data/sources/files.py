"""Names and bytes of a folder, a zip or a tar, read at random; and the base of the sources that are lists of such files."""

import glob
import os
import posixpath
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from ldm_jax.data.sources.base import PICTURE_SUFFIXES
from ldm_jax.errors import DataError


class Member(NamedTuple):
    """A file inside a tar: where its bytes are, and what changes with them."""

    offset: int
    size: int
    time: int


def tar_members(path: str) -> Iterator[tuple[str, Member]]:
    """(name, where) of each file in a tar, in its order, read once from end to end; of tars inside the tar, their files, under "inner/name".

    A compressed tar has no random access: DataError.
    """
    try:
        with open(path, "rb") as file:
            yield from _scan(file, path, 0, "")
    except tarfile.TarError as error:
        raise DataError(
            f"{path} is not a plain tar archive ({error}): unpack it first if it is compressed"
        ) from None


def _scan(file: IO[bytes], path: str, start: int, prefix: str) -> Iterator[tuple[str, Member]]:
    file.seek(start)
    with tarfile.open(
        fileobj=file, mode="r:"
    ) as archive:  # tarfile counts offsets from the file's beginning
        for info in archive:
            if not info.isfile():
                continue
            name = prefix + posixpath.normpath(info.name)
            if name.endswith(".tar"):
                yield from _scan(file, path, info.offset_data, f"{name.removesuffix('.tar')}/")
            else:
                yield name, Member(info.offset_data, info.size, int(info.mtime))
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  (it keeps every header otherwise)


class Files:
    """The files of a folder, a .zip or a .tar: ``names``, ``read``, ``stamp``. Picklable; every process opens its own handle.

    Raises:
      DataError: the path is missing, or neither of them.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._handle: tuple[int, Any] | None = None
        self._tar: dict[str, Member] = {}
        if not os.path.exists(self.path):
            raise DataError(
                f"{self.path} does not exist: give the path of a folder or .zip archive of pictures"
            )
        self.kind = (
            "folder"
            if os.path.isdir(self.path)
            else "zip"
            if zipfile.is_zipfile(self.path)
            else "tar"
        )
        if self.kind == "tar" and not tarfile.is_tarfile(self.path):
            raise DataError(
                f"{self.path} is not a zip archive (nor a folder): give a folder or .zip of pictures"
            )
        self.names = {
            n
            for n in self._list()
            if not n.startswith("__MACOSX/") and not posixpath.basename(n).startswith(".")
        }

    def _list(self) -> list[str]:
        if self.kind == "zip":
            return [info.filename for info in self._open().infolist() if not info.is_dir()]
        if self.kind == "tar":
            self._tar = dict(tar_members(self.path))
            return list(self._tar)
        return [n.replace(os.sep, "/") for n in glob.glob("**", root_dir=self.path, recursive=True)]

    def pictures(self, under: str = "") -> list[str]:
        """Names of the pictures in a folder of it, sorted."""
        under = f"{under.strip('/')}/" if under.strip("./") else ""
        return sorted(
            n for n in self.names if n.startswith(under) and n.lower().endswith(PICTURE_SUFFIXES)
        )

    def read(self, name: str) -> bytes:
        """The file's bytes; raises OSError and zip errors."""
        if self.kind == "folder":
            return Path(self.path, name).read_bytes()
        if self.kind == "zip":
            return self._open().read(name)
        return read_at(self._open(), self._tar[name], self.path)

    def stamp(self, name: str) -> int:
        """What changes with the file: its checksum in a zip, its time in a tar, its size in a folder."""
        if self.kind == "folder":
            return os.path.getsize(os.path.join(self.path, name))
        return self._open().getinfo(name).CRC if self.kind == "zip" else self._tar[name].time

    def _open(self) -> Any:
        # A handle inherited through fork shares its file offset with the parent, so each process opens its own.
        if self._handle is None or self._handle[0] != os.getpid():
            opened = (
                zipfile.ZipFile(self.path)
                if self.kind == "zip"
                else open(self.path, "rb", buffering=0)
            )
            self._handle = (os.getpid(), opened)
        return self._handle[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}


def read_at(file: Any, member: Member, path: str) -> bytes:
    """A tar member's bytes; threads may share the file."""
    data = os.pread(file.fileno(), member.size, member.offset)
    if len(data) != member.size:
        raise OSError(f"{path} ends before this file does")
    return data


class FileRows:
    """The base of sources whose rows name files of one `Files`: "file_name", and in ``_columns`` further ones whose bytes take the names' place.

    A subclass sets ``path``, ``rows``, ``_files`` and perhaps ``_columns``, ``_prefix``.
    """

    path: str
    rows: list[dict[str, Any]]
    _files: Files
    _columns: tuple[str, ...] = ()
    _prefix: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """The picture's name, for messages."""
        return self.rows[index]["file_name"]

    def stamp(self, index: int) -> int:
        """What changes with the picture's file: see `Files.stamp`."""
        return self._files.stamp(self._member(self.rows[index]["file_name"]))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the row with the picture's encoded bytes as "image"; raises OSError and zip errors."""
        row = self.rows[index]
        others = {column: self._files.read(self._member(row[column])) for column in self._columns}
        return {**row, **others, "image": self._files.read(self._member(row["file_name"]))}

    def _member(self, file_name: str) -> str:
        return posixpath.normpath(self._prefix + file_name)

    def _check_there(self, listed_in: str) -> None:
        """DataError where a row names no file, or one that is not there, or there is no row."""
        if not self.rows:
            raise DataError(
                f"{self.path}: no picture found ({', '.join(s[1:] for s in PICTURE_SUFFIXES)})"
            )
        wanted = [(row, column) for column in ("file_name", *self._columns) for row in self.rows]
        unnamed = next(
            (row for row, column in wanted if not isinstance(row.get(column), str)), None
        )
        if unnamed is not None:
            raise DataError(
                f"{self.path}: {unnamed['file_name']} has no file in every one of {', '.join(self._columns)}"
            )
        missing = [
            row[column]
            for row, column in wanted
            if self._member(row[column]) not in self._files.names
        ]
        if missing:
            raise DataError(
                f"{self.path}: {len(missing)} of {len(wanted)} files listed in {listed_in} are missing "
                f"(first: {missing[0]}): add them or remove their lines"
            )


def stem(name: str) -> str:
    """A file's path without its last suffix."""
    return posixpath.splitext(name)[0]


def beside(names: Sequence[str], suffix: str) -> dict[str, str]:
    """Stem -> the file of that suffix."""
    return {stem(name): name for name in names if name.lower().endswith(suffix)}
