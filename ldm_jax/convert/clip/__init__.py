"""CLIP models with both towers, under the names of OpenAI and of transformers, both ways."""

from ldm_jax.convert.clip.reading import from_clip, is_clip
from ldm_jax.convert.clip.writing import to_clip

__all__ = ["from_clip", "is_clip", "to_clip"]
