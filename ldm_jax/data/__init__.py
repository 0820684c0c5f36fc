"""Pictures and captions: sources, their parts, transforms, loaders and the latent cache.

A leaf of the package. Grain and TensorFlow Datasets are imported on use.
"""

from ldm_jax.data.captions import Captions, caption_template
from ldm_jax.data.decode import decode_image, to_rgb
from ldm_jax.data.latents import LatentLoader, LatentSource
from ldm_jax.data.loader import Loader
from ldm_jax.data.parts import hold_out_pairs, make_source, select, split_by
from ldm_jax.data.sources import SOURCES, TFDS, ImageFolder, Source, Subset
from ldm_jax.data.transforms import ImageTransform
from ldm_jax.errors import DataError, UnreadablePicture

__all__ = [
    "SOURCES",
    "TFDS",
    "Captions",
    "DataError",
    "ImageFolder",
    "ImageTransform",
    "LatentLoader",
    "LatentSource",
    "Loader",
    "Source",
    "Subset",
    "UnreadablePicture",
    "caption_template",
    "decode_image",
    "hold_out_pairs",
    "make_source",
    "select",
    "split_by",
    "to_rgb",
]
