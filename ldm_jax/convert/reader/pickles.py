"""An unpickler that builds plain data only: `pickle._Unpickler` with its risky opcodes replaced.

The C implementation with a harmless ``find_class`` is not enough: it calls what ``find_class``
returns, sets attributes on what it has built (BUILD), hashes whatever becomes a key (nested tuples
hash for ever) and allocates what a length field announces (BYTEARRAY8, LONG_BINPUT). The Python
implementation reads the same format opcode by opcode from a table, so the opcodes that call, build,
hash or allocate are overridden here and the rest is the standard library's. A name in a pickle
stays text: it is never imported.

Names that rebuild data (a tensor, an OrderedDict, a numpy scalar) map to the functions of
`ldm_jax.convert.reader.rebuild`. Names of code are refused wherever they appear, and so is a call
of any function that is not known. Other classes become inert `Standin` objects.
"""

import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from ldm_jax.convert.reader.lazy import MIB, STORAGE_CLASSES, TORCH_DTYPES, LazyTensor, shown
from ldm_jax.convert.reader.rebuild import (
    KNOWN,
    Known,
    NumpyType,
    Standin,
    StorageClass,
    check_key,
    fill_array,
    words,
)
from ldm_jax.errors import ReaderError

# Limits far above released files: a checkpoint with optimizer and EMA has a pickle of about 1 MiB
# and 100,000 opcodes.
MAX_PICKLE = 64 * MIB
MAX_OPS = 1_000_000
MAX_COPIES = 128 * MIB  # bytes that calls may copy: a few opcodes could copy a large value for ever
MAX_DEPTH = 200  # nesting of containers, so that recursion over the result is safe


class Stream(Protocol):
    """The source of a pickle; ``read`` raises ReaderError rather than return too little."""

    def read(self, n: int, /) -> bytes: ...  # noqa: D102
    def readline(self) -> bytes: ...  # noqa: D102
    def tell(self) -> int: ...  # noqa: D102


# ----------------------------------------------------------------------------------------- names

# Parts of a dotted name that mean running code, whatever module they are reached through
# (torch.os.system is os.system).
_RUNS = words("""
    os posix nt sys subprocess builtins importlib ctypes runpy pty socket shutil pickle cPickle
    _pickle marshal eval exec execfile system popen Popen getattr setattr delattr globals breakpoint
    """)
# Roots outside today's standard library that only run, install or load code.
_ALSO_REFUSED = words(
    "commands popen2 imp pipes distutils asyncore cPickle nt pip setuptools dill cloudpickle"
)
# Modules of the standard library whose classes and constants are data. Their functions still may
# not be called.
_INERT_MODULES = words("""
    __future__ abc argparse collections copyreg dataclasses datetime decimal enum fractions
    functools math numbers pathlib string time typing uuid zoneinfo
    """)
_BUILTIN_TYPES = words("""
    bool bytearray bytes complex dict float frozenset int list long object range set slice str tuple
    unicode
    """)
# Constructors that honest checkpoints call and that only hold their arguments.
_INERT_CALLS = words("""
    argparse.Namespace builtins.object builtins.range builtins.slice datetime.date datetime.datetime
    datetime.time datetime.timedelta datetime.timezone decimal.Decimal fractions.Fraction
    functools.partial pathlib.Path pathlib.PosixPath pathlib.PurePath pathlib.PurePosixPath
    pathlib.PureWindowsPath pathlib.WindowsPath pathlib._local.PosixPath pathlib._local.WindowsPath
    torch.device types.SimpleNamespace uuid.UUID
    """)
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's names
# Types and dtypes that are mentioned beside data: nothing is lost with them, so none is reported.
_SILENT = {"numpy.ndarray", "torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter"}
_SILENT |= {f"builtins.{name}" for name in _BUILTIN_TYPES}
_SILENT |= {f"torch.{name}" for name in TORCH_DTYPES}


def _refusal(name: str) -> ReaderError:
    return ReaderError(f"refused: its pickle would run {name}")


def _check_mention(name: str) -> None:
    """Raises ReaderError if the dotted name stands for code rather than for data."""
    if name in _INERT_CALLS or name in _SILENT:
        return
    root, *_ = parts = name.split(".")
    if root in sys.stdlib_module_names | _ALSO_REFUSED and root not in _INERT_MODULES:
        raise _refusal(name)
    dunder = ("__main__", "__future__", "__torch__")
    if any(p in _RUNS or (p.startswith("__") and p not in dunder) for p in parts):
        raise _refusal(name)


def _check_call(name: str) -> None:
    """Raises ReaderError unless the name is certain to be a class that only holds its arguments."""
    root, last = name.split(".")[0], name.split(".")[-1].lstrip("_")
    if name in _INERT_CALLS or (root not in sys.stdlib_module_names and last[:1].isupper()):
        return
    unknown = "" if root in _INERT_MODULES else " (a function that this reader does not know)"
    raise _refusal(name + unknown)


