"""A picture with a mask: inpainting."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from ldm_jax.conditioning.base import Names, RowCondition, check_kinds
from ldm_jax.conditioning.joined import Joined
from ldm_jax.errors import DataError, RequestError

Of = Literal["masked", "masked_sd", "masked_filled"]
_MASKS_DRAWN = 100


@dataclasses.dataclass(frozen=True)
class RowMask(RowCondition):
    """A mask uint8 [H, W, 1], 1 where the picture is to be painted.

    It is one of the ``kinds`` at random; one that hides more than the share ``most`` of the
    picture is drawn again.
    """

    kinds: tuple[str, ...] = ("boxes", "strokes", "outpaint", "half")
    most: float = 1.0
    column = ""

    def __post_init__(self) -> None:
        check_kinds(self.kinds, MASKS, "mask")

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: Any, rng: np.random.Generator
    ) -> np.ndarray:
        """Draws a mask for the picture."""
        h, w = image.shape[:2]
        for _ in range(_MASKS_DRAWN):
            mask = MASKS[self.kinds[rng.integers(len(self.kinds))]](h, w, rng)
            if mask.mean() <= self.most:
                return mask[:, :, None].astype(np.uint8)
        raise DataError(
            f"of {_MASKS_DRAWN} masks none hides {self.most:g} of a picture of {(h, w)} or less: "
            "raise data.condition.most"
        )

    def draw(self, images: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Draws the picture, grey where it is masked."""
        return np.where(values > 0, np.uint8(127), images)


