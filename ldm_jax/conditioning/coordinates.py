"""The place of every code in the whole picture, for transformers over codes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.base import Cond, Conditioner, Names, RowCondition
from ldm_jax.nn.resize import resize


def coordinates_of(size: tuple[int, int]) -> np.ndarray:
    """Returns the place of each pixel, row by row, as a part of all: float32 [H, W] in [0, 1)."""
    h, w = size
    return (np.arange(h * w, dtype=np.float64) / (h * w)).astype(np.float32).reshape(h, w)


@dataclasses.dataclass(frozen=True)
class RowCoordinates(RowCondition):
    """The coordinates of a crop within its whole picture, float32 [H, W]."""

    column: str = ""

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: Any, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns the coordinates of the crop's pixels."""
        h, w = view.size
        places = np.arange(h * w, dtype=np.int32).reshape(h, w)
        places = view.transform.apply(places, view.crop, "nearest")
        return (places.astype(np.float64) / (h * w)).astype(np.float32)

    def draw(self, images: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Draws coordinates from black to white."""
        grey = np.round(values * 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)


@dataclasses.dataclass(frozen=True)
class Coordinates(Conditioner):
    """Coordinates as a grid of tokens (the original's CoordStage).

    Their mean over the pixels of a code, times ``n_embed``, rounded half to even. Models of crops
    learn with them where in a picture a crop lies.

    Attributes:
      n_embed: The number of steps between the first pixel and the last.
      down_factor: Pixels of a code along a side.
      size: Height and width of the pictures in pixels, for `encode_null`.
    """

    n_embed: int
    down_factor: int
    size: tuple[int, int] = (256, 256)

    guided = False
    cached = False

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what computes the coordinates of a row."""
        super().row_condition(fields, settings, names)  # it has no settings
        return RowCoordinates()

    def check_size(self, size: tuple[int, int], latent: tuple[int, int]) -> None:
        """The grid is that of the codes."""
        if tuple(n // self.down_factor for n in size) != latent:
            raise ValueError(
                f"down_factor is {self.down_factor}: pictures of {size} have codes of {latent}"
            )

    @property
    def vocabulary(self) -> int:
        """The highest token of a whole picture, and those below it."""
        f, last = self.down_factor, coordinates_of(self.size)
        return int(np.round(self.n_embed * last[-f:, -f:].mean())) + 1

    def encode(self, values: Sequence[Any]) -> np.ndarray:
        """Returns coordinates float32 [b, H, W], all of one size."""
        maps = np.asarray(values, np.float32)
        if maps.ndim != 3:
            raise ValueError(f"coordinates of shape {maps.shape}, expected [b, h, w]")
        return maps

    def encode_null(self, n: int) -> np.ndarray:
        """Returns the coordinates of whole pictures."""
        return np.repeat(coordinates_of(self.size)[None], n, axis=0)

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Returns a grid of tokens."""
        return Cond(tokens=self.rounded(jnp.asarray(encoded)).astype(jnp.int32))

    def rounded(self, maps: jax.Array) -> jax.Array:
        """Coordinates [b, H, W] -> rounded means, float32 [b, h, w]; 1.0 becomes ``n_embed``."""
        means = resize(maps[..., None], 1 / self.down_factor, "area")[..., 0]
        return jnp.round(self.n_embed * jnp.clip(means, 0.0, 1.0))

    def parse(self, value: Any, canvas: Any, geometry: Any) -> list[np.ndarray]:
        """Returns the coordinates of the canvas."""
        return [coordinates_of(canvas.size)]
