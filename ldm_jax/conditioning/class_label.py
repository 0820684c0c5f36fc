"""Classes as one context token."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ldm_jax.conditioning.base import (
    Cond,
    Conditioner,
    Names,
    RowCondition,
    Rows,
    as_list,
    column_of,
    label_number,
    some,
)
from ldm_jax.errors import RequestError, did_you_mean
from ldm_jax.models.embedders import ClassEmbedder

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RowClass(RowCondition):
    """The class that a column names: its place in ``names``, or the column's own number."""

    column: str
    names: Names = ()

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: Any, rng: np.random.Generator
    ) -> int:
        """Returns the number of the row's class."""
        return label_number(column_of(row, self.column), self.names, "class")


@dataclasses.dataclass(frozen=True)
class Classes(Conditioner):
    """What every condition on a class has in common; ``count`` is the number of classes."""

    field = "classes"
    argument = "classes"

    @property
    def count(self) -> int:
        """The number of classes, the null class included."""
        raise NotImplementedError

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what reads the class of a row."""
        return RowClass(**settings, names=names())

    @classmethod
    def row_labels(cls, row: Mapping[str, Any], column: str) -> Iterable[Any]:
        """Yields the row's class."""
        return [column_of(row, column)]

    def row_problems(self, rows: Rows, column: str, few: int) -> Iterator[str]:
        """Yields classes with few pictures."""
        counts = Counter(row.get(column) for row in rows.rows)
        listed = [f"{name} {n}" for name, n in counts.most_common()]
        LOG.info("%d classes: %s", len(counts), some(listed, 20))
        if rare := [str(name) for name, n in counts.items() if n < few]:
            yield (
                f"{len(rare)} of {len(counts)} classes have fewer than {few} pictures "
                f"({some(rare)})"
            )

    def encode(self, values: Sequence[int | str]) -> np.ndarray:
        """Returns labels int32 [b]."""
        labels = np.asarray([int(label) for label in values], np.int32)
        if len(labels) and (labels.min() < 0 or labels.max() >= self.count):
            raise ValueError(f"labels must be from 0 to {self.count - 1}")
        return labels

    def parse(self, value: Any, canvas: Any, geometry: Any) -> list[int]:
        """Returns the numbers of classes given by number or name; "all" is every class."""
        return self.numbers(as_list(value), geometry.names)

    def numbers(self, labels: Sequence[Any], names: Sequence[str] | None) -> list[int]:
        """Returns the numbers of classes given by number or name; ["all"] is every class."""
        count = self.count
        if list(labels) == ["all"]:
            return list(range(len(names or range(count))))
        return class_numbers(labels, count, names)

    def labels(self, names: Sequence[str] | None) -> list[str]:
        """Returns the names of the classes, or their numbers."""
        return list(names or map(str, range(self.count)))

    def cache_fields(self) -> dict[str, dict[str, Any]]:
        """Returns a number for each row."""
        return {"condition": {"dtype": "int64", "shape": ()}}


@dataclasses.dataclass(frozen=True)
class ClassLabel(Classes):
    """A class as one context token (the original's ClassEmbedder).

    Where a model is trained for guidance the last class is the null class, as in cin256-v2: 1000
    of 1001.
    """

    module: ClassEmbedder

    network = ClassEmbedder
    interpolates = True

    @property
    def count(self) -> int:
        """The number of classes, the null class included."""
        return self.module.n_classes

    @classmethod
    def complete(
        cls, fields: Mapping[str, Any], row_condition: RowCondition | None, dropout: float
    ) -> dict[str, Any]:
        """Fills in the number of classes: the names and the null class."""
        known = len(getattr(row_condition, "names", ()))
        if "n_classes" not in fields and not known:
            raise ValueError(
                "n_classes is missing: the classes have no names to count; add one for the null "
                "class"
            )
        fields = {"n_classes": known + 1, **fields}
        if fields["n_classes"] < known + (dropout > 0):
            raise ValueError(
                f"n_classes is {fields['n_classes']}: there are {known} classes, and "
                "loss.caption_dropout needs one more"
            )
        return fields

    def encode_null(self, n: int) -> np.ndarray:
        """Returns the last class, ``n`` times."""
        return np.full(n, self.count - 1, np.int32)

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Embeds the class as one token [b, 1, k]."""
        token: Any = self.module.apply({"params": params}, encoded)
        return Cond(crossattn=token)

    def signature(self, names: Sequence[str] | None) -> dict[str, Any]:
        """Returns the null class and the names."""
        return {"null_class": self.count - 1, "classes": names}


def class_numbers(
    labels: Sequence[int | str], count: int, names: Sequence[str] | None = None
) -> list[int]:
    """Returns the numbers of classes.

    Args:
      labels: Numbers or names; of a name like "tench, Tinca tinca" each part will do.
      count: The number of classes.
      names: The names of classes, where the model has any.

    Raises:
      RequestError: A class does not exist.
    """
    known = {
        part.strip().lower(): i
        for i, name in reversed(list(enumerate(names or [])))
        for part in name.split(",")
    }
    known |= {name.lower(): i for i, name in enumerate(names or [])}
    numbers = []
    for label in labels:
        text = str(label).strip()
        number = int(text) if text.isdecimal() else known.get(text.lower())
        if number is None and not known:
            raise RequestError(
                f"class {text!r}: this model has no names for its classes; give a number below "
                f"{count}"
            )
        if number is None:
            near = did_you_mean(text.lower(), known)
            hint = near if near.startswith(";") else f"; the model has {len(names or [])} names"
            raise RequestError(f"class {text!r} does not exist{hint}")
        if not 0 <= number < count:
            raise RequestError(
                f"class {number} does not exist: give a number from 0 to {count - 1}"
            )
        numbers.append(number)
    return numbers
