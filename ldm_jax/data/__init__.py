"""Pictures and captions: sources, their parts, transforms and the batch loader.

A leaf: imports nothing else of ldm_jax, and Grain and TensorFlow Datasets only on use.
"""

import difflib
import hashlib
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_jax.data.latents import LatentLoader, LatentSource
from ldm_jax.data.loader import Loader
from ldm_jax.data.sources import SOURCES, TFDS, ImageFolder, Source, Subset
from ldm_jax.data.transforms import ImageTransform, caption_template, decode_image, to_rgb
from ldm_jax.errors import DataError, UnreadablePicture

__all__ = [
    "SOURCES",
    "TFDS",
    "DataError",
    "ImageFolder",
    "ImageTransform",
    "LatentLoader",
    "LatentSource",
    "Loader",
    "Source",
    "Subset",
    "UnreadablePicture",
    "caption_template",
    "decode_image",
    "hold_out_pairs",
    "make_source",
    "select",
    "split_by",
    "to_rgb",
]

_PARTS = ("all", "train", "validation", "pairs")
_SELECTION = {
    "where": None,
    "split_column": None,
    "holdout": 0.0,
    "pair_columns": ("hexcode", "style"),
    "pair_holdout": 0.0,
    "split_seed": 0,
    "part": "train",
}


def make_source(config: Mapping[str, Any]) -> Source:
    """Builds a source, and the part of it to use, from a plain mapping.

    Keys:
      source: a name in ``SOURCES``, default "image_folder".
      path: a folder, a .zip or a TFDS name or directory; "pkg:..." lies inside the installed ldm_jax package.
      where: ``{column: [values]}`` to keep, see ``select``.
      split_column, holdout: hold out this fraction of a column's values, see ``split_by``.
      pair_columns, pair_holdout: of the rest, hold out this fraction of combinations, see ``hold_out_pairs``.
      split_seed: seed of both.
      part: "train" (default; everything where nothing is held out), "validation" (the held-out values),
        "pairs" (the held-out combinations) or "all".
      any further key: an argument of the source's class.

    Raises:
      DataError: an unknown key or value, or whatever the source raises.
    """
    config = dict(config)
    kind = config.pop("source", "image_folder")
    if kind not in SOURCES:
        raise DataError(
            f"unknown data source {kind!r}{_nearest(kind, SOURCES)}: there are {', '.join(SOURCES)}"
        )
    arguments = list(inspect.signature(SOURCES[kind]).parameters)
    known = ["source", *arguments, *_SELECTION]
    for key in config:
        if key not in known:
            raise DataError(
                f"unknown data setting {key!r}{_nearest(key, known)}: there are {', '.join(known)}"
            )
    if not config.get("path"):
        raise DataError(
            "the data setting 'path' is missing: give a folder, a .zip or a dataset's name"
        )
    config["path"] = _resolve(os.fspath(config["path"]))
    chosen = {key: config.pop(key, default) for key, default in _SELECTION.items()}
    if chosen["part"] not in _PARTS:
        raise DataError(f"unknown part {chosen['part']!r}: there are {', '.join(_PARTS)}")
    return _choose(select(SOURCES[kind](**config), chosen["where"]), **chosen)


def _choose(
    source: Source,
    *,
    split_column: str | None,
    holdout: float,
    pair_columns: Iterable[str],
    pair_holdout: float,
    split_seed: int,
    part: str,
    **_: Any,
) -> Source:
    if part == "all":
        return source
    if part == "validation" and not (split_column and holdout):
        raise DataError("part 'validation' needs split_column and holdout above 0")
    if part == "pairs" and not pair_holdout:
        raise DataError("part 'pairs' needs pair_holdout above 0")
    if split_column and holdout:
        source = split_by(
            source,
            split_column,
            holdout,
            split_seed,
            "validation" if part == "validation" else "train",
        )
    if pair_holdout and part != "validation":
        pair_part = "validation" if part == "pairs" else "train"
        source = hold_out_pairs(source, tuple(pair_columns), pair_holdout, split_seed, pair_part)
    return source


def _resolve(path: str) -> str:
    if not path.startswith("pkg:"):
        return path
    return str(Path(__file__).resolve().parent.parent / path.removeprefix("pkg:"))


def _nearest(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def select(source: Source, where: Mapping[str, Any] | None) -> Source:
    """Keeps the rows whose every column in ``where`` has one of the given values.

    Args:
      source: any source.
      where: ``{column: [values]}`` (one bare value works too); a list column, such as tags, needs one value in common.

    Raises:
      DataError: a column does not exist, or nothing is left.
    """
    if not where:
        return source
    wanted = {c: list(v) if isinstance(v, list | tuple | set) else [v] for c, v in where.items()}
    rows = source.rows
    _check_columns(source, rows, wanted)

    def keeps(row: Mapping[str, Any], column: str, values: list[Any]) -> bool:
        value = row.get(column)
        return any(v in values for v in value) if isinstance(value, list) else value in values

    kept = [i for i, row in enumerate(rows) if all(keeps(row, c, v) for c, v in wanted.items())]
    if not kept:
        raise DataError(f"{source.path}: no row has {wanted}: check the values of 'where'")
    return Subset(source, kept)


def split_by(
    source: Source, column: str, holdout_fraction: float, seed: int = 0, part: str = "train"
) -> Source:
    """Splits by a column: all rows with one value, such as one concept, fall into the same part.

    The choice is a hash of seed and value, so it is equal on every machine, for any order and any other rows.

    Args:
      source: any source.
      column: the metadata column.
      holdout_fraction: the expected fraction of values in the validation part, in [0, 1).
      seed: another seed holds out other values.
      part: "train" or "validation".

    Raises:
      DataError: the column does not exist, an argument is out of range, or the part is empty.
    """
    return hold_out_pairs(source, (column,), holdout_fraction, seed, part)


def hold_out_pairs(
    source: Source,
    columns: Sequence[str] = ("hexcode", "style"),
    fraction: float = 0.05,
    seed: int = 0,
    part: str = "train",
) -> Source:
    """Like ``split_by`` for combinations of columns: "validation" has exactly the held-out combinations."""
    if part not in ("train", "validation"):
        raise DataError(f"part is {part!r}: choose 'train' or 'validation'")
    if not 0 <= fraction < 1:
        raise DataError(
            f"the held-out fraction is {fraction}: give a number from 0 up to, not including, 1"
        )
    rows = source.rows
    _check_columns(source, rows, columns)

    def held_out(row: Mapping[str, Any]) -> bool:
        value = "\x1f".join(
            str(row.get(column)) for column in columns
        )  # one column: the value itself
        digest = hashlib.sha256(f"{seed}:{value}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < fraction * 2**64

    kept = [i for i, row in enumerate(rows) if held_out(row) == (part == "validation")]
    if not kept:
        name = "/".join(columns)
        raise DataError(
            f"{source.path}: the {part} part by {name} is empty: change the fraction {fraction}"
        )
    return Subset(source, kept)


def _check_columns(
    source: Source, rows: Sequence[Mapping[str, Any]], columns: Iterable[str]
) -> None:
    known = {key: None for row in rows for key in row}
    for column in columns:
        if column not in known:
            raise DataError(
                f"{source.path}: there is no column {column!r}: there are {', '.join(known)}"
            )
