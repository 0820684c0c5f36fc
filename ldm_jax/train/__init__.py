"""Training: ``ldm_jax.train(config, workdir)`` runs a config of `ldm_jax.configs`."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    """Lets ``ldm_jax.train`` be the function as well as the package of that name."""

    def __call__(
        self, config: Any, workdir: str | Path, *, restore_step: int | None = None
    ) -> Path:
        """Trains a model; see `ldm_jax.train.loop.train`."""
        from ldm_jax.train.loop import train

        return train(config, workdir, restore_step=restore_step)


sys.modules[__name__].__class__ = _CallableModule
