"""Building a source from a config, and choosing the part of it to use."""

import hashlib
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_jax.data.sources import SOURCES, Source, Subset
from ldm_jax.errors import DataError, did_you_mean

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
      source: A name in `SOURCES`, by default "image_folder".
      path: A folder, an archive, a table or a data set's name; "pkg:..." lies inside the installed
        ldm_jax package.
      where: ``{column: [values]}`` to keep, see `select`.
      split_column, holdout: Hold out this fraction of a column's values, see `split_by`.
      pair_columns, pair_holdout: Of the rest, hold out this fraction of the combinations, see
        `hold_out_pairs`.
      split_seed: Seed of both.
      part: "train" (default; everything where nothing is held out), "validation" (the held-out
        values), "pairs" (the held-out combinations) or "all".
      Any further key is an argument of the source's class.

    Raises:
      DataError: An unknown key or value, or whatever the source raises.
    """
    config = dict(config)
    kind = config.pop("source", "image_folder")
    if kind not in SOURCES:
        raise DataError(f"unknown data source {kind!r}{did_you_mean(kind, SOURCES)}")
    known = ["source", *inspect.signature(SOURCES[kind]).parameters, *_SELECTION]
    for key in config:
        if key not in known:
            raise DataError(f"unknown data setting {key!r}{did_you_mean(key, known)}")
    if not config.get("path"):
        raise DataError(
            "the data setting 'path' is missing: give a folder, a .zip or a dataset's name"
        )
    path = os.fspath(config["path"])
    if path.startswith("pkg:"):
        path = str(Path(__file__).resolve().parents[1] / path.removeprefix("pkg:"))
    chosen = {key: config.pop(key, default) for key, default in _SELECTION.items()}
    if chosen["part"] not in _PARTS:
        raise DataError(f"unknown part {chosen['part']!r}{did_you_mean(chosen['part'], _PARTS)}")
    return _choose(select(SOURCES[kind](**config | {"path": path}), chosen.pop("where")), **chosen)


def _choose(
    source: Source,
    *,
    split_column: str | None,
    holdout: float,
    pair_columns: Iterable[str],
    pair_holdout: float,
    split_seed: int,
    part: str,
) -> Source:
    if part == "all":
        return source
    if part == "validation" and not (split_column and holdout):
        raise DataError("part 'validation' needs split_column and holdout above 0")
    if part == "pairs" and not pair_holdout:
        raise DataError("part 'pairs' needs pair_holdout above 0")
    if split_column and holdout:
        column_part = "validation" if part == "validation" else "train"
        source = split_by(source, split_column, holdout, split_seed, column_part)
    if pair_holdout and part != "validation":
        pair_part = "validation" if part == "pairs" else "train"
        source = hold_out_pairs(source, tuple(pair_columns), pair_holdout, split_seed, pair_part)
    return source


def select(source: Source, where: Mapping[str, Any] | None) -> Source:
    """Keeps the rows whose every column in ``where`` has one of the given values.

    Args:
      source: Any source.
      where: ``{column: [values]}`` (a single value works, too); a list column, such as tags, needs
        one value in common.

    Raises:
      DataError: A column does not exist, or nothing is left.
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
    """Splits by a column: all rows with one value, such as one concept, are in the same part.

    The choice is a hash of seed and value: the same on every machine, in any order and beside any
    other rows.

    Args:
      source: Any source.
      column: The metadata column.
      holdout_fraction: The expected fraction of values in the validation part, in [0, 1).
      seed: Another seed holds out other values.
      part: "train" or "validation".

    Raises:
      DataError: The column does not exist, an argument is out of range, or the part is empty.
    """
    return hold_out_pairs(source, (column,), holdout_fraction, seed, part)


def hold_out_pairs(
    source: Source,
    columns: Sequence[str] = ("hexcode", "style"),
    fraction: float = 0.05,
    seed: int = 0,
    part: str = "train",
) -> Source:
    """Splits as `split_by` does, by the combination of several columns' values."""
    if part not in ("train", "validation"):
        raise DataError(f"part is {part!r}: choose 'train' or 'validation'")
    if not 0 <= fraction < 1:
        raise DataError(
            f"the held-out fraction is {fraction}: give a number from 0 up to, not including, 1"
        )
    rows = source.rows
    _check_columns(source, rows, columns)

    def held_out(row: Mapping[str, Any]) -> bool:
        value = "\x1f".join(str(row.get(column)) for column in columns)
        digest = hashlib.sha256(f"{seed}:{value}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < fraction * 2**64

    kept = [i for i, row in enumerate(rows) if held_out(row) == (part == "validation")]
    if not kept:
        raise DataError(
            f"{source.path}: the {part} part by {'/'.join(columns)} is empty: "
            f"change the fraction {fraction}"
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
