"""The vector of a caption in the space that CLIP's texts and pictures share."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ldm_jax.conditioning.base import Cond
from ldm_jax.conditioning.text import ClipText
from ldm_jax.models.clip import normalized


@dataclasses.dataclass(frozen=True)
class ClipVector(ClipText):
    """CLIP's projected end token as the context (FrozenCLIPTextEmbedder).

    Attributes:
      n_repeat: How often the vector is in the context.
      normalize: Whether it has unit length.
    """

    n_repeat: int = 1
    normalize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighted or self.clip_skip != 1:
            name = "weighted" if self.weighted else "clip_skip"
            raise ValueError(f"{name} is for contexts of tokens: the vector is of the last layer")
        if self.n_repeat < 1:
            raise ValueError(f"n_repeat {self.n_repeat} must be at least 1")
        if self.module.projection_dim is None:
            raise ValueError("projection_dim is missing: the text tower has no projection")

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Encodes tokens int32 [b, m] as the context [b, n_repeat, projection_dim]."""
        states: Any = self.module.apply({"params": params}, encoded)
        vector = normalized(states.pooled) if self.normalize else states.pooled
        return Cond(crossattn=jnp.repeat(vector[:, None], self.n_repeat, axis=1))
