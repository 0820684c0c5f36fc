"""Latent diffusion in JAX/Flax.

>>> import ldm_jax
>>> ldm_jax.use_cores()  # on a CPU
>>> pipe = ldm_jax.load("emoji")
>>> images = pipe(["red apple, noto style"], seeds=[0, 1])  # uint8 [2, 64, 64, 3]
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm_jax.convert.conversion import convert
    from ldm_jax.diffusion.samplers import SAMPLERS
    from ldm_jax.errors import LdmJaxError
    from ldm_jax.eval.evaluation import evaluate
    from ldm_jax.kernels.cores import use_cores
    from ldm_jax.sampling.pipeline import Pipeline, load
    from ldm_jax.sampling.request import Request
    from ldm_jax.sampling.server import serve
    from ldm_jax.train.loop import train

# Public names and the modules that define them; JAX is imported when one is used.
_WHERE = {
    "Pipeline": "ldm_jax.sampling.pipeline",
    "Request": "ldm_jax.sampling.request",
    "SAMPLERS": "ldm_jax.diffusion.samplers",
    "LdmJaxError": "ldm_jax.errors",
    "evaluate": "ldm_jax.eval.evaluation",
    "load": "ldm_jax.sampling.pipeline",
    "serve": "ldm_jax.sampling.server",
    "use_cores": "ldm_jax.kernels.cores",
}

__all__ = [
    "SAMPLERS",
    "LdmJaxError",
    "Pipeline",
    "Request",
    "__version__",
    "convert",
    "evaluate",
    "load",
    "serve",
    "train",
    "use_cores",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("ldm_jax")
        except PackageNotFoundError:  # a checkout that is not installed
            return "0+unknown"
    if name in ("convert", "train"):  # packages that can be called
        return importlib.import_module(f"ldm_jax.{name}")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