# ------------------------------------------------------------------------------------- unpickler


class _Dispatch(dict[int, Callable[..., None]]):
    """The opcode table of one pickle; it stops a pickle that takes more than ``left`` opcodes."""

    def __init__(self, table: dict[int, Callable[..., None]], left: int):
        super().__init__(table)
        self.left = left

    def __getitem__(self, opcode: int) -> Callable[..., None]:
        self.left -= 1
        if self.left < 0:
            raise ReaderError("its pickle is too long")
        return super().__getitem__(opcode)

    def __missing__(self, opcode: int) -> Callable[..., None]:
        raise ReaderError(
            f"its pickle is damaged or uses the opcode {opcode:#x}, which no checkpoint needs"
        )


# The Python form, see above. The type checker's stubs lack its attributes.
_PythonUnpickler: Any = pickle._Unpickler


class Unpickler(_PythonUnpickler):
    """Reads one pickle.

    Args:
      stream: Where the pickle begins.
      persistent: Maps the tuples that stand for storages to them; None: there are none.
      standins: Counts the stand-ins made, by class name.
      max_ops: The most opcodes that the pickle may take.
    """

    def __init__(
        self,
        stream: Stream,
        persistent: Callable[[tuple], Any] | None,
        standins: Counter[str],
        max_ops: int = MAX_OPS,
    ):
        # Latin-1 keeps the bytes of Python 2's strings.
        super().__init__(stream, fix_imports=False, encoding="latin1")
        self.dispatch = _Dispatch(_OPCODES, max_ops)
        self.stream, self.persistent, self.standins = stream, persistent, standins
        self.classes: dict[str, Any] = {}
        self.instances: Counter[str] = Counter()
        self.unfilled: dict[int, LazyTensor] = {}
        self.copies = MAX_COPIES

    def load(self) -> Any:
        """Returns the pickle's value. Raises ReaderError, and nothing else, on all but data."""
        try:
            with warnings.catch_warnings(action="ignore"):  # of odd escapes in protocol 0's texts
                value = super().load()
        except ReaderError:
            raise
        except Exception:  # whatever malformed opcodes make the standard library raise
            place = self.stream.tell()
            raise ReaderError(f"its pickle is damaged near byte {place}") from None
        if self.stack or self.metastack:
            raise ReaderError("its pickle is damaged: values are left over at its end")
        for known in self.classes.values():
            if isinstance(known, Standin) and known.name not in _SILENT:
                self.standins[known.name] += max(1, self.instances[known.name])
        _check_nesting(value)
        return value

    def spend(self, cost: int) -> None:
        """Counts bytes that are copied."""
        self.copies -= cost
        if self.copies < 0:
            raise ReaderError(f"its pickle copies more than {MAX_COPIES // MIB} MiB of itself")

    def find_class(self, module: str, name: str) -> Any:
        """Maps a dotted name to a StorageClass, a Known or a stand-in, the same each time."""
        if max(len(module), len(name)) > 300:
            raise ReaderError(
                f"its pickle mentions {shown(module)} {shown(name)}, which is no name"
            )
        full = f"{_RENAMED.get(module, module)}.{name}"
        if full not in self.classes:
            parts = full.split(".")
            if not all(part.isidentifier() for part in parts):
                raise ReaderError(f"its pickle mentions {shown(full)}, which is no name")
            if parts[0] == "torch" and parts[-1] in STORAGE_CLASSES:
                self.classes[full] = StorageClass(STORAGE_CLASSES[parts[-1]])
            elif full in KNOWN:
                self.classes[full] = Known(full, KNOWN[full])
            else:
                _check_mention(full)
                self.classes[full] = Standin(full, is_class=True)
        return self.classes[full]

    def persistent_load(self, pid: Any) -> Any:
        """Maps the tuple that stands for a storage to it."""
        if self.persistent is None or not isinstance(pid, tuple):
            raise ReaderError("its pickle refers to something outside of it that is no storage")
        return self.persistent(pid)

    def call(self, function: Any, args: Any) -> Any:
        """REDUCE: data for a known name, a stand-in for a class, refused for all else."""
        if not isinstance(args, tuple):
            raise ReaderError("its pickle is damaged: a call has no arguments")
        if isinstance(function, Known):
            if (value := function.call(self, args)) is NotImplemented:
                raise ReaderError(
                    f"its pickle is damaged: {function.name} does not fit its arguments"
                )
            return value
        if isinstance(function, Standin) and function.is_class:
            _check_call(function.name)
            return self.instance(function, args)
        raise ReaderError("refused: its pickle calls something that is no class")

    def instance(self, cls: Any, args: Any) -> Any:
        """NEWOBJ: an object made without calling its class, as classes without __reduce__ are."""
        if isinstance(cls, Known):
            return self.call(cls, args)
        if not isinstance(cls, Standin) or not cls.is_class or not isinstance(args, tuple):
            raise ReaderError("refused: its pickle makes an object of something that is no class")
        self.instances[cls.name] += 1
        return Standin(cls.name, is_class=False, args=args)

    def set_items(self, target: Any, flat: list) -> None:
        """Sets the keys and values that alternate in ``flat``; a key may not occur twice."""
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if isinstance(target, Standin) and not target.is_class:
                target.append((key, value))
            elif not isinstance(target, dict):
                raise ReaderError("its pickle is damaged: it sets an item of no dict")
            elif check_key(key) in target:
                raise ReaderError(f"the key {shown(key)} occurs twice in one dict")
            else:
                target[key] = value

    # Each method below replaces the opcode of its name.

    def _op_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.set_items(self.stack[-1], items)

    def _op_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items(self.stack[-1], [key, value])

    def _op_setitems(self) -> None:
        items = self.pop_mark()
        self.set_items(self.stack[-1], items)

    def _op_append(self) -> None:
        self._extend([self.stack.pop()])

    def _op_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, list) and not (isinstance(target, Standin) and target.is_object):
            raise ReaderError("its pickle is damaged: it appends to no list")
        for item in items:
            target.append(item)

    def _op_additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise ReaderError("its pickle is damaged: it adds to no set")
        self.stack[-1].update(check_key(item) for item in items)

    def _op_frozenset(self) -> None:
        self.append(frozenset(check_key(item) for item in self.pop_mark()))

    def _op_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def _op_long4(self) -> None:
        length = int.from_bytes(self.read(4), "little")
        if length > 512:
            raise ReaderError("its pickle holds a number of over 4096 bits")
        self.append(pickle.decode_long(self.read(length)))

    def _op_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.append(self.call(function, args))

    def _op_inst(self) -> None:
        module, name = self.readline()[:-1].decode(), self.readline()[:-1].decode()
        self.append(self.call(self.find_class(module, name), tuple(self.pop_mark())))

    def _op_obj(self) -> None:
        cls, *args = self.pop_mark()
        self.append(self.call(cls, tuple(args)))

    def _op_newobj(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.append(self.instance(cls, args))

    def _op_newobj_ex(self) -> None:
        keywords, args, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple) or not isinstance(keywords, dict):
            raise ReaderError("its pickle is damaged: an object has no arguments")
        self.append(self.instance(cls, (*args, keywords) if keywords else args))

    def _op_build(self) -> None:
        """Puts a state into a stand-in or a half-built numpy value; the state of a dict is lost."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Standin) and target.is_object:
            target.state = state
        elif isinstance(target, LazyTensor) and id(target) in self.unfilled:
            fill_array(self, self.unfilled.pop(id(target)), state)
        elif isinstance(target, NumpyType):
            match state:
                case (int(), "<" | ">" | "|" | "=" as order, *_):
                    target.dtype = target.dtype.newbyteorder(order)
                case _:
                    raise ReaderError("its pickle is damaged: a numpy dtype has no state")
        elif not isinstance(target, dict):  # a state_dict carries _metadata as an attribute
            raise ReaderError("refused: its pickle changes something that is no object of its own")


# Left out: the extension registry, buffers outside of the stream, and what makes views of memory.
_REFUSED = words("EXT1 EXT2 EXT4 NEXT_BUFFER READONLY_BUFFER")
_REPLACED = words("""
    DICT SETITEM SETITEMS APPEND APPENDS ADDITEMS FROZENSET BYTEARRAY8 LONG4 REDUCE INST OBJ
    NEWOBJ NEWOBJ_EX BUILD
    """)
_OPCODES: dict[int, Callable[..., None]] = {
    **_PythonUnpickler.dispatch,
    **{getattr(pickle, name)[0]: getattr(Unpickler, f"_op_{name.lower()}") for name in _REPLACED},
}
for _name in _REFUSED:
    del _OPCODES[getattr(pickle, _name)[0]]


def _check_nesting(value: Any) -> None:
    """Raises ReaderError where containers hold themselves or lie too deep; visits each once."""
    depth: dict[int, int] = {}  # 0 while the contents are being visited
    todo: list[tuple[Any, bool]] = [(value, False)]
    while todo:
        node, leaving = todo.pop()
        # Sets hold nothing that nests (see `check_key`).
        inside = node.values() if isinstance(node, dict) else node
        inside = inside if isinstance(node, dict | list | tuple) else ()
        nested = [child for child in inside if isinstance(child, dict | list | tuple)]
        if leaving:
            depth[id(node)] = 1 + max((depth[id(child)] for child in nested), default=0)
            if depth[id(node)] > MAX_DEPTH:
                raise ReaderError(f"its pickle nests containers more than {MAX_DEPTH} deep")
        elif id(node) not in depth:
            depth[id(node)] = 0
            todo.append((node, True))
            for child in nested:
                if depth.get(id(child)) == 0:
                    raise ReaderError("its pickle holds a container that contains itself")
                todo.append((child, False))
