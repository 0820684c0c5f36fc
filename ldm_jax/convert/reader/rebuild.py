"""The functions for known names of a pickle: they rebuild tensors, containers and NumPy values.

They rebuild what their namesakes make in torch/_utils.py, torch/_tensor.py,
numpy/_core/multiarray.py and the standard library, from checked arguments; each returns
NotImplemented where the arguments do not fit.
"""

import re
from collections.abc import Callable
from math import prod
from typing import Any, Protocol

import numpy as np

from ldm_jax.convert.reader.lazy import TORCH_DTYPES, LazyTensor, Storage, decoded, sizes, strided
from ldm_jax.errors import ReaderError

ITEM = 512  # the cost of handling one item, in bytes copied: about 1 µs


class Machine(Protocol):
    """The part of the unpickler that rebuilding uses."""

    classes: dict[str, Any]
    unfilled: dict[int, LazyTensor]

    def spend(self, cost: int) -> None: ...  # noqa: D102
    def set_items(self, target: Any, flat: list) -> None: ...  # noqa: D102
    def call(self, function: Any, args: Any) -> Any: ...  # noqa: D102
    def instance(self, cls: Any, args: Any) -> Any: ...  # noqa: D102


Rebuild = Callable[[Any, tuple], Any]


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


class Standin:
    """A class of the pickle (``is_class``), or an object of one: inert, hashable by identity.

    Attributes:
      name: The dotted name of the class.
      args: The arguments of its constructor.
      state: The state that BUILD would set.
      contents: The items appended, or (key, value) pairs set, or None.
    """

    __slots__ = ("args", "contents", "is_class", "name", "state")

    def __init__(self, name: str, *, is_class: bool, args: tuple = ()):
        self.name, self.is_class, self.args = name, is_class, args
        self.state: Any = None
        self.contents: list | None = None

    @property
    def is_object(self) -> bool:
        """Whether it stands for an object, not for a class."""
        return not self.is_class

    def append(self, item: Any) -> None:
        """Adds an item to the contents."""
        self.contents = self.contents or []
        self.contents.append(item)

    def __repr__(self) -> str:
        return f"<stand-in for {'' if self.is_class else 'an object of '}{self.name}>"


class Known:
    """A name with a function of this file; ``call`` takes (unpickler, arguments)."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: Rebuild):
        self.name, self.call = name, call


class StorageClass:
    """torch.FloatStorage and its kind; ``dtype`` None is an untyped one."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype | None):
        self.dtype = dtype


class NumpyType:
    """A numpy.dtype under construction: its byte order comes later."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


def check_key(key: Any) -> Any:
    """Returns ``key`` if it may be a key, else raises ReaderError.

    Keys are scalars, stand-ins and short flat tuples of them: hashing others could take for ever.
    """
    flat = key if isinstance(key, tuple | frozenset) and len(key) <= 16 else (key,)
    for part in flat:
        if not isinstance(part, str | float | bool | bytes | complex | None | Standin | int):
            raise ReaderError(f"its pickle uses a {type(key).__name__} as a key")
        if isinstance(part, int) and part.bit_length() > 64:
            raise ReaderError("its pickle uses a number of over 64 bits as a key")
        if isinstance(part, str | bytes) and len(part) > 10_000:
            raise ReaderError("its pickle uses a text of over 10,000 characters as a key")
    return key


def _ordered_dict(m: Machine, args: tuple) -> Any:
    new: dict = {}
    match args:
        case () | (None,):
            pass
        case ([*pairs],):
            m.spend(ITEM * len(pairs))
            for pair in pairs:
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    return NotImplemented
                m.set_items(new, list(pair))
        case (dict() as other,):
            m.spend(ITEM * len(other))
            new.update(other)
        case _:
            return NotImplemented
    return new


def _default_dict(m: Machine, args: tuple) -> Any:
    return _ordered_dict(m, args[1:])  # the factory is a name, and is never called


def _deque(m: Machine, args: tuple) -> Any:
    match args:
        case () | ([],) | ([], int() | None):
            return []
    return NotImplemented


def _set(make: Callable[[Any], Any]) -> Rebuild:
    def rebuild(m: Machine, args: tuple) -> Any:
        match args:
            case ([*items],):
                m.spend(ITEM * len(items))
                return make(check_key(item) for item in items)
        return make(()) if args == () else NotImplemented

    return rebuild


def _bytearray(m: Machine, args: tuple) -> Any:
    match args:
        case ():
            return bytearray()
        case (bytes() | bytearray() as data,):
            m.spend(len(data))
            return bytearray(data)
        case (str() as text, "latin-1"):
            m.spend(len(text))
            return bytearray(_latin1(text))
    return NotImplemented


def _encode(m: Machine, args: tuple) -> Any:
    """_codecs.encode: how protocol 2 spells bytes."""
    match args:
        case (str() as text, "latin1" | "latin-1"):
            m.spend(len(text))
            return _latin1(text)
    return NotImplemented


def _latin1(data: str | bytes | bytearray) -> bytes:
    try:
        return data.encode("latin-1") if isinstance(data, str) else bytes(data)
    except UnicodeEncodeError:
        raise ReaderError("its pickle is damaged: bytes are none") from None


def _reconstructor(m: Machine, args: tuple) -> Any:
    """copyreg._reconstructor(class, base, state): protocols 0 and 1's NEWOBJ."""
    match args:
        case (Standin() as cls, _, state):
            return m.instance(cls, () if state is None else (state,))
    return NotImplemented


def _newobj_call(m: Machine, args: tuple) -> Any:
    match args:
        case (cls, *rest):
            return m.instance(cls, tuple(rest))
    return NotImplemented


