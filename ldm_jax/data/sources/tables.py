"""Tables of metadata: reading them, and finding their columns of captions and of file names."""

import csv
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ldm_jax.data.decode import describe
from ldm_jax.errors import DataError, StorageError
from ldm_jax.io import paths

_LOG = logging.getLogger(__name__)

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "prompts", "description")
FILE_COLUMNS = (
    *("file_name", "filename", "file", "image", "image_path", "image_file", "img", "path"),
    *("file_path", "filepath", "picture"),
)
PICTURE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "png", "webp", "image_bytes", "bytes")
# What other programs write for a missing value into a table that has no type for it.
_MISSING_WORDS = ("nan", "NaN", "None", "null", "NULL", "<NA>")
_MAX_DEPTH = 64
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_CSV_LOCK = threading.Lock()


def find_columns(
    columns: Iterable[str], setting: str, wanted: str, candidates: Sequence[str], where: str
) -> list[str]:
    """Finds the columns that a source reads for a purpose: the one rule for all sources.

    Args:
      columns: The columns of the table.
      setting: Name of the source's argument, for messages.
      wanted: Its value; "" finds those of ``candidates`` that exist, in upper or lower case.
      candidates: Usual names, best first.
      where: The table, for messages.

    Returns:
      The columns, best first; [] where ``wanted`` is "" and there is none.

    Raises:
      DataError: The column ``wanted`` does not exist.
    """
    columns = list(columns)
    if wanted and wanted not in columns:
        raise DataError(
            f"{where}: there is no column {wanted!r} but {', '.join(map(str, columns))}: "
            f"set data.{setting} to one of them"
        )
    folded = {str(c).casefold().replace(" ", "_"): c for c in reversed(columns)}
    found = [wanted] if wanted else [folded[c] for c in candidates if c in folded]
    if found and found[0] not in (wanted, candidates[0]):
        _LOG.info("%s: data.%s is the column %r", where, setting, found[0])
    return found


def is_missing(value: Any) -> bool:
    """Whether a cell of a table is empty: None, NaN, or a missing value of pandas."""
    kind = type(value).__name__
    return value is None or (kind == "float" and value != value) or kind in ("NAType", "NaTType")


def caption_text(value: Any, where: str = "") -> str:
    """Returns the caption in a cell: numbers as text, the first of a list, "" for a missing one."""
    if isinstance(value, list | tuple):
        return next((text for text in (caption_text(v, where) for v in value) if text), "")
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, Mapping):
        raise DataError(f"{where}: the caption {value!r} is no text: set data.text to a column")
    # Lone surrogates, which JSON can escape, are not text that could be stored or tokenized.
    return "" if is_missing(value) else str(value).encode("utf-8", "replace").decode()


def with_text(rows: list[dict[str, Any]], where: str, text: str = "") -> list[dict[str, Any]]:
    """Gives all rows the same columns, and "text": the caption in the column ``text``.

    Args:
      rows: The metadata, in which a row may lack some columns.
      where: The table, for messages.
      text: The column of captions; "" takes the first of `CAPTION_COLUMNS` that the row has.
    """
    columns = dict.fromkeys(key for row in rows for key in row)
    usable = find_columns(columns, "text", text, CAPTION_COLUMNS, where)
    untyped = where.lower().endswith((".csv", ".tsv"))

    def caption(row: Mapping[str, Any], number: int) -> str:
        cell = next((row[c] for c in usable if not is_missing(row.get(c))), None)
        found = caption_text(cell, f"{where}: row {number}")
        return "" if untyped and found.strip() in _MISSING_WORDS else found

    blank = dict.fromkeys(columns)
    return [blank | row | {"text": caption(row, i)} for i, row in enumerate(rows, start=1)]


def read_bytes(path: str) -> bytes:
    """Reads a file; DataError where that fails."""
    try:
        return paths.read_bytes(path)
    except StorageError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def encoding_of(data: bytes) -> str:
    """Returns the encoding of a text file: UTF-8, or UTF-16 by its byte order mark."""
    return "utf-16" if data[:2] in _UTF16_MARKS else "utf-8-sig"