@dataclasses.dataclass(frozen=True)
class MaskedPicture(Joined):
    """The latents of a masked picture, and its mask.

    Attributes:
      of: How they are made, see `masked_condition`.
    """

    of: Of = "masked"

    edits = False
    needs_mask = True

    def __post_init__(self) -> None:
        if self.of not in get_args(Of):
            raise ValueError(
                f"of {self.of!r} is neither 'picture' nor 'masked', 'masked_sd' or 'masked_filled'"
            )

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what draws the mask of a row."""
        return RowMask(**settings)

    def check_request(self, request: Any) -> None:
        """An image and its mask are both needed."""
        if request.image is None or request.mask is request.outpaint is None:
            raise RequestError(
                "this model paints a masked part of an image: give an image, and a mask or outpaint"
            )
        super().check_request(request)

    def parse(self, value: Any, canvas: Any, geometry: Any) -> list[None]:
        """Returns one empty condition: `with_picture` makes it inside the program."""
        return [None]

    def encode(self, values: Sequence[Any]) -> Any:
        """Returns None for what `parse` returns, else as `Joined` does."""
        return None if list(values) == [None] else super().encode(values)

    def null_row(self, encoded: Any = None) -> None:
        """Returns None: the condition is never dropped."""

    def with_picture(
        self, encoded: Any, first_stage: Any, image: jax.Array | None, mask: jax.Array | None
    ) -> Any:
        """Returns the masked picture's latents and its mask, [b, h, w, channels]."""
        assert image is not None
        assert mask is not None
        return masked_condition(first_stage, image, mask, self.of).astype(jnp.float32)

    def encode_rows(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the masks of a batch."""
        return {"encoded": None, "mask": raw["mask"] if "mask" in raw else raw["condition"]}

    def example_rows(self, size: tuple[int, int]) -> dict[str, Any]:
        """Returns an empty mask."""
        return {"encoded": None, "mask": np.zeros((1, *size, 1), np.uint8)}


def masked_condition(
    stage: Any, pixels: jax.Array, mask: jax.Array, of: Of = "masked"
) -> jax.Array:
    """Returns the condition of inpainting models, [b, h, w, c + 1].

    Args:
      stage: The `FirstStage`.
      pixels: The picture [b, H, W, 3] in [-1, 1].
      mask: [b, H, W, 1], 1 where the picture is to be painted.
      of: "masked", as in the original's scripts/inpaint.py: the unscaled latents of the picture,
        black in the mask, and the mask as -1 and 1. "masked_sd", as in its LatentInpaintDiffusion:
        the mask as 0 and 1, and the scaled latents of the picture, grey in the mask; masks shrink
        by nearest neighbours. "masked_filled", our own, for pictures of few cells: the scaled
        latents of the picture, `filled` in the mask, and the masked share of each cell. A black or
        grey hole changes the latents of the cells beside it, and a stroke thinner than a cell is
        lost where a mask shrinks by nearest neighbours.
    """
    f, hole = stage.downsampling, mask.astype(pixels.dtype)
    if of == "masked_filled":
        b, h, w, _ = hole.shape
        z = stage.encode(filled(pixels, 1 - hole))
        share = hole.reshape(b, h // f, f, w // f, f, 1).mean((2, 4))
        return jnp.concatenate([z, share.astype(z.dtype)], axis=-1)
    small = hole[:, ::f, ::f]
    if of == "masked_sd":
        z = stage.encode(jnp.where(hole > 0, 0.0, pixels))
        return jnp.concatenate([small.astype(z.dtype), z], axis=-1)
    z = stage.encode(jnp.where(hole > 0, -1.0, pixels)) / stage.scale
    return jnp.concatenate([z, (2 * small - 1).astype(z.dtype)], axis=-1)


def filled(pixels: jax.Array, known: jax.Array) -> jax.Array:
    """Fills unknown pixels smoothly with a pull-push pyramid (Gortler et al. 1996).

    Args:
      pixels: [b, H, W, c].
      known: [b, H, W, 1], 1 where a pixel is known, 0 elsewhere.

    Returns:
      [b, H, W, c]; 0 where nothing is known.
    """
    b, h, w, _ = pixels.shape
    if h * w == 1:
        return known * pixels
    known, pixels = (jnp.pad(a, ((0, 0), (0, h % 2), (0, w % 2), (0, 0))) for a in (known, pixels))
    cells = (b, (h + 1) // 2, 2, (w + 1) // 2, 2, -1)
    count = known.reshape(cells).sum((2, 4))
    mean = (known * pixels).reshape(cells).sum((2, 4)) / jnp.maximum(count, 1)
    coarse = filled(mean, jnp.minimum(count, 1))
    behind = jax.image.resize(coarse, pixels.shape, "linear")
    return (known * pixels + (1 - known) * behind)[:, :h, :w]


# --------------------------------------------------------------------------- masks to train with


def boxes(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    """Draws one to four rectangles, each a tenth to a half of either side."""
    mask = np.zeros((h, w), bool)
    for _ in range(rng.integers(1, 5)):
        high, wide = _side(h, rng, 0.1, 0.5), _side(w, rng, 0.1, 0.5)
        top, left = rng.integers(0, h - high + 1), rng.integers(0, w - wide + 1)
        mask[top : top + high, left : left + wide] = True
    return mask


def strokes(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    """Draws one to four strokes of a round brush (after Yu et al. 2019, arXiv:1806.03589)."""
    image = Image.new("1", (w, h))
    draw, side = ImageDraw.Draw(image), min(h, w)
    for _ in range(rng.integers(1, 5)):
        radius = max(1, round(side * rng.uniform(0.02, 0.08)))
        at, angle = rng.uniform((0, 0), (w, h)), rng.uniform(0, 2 * np.pi)
        for _ in range(rng.integers(3, 9)):
            angle += rng.normal(0, 0.9)
            to = np.clip(
                at + side * rng.uniform(0.1, 0.3) * np.array([np.cos(angle), np.sin(angle)]),
                0,
                (w, h),
            )
            draw.line([*at, *to], fill=1, width=2 * radius)
            for x, y in (at, to):  # round ends, and no notches between two pieces
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1)
            at = to
    return np.array(image)


def outpaint(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    """Masks borders at one to four sides, each a tenth to two fifths of the picture."""
    mask = np.zeros((h, w), bool)
    for side in rng.permutation(4)[: rng.integers(1, 5)]:
        turned = np.rot90(mask, int(side))  # a view: writes into the mask
        turned[: _side(turned.shape[0], rng, 0.1, 0.4)] = True
    return mask


def half(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    """Masks one half: upper, lower, left or right."""
    mask = np.zeros((h, w), bool)
    turned = np.rot90(mask, int(rng.integers(4)))
    turned[: max(1, turned.shape[0] // 2)] = True
    return mask


def _side(length: int, rng: np.random.Generator, least: float, most: float) -> int:
    return max(1, round(length * rng.uniform(least, most)))


MASKS: dict[str, Callable[[int, int, np.random.Generator], np.ndarray]] = {
    "boxes": boxes,
    "strokes": strokes,
    "outpaint": outpaint,
    "half": half,
}
