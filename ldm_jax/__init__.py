"""Latent diffusion in JAX/Flax.

>>> import ldm_jax
>>> ldm_jax.use_cores()  # on a CPU
>>> pipe = ldm_jax.load("emoji")
>>> images = pipe(["red apple, noto style"], seeds=[0, 1])  # uint8 [2, 64, 64, 3]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm_jax.sampling.pipeline import Pipeline

__version__ = "0.2.0"
__all__ = ["__version__", "load", "use_cores"]


def load(model: str = "emoji", **options: Any) -> "Pipeline":
    """A pipeline of a model directory, a checkpoint of the original or a model that ships with the package; see `ldm_jax.sampling.pipeline.load`."""
    from ldm_jax.sampling.pipeline import load  # jax is imported only when it is needed

    return load(model, **options)


def use_cores() -> None:
    """Makes each core of a CPU a device, for the pipelines that are made after it; see `ldm_jax.kernels.cores.use_cores`."""
    from ldm_jax.kernels.cores import use_cores

    use_cores()