def decode_text(data: bytes, where: str) -> str:
    """Decodes UTF-8, or UTF-16 with a byte order mark; the mark is not part of the text."""
    encoding = encoding_of(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise DataError(f"{where} is not {name} ({error}): save it as UTF-8") from None


def parse_json(data: bytes | str, where: str) -> Any:
    """Parses JSON; DataError where it is malformed or nested more than 64 levels deep."""
    text = data if isinstance(data, str) else decode_text(data, where)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({describe(error)})") from None
    if text.count("[") + text.count("{") > _MAX_DEPTH and _deeper(value, _MAX_DEPTH):
        raise DataError(f"{where} is nested more than {_MAX_DEPTH} levels deep")
    return value


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(item, levels - 1) for item in items)


def _json_lines(data: bytes, where: str) -> list[dict[str, Any]]:
    text_start = data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if text_start == b"[":  # an array, where lines of objects are usual
        found = parse_json(data, where)
        numbered = [(f"row {i}", row) for i, row in enumerate(found, start=1)]
    else:
        if data[:2] in _UTF16_MARKS:
            data = decode_text(data, where).encode()
        numbered = [
            (f"line {i}", parse_json(line, f"{where}: line {i}"))
            for i, line in enumerate(data.split(b"\n"), start=1)
            if line.strip(b"\xef\xbb\xbf \t\r")
        ]
    for place, row in numbered:
        if not isinstance(row, dict):
            raise DataError(f"{where}: {place} is not a JSON object like {{'file_name': ...}}")
    return [row for _, row in numbered]


def _delimited(data: bytes, where: str) -> list[dict[str, Any]]:
    text = decode_text(data, where)
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count) if not where.lower().endswith(".tsv") else "\t"
    rows: list[dict[str, Any]] = []
    names: list[str] = []
    with _CSV_LOCK:  # the limit is global; its default refuses long captions
        limit = csv.field_size_limit(2**31 - 1)
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=delimiter,
            skipinitialspace=f"{delimiter} " in header,
            strict=True,  # else an unpaired quote swallows all rows up to the next one
        )
        try:
            for fields in reader:
                if not fields:
                    continue
                if not names:
                    names = [name.strip() for name in fields]
                    if twice := [n for n in names if names.count(n) > 1]:
                        raise DataError(f"{where}: the column {twice[0]!r} is there twice")
                    continue
                if len(fields) > len(names) and not any(fields[len(names) :]):
                    fields = fields[: len(names)]  # trailing delimiters
                if len(fields) != len(names):
                    raise DataError(
                        f"{where}: the row in line {reader.line_num} has {len(fields)} fields, "
                        f"the header has {len(names)}"
                    )
                rows.append(dict(zip(names, fields, strict=True)))
        except csv.Error as error:
            raise DataError(f"{where}: line {reader.line_num} is damaged ({error})") from None
        finally:
            csv.field_size_limit(limit)
    return rows


def _parquet(data: bytes, where: str) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{where}: Parquet needs pyarrow: pip install pyarrow") from None
    try:
        return parquet.read_table(io.BytesIO(data)).to_pylist()
    except Exception as error:  # pyarrow raises nearly every class on damaged files
        raise DataError(f"{where} cannot be read: {describe(error)}") from None


# suffix -> (bytes, name in messages) -> rows
TABLES: dict[str, Callable[[bytes, str], list[dict[str, Any]]]] = {
    ".csv": _delimited,
    ".tsv": _delimited,
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
}


def parse_table(data: bytes, where: str) -> list[dict[str, Any]]:
    """Parses a table of metadata in the format that the suffix of ``where`` names.

    Raises:
      DataError: The suffix is not in `TABLES`, or the table is malformed; names the row.
    """
    suffix = os.path.splitext(where)[1].lower()
    if suffix not in TABLES:
        raise DataError(f"{where}: a table ends in {', '.join(TABLES)}")
    return TABLES[suffix](data, where)
