"""Captions made of a row's columns, at random where a config gives a choice."""

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ldm_jax.data.sources.tables import is_missing
from ldm_jax.errors import DataError

# "[, {style} style]": square brackets around at least one column.
_OPTIONAL = re.compile(r"(?<!\[)\[((?:[^\[\]{}]|\{[^{}]*\})*)\](?!\])")


@dataclasses.dataclass(frozen=True)
class Captions:
    """Makes the caption of a row from templates over its columns. Picklable.

    A template is a format string such as "{text}, {style} style". List columns are joined with
    ", "; "{captions:any}" is one of a list at random; missing values are "". A part in square
    brackets that names a column, such as "[, {style} style]", is optional: it is left out where
    its columns are empty, and with the probability ``part_dropout``. "[[" and "]]" are brackets.

    Attributes:
      templates: One is drawn for each sample. Without a generator the first is taken, and nothing
        is dropped or shuffled.
      weights: Relative probabilities of the templates; equal by default.
      part_dropout: Probability that an optional part is left out, drawn for each part.
      tag_column: The column of tags, a list or a text with commas.
      tag_shuffle: Draw the order of the tags.
      tag_dropout: Probability that a tag is left out.
      tag_keep: Number of tags at the beginning that are neither moved nor left out.
    """

    templates: tuple[str, ...]
    weights: tuple[float, ...] = ()
    part_dropout: float = 0.0
    tag_column: str = ""
    tag_shuffle: bool = False
    tag_dropout: float = 0.0
    tag_keep: int = 0

    def __post_init__(self) -> None:
        weights, n = self.weights, len(self.templates)
        if not n or not all(isinstance(template, str) for template in self.templates):
            raise DataError(f"data.caption is {self.templates!r}: give a template or several")
        if weights and (len(weights) != n or min(weights) < 0 or not 0 < sum(weights) < np.inf):
            raise DataError(
                f"data.caption_weights is {weights}: give {n} numbers from 0 up, one a template"
            )
        for name in ("part_dropout", "tag_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"data.{name} is {getattr(self, name)}: give a probability")
        if (self.tag_shuffle or self.tag_dropout) and not self.tag_column:
            raise DataError("data.tag_shuffle and data.tag_dropout need data.tag_column")

    @property
    def random(self) -> bool:
        """Whether samples of one row may get different captions."""
        anyone = any(":any}" in template for template in self.templates)
        dropped = self.part_dropout or self.tag_dropout or self.tag_shuffle
        return bool(anyone or dropped or len(self.templates) > 1)

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator | None = None) -> str:
        """Returns a caption of ``row``, drawn from ``rng`` where there is a choice.

        Raises:
          DataError: The template is malformed or names a column that the row does not have.
        """
        choice = 0
        if rng is not None and len(self.templates) > 1:
            weights = np.array(self.weights or [1.0] * len(self.templates))
            choice = int(rng.choice(len(weights), p=weights / weights.sum()))
        template = self.templates[choice]
        columns = {key: _cell(value, rng) for key, value in row.items() if key != "image"}
        if self.tag_column in columns and rng is not None:
            columns[self.tag_column] = self._draw_tags(columns[self.tag_column], rng)
        try:
            parts = [
                string.Formatter().vformat(text, (), columns)
                for names, text in _parse(template)
                if names is None or self._keeps(names, columns, rng)
            ]
        except KeyError as error:
            raise DataError(
                f"caption {template!r}: there is no column {error.args[0]!r}: there are "
                f"{', '.join(columns)}"
            ) from None
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            raise DataError(
                f"caption {template!r} does not fit: {error}; write columns as {{text}}"
            ) from None
        return "".join(parts)

    def _keeps(
        self, names: Sequence[str], columns: Mapping[str, Any], rng: np.random.Generator | None
    ) -> bool:
        dropped = rng is not None and self.part_dropout > 0 and rng.random() < self.part_dropout
        return not dropped and any(columns[name] not in ("", []) for name in names)

    def _draw_tags(self, value: Any, rng: np.random.Generator) -> Any:
        tags = value if isinstance(value, list) else [t.strip() for t in str(value).split(",")]
        first, rest = list(tags[: self.tag_keep]), list(tags[self.tag_keep :])
        if self.tag_dropout:
            rest = [tag for tag in rest if rng.random() >= self.tag_dropout]
        if self.tag_shuffle:
            rest = [rest[i] for i in rng.permutation(len(rest))]
        return _cell(first + rest, rng)


class _Joined(list):
    """A list column that a template prints as "a, b", or one of it with the format "any"."""

    rng: np.random.Generator | None = None

    def __format__(self, spec: str) -> str:
        if spec == "any":
            place = int(self.rng.integers(len(self))) if self.rng is not None and self else 0
            return str(self[place]) if self else ""
        return format(", ".join(map(str, self)), spec)


def _cell(value: Any, rng: np.random.Generator | None) -> Any:
    if isinstance(value, list | tuple):
        value = _Joined(item for item in value if not is_missing(item))
        value.rng = rng
        return value
    return "" if is_missing(value) else value


@lru_cache(maxsize=256)
def _parse(template: str) -> tuple[tuple[tuple[str, ...] | None, str], ...]:
    """Splits a template into (columns of an optional part or None, text)."""
    parts: list[tuple[tuple[str, ...] | None, str]] = []
    end = 0
    for match in _OPTIONAL.finditer(template):
        names = re.findall(r"\{(\w+)", match[1])
        if names:
            parts += [(None, template[end : match.start()]), (tuple(names), match[1])]
            end = match.end()
    parts.append((None, template[end:]))
    return tuple((n, text.replace("[[", "[").replace("]]", "]")) for n, text in parts if text)


def caption_template(template: str, row: Mapping[str, Any]) -> str:
    """Fills a caption template such as "{text}, {style} style" from a row, without any draw."""
    return Captions((template,))(row)


# The settings of a config's "data" that make captions.
CAPTION_SETTINGS = (
    *("caption", "caption_templates", "caption_weights", "part_dropout"),
    *("tag_column", "tag_shuffle", "tag_dropout", "tag_keep"),
)


def make_captions(caption: str | Sequence[str] | Captions | None) -> Captions | None:
    """Returns the `Captions` of a template or several; None, for empty captions, stays None."""
    if caption is None or isinstance(caption, Captions):
        return caption
    return Captions((caption,) if isinstance(caption, str) else tuple(caption))


def configured_captions(data: Mapping[str, Any]) -> Captions | None:
    """Returns the captions of a config's "data"; see `CAPTION_SETTINGS`, all but one optional.

    Several "caption_templates", with "caption_weights", take the place of "caption".
    """
    if data.get("caption") is None and not data.get("caption_templates"):
        return None
    names = ("part_dropout", "tag_column", "tag_shuffle", "tag_dropout", "tag_keep")
    return Captions(
        tuple(data.get("caption_templates") or (data["caption"],)),
        tuple(data.get("caption_weights") or ()),
        **{name: data[name] for name in names if name in data},
    )
