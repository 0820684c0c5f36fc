"""Classes as tokens of a transformer over codes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.base import Cond, RowCondition
from ldm_jax.conditioning.class_label import Classes


@dataclasses.dataclass(frozen=True)
class LabelToken(Classes):
    """The number of a class as the token in front of its pictures (the original's Labelator).

    The token is not shifted: classes and codes share the vocabulary.

    Attributes:
      n_classes: The number of classes.
    """

    n_classes: int

    argument = None
    guided = False

    @property
    def count(self) -> int:
        """The number of classes."""
        return self.n_classes

    @property
    def vocabulary(self) -> int:
        """The number of classes."""
        return self.n_classes

    @classmethod
    def complete(
        cls, fields: Mapping[str, Any], row_condition: RowCondition | None, dropout: float
    ) -> dict[str, Any]:
        """Fills in the number of classes that have names."""
        known = len(getattr(row_condition, "names", ()))
        if "n_classes" not in fields and not known:
            raise ValueError("n_classes is missing: the classes have no names to count")
        fields = {"n_classes": known, **fields}
        if fields["n_classes"] < known:
            raise ValueError(f"n_classes is {fields['n_classes']}: there are {known} classes")
        return fields

    def encode(self, values: Sequence[int | str]) -> np.ndarray:
        """Returns labels int32 [b, 1]."""
        return super().encode(values)[:, None]

    def encode_null(self, n: int) -> np.ndarray:
        """Returns class 0, ``n`` times; it has the shape of any other."""
        return np.zeros((n, 1), np.int32)

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Returns the encoded labels."""
        return Cond(tokens=jnp.asarray(encoded))

    def signature(self, names: Sequence[str] | None) -> dict[str, Any]:
        """Returns the names."""
        return {"classes": names}
