"""Name tables: which array of a PyTorch checkpoint is which of our parameters, and how its axes turn. One table runs
both ways.

A table is a list of entries that a walker over a model's configuration yields (`ldm_jax.convert.compvis.compvis` has the
walkers). It is total: reading or writing with it either accounts for every array on both sides or raises a
ConversionError that lists all that does not fit.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ldm_jax.errors import ConversionError

Path = tuple[str, ...]


class Op(NamedTuple):
    """How one array turns between PyTorch's layout and ours. Axes move and values stay, so a round trip is exact to the
    bit.
    """

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


COPY = Op(lambda a: a, lambda a: a)
CONV = Op(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
DENSE = Op(lambda w: w.T, lambda w: w.T)  # [out, in] <-> [in, out]
CONV1X1 = Op(
    lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None]
)  # a 1x1 Conv2d is a dense layer here
CONV1D = Op(lambda w: w[:, :, 0].T, lambda w: w.T[:, :, None])  # ... and so is a Conv1d of width 1
CHANNELS = Op(lambda a: a[0, :, 0, 0], lambda a: a[None, :, None, None])  # [1, c, 1, 1] <-> [c]
COUNT = Op(
    lambda a: a.astype(np.int32), lambda a: a.astype(np.int64)
)  # our counters are 32 bits wide
LEADING = Op(lambda a: a[0], lambda a: a[None])  # [1, ...] <-> [...]


class Entry(NamedTuple):
    """The array ``source`` of the checkpoint is our parameter at ``path``, turned by ``op``."""

    source: str
    path: Path
    op: Op = COPY


class Unused(NamedTuple):
    """An array that the original stores and no computation needs (a constant buffer, a layer that is never called).

    It may be there or not when a checkpoint is read; it is written as ``value()``. Where ``fixed``, the checkpoint's must
    be that (to the rounding of float16), since the network here has it built in.
    """

    source: str
    value: Callable[[], np.ndarray]
    fixed: bool = False


class Duplicate(NamedTuple):
    """The array of another name once more, as PyTorch stores a module that is held twice.

    It may be there or not when a checkpoint is read, and must then be the same; it is written.
    """

    source: str
    of: str


Table = list[Entry | Unused | Duplicate]


# ----------------------------------------------------------------------------------------------------- pieces of tables


def conv(source: str, path: Path, *, bias: bool = True, op: Op = CONV) -> Iterator[Entry]:
    """A layer of one kernel and perhaps one bias: convolution, or with another ``op`` dense."""
    yield Entry(f"{source}.weight", (*path, "kernel"), op)
    if bias:
        yield Entry(f"{source}.bias", (*path, "bias"))


def dense(source: str, path: Path, *, bias: bool = True, op: Op = DENSE) -> Iterator[Entry]:
    """A linear layer; ``op`` CONV1X1 or CONV1D where the original spells it as a convolution."""
    yield from conv(source, path, bias=bias, op=op)


def norm(source: str, path: Path) -> Iterator[Entry]:
    """The gain and offset of a GroupNorm, LayerNorm or BatchNorm."""
    yield Entry(f"{source}.weight", (*path, "scale"))
    yield Entry(f"{source}.bias", (*path, "bias"))


def embedding(source: str, path: Path) -> Iterator[Entry]:
    """An embedding table [entries, features]."""
    yield Entry(f"{source}.weight", (*path, "embedding"))


def unused(source: str, *shape: int) -> Unused:
    """An array of zeros that nothing reads."""
    return Unused(source, lambda: np.zeros(shape, np.float32))


def constant(source: str, value: np.ndarray) -> Unused:
    """An array that has to be ``value``."""
    return Unused(source, lambda: value, fixed=True)


def under(path: Path, table: Iterable[Entry | Unused | Duplicate]) -> Table:
    """The same table for parameters that live at ``path`` of a larger tree."""
    return [
        entry._replace(path=(*path, *entry.path)) if isinstance(entry, Entry) else entry
        for entry in table
    ]


# ------------------------------------------------------------------------------------------------------ running a table


def flatten(tree: Mapping[str, Any], path: Path = ()) -> dict[Path, Any]:
    """Nested mappings -> {path: leaf}."""
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, (*path, key))
        else:
            flat[*path, key] = value
    return flat


def nest(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """{path: leaf} -> nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def source_shapes(
    table: Table, shapes: Mapping[str, Any], where: str = "table"
) -> dict[str, tuple[int, ...]]:
    """{source name: shape in the original's layout} of everything a table names.

    ``shapes`` is our parameter tree with leaves that have a ``shape`` (of `jax.eval_shape`, say). Raises
    ConversionError unless table and tree name the same parameters, each once.
    """
    leaves = flatten(shapes)
    entries = [entry for entry in table if isinstance(entry, Entry)]
    paths, names = (
        Counter(entry.path for entry in entries),
        Counter(entry.source for entry in table),
    )
    ConversionError.check(
        f"{where}, table against parameters",
        missing=("/".join(path) for path in leaves.keys() - paths.keys()),
        unexpected=("/".join(path) for path in paths.keys() - leaves.keys()),
        duplicate=[
            *("/".join(path) for path, n in paths.items() if n > 1),
            *(name for name, n in names.items() if n > 1),
        ],
    )
    # Only axes move, so a zero-stride stand-in of the right shape tells the other layout's shape without memory.
    expected = {
        e.source: e.op.to_theirs(np.broadcast_to(np.float32(0), leaves[e.path].shape)).shape
        for e in entries
    }
    expected |= {entry.source: entry.value().shape for entry in table if isinstance(entry, Unused)}
    return expected | {
        entry.source: expected[entry.of] for entry in table if isinstance(entry, Duplicate)
    }


