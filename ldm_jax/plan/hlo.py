"""Reads the text of a compiled program: computations, how often each runs, collectives."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)(\(.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUP = re.compile(
    r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\}"
    r"|mesh\[([^]]*)\](?:, device_ids=\(\S*\))? \{([^}]*)\})"
)


class Array(NamedTuple):
    """An array in a compiled program: its type, "bf16", dimensions, elements, and bits of each."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    bits: int

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * self.bits // 8


class Instruction(NamedTuple):
    """One instruction. ``rest`` is its text after the operands: attributes and metadata."""

    name: str
    results: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def called(self) -> Iterator[tuple[str, str]]:
        """(attribute, computation) of every computation that it calls."""
        for attribute, names in _CALLED.findall(self.rest):
            yield from ((attribute, name) for name in re.findall(r"[\w.\-]+", names))


Program = dict[str, list[Instruction]]  # computations by name; the main one is "ENTRY"


class Collective(NamedTuple):
    """One collective of a step.

    Attributes:
      kind: One of `COLLECTIVES`.
      name: Of the instruction.
      size: Bytes of the whole (gathered, or not yet reduced) array.
      group: Devices that take part.
      times: Iterations of the loops around it.
    """

    kind: str
    name: str
    size: int
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends, by the ring algorithm."""
        if self.kind == "collective-permute":
            return self.times * self.size
        passes = 2 if self.kind == "all-reduce" else 1
        return self.times * self.size * passes * (self.group - 1) / max(self.group, 1)


def parse(text: str) -> Program:
    """Parses ``compiled.as_text()``."""
    program: Program = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            body = program.setdefault("ENTRY" if match[1] else match[2], [])
        elif match := _INSTRUCTION.match(line):
            root, name, result, opcode, rest = match.groups()
            end = _closing(rest)
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
            body.append(Instruction(name, arrays(result), opcode, operands, rest[end:], bool(root)))
    return program


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type, "(f32[2,4]{1,0}, u8[16]{0})", nested tuples flattened."""
    found = []
    for dtype, dims in _ARRAY.findall(text):
        shape = tuple(int(d) for d in dims.split(",") if d)
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        found.append(Array(dtype, shape, math.prod(shape), bits))
    return tuple(found)


def _closing(text: str) -> int:
    """Index after the parenthesis that closes the one at the start of ``text``."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def run_counts(program: Program, *, launched: bool = False) -> dict[str, int]:
    """How often each computation runs in one run of the program.

    Args:
      program: From `parse`.
      launched: Count only computations whose instructions are launched one by one: main, loop
        bodies, branches and calls, but not the bodies of fusions and reductions.
    """
    counts: dict[str, int] = defaultdict(int)

    def visit(name: str, n: int) -> None:
        counts[name] += n
        for instruction in program[name]:
            # async-update and async-done repeat the computation of their async-start.
            if instruction.opcode in ("async-done", "async-update") or (
                launched and instruction.opcode not in ("while", "conditional", "call")
            ):
                continue
            trips = _TRIP_COUNT.search(instruction.rest)
            for attribute, called in instruction.called:
                if called in program:
                    loops = trips and attribute in ("body", "condition")
                    visit(called, n * (int(trips[1]) if trips and loops else 1))

    visit("ENTRY", 1)
    return counts


def collectives(program: Program, devices: int) -> list[Collective]:
    """All collectives; one over all ``devices`` may name no group."""
    counts, found = run_counts(program), []
    for computation, body in program.items():
        for instruction in body:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or not counts[computation]:
                continue
            # The result of most asynchronous forms is (operands, results, contexts).
            results, n = instruction.results, len(instruction.operands)
            if instruction.opcode != kind and len(results) > n:
                results = results[n : 2 * n]
            # A TPU program has a reduce-scatter as a fusion of that name around an all-reduce.
            scattered = kind == "all-reduce" and "reduce-scatter" in computation
            group = _group_size(instruction.rest, devices)
            size = sum(a.nbytes for a in results) * (group if kind == "reduce-scatter" else 1)
            found.append(
                Collective(
                    "reduce-scatter" if scattered else kind,
                    instruction.name,
                    size,
                    group,
                    counts[computation],
                )
            )
    return found


def _group_size(rest: str, devices: int) -> int:
    """Reads [groups,size], {{first group},...} or mesh['axis'=size,...] {axes}."""
    match = _GROUP.search(rest)
    if match is None:
        return devices
    size, listed, axes, over = match.groups()
    if axes is not None:
        sizes = re.findall(r"('\w+')=(\d+)", axes)
        return math.prod(int(size) for axis, size in sizes if axis in over.split(","))
    return int(size) if size else len([x for x in listed.split(",") if x])
