"""Channels that are concatenated to the latents without a network."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm_jax.conditioning.base import Cond, Conditioner


@dataclasses.dataclass(frozen=True)
class Joined(Conditioner):
    """Base of kinds whose channels are concatenated to the latents.

    Attributes:
      channels: The number of channels.
      size: Height and width of the latents, for `encode_null`.
    """

    channels: int
    size: tuple[int, int] = (64, 64)

    field = "image"
    guided = False
    cached = False

    @property
    def concat_channels(self) -> int:
        """The number of channels that are concatenated to the latents."""
        return self.channels

    def check_size(self, size: tuple[int, int], latent: tuple[int, int]) -> None:
        """The null condition has the size of the latents."""
        if tuple(self.size) != latent:
            raise ValueError(
                f"size is {tuple(self.size)}: latents of pictures of {size} are {latent}"
            )

    def encode(self, values: Sequence[Any]) -> Any:
        """Returns float32 [b, h, w, channels] of arrays [h, w, channels], all of one size."""
        arrays = np.asarray(values, np.float32)
        if arrays.ndim != 4 or arrays.shape[-1] != self.channels:
            raise ValueError(f"arrays of shape {arrays.shape}, expected [b, h, w, {self.channels}]")
        return arrays

    def encode_null(self, n: int) -> np.ndarray:
        """Returns zeros."""
        return np.zeros((n, *self.size, self.channels), np.float32)

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Returns the channels."""
        return Cond(concat=encoded)
