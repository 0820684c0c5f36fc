"""Classes as an embedding that is added to that of the timestep (the original's "adm")."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.base import Cond, RowCondition
from ldm_jax.conditioning.class_label import Classes


@dataclasses.dataclass(frozen=True)
class ClassVector(Classes):
    """A class whose embedding the UNet adds to the timestep's (arXiv:2105.05233, section 3.1).

    The table is the UNet's own: ``unet.num_classes`` must equal ``n_classes``. The original trains
    these models without a null class, so that they are sampled without classifier-free guidance.

    Attributes:
      n_classes: The number of classes, the null class included.
      null_class: Whether the last class is the null class.
    """

    n_classes: int
    null_class: bool = True

    gives_vector = True

    @property
    def guided(self) -> bool:  # type: ignore[override]
        """Whether there is a null class to be guided away from."""
        return self.null_class

    @property
    def count(self) -> int:
        """The number of classes, the null class included."""
        return self.n_classes

    @classmethod
    def complete(
        cls, fields: Mapping[str, Any], row_condition: RowCondition | None, dropout: float
    ) -> dict[str, Any]:
        """Fills in the number of classes: the names and, where conditions are dropped, the null."""
        fields = {"null_class": dropout > 0, **fields}
        if dropout > 0 and not fields["null_class"]:
            raise ValueError(
                "null_class is off, and loss.caption_dropout needs the null class: set it to 0"
            )
        known = len(getattr(row_condition, "names", ())) + bool(fields["null_class"])
        if "n_classes" not in fields and known < 2:
            raise ValueError("n_classes is missing: the classes have no names to count")
        fields = {"n_classes": known, **fields}
        if fields["n_classes"] < known:
            raise ValueError(f"n_classes is {fields['n_classes']}: the data need {known}")
        return fields

    @classmethod
    def unet_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the size of the UNet's table of classes."""
        return {"num_classes": fields["n_classes"]}

    def encode_null(self, n: int) -> np.ndarray:
        """Returns the last class, ``n`` times."""
        return np.full(n, self.n_classes - 1, np.int32)

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Passes the numbers of classes [b] on to the UNet."""
        return Cond(vector=jnp.asarray(encoded))

    def signature(self, names: Sequence[str] | None) -> dict[str, Any]:
        """Returns the names, and the null class where there is one."""
        null = {"null_class": self.n_classes - 1} if self.null_class else {}
        return {**null, "classes": names}
