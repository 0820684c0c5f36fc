"""Boxes as tokens of a transformer over codes."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.base import Cond, Conditioner, Names, RowCondition, Rows
from ldm_jax.conditioning.layout import Layout, RowLayout, read_layout, request_tokens


@dataclasses.dataclass(frozen=True)
class BoxTokens(Conditioner):
    """The tokens of `layout.layout_tokens` in front of a scene's, in the same vocabulary.

    Attributes:
      vocab_size: The number of values of a token.
      max_length: Tokens of a scene: 3 for each box, and 2 for the crop where they are left over.
    """

    vocab_size: int
    max_length: int = 92

    field = "layout"
    guided = False

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what makes the tokens of a row's boxes."""
        length = fields.get("max_length", cls.max_length)
        if "vocab_size" not in fields:
            raise ValueError("model.conditioner.vocab_size is missing: that of the transformer")
        vocabulary = fields["vocab_size"]
        return RowLayout(**settings, length=length, vocabulary=vocabulary, names=names())

    @classmethod
    def row_labels(cls, row: Mapping[str, Any], column: str) -> Iterable[Any]:
        """Yields the labels of the row's boxes."""
        return Layout.row_labels(row, column)

    def row_problems(self, rows: Rows, column: str, few: int) -> Iterator[str]:
        """Yields pictures without a box."""
        empty = [rows.name(i) for i, row in enumerate(rows.rows) if not row.get(column)]
        if empty:
            yield f"{len(empty)} of {len(rows.rows)} pictures have no box"

    @property
    def vocabulary(self) -> int:
        """That of the tokens of boxes."""
        return self.vocab_size

    def encode(self, values: Sequence[Any]) -> np.ndarray:
        """Returns tokens int32 [b, max_length]."""
        tokens = np.asarray(values, np.int32)
        if tokens.ndim != 2 or tokens.shape[1] != self.max_length:
            raise ValueError(f"tokens of shape {tokens.shape}, expected rows of {self.max_length}")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(f"tokens must be from 0 to {self.vocab_size - 1}")
        return tokens

    def encode_null(self, n: int) -> np.ndarray:
        """Returns scenes without a box."""
        return np.full((n, self.max_length), self.vocab_size - 1, np.int32)

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Returns the encoded tokens."""
        return Cond(tokens=jnp.asarray(encoded))

    def parse(self, value: Any, canvas: Any, geometry: Any) -> list[list[int]]:
        """Returns the tokens of one layout: the path of a JSON file, or boxes."""
        boxes = read_layout(value) if isinstance(value, str | Path) else value
        size = {"length": self.max_length, "vocabulary": self.vocab_size}
        return [request_tokens(boxes, **size, names=geometry.names)]
