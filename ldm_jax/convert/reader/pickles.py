"""An interpreter of pickles that cannot run anything: names in a pickle are text here, never looked up.

Python's own ``pickle.Unpickler`` with a harmless ``find_class`` would be shorter, but then every guard has to be put
around somebody else's machine: it still calls what ``find_class`` returns, uses attributes of the objects it builds
(``append``, ``__setstate__``, ``__dict__``), hashes whatever becomes a key, and allocates what a length field says.
Here each opcode (decoded by ``pickletools``, the standard library's description of the format) does one of a few
things on plain containers, and everything it does is counted against a limit.

Of the names a pickle mentions, some rebuild data (a tensor, an OrderedDict, a numpy scalar), by the functions of rebuild.
Names that run code are refused wherever they appear, and so is every call of a function that is not known. Classes
become stand-ins, which hold what was to be put into them and do nothing.
"""

import pickletools
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import IO, Any, Protocol, cast

from ldm_jax.convert.reader.lazy import MIB, STORAGE_CLASSES, TORCH_DTYPES, LazyTensor, shown
from ldm_jax.convert.reader.rebuild import (
    KNOWN,
    Known,
    NumpyType,
    Standin,
    StorageClass,
    checked,
    fill_array,
    words,
)
from ldm_jax.errors import ReaderError

MAX_PICKLE = (
    64 * MIB
)  # bytes of one pickle: a released checkpoint's, with optimizer and EMA, is about 1 MiB
MAX_OPS = (
    1_000_000  # a state dict takes about 30 opcodes an entry, a whole training state about 100,000
)
MAX_COPIES = (
    128 * MIB
)  # bytes that calls may copy: a few opcodes could otherwise copy a large value for ever
MAX_DEPTH = 200  # nesting of containers, so that whoever walks them may recurse


