"""What a compiled program's text says about communication."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(
    rf"^\s+(?:ROOT )?%?([\w.\-]+) = (\S+|\(.*?\)) ({'|'.join(COLLECTIVES)})(-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUP = re.compile(
    r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\}|mesh\[([^]]*)\](?:, device_ids=\(\S*\))? \{([^}]*)\})"
)


class Collective(NamedTuple):
    """One collective of a step.

    ``size``: bytes of the whole (gathered, or not yet reduced) array; ``group``: devices that take part; ``times``: turns of the loops around it.
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
        return (
            self.times
            * self.size
            * (2 if self.kind == "all-reduce" else 1)
            * (self.group - 1)
            / max(self.group, 1)
        )


def collectives(text: str, devices: int) -> list[Collective]:
    """All of a compiled program (``compiled.as_text()``); a collective over all ``devices`` may name no group."""
    bodies = dict(_computations(text))
    times = _multiplicity(bodies)
    found = []
    for computation, lines in bodies.items():
        for line in lines:
            if not (match := _INSTRUCTION.match(line)) or not times[computation]:
                continue
            name, result, kind, start = match.groups()
            sizes = [_bytes(*array.groups()) for array in _ARRAY.finditer(result)]
            n = _group(line, devices)
            if start and kind in (
                "all-gather",
                "collective-permute",
            ):  # (operands, results, ...): the larger half is the results'
                size = sum(sizes[len(sizes) // 2 :]) if kind == "all-gather" else max(sizes)
            else:
                size = sum(sizes) * (n if kind == "reduce-scatter" else 1)
            found.append(Collective(_really(kind, computation), name, size, n, times[computation]))
    return found


def _group(line: str, devices: int) -> int:
    """Devices that take part: [groups,devices], {{first group},...} or mesh['axis'=size,...] {axes of it}; all where nothing is said."""
    match = _GROUP.search(line)
    if match is None:
        return devices
    each, listed, axes, over = match.groups()
    if axes is not None:
        return math.prod(
            int(size)
            for name, size in re.findall(r"('\w+')=(\d+)", axes)
            if name in over.split(",")
        )
    return int(each) if each else len([x for x in listed.split(",") if x])


def _really(kind: str, computation: str) -> str:
    """A TPU program has its reduce-scatters as fusions of that name around an all-reduce and a slice."""
    return "reduce-scatter" if kind == "all-reduce" and "reduce-scatter" in computation else kind


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name, lines = ("ENTRY" if match[1] else match[2]), []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _multiplicity(bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in one run of the program."""
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, lines in bodies.items():
        for line in lines:
            if (
                " async-done(" in line or " async-update(" in line
            ):  # names again what async-start has called
                continue
            turns = _TURNS.search(line)
            for how, called in _CALLED.findall(line):
                n = int(turns[1]) if turns and how in ("body", "condition") else 1
                calls[name] += [(c, n) for c in re.findall(r"[\w.\-]+", called)]
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, n: int) -> None:
        times[name] += n
        for called, turns in calls[name]:
            if called in bodies:
                visit(called, n * turns)

    visit("ENTRY", 1)
    return times


def _bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    size = 1
    for dim in dims.split(","):
        size *= int(dim or 1)
    return size * bits // 8
