"""Batches of changing sizes, as the original's batch_resize_range trains a first stage."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import ConfigError
from ldm_jax.nn.resize import resize_to

STEP = 16  # pixels between two sizes
FIRST = 4  # up to this step the batches have the upper size, so that memory is tested early


@dataclasses.dataclass(frozen=True)
class BatchResize:
    """Square sizes between two bounds, one for each step.

    Attributes:
      lower: The smallest size in pixels.
      upper: The size of the first steps; where the bounds differ by no multiple of 16, a later size
        may exceed it, as in the original.
    """

    lower: int
    upper: int

    def __post_init__(self) -> None:
        if not 0 < self.lower <= self.upper:
            raise ConfigError(
                f"batch_resize ({self.lower}, {self.upper}): give the smallest size, then the "
                "largest"
            )

    @property
    def sizes(self) -> list[int]:
        """The sizes that are drawn from."""
        return list(range(self.lower, self.upper + STEP, STEP))

    def size_at(self, step: int, drawn: int | None = None, seed: int = 0) -> int:
        """The size at a step; ``drawn`` is the size that was chosen, else it follows from seed."""
        if step <= FIRST:
            return self.upper
        return (
            int(np.random.default_rng((seed, step)).choice(self.sizes)) if drawn is None else drawn
        )


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Pictures [b, h, w, c] as [b, size, size, c] by bicubic interpolation, not antialiased.

    As in the original a batch whose height fits is left alone, whatever its width. Resized values
    are float32, on 0..255 like those of uint8.
    """
    if images.shape[1] == size:
        return images
    return np.asarray(resize_to(jnp.asarray(images, jnp.float32), (size, size), "bicubic"))
