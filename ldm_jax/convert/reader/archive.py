"""Reads the directory of a zip archive without trusting it; nothing is ever unpacked to disk.

The standard library's zipfile is not used: it allocates what the directory announces, accepts
repeated names and entries that share bytes, and has no random access to stored entries from several
threads. The format: PKWARE's APPNOTE.TXT, 4.3 to 4.5.
"""

import struct
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ldm_jax.convert.reader.lazy import MIB, File, shown
from ldm_jax.errors import ReaderError

MAX_ENTRIES = 100_000  # a full training checkpoint has about 6,000


class Entry(NamedTuple):
    """A file in a zip archive: the offset of its bytes, their number packed and unpacked."""

    start: int
    packed: int
    size: int
    deflated: bool


def read_entry(file: File, entry: Entry, start: int, out: np.ndarray) -> None:
    """Reads into ``out`` (uint8 [n]) the unpacked bytes of an entry from ``start`` on."""
    if start + out.size > entry.size:
        raise ReaderError("a tensor reaches beyond its storage")
    if entry.deflated:
        data = file.inflate(entry.start, entry.packed, entry.size)
        out[:] = np.frombuffer(data, np.uint8, out.size, start)
    else:
        file.fill(entry.start + start, out)


def zip_entries(file: File) -> dict[str, Entry]:
    """Returns the entries by name; names, methods and sizes are checked, and that none overlap."""
    tail_start = max(0, file.size - 22 - 65535)
    tail = file.read(tail_start, file.size - tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise ReaderError("a zip archive without its directory: truncated?")
    disk, first, here, count, length, start, comment = struct.unpack_from("<4H2LH", tail, at + 4)
    end = tail_start + at
    if at + 22 + comment != len(tail):
        raise ReaderError("a zip archive with a damaged end")
    if at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":  # zip64: the same numbers, wider
        where = struct.unpack_from("<Q", tail, at - 12)[0]
        if where + 56 > end - 20:
            raise ReaderError("a zip archive with a damaged end")
        record = file.read(where, 56)
        if record[:4] != b"PK\x06\x06":
            raise ReaderError("a zip archive with a damaged end")
        disk, first, here, count, length, start = struct.unpack_from("<2L4Q", record, 16)
        end = where
    if (disk, first) != (0, 0) or here != count:
        raise ReaderError("a zip archive in several parts")
    if count > MAX_ENTRIES or length > MAX_ENTRIES * 512 or start + length > end:
        raise ReaderError(
            "a zip archive whose directory does not fit the file: truncated or damaged"
        )

    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int]] = []
    directory, at, total = file.read(start, length), 0, 0
    for _ in range(count):
        at, name, begin, entry = _zip_entry(file, directory, at)
        spans.append((begin, entry.start + entry.packed))
        if name in entries:
            raise ReaderError(f"a zip archive that holds {shown(name)} twice")
        entries[name] = entry
        total += entry.size
    if at != len(directory):
        raise ReaderError("a zip archive with a damaged directory")
    spans = [*sorted(spans), (start, end)]
    if any(this[1] > following[0] for this, following in pairwise(spans)):
        raise ReaderError("a zip archive whose entries overlap")
    if total > 2 * file.size + 512 * MIB:
        raise ReaderError(
            f"a zip archive that expands to {total // MIB} MiB from {file.size // MIB}: refused"
        )
    return entries


def _zip_entry(file: File, directory: bytes, at: int) -> tuple[int, str, int, Entry]:
    """Returns (offset of the next record, name, offset of the local header, entry)."""
    if directory[at : at + 4] != b"PK\x01\x02" or at + 46 > len(directory):
        raise ReaderError("a zip archive with a damaged directory")
    _, _, flags, method, _, _, _, packed, size, *lengths, _, _, _, begin = struct.unpack_from(
        "<6H3L5H2L", directory, at + 4
    )
    name_end = at + 46 + lengths[0]
    extra_end = name_end + lengths[1]
    if (after := extra_end + lengths[2]) > len(directory):
        raise ReaderError("a zip archive with a damaged directory")
    raw_name, extra = directory[at + 46 : name_end], directory[name_end:extra_end]
    name = _safe_name(raw_name)
    if 0xFFFFFFFF in (size, packed, begin):
        wide = iter(_zip64_fields(extra))
        size, packed, begin = (
            next(wide, n) if n == 0xFFFFFFFF else n for n in (size, packed, begin)
        )
    if flags & 1 or method not in (0, 8) or (method == 0 and packed != size):
        raise ReaderError(
            f"the zip entry {shown(name)} is encrypted, damaged or compressed in an unknown way"
        )
    local = file.read(begin, 30)
    own_name, own_extra = struct.unpack_from("<2H", local, 26)
    if (
        local[:4] != b"PK\x03\x04"
        or struct.unpack_from("<H", local, 8)[0] != method
        or own_name != len(raw_name)
        or file.read(begin + 30, own_name) != raw_name
    ):
        raise ReaderError(
            f"the zip entry {shown(name)} is not where the directory says, or not the same"
        )
    data = begin + 30 + own_name + own_extra
    if data + packed > file.size or size > file.size + 512 * MIB:
        raise ReaderError(
            f"the zip entry {shown(name)} announces {size} bytes, which the file cannot hold"
        )
    return after, name, begin, Entry(data, packed, size, method == 8)


def _zip64_fields(extra: bytes) -> tuple[int, ...]:
    """The 64-bit numbers of a directory record: its extra field 1."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1 and at + 4 + length <= len(extra):
            return struct.unpack_from(f"<{length // 8}Q", extra, at + 4)
        at += 4 + length
    return ()


def _safe_name(raw: bytes) -> str:
    """Returns an entry's name; raises ReaderError for one that unpacking would put elsewhere."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ReaderError(
            f"a zip archive with the entry {shown(raw)}, whose name is no UTF-8"
        ) from None
    unsafe = (
        name.startswith("/")
        or "\\" in name
        or ":" in name
        or ".." in name.split("/")
        or not name.isprintable()
    )
    if unsafe or not name or len(name) > 1000:
        raise ReaderError(f"a zip archive with the entry {shown(name)}, whose name is not safe")
    return name
