"""Conditions of diffusion models: one file for each kind, and the registry of kinds."""

from collections.abc import Mapping
from typing import Any

from ldm_jax.conditioning.base import Cond, Conditioner, RowCondition
from ldm_jax.conditioning.box_tokens import BoxTokens
from ldm_jax.conditioning.class_label import ClassLabel
from ldm_jax.conditioning.class_vector import ClassVector
from ldm_jax.conditioning.clip_vector import ClipVector
from ldm_jax.conditioning.coded_map import CodedLabels
from ldm_jax.conditioning.coordinates import Coordinates
from ldm_jax.conditioning.depth import TextDepth
from ldm_jax.conditioning.embeddings import Embeddings
from ldm_jax.conditioning.hybrid import Hybrid
from ldm_jax.conditioning.label_token import LabelToken
from ldm_jax.conditioning.layout import Layout
from ldm_jax.conditioning.sdxl import Sdxl
from ldm_jax.conditioning.semantic_map import SemanticMap
from ldm_jax.conditioning.small_picture import SmallPicture
from ldm_jax.conditioning.start_token import StartToken
from ldm_jax.conditioning.text import BertText, ClipText
from ldm_jax.conditioning.unconditional import Unconditional
from ldm_jax.conditioning.upscale import TextUpscale
from ldm_jax.errors import ConfigError, did_you_mean

__all__ = [
    "CONDITIONERS",
    "Cond",
    "Conditioner",
    "RowCondition",
    "conditioner_class",
    "make_conditioner",
]

# A model config's "conditioner.kind" -> its class, whose `from_config` takes the other fields.
CONDITIONERS: dict[str, type[Conditioner]] = {
    "bert": BertText,
    "tokens": Layout,
    "clip": ClipText,
    "clip_vector": ClipVector,
    "sdxl": Sdxl,
    "class": ClassLabel,
    "class_vector": ClassVector,
    "rescale": SemanticMap,
    "joined": SmallPicture,
    "hybrid": Hybrid,
    "depth": TextDepth,
    "upscale": TextUpscale,
    "embeddings": Embeddings,
    "none": Unconditional,
    # Of a transformer over codes.
    "start": StartToken,
    "label": LabelToken,
    "coordinates": Coordinates,
    "coded_map": CodedLabels,
    "boxes": BoxTokens,
}


def conditioner_class(fields: Mapping[str, Any]) -> type[Conditioner]:
    """Returns the class of a model config's "conditioner"; raises ConfigError if there is none."""
    kind = fields.get("kind")
    if kind not in CONDITIONERS:
        raise ConfigError(
            f"conditioner: kind {kind!r} does not exist{did_you_mean(kind, CONDITIONERS)}"
        )
    return CONDITIONERS[kind].variant(fields)


def make_conditioner(fields: Mapping[str, Any], dtype: Any) -> Conditioner:
    """Builds the conditioner of a model config; raises ConfigError where the fields do not fit."""
    cls = conditioner_class(fields)
    rest = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "kind"}
    try:
        return cls.from_config(dtype, **rest)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"conditioner: {error}") from None
