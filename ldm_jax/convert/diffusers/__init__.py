"""Folders of diffusers, read and written without diffusers and PyTorch.

A pipeline folder has a ``model_index.json`` and a folder for each component; a component folder has
a ``config.json`` and one checkpoint.
"""

from ldm_jax.convert.diffusers.reading import from_diffusers, is_diffusers
from ldm_jax.convert.diffusers.writing import to_diffusers

__all__ = ["from_diffusers", "is_diffusers", "to_diffusers"]
