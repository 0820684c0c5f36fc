"""Text and a depth map together: Stable Diffusion 2's depth model.

The map is given; nothing here estimates it from a picture.
"""

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ldm_jax.conditioning.base import Cond, Conditioner, Names, RowCondition, as_list, column_of
from ldm_jax.conditioning.hybrid import BesideText, text_of
from ldm_jax.conditioning.pictures import open_picture
from ldm_jax.errors import DataError, RequestError
from ldm_jax.nn.resize import resize_to


@dataclasses.dataclass(frozen=True)
class RowDepth(RowCondition):
    """The depth map in a ``column``, cut as the picture is and resized to ``size``: float32 [h, w].

    A row holds a picture of one channel, encoded or as an array; brighter is nearer.
    """

    column: str
    size: tuple[int, int]

    def read(self, row: dict[str, Any]) -> None:
        """Decodes the map."""
        row[self.column] = read_depth(column_of(row, self.column))

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: Any, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns the map of the crop."""
        depth, (h, w), crop = row[self.column], view.size, view.crop
        if depth.shape != view.size:
            raise DataError(
                f"the depth map of {row.get('file_name', 'a row')} has {depth.shape} pixels, its "
                f"picture {(h, w)}"
            )
        depth = depth[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        depth = np.ascontiguousarray(depth[:, ::-1] if crop.mirror else depth)
        height, width = self.size
        small = Image.fromarray(depth).resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(small)

    def draw(self, images: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Draws the maps in grey."""
        size, grey = images.shape[2:0:-1], np.asarray(normalized(values[..., None]))[..., 0]
        small = (127.5 * (grey + 1)).clip(0, 255).astype(np.uint8)
        shown = [Image.fromarray(one).resize(size).convert("RGB") for one in small]
        return np.stack([np.asarray(one) for one in shown])


def read_depth(value: Any) -> np.ndarray:
    """Reads a picture of one channel, a .npy or an array as float32 [h, w]; colours become grey.

    Args:
      value: A path, a picture, an array, or the bytes of a picture or of a .npy file.

    Raises:
      RequestError: It cannot be read.
    """

    def convert(picture: Any) -> np.ndarray:
        if isinstance(picture, Image.Image):
            grey = picture.mode in ("L", "F") or picture.mode.startswith("I")
            picture = picture if grey else picture.convert("L")
        array = np.asarray(picture, np.float32)
        array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
        if array.ndim != 2 or not array.size or not np.isfinite(array).all():
            raise RequestError(
                f"depth of shape {array.shape}: give a picture or an array of finite numbers [h, w]"
            )
        return array

    if isinstance(value, str | Path) and Path(value).suffix == ".npy":
        try:
            value = Path(value).read_bytes()
        except OSError as error:
            raise RequestError(f"depth {value} cannot be read: {error.strerror or error}") from None
    if isinstance(value, bytes) and value.startswith(b"\x93NUMPY"):
        try:
            return convert(np.load(io.BytesIO(value), allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise RequestError(f"depth: {error}") from error
    if isinstance(value, bytes):
        from ldm_jax.data import decode

        with decode.open_picture(value) as image:
            image.load()
            return convert(image)
    return open_picture(value if not isinstance(value, Path) else str(value), "depth", convert)


def normalized(depth: Any) -> jax.Array:
    """Scales maps [b, h, w, 1] to [-1, 1] each, as the original does."""
    depth = jnp.asarray(depth, jnp.float32)
    low, high = (f(depth, axis=(1, 2, 3), keepdims=True) for f in (jnp.min, jnp.max))
    return 2 * (depth - low) / (high - low + 0.001) - 1


def depth_condition(depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes maps [b, h, w, 1] to latents of ``size``, bicubic, and normalises them."""
    return np.asarray(normalized(resize_to(jnp.asarray(depth, jnp.float32), size, "bicubic")))


@dataclasses.dataclass(frozen=True)
class TextDepth(BesideText):
    """Text as the context, and a depth map concatenated to the latents.

    `from_request` makes {"text", "depth"} of the tokens. Guidance leads away from another text,
    with the same map; only the text is dropped in training.

    Attributes:
      size: Height and width of the latents in training and in `encode_null`.
      factor: Pixels along a side of a latent's cell.
    """

    size: tuple[int, int] = (64, 64)
    factor: int = 8

    options = ("depth",)

    @property
    def concat_channels(self) -> int:
        """The map's channel."""
        return 1

    @classmethod
    def from_config(cls, dtype: Any = jnp.float32, **fields: Any) -> Conditioner:
        """Builds it from "text", a kind of text with its fields, and its own."""
        built: Any = super().from_config(dtype, **{**fields, "text": text_of(fields, dtype)})
        return built

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what reads the map of a row."""
        return RowDepth(**settings, size=tuple(fields.get("size", (64, 64))))

    def check_size(self, size: tuple[int, int], latent: tuple[int, int]) -> None:
        """Maps have the size of the latents."""
        if tuple(self.size) != latent:
            raise ValueError(
                f"size is {tuple(self.size)}: latents of pictures of {size} are {latent}"
            )

    def check_request(self, request: Any) -> None:
        """A map is needed."""
        super().check_request(request)
        if request.depth is None:
            raise RequestError(
                "this model needs a depth map: give one as depth, brighter where nearer (it is not "
                "estimated from a picture here)"
            )

    def encode_null(self, n: int) -> dict[str, Any]:
        """Returns the empty caption, and zeros."""
        zeros = np.zeros((n, *self.size, 1), np.float32)
        return {"text": self.text.encode_null(n), "depth": zeros}

    def null_row(self, encoded: Any = None) -> dict[str, Any]:
        """Returns the empty caption with the map of ``encoded``."""
        null = self.encode_null(1)
        return null if encoded is None else null | {"depth": encoded["depth"]}

    def drop(self, encoded: Any, null: Any, drop: jax.Array) -> Any:
        """Replaces the caption of the rows in ``drop`` [b]; the map stays."""
        text = self.text.drop(encoded["text"], null["text"], drop)
        return {"text": text, "depth": encoded["depth"]}

    def from_request(
        self,
        encoded: Any,
        request: Any,
        canvas: Any,
        *,
        seeds: Sequence[int],
        negative: bool = False,
    ) -> dict[str, Any]:
        """Adds the maps of a request, stretched to the latents; one, or one for each picture."""
        text = encoded["text"] if isinstance(encoded, dict) and "text" in encoded else encoded
        size = canvas.size[0] // self.factor, canvas.size[1] // self.factor
        maps = [read_depth(one) for one in as_list(request.depth)]
        depth = [depth_condition(one[None, :, :, None], size)[0] for one in maps]
        return {"text": text, "depth": np.stack(depth)}

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Encodes the text; the map is concatenated."""
        text = self.text(params, encoded["text"], train=train, rngs=rngs)
        return Cond(crossattn=text.crossattn, concat=encoded["depth"])

    def encode_rows(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Encodes the captions and the maps of a batch."""
        text = self.text.encode_rows({"caption": raw["caption"]})["encoded"]
        depth = np.asarray(normalized(raw["condition"][..., None]))
        return {"encoded": {"text": text, "depth": depth}}
