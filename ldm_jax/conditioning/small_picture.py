"""A small picture of the latents' size: super-resolution."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.conditioning.base import Conditioner, Names, RowCondition, check_kinds
from ldm_jax.conditioning.degrade import DEGRADATIONS
from ldm_jax.conditioning.joined import Joined
from ldm_jax.conditioning.masked import MaskedPicture
from ldm_jax.conditioning.pictures import Canvas, Geometry, small_canvas
from ldm_jax.errors import DataError, RequestError


@dataclasses.dataclass(frozen=True)
class RowSmallPicture(RowCondition):
    """The picture reduced to ``size``: uint8 [h, w, 3].

    It is degraded by one of the ``kinds`` at random, see `ldm_jax.conditioning.degrade`.
    """

    size: tuple[int, int]
    kinds: tuple[str, ...] = ("bicubic",)
    column = ""

    def __post_init__(self) -> None:
        check_kinds(self.kinds, DEGRADATIONS, "degradation")

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: Any, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns the small picture."""
        if any(n < m for n, m in zip(image.shape, self.size, strict=False)):
            raise DataError(
                f"pictures of {image.shape[:2]} cannot be reduced to {self.size}: raise data.size"
            )
        return DEGRADATIONS[self.kinds[rng.integers(len(self.kinds))]](image, self.size, rng)

    def draw(self, images: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Enlarges the small pictures, pixel by pixel."""
        size, nearest = images.shape[2:0:-1], Image.Resampling.NEAREST
        return np.stack([np.asarray(Image.fromarray(x).resize(size, nearest)) for x in values])


@dataclasses.dataclass(frozen=True)
class SmallPicture(Joined):
    """The small picture of super-resolution, in [-1, 1]."""

    edits = False

    @classmethod
    def variant(cls, fields: Mapping[str, Any]) -> type[Conditioner]:
        """Returns the class for the config's ``of``: "picture", or how a mask enters."""
        return cls if fields.get("of", "picture") == "picture" else MaskedPicture

    @classmethod
    def from_config(cls, dtype: Any = None, **fields: Any) -> Conditioner:
        """Builds it from a config's fields; ``of`` is "picture"."""
        fields.pop("of", None)
        return super().from_config(dtype, **fields)

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what makes the small picture of a row."""
        return RowSmallPicture(**settings, size=tuple(fields.get("size", Joined.size)))

    def check_request(self, request: Any) -> None:
        """An image is enlarged whole."""
        super().check_request(request)
        if request.mask is not None or request.outpaint is not None:
            raise RequestError("this model enlarges an image: it takes no mask and no outpaint")

    def canvas(self, request: Any, geometry: Geometry) -> Canvas:
        """Returns a canvas of the small pictures' size times the latents' factor."""
        return small_canvas(request.image, geometry)

    def parse(self, value: Any, canvas: Canvas, geometry: Geometry) -> list[np.ndarray]:
        """Returns the small pictures, in [-1, 1]."""
        assert canvas.small is not None
        return list(canvas.small.astype(np.float32) / 127.5 - 1.0)

    def encode_rows(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Encodes the small pictures of a batch."""
        return {"encoded": self.encode(raw["condition"] / np.float32(127.5) - 1)}
