"""Maps of labels (or small pictures), resized to the latents and concatenated to them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from ldm_jax.conditioning.base import Cond, Conditioner, Names, RowCondition, as_list, column_of
from ldm_jax.conditioning.pictures import Canvas, Geometry, fit, open_picture, read_picture
from ldm_jax.data import decode
from ldm_jax.errors import DataError, RequestError, UnreadablePicture
from ldm_jax.io.png import palette
from ldm_jax.models.embedders import SpatialRescaler


@dataclasses.dataclass(frozen=True)
class RowLabelMap(RowCondition):
    """The map of labels in a ``column``, cut as the picture is: int32 [H, W].

    A row holds a picture of one channel, encoded or as an array. Labels are 0 to ``labels`` - 1;
    those in ``ignore`` become -1, no label.
    """

    column: str
    labels: int
    ignore: tuple[int, ...] = (255,)

    def read(self, row: dict[str, Any]) -> None:
        """Decodes the map."""
        row[self.column] = read_labels(column_of(row, self.column))

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: Any, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns the map at the picture's size."""
        labels = row[self.column]
        if labels.shape != view.size:
            h, w = view.size
            labels = np.asarray(Image.fromarray(labels).resize((w, h), Image.Resampling.NEAREST))
        labels = view.transform.apply(labels, view.crop, "nearest")
        labels = np.where(np.isin(labels, self.ignore), -1, labels)
        if labels.max() >= self.labels or labels.min() < -1:
            raise DataError(
                f"the label map {row.get('file_name', '')!r} has the label {labels.max()}: "
                f"model.conditioner.in_channels is {self.labels}"
            )
        return labels

    def draw(self, images: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Draws a colour for each label, white for none."""
        return np.concatenate([palette(self.labels), np.full((1, 3), 255, np.uint8)])[values]


@dataclasses.dataclass(frozen=True)
class SemanticMap(Conditioner):
    """A map brought to the latents' size and concatenated (the original's SpatialRescaler).

    Attributes:
      size: Height and width of the maps in pixels, for `encode_null`.
    """

    module: SpatialRescaler
    size: tuple[int, int] = (256, 256)

    field = "semantic_map"
    network = SpatialRescaler
    guided = False
    cached = False

    @property
    def of_pictures(self) -> bool:
        """Whether maps are pictures [h, w, 3] in [-1, 1] instead of labels."""
        return self.module.in_channels == 3

    @property
    def concat_channels(self) -> int:
        """The number of channels that are concatenated to the latents."""
        return self.module.out_channels or self.module.in_channels

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what reads the map of a row."""
        labels = fields.get("in_channels", SpatialRescaler.in_channels)
        if labels == 3:
            raise ValueError(
                "model.conditioner.in_channels is 3, which is for pictures: maps of labels need 4 "
                "or more"
            )
        return RowLabelMap(**settings, labels=labels)

    def check_size(self, size: tuple[int, int], latent: tuple[int, int]) -> None:
        """Maps are cut as the pictures are."""
        if tuple(self.size) != size:
            raise ValueError(
                f"model.conditioner.size is {tuple(self.size)}: maps are cut as the pictures are, "
                f"data.size={size}"
            )

    def init(self, key: jax.Array) -> dict:
        """Returns fresh parameters; {} without ``out_channels``."""
        maps = np.zeros((1, *self.size, self.module.in_channels), np.float32)
        variables: Any = self.module.init(key, maps)
        return dict(variables.get("params", {}))

    def encode(self, values: Sequence[Any]) -> np.ndarray:
        """Encodes maps, all of one size.

        Args:
          values: Labels [h, w], whole numbers, -1 for none; or channels [h, w, in_channels].

        Returns:
          Labels int32 [b, h, w], which become one-hot on the device, or channels float32
          [b, h, w, in_channels].
        """
        maps, channels = np.asarray(values), self.module.in_channels
        if maps.ndim == 3 and np.issubdtype(maps.dtype, np.integer):
            if maps.min() < -1 or maps.max() >= channels:
                raise ValueError(f"labels must be from 0 to {channels - 1}, or -1")
            return maps.astype(np.int32)
        maps = maps.astype(np.float32)
        if maps.ndim != 4 or maps.shape[-1] != channels:
            raise ValueError(f"maps of shape {maps.shape}, expected [b, h, w, {channels}]")
        return maps

    def encode_null(self, n: int) -> np.ndarray:
        """Returns maps without a label, or zeros where maps are pictures."""
        if self.of_pictures:
            return np.zeros((n, *self.size, 3), np.float32)
        return np.full((n, *self.size), -1, np.int32)

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Resizes the maps to the latents."""
        maps = jax.nn.one_hot(encoded, self.module.in_channels) if encoded.ndim == 3 else encoded
        small: Any = self.module.apply({"params": params}, maps)
        return Cond(concat=small)

    def labels(self, names: Sequence[str] | None) -> list[str]:
        """Returns the names of the labels, or their numbers; [] where maps are pictures."""
        return [] if self.of_pictures else list(names or map(str, range(self.module.in_channels)))

    def parse(self, value: Any, canvas: Canvas, geometry: Geometry) -> list[np.ndarray]:
        """Returns maps of the size that the network brings to that of the latents."""
        scale = self.module.multiplier**self.module.n_stages
        h, w = (round(n // geometry.factor / scale) for n in canvas.size)
        return [self._map(one, (h, w)) for one in as_list(value)]

    def _map(self, value: Any, size: tuple[int, int]) -> np.ndarray:
        if self.of_pictures:
            picture = fit(read_picture(value, "semantic_map"), size, "semantic_map")
            return picture.astype(np.float32) / 127.5 - 1.0
        return request_map(value, size, self.module.in_channels)


def request_map(value: Any, size: tuple[int, int], known: int) -> np.ndarray:
    """Reads a request's map and fits it to ``size``: labels [h, w] below ``known``."""
    labels = request_labels(value)
    if labels.min() < 0 or labels.max() >= known:
        highest = max(labels.max(), -labels.min(), key=abs)
        raise RequestError(
            f"semantic_map has the label {highest}: this model knows 0 to {known - 1}"
        )
    # Two bytes of a label as two channels, since only 8-bit pictures are resampled.
    pixels = np.stack([labels & 255, labels >> 8, np.zeros_like(labels)], -1).astype(np.uint8)
    fitted = fit(pixels, size, "semantic_map", "nearest").astype(int)
    return fitted[:, :, 0] + 256 * fitted[:, :, 1]


def request_labels(value: Any) -> np.ndarray:
    """Reads the labels [h, w] of a request's map: a path, PIL image or array of one channel."""
    labels = open_picture(value, "semantic_map", np.asarray)
    whole = np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool
    if labels.ndim != 2 or labels.size == 0 or not whole:
        raise RequestError(
            f"semantic_map: give a picture of one channel whose values are the labels (this one "
            f"is {labels.shape})"
        )
    return labels


def read_labels(data: bytes | np.ndarray) -> np.ndarray:
    """Reads a training row's map of labels: int32 [h, w]; palettes give their indices."""
    if isinstance(data, bytes):
        try:
            with decode.open_picture(data) as image:
                labels = np.asarray(image)
        except UnreadablePicture as error:
            raise UnreadablePicture(f"its label map: {error}") from error
    else:
        labels = np.asarray(data)
    if labels.ndim == 3 and labels.shape[2] == 1:
        labels = labels[:, :, 0]
    if labels.ndim != 2 or not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool):
        raise UnreadablePicture(
            f"its label map has the shape {labels.shape}: one channel of whole numbers is needed"
        )
    return labels.astype(np.int32)