class Stream(Protocol):
    """Where a pickle is read from; `read` raises ReaderError rather than return less than it was asked for."""

    def read(self, n: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


# ----------------------------------------------------------------------------------------------------------- names

# Parts of a dotted name that mean running code, whatever they hang on (torch.os.system is os.system).
_RUNS = words("""
    os posix nt sys subprocess builtins importlib ctypes runpy pty socket shutil pickle cPickle _pickle marshal
    eval exec execfile system popen Popen getattr setattr delattr globals breakpoint
    """)
# Roots beyond today's standard library that only run, install or load code.
_ALSO_REFUSED = words(
    "commands popen2 imp pipes distutils asyncore cPickle nt pip setuptools dill cloudpickle"
)
# Of the standard library, modules whose classes and constants are data. Their functions still may not be called.
_INERT_MODULES = words("""
    __future__ abc argparse collections copyreg dataclasses datetime decimal enum fractions functools math numbers
    pathlib string time typing uuid zoneinfo
    """)
_BUILTIN_TYPES = words(
    "bool bytearray bytes complex dict float frozenset int list long object range set slice str tuple unicode"
)
# Constructors that are called in honest checkpoints and only hold what they are given.
_INERT_CALLS = words("""
    argparse.Namespace builtins.object builtins.range builtins.slice datetime.date datetime.datetime datetime.time
    datetime.timedelta datetime.timezone decimal.Decimal fractions.Fraction functools.partial pathlib.Path
    pathlib.PosixPath pathlib.PurePath pathlib.PurePosixPath pathlib.PureWindowsPath pathlib.WindowsPath
    pathlib._local.PosixPath pathlib._local.WindowsPath torch.device types.SimpleNamespace uuid.UUID
    """)
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's names
# Mentioned beside data, as types and dtypes are: nothing is lost with them, so nothing is reported.
_SILENT = {"numpy.ndarray", "torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter"}
_SILENT |= {f"builtins.{name}" for name in _BUILTIN_TYPES} | {
    f"torch.{name}" for name in TORCH_DTYPES
}


def _refuse(name: str) -> ReaderError:
    return ReaderError(f"refused: its pickle would run {name}")


def _check_mention(name: str) -> None:
    """ReaderError if the dotted name stands for code rather than for data."""
    if name in _INERT_CALLS or name in _SILENT:
        return
    root, *_ = parts = name.split(".")
    if root in sys.stdlib_module_names | _ALSO_REFUSED and root not in _INERT_MODULES:
        raise _refuse(name)
    if any(
        p in _RUNS or (p.startswith("__") and p not in ("__main__", "__future__", "__torch__"))
        for p in parts
    ):
        raise _refuse(name)


def _check_call(name: str) -> None:
    """ReaderError unless calling the name is known, or by its spelling sure, to be the making of an object."""
    root, last = name.split(".")[0], name.split(".")[-1].lstrip("_")
    if name in _INERT_CALLS or (root not in sys.stdlib_module_names and last[:1].isupper()):
        return
    raise _refuse(
        f"{name} (a function that this reader does not know)"
        if root not in _INERT_MODULES
        else name
    )


# ----------------------------------------------------------------------------------------------------- the machine


class Interpreter:
    """Reads one pickle off a stream. ``persistent`` turns the tuples that stand for storages into them."""

    def __init__(
        self,
        stream: Stream,
        persistent: Callable[[tuple], Any] | None,
        standins: Counter[str],
        max_ops: int = MAX_OPS,
    ):
        self.stream, self.persistent, self.standins = stream, persistent, standins
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.classes: dict[str, Any] = {}
        self.instances: Counter[str] = Counter()
        self.unfilled: dict[int, LazyTensor] = {}
        self.copies, self.max_ops = MAX_COPIES, max_ops

    def load(self) -> Any:
        """The pickle's value. Raises ReaderError, and nothing else, on anything that is not plain data."""
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in the texts of protocol 0
            return self._load()

    def _load(self) -> Any:
        start = self.stream.tell()
        ops = pickletools.genops(cast(IO[bytes], self.stream))
        for count in range(self.max_ops + 1):
            try:
                op, arg, position = next(ops)
            except ReaderError:
                raise
            except Exception:  # ValueError, UnicodeDecodeError, struct.error ...: whatever malformed arguments raise
                raise ReaderError(f"its pickle is damaged near byte {self.stream.tell()}") from None
            if count == self.max_ops or (position or 0) - start > MAX_PICKLE:
                raise ReaderError(
                    f"its pickle is too long (over {self.max_ops} steps or {MAX_PICKLE // MIB} MiB)"
                )
            if op.name == "STOP":
                break
            if op.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[op.name])
            elif op.name in _LITERALS:
                if isinstance(arg, int) and arg.bit_length() > 4096:
                    raise ReaderError("its pickle holds a number of over 4096 bits")
                self.stack.append(arg)
            elif method := _METHODS.get(op.name):
                method(self, arg)
            else:
                raise ReaderError(
                    f"its pickle uses the opcode {op.name}, which no checkpoint needs"
                )
        value = self.pop()
        if self.stack or self.marks:
            raise ReaderError("its pickle is damaged: values are left over at its end")
        for known in self.classes.values():
            if isinstance(known, Standin) and known.name not in _SILENT:
                self.standins[known.name] += max(1, self.instances[known.name])
        _check_nesting(value)
        return value

    # stack

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ReaderError("its pickle is damaged: it takes a value that is not there")
        return self.stack.pop()

    def top(self) -> Any:
        self.stack.append(value := self.pop())
        return value

    def items(self) -> list:
        """What lies above the last mark."""
        if not self.marks:
            raise ReaderError("its pickle is damaged: a mark is missing")
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def spend(self, cost: int) -> None:
        """Counts bytes that are copied."""
        self.copies -= cost
        if self.copies < 0:
            raise ReaderError(f"its pickle copies more than {MAX_COPIES // MIB} MiB of itself")

    # containers

    def set_items(self, target: Any, flat: list) -> None:
        if len(flat) % 2:
            raise ReaderError("its pickle is damaged: a key lacks its value")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            self.set_item(target, key, value)

    def set_item(self, target: Any, key: Any, value: Any) -> None:
        if isinstance(target, Standin) and not target.is_class:
            target.contents = target.contents or []
            target.contents.append((key, value))
        elif isinstance(target, dict):
            if checked(key) in target:
                raise ReaderError(f"the key {shown(key)} occurs twice in one dict")
            target[key] = value
        else:
            raise ReaderError("its pickle is damaged: it sets an item of something that has none")

    def extend(self, target: Any, items: list) -> None:
        if isinstance(target, Standin) and not target.is_class:
            target.contents = target.contents or []
            target.contents.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise ReaderError("its pickle is damaged: it appends to something that is no list")

    def add(self, target: Any, items: list) -> None:
        if not isinstance(target, set):
            raise ReaderError("its pickle is damaged: it adds to something that is no set")
        target.update(checked(item) for item in items)

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise ReaderError("its pickle is damaged: it recalls a value that was never kept")
        self.stack.append(self.memo[index])

    # names

    def name(self, module: Any, name: Any) -> Any:
        """What a dotted name becomes: a StorageClass, a Known or a stand-in, the same each time."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ReaderError("its pickle is damaged: a name is no text")
        if max(len(module), len(name)) > 300:
            raise ReaderError(
                f"its pickle mentions {shown(module)} {shown(name)}, which is no name"
            )
        full = f"{_RENAMED.get(module, module)}.{name}"
        if full not in self.classes:
            if not all(part.isidentifier() for part in full.split(".")):
                raise ReaderError(f"its pickle mentions {shown(full)}, which is no name")
            root, last = full.split(".")[0], full.split(".")[-1]
            if root == "torch" and last in STORAGE_CLASSES:
                self.classes[full] = StorageClass(STORAGE_CLASSES[last])
            elif full in KNOWN:
                self.classes[full] = Known(full, KNOWN[full])
            else:
                _check_mention(full)
                self.classes[full] = Standin(full, is_class=True)
        return self.classes[full]

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
        """NEWOBJ: an object made without calling its class, as all classes without ``__reduce__`` are pickled."""
        if isinstance(cls, Known):  # subclasses aside, what NEWOBJ makes is what the call makes
            return self.call(cls, args)
        if not isinstance(cls, Standin) or not cls.is_class or not isinstance(args, tuple):
            raise ReaderError("refused: its pickle makes an object of something that is no class")
        self.instances[cls.name] += 1
        return Standin(cls.name, is_class=False, args=args)

    def build(self, state: Any) -> None:
        """BUILD: the state goes into the stand-in or the half-built numpy value; dicts have none (OrderedDict's is lost)."""
        target = self.top()
        if isinstance(target, Standin) and not target.is_class:
            target.state = state
        elif isinstance(target, LazyTensor) and id(target) in self.unfilled:
            fill_array(self, self.unfilled.pop(id(target)), state)
        elif isinstance(target, NumpyType):
            match state:
                case (int(), "<" | ">" | "|" | "=" as order, *_):
                    target.dtype = target.dtype.newbyteorder(order)
                case _:
                    raise ReaderError("its pickle is damaged: the state of a numpy dtype is none")
        elif not isinstance(target, dict):  # state_dict carries _metadata as an attribute
            raise ReaderError("refused: its pickle changes something that is no object of its own")

    def persistent_value(self, reference: Any) -> Any:
        if self.persistent is None or not isinstance(reference, tuple):
            raise ReaderError("its pickle refers to something outside of it that is no storage")
        return self.persistent(reference)


def _check_nesting(value: Any) -> None:
    """ReaderError where containers hold themselves or lie too deep. Each is looked at once, however often it is shared."""
    depth: dict[int, int] = {}  # 0 while its contents are being looked at
    todo: list[tuple[Any, bool]] = [(value, False)]
    while todo:
        node, leaving = todo.pop()
        # Sets hold nothing that nests (see `checked`).
        inside = (
            node.values()
            if isinstance(node, dict)
            else node
            if isinstance(node, list | tuple)
            else ()
        )
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


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = words("""
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    """)
_METHODS: dict[str, Callable[[Interpreter, Any], None]] = {
    "PROTO": lambda m, arg: None,
    "FRAME": lambda m, arg: None,
    "MARK": lambda m, arg: m.marks.append(len(m.stack)),
    "POP_MARK": lambda m, arg: m.items().clear(),
    "DUP": lambda m, arg: m.stack.append(m.top()),
    "EMPTY_LIST": lambda m, arg: m.stack.append([]),
    "EMPTY_DICT": lambda m, arg: m.stack.append({}),
    "EMPTY_SET": lambda m, arg: m.stack.append(set()),
    "LIST": lambda m, arg: m.stack.append(m.items()),
    "TUPLE": lambda m, arg: m.stack.append(tuple(m.items())),
    "TUPLE1": lambda m, arg: m.stack.append((m.pop(),)),
    "TUPLE2": lambda m, arg: m.stack.append((m.pop(), m.pop())[::-1]),
    "TUPLE3": lambda m, arg: m.stack.append((m.pop(), m.pop(), m.pop())[::-1]),
    "FROZENSET": lambda m, arg: m.stack.append(frozenset(checked(item) for item in m.items())),
    "BINGET": Interpreter.recall,
    "LONG_BINGET": Interpreter.recall,
    "GET": Interpreter.recall,
    "BINPUT": Interpreter.remember,
    "LONG_BINPUT": Interpreter.remember,
    "PUT": Interpreter.remember,
    "MEMOIZE": lambda m, arg: m.remember(len(m.memo)),
    "GLOBAL": lambda m, arg: m.stack.append(m.name(*arg.split(" ", 1))),
    "BINPERSID": lambda m, arg: m.stack.append(m.persistent_value(m.pop())),
}


def _opcode(method: Callable[[Interpreter, Any], None]) -> Callable[[Interpreter, Any], None]:
    _METHODS[method.__name__.upper().strip("_")] = method
    return method


@_opcode
def _pop(m: Interpreter, arg: Any) -> None:
    if m.marks and len(m.stack) == m.marks[-1]:
        m.marks.pop()
    else:
        m.pop()


@_opcode
def _dict(m: Interpreter, arg: Any) -> None:
    items, new = m.items(), {}
    m.set_items(new, items)
    m.stack.append(new)


@_opcode
def _setitem(m: Interpreter, arg: Any) -> None:
    value, key = m.pop(), m.pop()
    m.set_item(m.top(), key, value)


@_opcode
def _setitems(m: Interpreter, arg: Any) -> None:
    items = m.items()
    m.set_items(m.top(), items)


@_opcode
def _append(m: Interpreter, arg: Any) -> None:
    item = m.pop()
    m.extend(m.top(), [item])


@_opcode
def _appends(m: Interpreter, arg: Any) -> None:
    items = m.items()
    m.extend(m.top(), items)


@_opcode
def _additems(m: Interpreter, arg: Any) -> None:
    items = m.items()
    m.add(m.top(), items)


@_opcode
def _stack_global(m: Interpreter, arg: Any) -> None:
    name, module = m.pop(), m.pop()
    m.stack.append(m.name(module, name))


@_opcode
def _reduce(m: Interpreter, arg: Any) -> None:
    args, function = m.pop(), m.pop()
    m.stack.append(m.call(function, args))


@_opcode
def _newobj(m: Interpreter, arg: Any) -> None:
    args, cls = m.pop(), m.pop()
    m.stack.append(m.instance(cls, args))


@_opcode
def _newobj_ex(m: Interpreter, arg: Any) -> None:
    keywords, args, cls = m.pop(), m.pop(), m.pop()
    if not isinstance(args, tuple) or not isinstance(keywords, dict):
        raise ReaderError("its pickle is damaged: an object's arguments are none")
    m.stack.append(m.instance(cls, (*args, keywords) if keywords else args))


@_opcode
def _inst(m: Interpreter, arg: Any) -> None:
    args = tuple(m.items())
    m.stack.append(m.call(m.name(*arg.split(" ", 1)), args))


@_opcode
def _obj(m: Interpreter, arg: Any) -> None:
    cls, *args = m.items() or [None]
    m.stack.append(m.call(cls, tuple(args)))


@_opcode
def _build(m: Interpreter, arg: Any) -> None:
    m.build(m.pop())
