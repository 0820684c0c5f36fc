"""Name tables: which array of a PyTorch checkpoint is which parameter, and how its axes permute.

A table is a list of entries that a walker over a network's configuration yields
(`ldm_jax.convert.compvis.networks` has walkers). One table serves both directions, and it is total:
reading or writing accounts for every array on both sides or raises a ConversionError that lists
all that does not match.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ldm_jax.errors import ConversionError

Path = tuple[str, ...]


class Op(NamedTuple):
    """The permutation of one array between PyTorch's layout and ours; a round trip is exact."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


COPY = Op(lambda a: a, lambda a: a)
CONV = Op(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
DENSE = Op(lambda w: w.T, lambda w: w.T)  # [out, in] <-> [in, out]
# 1x1 Conv2d and Conv1d of width 1 are dense layers here.
CONV1X1 = Op(lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None])
CONV1D = Op(lambda w: w[:, :, 0].T, lambda w: w.T[:, :, None])
CHANNELS = Op(lambda a: a[0, :, 0, 0], lambda a: a[None, :, None, None])  # [1, c, 1, 1] <-> [c]
LEADING = Op(lambda a: a[0], lambda a: a[None])  # [1, ...] <-> [...]
COUNT = Op(lambda a: a.astype(np.int32), lambda a: a.astype(np.int64))  # int32 counters here


class Entry(NamedTuple):
    """The array ``source`` of the checkpoint is the parameter at ``path``, permuted by ``op``.

    ``part`` (i, n): the parameter is the i-th of n equal parts of the array's first axis, as where
    q, k and v are stored in one array.
    """

    source: str
    path: Path
    op: Op = COPY
    part: tuple[int, int] = (0, 1)


class Unused(NamedTuple):
    """An array that the original stores and no computation needs: a constant, an uncalled layer.

    It may be absent when a checkpoint is read; it is written as ``value()``. Where ``fixed``, the
    checkpoint's must equal that to the rounding of float16, because the network here has it built
    in.
    """

    source: str
    value: Callable[[], np.ndarray]
    fixed: bool = False


class Duplicate(NamedTuple):
    """A copy of the array ``of``, as PyTorch stores a module that is held twice.

    It may be absent when a checkpoint is read, and must be equal where present; it is written.
    """

    source: str
    of: str


Table = list[Entry | Unused | Duplicate]


# ------------------------------------------------------------------------------- pieces of tables


def conv(source: str, path: Path, *, bias: bool = True, op: Op = CONV) -> Iterator[Entry]:
    """A convolution, or with another ``op`` a dense layer: a kernel and possibly a bias."""
    yield Entry(f"{source}.weight", (*path, "kernel"), op)
    if bias:
        yield Entry(f"{source}.bias", (*path, "bias"))


def dense(source: str, path: Path, *, bias: bool = True, op: Op = DENSE) -> Iterator[Entry]:
    """A dense layer; ``op`` CONV1X1 or CONV1D where the original stores a convolution."""
    yield from conv(source, path, bias=bias, op=op)


def norm(source: str, path: Path) -> Iterator[Entry]:
    """The scale and bias of a GroupNorm, LayerNorm or BatchNorm."""
    yield Entry(f"{source}.weight", (*path, "scale"))
    yield Entry(f"{source}.bias", (*path, "bias"))


def embedding(source: str, path: Path) -> Iterator[Entry]:
    """An embedding table [entries, features]."""
    yield Entry(f"{source}.weight", (*path, "embedding"))


def unused(source: str, *shape: int) -> Unused:
    """An array of zeros that nothing reads."""
    return Unused(source, lambda: np.zeros(shape, np.float32))


def constant(source: str, value: np.ndarray) -> Unused:
    """An array that must equal ``value``."""
    return Unused(source, lambda: value, fixed=True)


def under(path: Path, table: Iterable[Entry | Unused | Duplicate]) -> Table:
    """Returns the table with every parameter moved under ``path``."""
    return [
        entry._replace(path=(*path, *entry.path)) if isinstance(entry, Entry) else entry
        for entry in table
    ]


# -------------------------------------------------------------------------------- running a table


def flatten(tree: Mapping[str, Any], path: Path = ()) -> dict[Path, Any]:
    """Nested mappings to {path: leaf}."""
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, (*path, key))
        else:
            flat[*path, key] = value
    return flat


