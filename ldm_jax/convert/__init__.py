"""Conversion of checkpoints: ``ldm_jax.convert(source, out)`` writes a model directory."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    """Lets ``ldm_jax.convert`` be the function as well as the package of that name."""

    def __call__(self, source: str | Path, out: str | Path, **options: Any) -> Any:
        """Converts a checkpoint; see `ldm_jax.convert.conversion.convert`."""
        from ldm_jax.convert.conversion import convert

        return convert(source, out, **options)


sys.modules[__name__].__class__ = _CallableModule
