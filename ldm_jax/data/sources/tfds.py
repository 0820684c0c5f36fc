"""TensorFlow Datasets, read without TensorFlow."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.errors import DataError


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
        self._options = {
            "split": split,
            "image_key": image_key,
            "data_dir": data_dir,
            "download": download,
        }
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
            reason = next(
                (line.strip() for line in str(error).splitlines() if line.strip()),
                type(error).__name__,
            )
            raise DataError(f"cannot open TFDS {self.path!r}, split {split!r}: {reason}") from error
        wanted = (
            [key for key in features if key != image_key]
            if self._columns is None
            else self._columns
        )
        for key in (image_key, *wanted):
            if key not in features:
                raise DataError(
                    f"TFDS {self.path!r} has no feature {key!r}: it has {', '.join(features)}"
                )
        self._kept = wanted
        self._labels = {
            k: features[k].names
            for k in wanted
            if isinstance(features[k], tfds.features.ClassLabel)
        }

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
        names = {
            f"{k}_name": labels[row[k]]
            for k, labels in self._labels.items()
            if 0 <= row[k] < len(labels)
        }
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