def _size(m: Machine, args: tuple) -> Any:
    return sizes(args[0], "shape") if len(args) == 1 else NotImplemented


def _axes(*values: Any) -> int:
    return sum(len(value) for value in values if isinstance(value, tuple | list))


def _tensor(m: Machine, args: tuple) -> Any:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2: storage, offset, sizes, strides, ..."""
    match args:
        case (Storage() as storage, offset, shape, strides, *rest) if len(rest) <= 3:
            m.spend(ITEM + ITEM // 8 * _axes(shape, strides))
            return strided(storage, offset, shape, strides, storage.dtype)
    return NotImplemented


def _tensor_v3(m: Machine, args: tuple) -> Any:
    """torch._utils._rebuild_tensor_v3: v2 with the dtype, for the newer dtypes."""
    match args:
        case (Storage() as storage, offset, shape, strides, _, _, Standin(name=name), *rest) if (
            len(rest) <= 1
        ):
            if (dtype := TORCH_DTYPES.get(name.removeprefix("torch."))) is None:
                raise ReaderError(f"tensors of {name} are not supported")
            m.spend(ITEM + ITEM // 8 * _axes(shape, strides))
            return strided(storage, offset, shape, strides, dtype)
    return NotImplemented


def _parameter(m: Machine, args: tuple) -> Any:
    """torch._utils._rebuild_parameter and _rebuild_parameter_with_state: the tensor, ..."""
    match args:
        case (LazyTensor() as tensor, *rest) if len(rest) <= 3:
            return tensor
    return NotImplemented


def _from_type(m: Machine, args: tuple) -> Any:
    """torch._tensor._rebuild_from_type_v2(function, type, args, state): tensors with attributes."""
    match args:
        case (Known() as function, _, tuple() as inner, _) if function.call in (
            _tensor,
            _tensor_v3,
            _parameter,
        ):
            return m.call(function, inner)
    return NotImplemented


_NUMPY_CODES = words("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16 bool int8 int16 int32 int64 uint8")
_NUMPY_CODES |= words("uint16 uint32 uint64 float16 float32 float64 complex64 complex128")


def _numpy_dtype(m: Machine, args: tuple) -> Any:
    match args:
        case (str() as code, *_) if re.sub("^[<>|=]", "", code) in _NUMPY_CODES:
            return NumpyType(np.dtype(code))
        case (str(), *_):  # objects, text, structures: no numbers
            return m.instance(
                m.classes.setdefault("numpy.dtype objects", Standin("numpy.dtype", is_class=True)),
                args,
            )
    return NotImplemented


def _numpy_array(m: Machine, shape: Any, dtype: NumpyType, data: Any, order: Any) -> LazyTensor:
    shape, kind = sizes(shape, "shape"), dtype.dtype
    if not isinstance(data, bytes | bytearray | str):
        raise ReaderError("its pickle is damaged: a numpy array has no bytes")
    m.spend(2 * ITEM + len(data))
    raw = _latin1(data)  # Python 2 wrote bytes as text
    if prod(shape) * kind.itemsize != len(raw):
        raise ReaderError(f"a numpy array of shape {list(shape)} has {len(raw)} bytes")

    def read() -> np.ndarray:
        flat = decoded(np.frombuffer(raw, np.uint8), kind.newbyteorder("="), not kind.isnative)
        return np.array(flat.reshape(shape, order=order), order="C")

    return LazyTensor(shape, kind.newbyteorder("="), read)


def _numpy_scalar(m: Machine, args: tuple) -> Any:
    match args:
        case (NumpyType() as dtype, bytes() | str() as data):
            return _numpy_array(m, (), dtype, data, "C").numpy().item()
        case (Standin() as dtype, *_):
            return dtype
    return NotImplemented


def _numpy_reconstruct(m: Machine, args: tuple) -> Any:
    def unread() -> np.ndarray:
        raise ReaderError("a numpy array of objects holds no numbers")

    if len(args) != 3 or not isinstance(args[0], Standin) or args[0].name != "numpy.ndarray":
        return NotImplemented
    array = LazyTensor((0,), np.dtype(np.uint8), unread)
    m.unfilled[id(array)] = array
    return array


def fill_array(m: Machine, array: LazyTensor, state: Any) -> None:
    """Fills an array that ``_reconstruct`` has announced with the state that BUILD gives it."""
    match state:
        case (int(), shape, NumpyType() as dtype, bool() | int() as fortran, data):
            array.become(_numpy_array(m, shape, dtype, data, "F" if fortran else "C"))
        case (int(), _, Standin(), _, _):
            pass
        case _:
            raise ReaderError("its pickle is damaged: the state of a numpy array is none")


def _numpy_buffer(m: Machine, args: tuple) -> Any:
    match args:
        case (data, NumpyType() as dtype, shape, "C" | "F" as order):
            return _numpy_array(m, shape, dtype, data, order)
    return NotImplemented


KNOWN: dict[str, Rebuild] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "collections.deque": _deque,
    "builtins.set": _set(set),
    "builtins.frozenset": _set(frozenset),
    "builtins.bytearray": _bytearray,
    "builtins.bytes": lambda m, args: b"" if args == () else NotImplemented,
    "builtins.complex": lambda m, args: (
        complex(*args) if [type(a) for a in args] == [float] * 2 else NotImplemented
    ),
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "copyreg.__newobj__": _newobj_call,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.tensor._rebuild_from_type_v2": _from_type,
    "numpy.dtype": _numpy_dtype,
    **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _numpy_reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _numpy_buffer for core in ("core", "_core")},
}
