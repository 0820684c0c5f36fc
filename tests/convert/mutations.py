"""Seeded mutations of good checkpoints."""

import functools
import io
import random
import zipfile
from collections.abc import Callable, Iterator

from hostile import (
    GOOD,
    GOOD_LEGACY,
    GOOD_SAFETENSORS,
    GOOD_ZIP,
    RUN,
    archive,
    call,
    entry,
    safetensors,
)

_EXTREMES = [
    0,
    1,
    0x7F,
    0xFF,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
]
_INSERTS = [
    call(*RUN),
    b"cbuiltins\neval\n",
    b"(",
    b"t",
    b"R",
    b"\x81",
    b"b",
    b"}",
    b"]",
    b"Q",
    b"0",
    b"q\x00h\x00",
    b"PK\x03\x04",
    b"\x00" * 64,
]


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """``data`` damaged in one to three ways; ``other`` lends pieces."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_MUTATIONS)(bytearray(data), other, rng)
    return bytes(data)


def _flip(data: bytearray, other: bytes, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _length(data: bytearray, other: bytes, rng: random.Random) -> bytearray:
    width, at = rng.choice((1, 2, 4, 8)), rng.randrange(max(1, len(data)))
    value = rng.choice(_EXTREMES) % (1 << 8 * width)
    data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
    return data


def _cut(data: bytearray, other: bytes, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data) + 1)]


def _remove(data: bytearray, other: bytes, rng: random.Random) -> bytearray:
    at = rng.randrange(len(data) + 1)
    del data[at : at + rng.choice((1, 2, 8, 100))]
    return data


def _insert(data: bytearray, other: bytes, rng: random.Random) -> bytearray:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(_INSERTS)
    return data


def _repeat(data: bytearray, other: bytes, rng: random.Random) -> bytearray:
    at = rng.randrange(len(data) + 1)
    data[at:at] = data[at : at + rng.randint(1, 200)] * rng.choice((1, 2, 50))
    return data


def _splice(data: bytearray, other: bytes, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


_MUTATIONS: list[Callable[[bytearray, bytes, random.Random], bytearray]] = [
    _flip,
    _length,
    _cut,
    _remove,
    _insert,
    _repeat,
    _splice,
]


def inside(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """A zip checkpoint with a mutated pickle in a sound container, to reach past its checks."""
    out = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w", method) as target:
        for member in source.namelist():
            content = source.read(member)
            if member.endswith("/data.pkl"):
                # Splices from the same pickle: more of them are valid opcodes.
                content = mutate(content, content, rng)
            target.writestr(member, content)
    return out.getvalue()


@functools.cache
def seeds() -> list[bytes]:
    """Good checkpoints of each kind, the hand-made ones."""
    sharded = {f"layer.{i}": entry(16 * i, 16 * i + 16) for i in range(20)}
    return [
        GOOD_ZIP,
        GOOD_LEGACY,
        GOOD_SAFETENSORS,
        safetensors(sharded, bytes(320)),
        archive(GOOD, deflate=True),
    ]


def mutants(count: int, seed: int, more: list[bytes]) -> Iterator[bytes]:
    """``count`` damaged copies of `seeds` and ``more``, deterministic in the seed."""
    rng, good = random.Random(seed), [*seeds(), *more]
    for _ in range(count):
        data, other = rng.choice(good), rng.choice(good)
        if data.startswith(b"PK") and rng.random() < 0.5:
            yield inside(data, other, rng)
        else:
            yield mutate(data, other, rng)
