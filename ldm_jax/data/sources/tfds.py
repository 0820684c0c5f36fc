"""TensorFlow Datasets, read without TensorFlow."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.data.decode import describe
from ldm_jax.data.sources.tables import CAPTION_COLUMNS, caption_text, find_columns
from ldm_jax.errors import DataError


class TFDS:
    """A prepared TensorFlow Datasets split (ArrayRecord or Parquet files).

    Strings arrive as ``str``; each class label column ``c`` comes with its name as ``c_name``.

    Args:
      path: The data set ("name", "name/config", "name:1.0.0") or a version directory.
      split: The split; slices such as "train[:90%]" work, too.
      image_key: The feature that holds the picture.
      text: The feature of captions; "" finds "text", "caption" and other usual names.
      columns: Features to keep as metadata; None keeps all.
      data_dir: Where named data sets lie; None for the default of TFDS.
      download: Download and prepare a named data set that is missing; else nothing is downloaded.

    Raises:
      DataError: The data set, split or feature is missing, or its files have no random access.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str = "train",
        image_key: str = "image",
        text: str = "",
        columns: Sequence[str] | None = None,
        data_dir: str | None = None,
        download: bool = False,
    ):
        self.path, self._split, self._image_key = os.fspath(path), split, image_key
        self._text, self._data_dir, self._download = text, data_dir, download
        self._columns = None if columns is None else list(columns)
        self._rows: list[dict[str, Any]] | None = None
        self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds

        image_key = self._image_key
        try:
            if "://" in self.path or os.path.isdir(self.path):
                builder: Any = tfds.builder_from_directory(self.path)
            else:
                builder = tfds.builder(self.path, data_dir=self._data_dir)
                if self._download:
                    builder.download_and_prepare(file_format="array_record")
                elif not builder.is_prepared():
                    raise DataError(
                        f"TFDS {self.path!r} is not in {builder.data_dir}: "
                        "prepare it, or set download=True"
                    )
            features = dict(builder.info.features or {})
            skip = {image_key: tfds.decode.SkipDecoding()} if image_key in features else None
            self._data: Any = builder.as_data_source(self._split, decoders=skip)
        except DataError:
            raise
        except NotImplementedError as error:
            raise DataError(
                f"the files of TFDS {self.path!r} have no random access: "
                "prepare it with file_format='array_record'"
            ) from error
        except Exception as error:  # tfds raises many classes, often with pages of text
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[0] if lines else describe(error)
            raise DataError(
                f"cannot open TFDS {self.path!r}, split {self._split!r}: {reason}"
            ) from error
        others = [key for key in features if key != image_key]
        self._kept = others if self._columns is None else self._columns
        for key in (image_key, *self._kept):
            if key not in features:
                raise DataError(
                    f"TFDS {self.path!r} has no feature {key!r}: it has {', '.join(features)}"
                )
        self._caption = find_columns(self._kept, "text", self._text, CAPTION_COLUMNS, self.path)
        labels = [k for k in self._kept if isinstance(features[k], tfds.features.ClassLabel)]
        self._labels = {k: features[k].names for k in labels}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metadata of all pictures; the first use reads the whole split, without decoding."""
        if self._rows is None:
            self._rows = [self._metadata(record) for record in self._data]
        return self._rows

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        """Returns the place of a picture in the data set, as records have no names."""
        return f"{self.path}[{index}]"

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._data[index]
        return {**self._metadata(record), "image": record[self._image_key]}

    def _metadata(self, record: Mapping[str, Any]) -> dict[str, Any]:
        row = {key: to_python(record[key]) for key in self._kept}
        names = {
            f"{k}_name": labels[row[k]]
            for k, labels in self._labels.items()
            if 0 <= row[k] < len(labels)
        }
        return (
            names
            | row
            | {
                "text": caption_text(
                    row.get(self._caption[0]) if self._caption else None, self.path
                )
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        # A worker only opens what is prepared, and reads the metadata record by record.
        return {**self.__dict__, "_download": False, "_rows": None, "_data": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def to_python(value: Any) -> Any:
    """Converts bytes to str and NumPy to Python values, inside lists and dicts as well."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, Mapping):
        return {key: to_python(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_python(item) for item in value]
    return to_python(value.tolist()) if hasattr(value, "tolist") else value
