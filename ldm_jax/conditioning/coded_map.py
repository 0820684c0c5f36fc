"""Maps coded by a VQ model of their own, as tokens of a transformer over codes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ldm_jax.conditioning.base import Cond, Conditioner, Names, RowCondition, as_list, column_of
from ldm_jax.conditioning.depth import read_depth
from ldm_jax.conditioning.semantic_map import RowLabelMap, request_map
from ldm_jax.data import ImageTransform
from ldm_jax.models.vqgan import VQModelInterface


@dataclasses.dataclass(frozen=True)
class CodedMap(Conditioner):
    """A map that the conditioner's VQ model codes: a grid of tokens.

    The original's cond_stage_model that is a VQModel, never trained with the transformer. "path" in
    a config is the model directory of that first stage.

    Attributes:
      module: The VQ model, of as many channels as the maps have.
      of: "labels" or "depth".
      size: Height and width of the maps in pixels, for `encode_null`.
      downsample: Side of the square that maps are resized to before they are coded; -1: as they are
        (the original's downsample_cond_size).
    """

    module: VQModelInterface
    of: Literal["labels", "depth"] = "labels"
    size: tuple[int, int] = (256, 256)
    downsample: int = -1

    network = VQModelInterface
    guided = False
    cached = False
    pretrained = "first_stage"

    @property
    def vocabulary(self) -> int:
        """The number of codes."""
        return self.module.make_quantizer().re_embed

    def check_size(self, size: tuple[int, int], latent: tuple[int, int]) -> None:
        """Maps are cut as the pictures are."""
        if tuple(self.size) != size:
            raise ValueError(
                f"size is {tuple(self.size)}: maps are cut as the pictures are, data.size={size}"
            )

    def init(self, key: jax.Array) -> dict:
        """Returns random parameters."""
        f = self.module.downsampling
        pixels = jnp.zeros((1, f, f, self.module.in_channels))
        return dict(self.module.init(key, pixels)["params"])

    def channels(self, encoded: jax.Array) -> jax.Array:
        """Encoded maps -> channels float32 [b, H, W, c]."""
        raise NotImplementedError

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Codes the maps; returns their grid of tokens [b, h, w]."""
        maps = self.channels(jnp.asarray(encoded))
        if self.downsample > 0:
            maps = resized(maps, (self.downsample, self.downsample))
        # Codes that the VQ model does not use any more may become random ones.
        variables, remap = {"params": params}, {"remap": jax.random.key(0)}
        h: Any = self.module.apply(variables, maps, method="prequant")
        code: Any = self.module.apply(variables, h, method="quantized", rngs=remap)
        return Cond(tokens=code.indices.reshape(h.shape[:3]))

    def encode_rows(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Encodes the maps of a batch."""
        return {"encoded": self.encode(raw["condition"])}


@dataclasses.dataclass(frozen=True)
class CodedLabels(CodedMap):
    """A map of labels, one-hot to its VQ model (VQSegmentationModel)."""

    field = "semantic_map"

    @classmethod
    def variant(cls, fields: Mapping[str, Any]) -> type[Conditioner]:
        """Returns the class of what is coded."""
        of = fields.get("of", "labels")
        if of not in ("labels", "depth"):
            raise ValueError(f"of is {of!r}: labels or depth")
        return CodedLabels if of == "labels" else CodedDepth

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what reads the map of a row."""
        if "in_channels" not in fields:
            raise ValueError("model.conditioner.in_channels is missing: the number of labels")
        return RowLabelMap(**settings, labels=fields["in_channels"])

    def encode(self, values: Sequence[Any]) -> np.ndarray:
        """Returns labels int32 [b, H, W], -1 for none, all of one size."""
        maps, labels = np.asarray(values), self.module.in_channels
        if maps.ndim != 3 or not np.issubdtype(maps.dtype, np.integer):
            raise ValueError(f"maps of shape {maps.shape}, expected whole numbers [b, h, w]")
        if maps.min() < -1 or maps.max() >= labels:
            raise ValueError(f"labels must be from 0 to {labels - 1}, or -1")
        return maps.astype(np.int32)

    def encode_null(self, n: int) -> np.ndarray:
        """Returns maps without a label."""
        return np.full((n, *self.size), -1, np.int32)

    def channels(self, encoded: jax.Array) -> jax.Array:
        """Labels [b, H, W] -> one-hot [b, H, W, labels]; channels are kept."""
        return encoded if encoded.ndim == 4 else jax.nn.one_hot(encoded, self.module.in_channels)

    def parse(self, value: Any, canvas: Any, geometry: Any) -> list[np.ndarray]:
        """Returns maps of labels of the canvas."""
        known = self.module.in_channels
        return [request_map(one, canvas.size, known) for one in as_list(value)]


@dataclasses.dataclass(frozen=True)
class RowDepth(RowCondition):
    """The depths in a ``column``, cut as the picture is: float32 [H, W] in [-1, 1].

    A row holds a picture of one channel of 8 or 16 bits or of floats, encoded, as .npy or as an
    array. Depths of a picture are relative: its smallest becomes -1, its largest 1.
    """

    column: str

    def read(self, row: dict[str, Any]) -> None:
        """Decodes the depths."""
        row[self.column] = read_depth(column_of(row, self.column))

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: Any, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns the depths at the picture's size."""
        depth = row[self.column]
        if depth.shape != view.size:
            depth = np.asarray(Image.fromarray(depth).resize(view.size[::-1], _BILINEAR))
        return relative(view.transform.apply(depth, view.crop, "bilinear"))

    def draw(self, images: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Draws depths from black to white."""
        grey = np.round((values + 1) * 127.5).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)


@dataclasses.dataclass(frozen=True)
class CodedDepth(CodedMap):
    """A map of depths, the only channel of its VQ model."""

    of: Literal["labels", "depth"] = "depth"

    field = "depth"

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what reads the depths of a row."""
        return RowDepth(**settings)

    def encode(self, values: Sequence[Any]) -> np.ndarray:
        """Returns depths float32 [b, H, W], all of one size."""
        maps = np.asarray(values, np.float32)
        if maps.ndim != 3:
            raise ValueError(f"depths of shape {maps.shape}, expected [b, h, w]")
        return maps

    def encode_null(self, n: int) -> np.ndarray:
        """Returns flat maps."""
        return np.zeros((n, *self.size), np.float32)

    def channels(self, encoded: jax.Array) -> jax.Array:
        """Depths [b, H, W] -> [b, H, W, 1]; channels are kept."""
        return encoded if encoded.ndim == 4 else encoded[..., None]

    def parse(self, value: Any, canvas: Any, geometry: Any) -> list[np.ndarray]:
        """Returns depths of the canvas."""
        return [self._fitted(one, canvas.size) for one in as_list(value)]

    def _fitted(self, value: Any, size: tuple[int, int]) -> np.ndarray:
        depth, transform = read_depth(value), ImageTransform(size)
        crop = transform.choose((depth.shape[0], depth.shape[1]), np.random.default_rng(0))
        return relative(transform.apply(depth, crop, "bilinear"))


_BILINEAR = Image.Resampling.BILINEAR


def relative(depth: np.ndarray) -> np.ndarray:
    """Brings depths [h, w] to [-1, 1]; equal ones become -1."""
    depth = depth - depth.min()
    return (2 * depth / max(float(depth.max()), 1e-8) - 1).astype(np.float32)


def resized(maps: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes maps [b, H, W, c] to ``size`` by the nearest pixel, as PyTorch's interpolate."""
    rows, columns = (
        np.minimum(np.arange(m) * np.float32(n / m), n - 1).astype(int)
        for n, m in zip(maps.shape[1:3], size, strict=True)
    )
    return maps[:, rows][:, :, columns]
