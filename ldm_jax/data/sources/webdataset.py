"""WebDataset: samples as files of one name in tar shards."""

import glob
import json
import os
import posixpath
from typing import Any

from ldm_jax.data.sources.base import PICTURE_SUFFIXES
from ldm_jax.data.sources.files import Member, read_at, tar_members
from ldm_jax.errors import DataError


class WebDataset:
    """Tar shards in which the files of a sample follow one another: 000.jpg, 000.txt, 000.json ... Read at random by an index, made once by
    scanning the shards' headers.

    Columns: "text" from .txt (or the JSON's "text" or "caption"), "label" from .cls, and those of .json. Samples without a picture are left out.

    Args:
      path: a shard, a folder of shards, or a pattern such as "data/train-*.tar".
      image: the picture's extension, "jpg" say; "" takes the first that is a picture.

    Raises:
      DataError: there is no shard or no picture, or a shard is compressed.
    """

    def __init__(self, path: str | os.PathLike[str], *, image: str = ""):
        self.path = os.fspath(path)
        pattern = (
            os.path.join(glob.escape(self.path), "*.tar") if os.path.isdir(self.path) else self.path
        )
        self._shards = sorted(glob.glob(pattern)) or (
            [self.path] if os.path.isfile(self.path) else []
        )
        if not self._shards:
            raise DataError(
                f"{self.path}: there is no .tar there: give a shard, their folder, or a pattern like 'train-*.tar'"
            )
        self._handles: dict[tuple[int, int], Any] = {}
        self._pictures: list[tuple[int, Member]] = []
        self.rows: list[dict[str, Any]] = []
        wanted = (f".{image.lower().lstrip('.')}",) if image else PICTURE_SUFFIXES
        for number, shard in enumerate(self._shards):
            self._read_shard(number, shard, wanted)
        if not self.rows:
            raise DataError(f"{self.path}: no picture found ({', '.join(s[1:] for s in wanted)})")
        self._close()  # handles of scanning: pickles and forks have none

    def _read_shard(self, number: int, shard: str, wanted: tuple[str, ...]) -> None:
        samples: dict[str, dict[str, Member]] = {}
        for name, member in tar_members(shard):
            folder, file = posixpath.split(name)
            key, _, extension = file.partition(".")  # all after the first dot, as WebDataset has it
            samples.setdefault(posixpath.join(folder, key), {})[f".{extension.lower()}"] = member
        for key, files in samples.items():
            picture = next((suffix for suffix in files if suffix in wanted), None)
            if picture is None:
                continue
            texts = {
                s: read_at(self._open(number), files[s], shard)
                for s in (".json", ".txt", ".cls")
                if s in files
            }
            where = f"{os.path.basename(shard)}/{key}"
            self.rows.append({"file_name": where + picture, **_columns(texts, where)})
            self._pictures.append((number, files[picture]))

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """shard/key.extension, for messages."""
        return self.rows[index]["file_name"]

    def stamp(self, index: int) -> int:
        """The file's time in its shard."""
        return self._pictures[index][1].time

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the row with the picture's encoded bytes as "image"; raises OSError."""
        number, member = self._pictures[index]
        return {
            **self.rows[index],
            "image": read_at(self._open(number), member, self._shards[number]),
        }

    def _open(self, number: int) -> Any:
        key = os.getpid(), number  # as with zip archives, every process opens its own
        if key not in self._handles:
            self._handles[key] = open(self._shards[number], "rb", buffering=0)  # noqa: SIM115  (kept open)
        return self._handles[key]

    def _close(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}


def _columns(texts: dict[str, bytes], where: str) -> dict[str, Any]:
    """The columns that a sample's .json, .txt and .cls make."""
    row: dict[str, Any] = {}
    if ".json" in texts:
        try:
            row = json.loads(texts[".json"])
        except ValueError as error:
            raise DataError(f"{where}.json is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}.json is not a JSON object")
        row = {k: v for k, v in row.items() if k not in ("file_name", "image")}
    caption = (
        texts[".txt"].decode("utf-8", errors="replace").strip()
        if ".txt" in texts
        else row.get("text", row.get("caption"))
    )
    row["text"] = caption or ""
    if ".cls" in texts:
        label = texts[".cls"].decode("utf-8", errors="replace").strip()
        row["label"] = int(label) if label.isdecimal() else label
    return row
