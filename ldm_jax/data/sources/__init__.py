"""Random access sources of pictures with metadata.

A source has ``len(source)``; ``source.rows``, a list with one metadata dict per picture (no pixels);
``source[i]``, that dict with the picture under ``"image"`` (encoded bytes, or a uint8 array [H, W, C]); and
``source.path`` and ``source.name(i)``, for messages. Where it can, ``source.stamp(i)`` is a number that changes with the
picture's file. Sources can be pickled: worker processes open their own files.
"""

from collections.abc import Callable

from ldm_jax.data.sources.base import PICTURE_SUFFIXES, Source, Subset
from ldm_jax.data.sources.coco import COCO
from ldm_jax.data.sources.databases import LSUN
from ldm_jax.data.sources.folder import ClassFolders, ImageFolder, LabelMaps
from ldm_jax.data.sources.parquet import Parquet
from ldm_jax.data.sources.scenes import Scenes
from ldm_jax.data.sources.tables import Table, TextList
from ldm_jax.data.sources.tfds import TFDS
from ldm_jax.data.sources.webdataset import WebDataset
from ldm_jax.errors import DataError

__all__ = [
    "PICTURE_SUFFIXES",
    "SOURCES",
    "TFDS",
    "DataError",
    "ImageFolder",
    "Source",
    "Subset",
]

# data.source -> what reads data.path
SOURCES: dict[str, Callable[..., Source]] = {
    "image_folder": ImageFolder,
    "text_list": TextList,
    "table": Table,
    "parquet": Parquet,
    "class_folders": ClassFolders,
    "label_maps": LabelMaps,
    "coco": COCO,
    "webdataset": WebDataset,
    "lsun": LSUN,
    "tfds": TFDS,
    "scenes": Scenes,
}