def _differs(entry: Entry | Unused | Duplicate, found: Mapping[str, np.ndarray]) -> bool:
    """Whether the checkpoint holds another value where only one is right."""
    if isinstance(entry, Entry) or entry.source not in found:
        return False
    if isinstance(entry, Duplicate):
        same = entry.of not in found or np.array_equal(
            found[entry.source], found[entry.of], equal_nan=True
        )
        return not same
    if not entry.fixed:
        return False
    ours, theirs = entry.value(), np.asarray(found[entry.source])
    # Stored in half precision, it is right to its rounding.
    rtol = (
        max(1e-3, float(ml_dtypes.finfo(theirs.dtype).eps)) if theirs.dtype.kind in "fV" else 1e-3
    )
    return ours.shape == theirs.shape and not np.allclose(
        ours, theirs.astype(np.float64), rtol=rtol, atol=1e-6
    )


def check(
    table: Table,
    found: Mapping[str, Any],
    *,
    shapes: Mapping[str, Any],
    where: str,
    duplicate: Iterable[str] = (),
) -> None:
    """Raises ConversionError with every missing, unexpected, misshapen and different name of a checkpoint's arrays.

    ``found`` maps original names to arrays, which may be lazy: of the values, only those are read where one is right. The rest as for `to_ours`.
    """
    expected = source_shapes(table, shapes, where)
    ConversionError.check(
        where,
        missing=(
            entry.source
            for entry in table
            if isinstance(entry, Entry) and entry.source not in found
        ),
        unexpected=found.keys() - expected.keys(),
        duplicate=duplicate,
        misshapen=(
            (n, np.shape(found[n]), shape)
            for n, shape in expected.items()
            if n in found and np.shape(found[n]) != shape
        ),
        different=(entry.source for entry in table if _differs(entry, found)),
    )


def to_ours(
    table: Table,
    state_dict: Mapping[str, Any] | Iterable[tuple[str, Any]],
    *,
    shapes: Mapping[str, Any],
    where: str,
) -> dict[str, Any]:
    """The checkpoint's arrays as our nested parameter tree, dtypes unchanged.

    ``state_dict`` maps original names to arrays (or yields such pairs: the shards of one checkpoint, say); ``shapes``
    is our parameter tree, as for `source_shapes`; ``where`` opens the error message. Raises ConversionError with every
    missing, unexpected, duplicate and misshapen name.
    """
    pairs: list[Any] = list(state_dict.items() if isinstance(state_dict, Mapping) else state_dict)
    found: dict[str, Any] = dict(pairs)
    twice = (name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
    check(table, found, shapes=shapes, where=where, duplicate=twice)
    return nest(
        {e.path: as_ours(e, np.asarray(found[e.source])) for e in table if isinstance(e, Entry)}
    )


def as_ours(entry: Entry, array: np.ndarray) -> np.ndarray:
    """An original array in our layout, in C order."""
    return np.asarray(entry.op.to_ours(array), order="C")


def to_theirs(
    table: Table, params: Mapping[str, Any], *, where: str = "parameters"
) -> dict[str, np.ndarray]:
    """Our nested parameter tree as {original name: array in PyTorch's layout}, dtypes unchanged: the inverse of
    `to_ours`.

    Raises ConversionError unless table and tree name the same parameters.
    """
    source_shapes(table, params, where)
    leaves = flatten(params)

    def value(entry: Entry | Unused) -> np.ndarray:
        if isinstance(entry, Unused):
            return np.asarray(entry.value())
        return np.asarray(entry.op.to_theirs(np.asarray(leaves[entry.path])), order="C")

    written = {entry.source: value(entry) for entry in table if not isinstance(entry, Duplicate)}
    return written | {
        entry.source: written[entry.of] for entry in table if isinstance(entry, Duplicate)
    }
