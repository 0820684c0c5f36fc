"""No condition."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.conditioning.base import Cond, Conditioner


@dataclasses.dataclass(frozen=True)
class Unconditional(Conditioner):
    """A model without a condition."""

    guided = False
    interpolates = True

    def encode(self, values: Sequence[Any]) -> None:
        """Returns None."""

    def encode_null(self, n: int) -> None:
        """Returns None."""

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Returns the empty condition."""
        return Cond()

    def parse(self, value: Any, canvas: Any, geometry: Any) -> list[Any]:
        """Returns one empty condition, for all pictures."""
        return [None]

    def encode_rows(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Returns no condition."""
        return {"encoded": None}