def nest(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """{path: leaf} to nested dicts."""
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
    """Returns {source name: shape in the original's layout} of everything in a table.

    Args:
      table: The table.
      shapes: The parameter tree with leaves that have a ``shape`` (of `jax.eval_shape`, say).
      where: Opens the error message.

    Raises:
      ConversionError: Table and tree do not have the same parameters, each once.
    """
    leaves = flatten(shapes)
    entries = [entry for entry in table if isinstance(entry, Entry)]
    paths = Counter(entry.path for entry in entries)
    names = Counter((entry.source, getattr(entry, "part", (0, 1))) for entry in table)
    ConversionError.check(
        f"{where}, table against parameters",
        missing=("/".join(path) for path in leaves.keys() - paths.keys()),
        unexpected=("/".join(path) for path in paths.keys() - leaves.keys()),
        duplicate=[
            *("/".join(path) for path, n in paths.items() if n > 1),
            *(name for (name, _), n in names.items() if n > 1),
        ],
    )
    expected = {}
    for e in entries:
        # Only axes move, so a zero-stride array yields the other layout's shape without memory.
        stand_in = np.broadcast_to(np.float32(0), leaves[e.path].shape)
        first, *rest = e.op.to_theirs(stand_in).shape or (None,)
        expected[e.source] = () if first is None else (first * e.part[1], *rest)
    expected |= {entry.source: entry.value().shape for entry in table if isinstance(entry, Unused)}
    return expected | {
        entry.source: expected[entry.of] for entry in table if isinstance(entry, Duplicate)
    }


def _differs(entry: Entry | Unused | Duplicate, found: Mapping[str, Any]) -> bool:
    """Whether the checkpoint has another value where only one is right."""
    if isinstance(entry, Entry) or entry.source not in found:
        return False
    theirs = np.asarray(found[entry.source])
    if isinstance(entry, Duplicate):
        return entry.of in found and not np.array_equal(theirs, found[entry.of], equal_nan=True)
    if not entry.fixed:
        return False
    ours = entry.value()
    # Half precision is compared to its rounding. NumPy counts bfloat16 among its kind "V".
    rtol = 1e-3
    if theirs.dtype.kind in "fV":
        rtol = max(rtol, float(ml_dtypes.finfo(theirs.dtype).eps))
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
    """Checks a checkpoint's arrays against a table.

    Args:
      table: The table.
      found: {original name: array}. Lazy arrays are read only where the table fixes a value.
      shapes: The parameter tree, as for `source_shapes`.
      where: Opens the error message.
      duplicate: Names already known to occur twice.

    Raises:
      ConversionError: With every missing, unexpected, misshapen and different name.
    """
    expected = source_shapes(table, shapes, where)
    unread = {e.source for e in table if isinstance(e, Unused) and not e.fixed}
    ConversionError.check(
        where,
        missing={e.source for e in table if isinstance(e, Entry)} - found.keys(),
        unexpected=found.keys() - expected.keys(),
        duplicate=duplicate,
        misshapen=(
            (n, np.shape(found[n]), shape)
            for n, shape in expected.items()
            if n in found and n not in unread and np.shape(found[n]) != shape
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
    """Returns the checkpoint's arrays as our nested parameter tree, dtypes unchanged.

    Args:
      table: The table.
      state_dict: {original name: array}, or such pairs (the shards of one checkpoint, say).
      shapes: The parameter tree, as for `source_shapes`.
      where: Opens the error message.

    Raises:
      ConversionError: With every missing, unexpected, duplicate and misshapen name.
    """
    pairs: list[Any] = list(state_dict.items() if isinstance(state_dict, Mapping) else state_dict)
    found: dict[str, Any] = dict(pairs)
    twice = (name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
    check(table, found, shapes=shapes, where=where, duplicate=twice)
    return nest(
        {e.path: as_ours(e, np.asarray(found[e.source])) for e in table if isinstance(e, Entry)}
    )


def as_ours(entry: Entry, array: np.ndarray) -> np.ndarray:
    """Returns an original array, or the entry's part of it, in our layout and C order."""
    i, n = entry.part
    rows = len(array) // n if n > 1 else 0
    return np.asarray(
        entry.op.to_ours(array[i * rows : (i + 1) * rows] if n > 1 else array), order="C"
    )


def to_theirs(
    table: Table, params: Mapping[str, Any], *, where: str = "parameters"
) -> dict[str, np.ndarray]:
    """Returns {original name: array in PyTorch's layout}, dtypes unchanged: inverse of `to_ours`.

    Raises:
      ConversionError: Table and tree do not have the same parameters.
    """
    source_shapes(table, params, where)
    leaves = flatten(params)
    parts: dict[str, dict[int, np.ndarray]] = {}
    for e in table:
        if isinstance(e, Unused):
            parts[e.source] = {0: np.asarray(e.value())}
        elif isinstance(e, Entry):
            array = np.asarray(e.op.to_theirs(np.asarray(leaves[e.path])), order="C")
            parts.setdefault(e.source, {})[e.part[0]] = array
    written = {
        name: found[0] if len(found) == 1 else np.concatenate([found[i] for i in sorted(found)])
        for name, found in parts.items()
    }
    return written | {e.source: written[e.of] for e in table if isinstance(e, Duplicate)}
