"""Random access sources of pictures with metadata; see `Source`."""

from collections.abc import Callable

from ldm_jax.data.sources.base import Source, Subset
from ldm_jax.data.sources.coco import COCO
from ldm_jax.data.sources.folder import ClassFolders, ImageFolder, LabelMaps
from ldm_jax.data.sources.hf import HuggingFace
from ldm_jax.data.sources.lists import Table, TextList
from ldm_jax.data.sources.lsun import LSUN
from ldm_jax.data.sources.parquet import Parquet
from ldm_jax.data.sources.scenes import Scenes
from ldm_jax.data.sources.tfds import TFDS
from ldm_jax.data.sources.webdataset import WebDataset

__all__ = ["SOURCES", "TFDS", "ImageFolder", "Source", "Subset"]

# data.source -> the class that reads data.path
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
    "hf": HuggingFace,
    "scenes": Scenes,
}
