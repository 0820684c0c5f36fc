"""One constant token: an unconditional transformer over codes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.base import Cond, Conditioner


@dataclasses.dataclass(frozen=True)
class StartToken(Conditioner):
    """The same token in front of every picture (the original's SOSProvider).

    Attributes:
      token: The token, one of the vocabulary that the codes have too.
    """

    token: int = 0

    guided = False

    @property
    def vocabulary(self) -> int:
        """The token and those below it."""
        return self.token + 1

    def encode(self, values: Sequence[Any]) -> np.ndarray:
        """Returns the token for each picture, int32 [b, 1]."""
        return np.full((len(values), 1), self.token, np.int32)

    def encode_null(self, n: int) -> np.ndarray:
        """Returns the token ``n`` times."""
        return self.encode([None] * n)

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Returns the token as it is encoded."""
        return Cond(tokens=jnp.asarray(encoded))

    def parse(self, value: Any, canvas: Any, geometry: Any) -> list[Any]:
        """Returns one empty condition, for all pictures."""
        return [None]

    def encode_rows(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the token for each row."""
        rows = raw["moments"] if "moments" in raw else raw["image"]
        return {"encoded": self.encode_null(len(rows))}
