"""Hugging Face data sets, loaded or streamed (needs the package datasets)."""

import os
import threading
from collections.abc import Iterator
from typing import Any

from ldm_jax.data.decode import describe
from ldm_jax.data.sources.tables import PICTURE_COLUMNS, find_columns, with_text
from ldm_jax.errors import DataError
from ldm_jax.io.paths import exists

_WINDOWS_KEPT = 3


class HuggingFace:
    """A split of a Hugging Face data set: from the Hub, its cache, or a folder.

    A streamed data set is read in order, and shuffled inside windows of 1,024 pictures; its rows
    are not known beforehand, so that it cannot be split or selected from. Resuming skips to the
    window of the step.

    Args:
      path: The name of a data set, a folder of files, or one written by ``save_to_disk``.
      split: The split; slices such as "train[:90%]" work unless streamed.
      config: The name of a configuration of the data set; "" for its default.
      image: The column of pictures; "" finds it by its type, then by usual names.
      text: The column of captions; "" finds "text", "caption" and other usual names.
      streaming: Read while downloading, without storing the data.
      count: Number of pictures of a streamed data set; 0 takes it from its description.
      download: Download what is not in the local cache; else nothing is downloaded.

    Raises:
      DataError: The data set, its split or a column is missing, or it has no pictures.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str = "train",
        config: str = "",
        image: str = "",
        text: str = "",
        streaming: bool = False,
        count: int = 0,
        download: bool = False,
    ):
        self.path, self._split, self._config = os.fspath(path), split, config
        self._image, self._text, self._download = image, text, download
        self.window = 1024 if streaming else 0
        self._rows: list[dict[str, Any]] | None = None
        self._open()
        if streaming:
            splits = self._data.info.splits or {}
            count = count or getattr(splits.get(split), "num_examples", None) or 0
        self._count = count if streaming else len(self._data)
        if not self._count:
            reason = "its length is not known: set data.count" if streaming else "no picture found"
            raise DataError(f"{self.path}: {reason}")

    def _open(self) -> None:
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise DataError(
                f"{self.path}: Hugging Face data sets need datasets: pip install datasets"
            ) from None
        saved = ("state.json", "dataset_dict.json")
        try:
            if any(exists(os.path.join(self.path, name)) for name in saved):
                data: Any = datasets.load_from_disk(self.path)
                data = data[self._split] if isinstance(data, datasets.DatasetDict) else data
                data = data.to_iterable_dataset() if self.window else data
            else:
                offline = not (self._download or self.window)
                data = datasets.load_dataset(
                    self.path,
                    self._config or None,
                    split=self._split,
                    streaming=bool(self.window),
                    download_config=datasets.DownloadConfig(local_files_only=offline),
                )
            features = dict(data.features or {})
        except Exception as error:  # datasets raises many classes
            raise DataError(
                f"cannot open the data set {self.path!r}, split {self._split!r}: {describe(error)}"
            ) from error
        pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        found = [] if self._image else pictures
        found = found or find_columns(features, "image", self._image, PICTURE_COLUMNS, self.path)
        if not found:
            raise DataError(
                f"{self.path}: there is no column of pictures but {', '.join(features)}: "
                "set data.image"
            )
        self._column = found[0]
        if self._column in pictures:
            data = data.cast_column(self._column, datasets.Image(decode=False))
        self._data, self._lock = data, threading.Lock()
        self._iterator: tuple[int, Iterator[dict[str, Any]]] | None = None
        self._windows: dict[int, list[dict[str, Any]]] = {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metadata of all pictures, read on first use; DataError for a streamed data set."""
        if self.window:
            raise DataError(
                f"{self.path} is streamed, its rows are not known: leave out where, split_column, "
                "holdout and pair_holdout, or set data.streaming=False"
            )
        if self._rows is None:
            rows = self._data.remove_columns([self._column]).to_list()
            rows = rows or [{} for _ in range(self._count)]  # no other column
            self._rows = with_text(rows, self.path, self._text)
        return self._rows

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        """Returns the place of a picture in the data set."""
        return f"{self.path}[{index}]"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the row with the picture's encoded bytes as "image"; raises OSError."""
        item = dict(self._streamed(index) if self.window else self._data[index])
        picture = item.pop(self._column)
        path = None
        if isinstance(picture, dict):
            picture, path = picture.get("bytes"), picture.get("path")
        if picture is None and path:
            with open(path, "rb") as file:
                picture = file.read()
        row = self.rows[index] if not self.window else with_text([item], self.path, self._text)[0]
        return {**row, "image": picture if picture is not None else b""}

    def _streamed(self, index: int) -> dict[str, Any]:
        number = index // self.window
        with self._lock:
            if number not in self._windows:
                if self._iterator is None or self._iterator[0] != number:
                    self._iterator = number, iter(self._data.skip(number * self.window))
                stream = self._iterator[1]
                left = min(self.window, self._count - number * self.window)
                try:
                    items = [item for _, item in zip(range(left), stream, strict=False)]
                except Exception as error:  # of the network, or of damaged files
                    self._iterator = None
                    raise OSError(describe(error)) from error
                self._iterator = number + 1, stream
                self._windows[number] = items
                while len(self._windows) > _WINDOWS_KEPT:
                    del self._windows[next(iter(self._windows))]
            items = self._windows[number]
        place = index - number * self.window
        if place >= len(items):
            raise DataError(f"{self.path} has fewer than {self._count} pictures: set data.count")
        return items[place]

    def __getstate__(self) -> dict[str, Any]:
        dropped = {"_data": None, "_lock": None, "_iterator": None, "_windows": {}, "_rows": None}
        return {**self.__dict__, **dropped, "_download": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
