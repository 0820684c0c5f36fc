"""Hostile checkpoints, made by hand and named; mutations.py makes random ones.

Each case is the files on disk, {file name: bytes}, of which the first is opened, and a part of the
expected message. CANARY is the file that their calls would create.
"""

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

CANARY = "/tmp/ldm_jax_reader_canary"
MAGIC = 0x1950A86A20F9469CFC6C


class Case(NamedTuple):
    name: str
    files: dict[str, bytes]
    message: str


# ------------------------------------------------------------------------------ pickles, by opcodes


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tup(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(function: bytes, *args: bytes) -> bytes:
    return function + tup(*args) + b"R"


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def storage(cls: str = "FloatStorage", key: str = "0", numel: int = 4, *extra: bytes) -> bytes:
    return (
        tup(text("storage"), name("torch", cls), text(key), text("cpu"), number(numel), *extra)
        + b"Q"
    )


def tensor(
    of: bytes | None = None, offset: int = 0, shape=(4,), strides=(1,), hooks: bytes = b"}"
) -> bytes:
    shape, strides = (tup(*(number(n) for n in values)) for values in (shape, strides))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(
        rebuild, storage() if of is None else of, number(offset), shape, strides, b"\x89", hooks
    )


def mapping(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


RUN = name("posix", "system"), text(f"touch {CANARY}")


# --------------------------------------------------------------------------------------- containers


def archive(
    value: bytes | None,
    storages: dict[str, bytes] | None = None,
    deflate: bool = False,
    **more: bytes,
) -> bytes:
    """A zip checkpoint of the pickle of ``value``; ``more`` are extra entries ("__" for "/")."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as file:
        if value is not None:
            file.writestr("a/data.pkl", pickled(value))
        for key, data in ({"0": bytes(16)} if storages is None else storages).items():
            file.writestr(f"a/data/{key}", data)
        for entry, data in more.items():
            file.writestr(entry.replace("__", "/"), data)
    return out.getvalue()


def legacy(
    value: bytes, keys: bytes | None = None, raw: bytes | None = None, **head: bytes
) -> bytes:
    keys = b"](" + text("0") + b"e" if keys is None else keys
    raw = struct.pack("<q", 4) + bytes(16) if raw is None else raw
    magic = head.get("magic", number(MAGIC))
    system = head.get("system", mapping(little_endian=b"\x88"))
    return (
        b"".join(map(pickled, (magic, head.get("protocol", number(1001)), system, value, keys)))
        + raw
    )


def legacy_tensor(view: bytes = b"N", **options) -> bytes:
    return tensor(storage("FloatStorage", "0", 4, view), **options)


def safetensors(header: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin: int = 0, end: int = 16, shape=(4,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def patched(data: bytes, find: bytes, at: int, new: bytes, last: bool = True) -> bytes:
    """``data`` with ``new`` at ``at`` bytes behind the last (or first) ``find``."""
    place = (data.rindex if last else data.index)(find) + at
    return data[:place] + new + data[place + len(new) :]


GOOD = mapping(state_dict=mapping(weight=tensor()))
GOOD_ZIP = archive(GOOD)
GOOD_LEGACY = legacy(mapping(weight=legacy_tensor()))
GOOD_SAFETENSORS = safetensors({"weight": entry()})


# -------------------------------------------------------------------------------------------- cases


def _calls() -> Iterator[tuple[str, bytes, str]]:
    """Pickled calls, and what the refusal must name."""
    function, argument = RUN
    yield "reduce", call(function, argument), "posix.system"
    yield "mention only", function, "posix.system"
    yield "in a dict", mapping(weight=tensor(), x=call(function, argument)), "posix.system"
    yield "as a key", b"}" + call(function, argument) + b"Ns", "posix.system"
    yield "in a list in a tuple", b"(](" + call(function, argument) + b"et", "posix.system"
    yield (
        "in a tensor's hooks",
        mapping(weight=tensor(hooks=call(function, argument))),
        "posix.system",
    )
    yield (
        "as a storage's key",
        tensor(tup(text("storage"), call(function, argument)) + b"Q"),
        "posix.system",
    )
    yield (
        "memoised",
        b"](" + function + b"q\x05" + argument + b"\x85q\x06h\x05h\x06Re",
        "posix.system",
    )
    yield (
        "memoised, name split",
        text("posix") + b"q\x010" + text("system") + b"q\x020h\x01h\x02\x93" + tup(argument) + b"R",
        "posix",
    )
    yield "stack_global", text("os") + text("system") + b"\x93" + tup(argument) + b"R", "os.system"
    yield "inst", b"(" + argument + b"iposix\nsystem\n", "posix.system"
    yield "obj", b"(" + function + argument + b"o", "posix.system"
    yield "newobj", function + tup(argument) + b"\x81", "posix.system"
    yield "newobj_ex", function + tup(argument) + b"}\x92", "posix.system"
    yield (
        "build on a class",
        name("some.module", "Class") + mapping(run=number(1)) + b"b",
        "changes something",
    )
    yield "build on a function", name("os", "system") + mapping(run=number(1)) + b"b", "os.system"
    setstate = mapping(__setstate__=name("os", "system"))
    yield (
        "setstate",
        name("some", "Class") + b")\x81" + setstate + b"b" + argument + b"b",
        "os.system",
    )
    yield (
        "reconstructor",
        call(name("copyreg", "_reconstructor"), function, name("builtins", "object"), b"N"),
        "posix.system",
    )
    yield "partial", call(name("functools", "partial"), function, argument), "posix.system"
    yield "default factory", call(name("collections", "defaultdict"), function), "posix.system"
    yield (
        "functools.reduce",
        call(name("functools", "reduce"), name("some", "Class"), b"]"),
        "functools.reduce",
    )
    yield "map", call(name("builtins", "map"), name("some", "Class"), b"]"), "builtins.map"
    yield (
        "a module's module",
        text("torch") + text("os.system") + b"\x93" + tup(argument) + b"R",
        "torch.os.system",
    )
    yield (
        "a type's subclasses",
        text("builtins") + text("dict.__subclasses__") + b"\x93)R",
        "__subclasses__",
    )
    yield "globals", text("torch") + text("Tensor.__init__.__globals__") + b"\x93", "__globals__"
    yield "extension registry", b"\x82\x01", "opcode 0x82"
    yield "persistent name", b"Pos.system\n", "outside of it"
    yield "out of band", b"\x97", "opcode 0x97"
    yield "result of a call", call(call(name("torch", "Size"), tup())), "no class"
    rebuild = name("torch._tensor", "_rebuild_from_type_v2")
    yield "tensor of a type", call(rebuild, function, b"N", tup(argument), b"N"), "posix.system"
    yield (
        "tensor of a call",
        call(rebuild, name("a", "B"), b"N", tup(argument), b"N"),
        "does not fit",
    )
    functions = """
        builtins.eval builtins.exec builtins.compile builtins.getattr builtins.setattr builtins.open
        builtins.__import__ __builtin__.eval __builtin__.execfile builtins.input builtins.breakpoint
        os.popen os.execv nt.system subprocess.Popen subprocess.check_output runpy.run_path
        importlib.import_module ctypes.CDLL socket.socket shutil.rmtree pty.spawn webbrowser.open
        timeit.timeit code.InteractiveInterpreter pickle.loads marshal.loads types.FunctionType
        types.CodeType operator.attrgetter multiprocessing.Process sys.exit pdb.run bdb.Bdb
        commands.getoutput pip.main torch.hub.load torch.load torch.serialization.load
        torch.utils.cpp_extension.load numpy.load numpy.testing._private.utils.runstring
        pandas.io.common.os.system __main__.evil evil.run logging.FileHandler
        tempfile.NamedTemporaryFile urllib.request.urlopen cloudpickle.loads dill.Unpickler
    """
    for full in functions.split():
        module, attribute = full.rsplit(".", 1)
        yield (
            full,
            call(name(module, attribute), text(f"touch {CANARY}")),
            full.replace("__builtin__", "builtins"),
        )


def _pickles() -> Iterator[tuple[str, bytes, str]]:
    """Damaged, endless or oversized values."""
    yield "underflow", b"0", "damaged"
    yield "no mark", b"t", "damaged"
    yield "memo miss", b"h\x07", "damaged"
    yield "unknown opcode", b"\xff", "damaged"
    yield "left over", b"NN", "left over"
    yield "odd dict", b"}(Nu", "damaged"
    yield "append to a dict", b"}Na", "no list"
    yield "item of a list", b"]NNs", "no dict"
    yield "call without arguments", name("a", "B") + b"]R", "no arguments"
    yield "huge text", b"\x8d" + struct.pack("<Q", 1 << 62), "damaged|too soon"
    yield "huge bytes", b"\x8e" + struct.pack("<Q", 1 << 40), "damaged|too soon"
    yield "huge number", b"\x8b" + struct.pack("<i", 1 << 30), "4096 bits"
    yield "long number", b"\x8b" + struct.pack("<i", 100_000) + b"\x55" * 100_000, "4096 bits"
    yield "decimal number", b"L" + b"9" * 100_000 + b"L\n", "damaged"
    yield "no line end", b"I123", "damaged"
    yield "deep", b"]" * 100_000 + b"a" * 99_999, "deep"
    yield "contains itself", b"]q\x00h\x00a", "contains itself"
    yield (
        "laughs as a key",
        b"Nq\x00" + b"h\x00h\x00\x86q\x000h\x00" * 80 + b"0" * 80 + b"}h\x00Ns",
        "as a key",
    )
    yield "list as a key", b"}]Ns", "as a key"
    yield "tensor as a key", b"}" + tensor() + b"Ns", "as a key"
    yield "large number as a key", b"}" + number(1 << 80) + b"Ns", "as a key"
    yield "key twice", b"}(" + (text("a") + b"N") * 2 + b"u", "occurs twice"
    yield "no name", name("os;import x", "y"), "which is no name"
    yield "no text as name", b"NN\x93", "damaged"
    make = name("collections", "OrderedDict") + b"q\x010](" + tup(text("k"), b"N") + b"eq\x020]("
    copies = (
        b"]("
        + b"N" * 50_000
        + b"eq\x020]("
        + (name("builtins", "set") + b"h\x02\x85R") * 2000
        + b"e"
    )
    yield "copies of a list", copies, "copies more"
    encode = (
        name("_codecs", "encode")
        + b"q\x010"
        + text("x" * 1_000_000)
        + b"q\x020"
        + text("latin1")
        + b"q\x030"
    )
    yield "copies of bytes", encode + b"](" + b"h\x01h\x02h\x03\x86R" * 1000 + b"e", "copies more"
    yield "copies of a dict", make + b"h\x01h\x02\x85R" * 3 + b"e" + b"N", "left over"
    yield "endless", b"N0" * 500_001 + b"N", "too long"
    yield (
        "bytearray of a size",
        call(name("builtins", "bytearray"), number(1 << 45)),
        "does not fit",
    )
    yield "bytes of a size", call(name("builtins", "bytes"), number(1 << 45)), "does not fit"
    yield "other codec", call(name("_codecs", "encode"), text("x"), text("zlib")), "does not fit"
    dtype = call(name("numpy", "dtype"), text("f4"), b"\x89", b"\x88")
    empty = call(
        name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), tup(), text("b")
    )
    state = tup(number(1), tup(number(1 << 40)), dtype, b"\x89", text("abcd"))
    yield "numpy array too large", mapping(x=empty + state + b"b"), "has 4 bytes"
    yield (
        "numpy scalar too large",
        call(name("numpy.core.multiarray", "scalar"), dtype, text("a")),
        "has 1 bytes",
    )
    yield "numpy dtype order", dtype + tup(number(3), text("?")) + b"b", "numpy dtype"


def _tensors() -> Iterator[tuple[str, bytes, str]]:
    yield "offset beyond", tensor(offset=1), "beyond its storage"
    yield "shape beyond", tensor(shape=(5,)), "beyond its storage"
    yield "strides beyond", tensor(shape=(2, 2), strides=(3, 1)), "beyond its storage"
    yield "huge strides", tensor(shape=(2,), strides=(1 << 47,)), "beyond its storage"
    yield "negative stride", tensor(shape=(4,), strides=(-1,)), "strides"
    yield "negative size", tensor(shape=(-1,)), "shape"
    yield "negative offset", tensor(offset=-1), "offset"
    yield "huge size", tensor(shape=(1 << 62,)), "shape"
    yield "huge empty", tensor(shape=(0, 1 << 40, 1 << 40), strides=(1, 1, 1)), "too large"
    yield "repeats", tensor(shape=(1 << 20, 1 << 20), strides=(0, 0)), "repeats"
    yield "too few strides", tensor(shape=(2, 2), strides=(1,)), "do not fit"
    yield "too many axes", tensor(shape=(1,) * 65, strides=(1,) * 65), "shape"
    yield "no storage", tensor(b"N"), "does not fit"
    yield "storage missing", tensor(storage(key="1")), "missing"
    yield "storage elsewhere", tensor(storage(key="../data/0")), "missing"
    yield "storage too long", tensor(storage(numel=5)), "its tensors need 20"
    yield "storage too short", tensor(storage(numel=3)), "its tensors need 12"
    yield "storage negative", tensor(storage(numel=-4)), "no storage"
    yield "storage huge", tensor(storage(numel=1 << 60)), "no storage"
    yield "storage of no class", tensor(storage("QInt8Storage")), "no storage"
    yield "storage of other class", mapping(a=tensor(), b=tensor(storage("IntStorage"))), "two ways"
    yield "no dtype", tensor(storage("UntypedStorage", numel=16), shape=(16,)), "dtype"
    yield "no reference", b"NQ", "no storage"
    yield "no state dict", mapping(epoch=number(1)), "no state dict"
    yield "an object", name("some.Model", "Net") + b")\x81", "some.Model.Net"
    yield "name is no text", b"}" + number(1) + tensor() + b"s", "no text"
    many = b"".join(text(str(i)) + tensor(shape=(1 << 24,), strides=(0,)) for i in range(40))
    yield "repeats in small", b"}(" + many + b"u", "would take"


def _archives() -> Iterator[tuple[str, bytes, str]]:
    for keep in (4, 30, 100, len(GOOD_ZIP) // 2, len(GOOD_ZIP) - 1):
        yield f"zip cut at {keep}", GOOD_ZIP[:keep], "zip archive"
    yield "zip with a tail", GOOD_ZIP + b"x", "damaged end"
    yield "zip without data.pkl", archive(None), "no data.pkl"
    yield "zip of two", archive(GOOD, b__data=b"", **{"b__data.pkl": pickled(GOOD)}), "2 data.pkl"
    yield "zip of nothing", zipped_empty(), "no data.pkl"
    yield "TorchScript", archive(GOOD, **{"a__constants.pkl": b""}), "TorchScript"
    yield "byte order", archive(GOOD, a__byteorder=b"middle"), "byte order"
    yield "after the pickle", archive(GOOD + b"." + GOOD), "belong to nothing"
    for unsafe in ("../../evil", "/etc/evil", "a/../../evil", "C:evil", "a/x\ny"):
        yield f"zip entry {unsafe!r}", archive(GOOD, **{unsafe: b""}), "not safe"
    backslash = archive(GOOD, **{"a|..|evil": b""}).replace(b"a|..|evil", b"a\\..\\evil")
    yield "zip entry with backslashes", backslash, "not safe"
    yield "zip entry no UTF-8", archive(GOOD, abcd=b"").replace(b"abcd", b"ab\xff\xfe"), "no UTF-8"
    yield (
        "zip entry twice",
        archive(GOOD, a__data__1=bytes(16)).replace(b"a/data/1", b"a/data/0"),
        "twice",
    )
    directory = b"PK\x01\x02"
    yield "zip entries overlap", _overlapping(), "overlap"
    yield "zip encrypted", patched(GOOD_ZIP, directory, 8, b"\x01"), "encrypted"
    yield "zip method", patched(GOOD_ZIP, directory, 10, b"\x0c"), "unknown way"
    yield "zip local method", patched(GOOD_ZIP, b"PK\x03\x04", 8, b"\x08"), "not where"
    yield "zip local name", patched(GOOD_ZIP, b"PK\x03\x04", 30, b"b"), "not where"
    yield "zip entry nowhere", patched(GOOD_ZIP, directory, 42, b"\xff\xff\xff\x00"), "are needed"
    yield (
        "zip sizes",
        patched(GOOD_ZIP, directory, 20, struct.pack("<2I", 1 << 30, 1 << 30)),
        "cannot hold",
    )
    yield "zip size", patched(GOOD_ZIP, directory, 24, struct.pack("<I", 17)), "unknown way"
    end = b"PK\x05\x06"
    yield "zip count", patched(GOOD_ZIP, end, 8, struct.pack("<2H", 9, 9)), "damaged directory"
    yield (
        "zip count too small",
        patched(GOOD_ZIP, end, 8, struct.pack("<2H", 1, 1)),
        "damaged directory",
    )
    yield (
        "zip directory elsewhere",
        patched(GOOD_ZIP, end, 16, struct.pack("<I", 7)),
        "damaged directory",
    )
    yield (
        "zip directory outside",
        patched(GOOD_ZIP, end, 12, struct.pack("<I", 1 << 30)),
        "does not fit",
    )
    yield "zip on disks", patched(GOOD_ZIP, end, 4, b"\x01"), "several parts"
    yield "zip64 nowhere", _with_zip64(1 << 40), "damaged end"
    yield "zip64 count", _with_zip64(None, count=1 << 40), "does not fit"
    packed = archive(GOOD, deflate=True)
    yield "bomb announced", archive(text("x" * 70_000_000), deflate=True), "more than"
    yield (
        "bomb hidden",
        patched(packed, directory, 24, struct.pack("<I", 64), last=False),
        "does not expand",
    )
    zeros = archive(
        mapping(weight=tensor(storage(numel=1 << 29), shape=(1 << 29,))),
        {"0": bytes(1 << 20)},
        deflate=True,
    )
    yield (
        "bomb in a storage",
        patched(zeros, directory, 24, struct.pack("<I", 1 << 31)),
        "cannot hold",
    )
    yield (
        "deflate damaged",
        patched(packed, b"a/data.pkl", 10, b"\xff\xff\xff\xff", last=False),
        "damaged",
    )


def zipped_empty() -> bytes:
    out = io.BytesIO()
    zipfile.ZipFile(out, "w").close()
    return out.getvalue()


def _overlapping() -> bytes:
    """A whole entry hidden in the bytes of another."""
    inner = (
        b"PK\x03\x04"
        + struct.pack("<5H3I2H", 20, 0, 0, 0, 0, zlib.crc32(bytes(16)), 16, 16, 8, 0)
        + b"a/data/1"
        + bytes(16)
    )
    nested = archive(GOOD, {"0": inner})
    begin = nested.index(inner)
    record = (
        b"PK\x01\x02"
        + struct.pack("<6H3I5H2I", 20, 20, 0, 0, 0, 0, 0, 16, 16, 8, 0, 0, 0, 0, 0, begin)
        + b"a/data/1"
    )
    end = nested.rindex(b"PK\x05\x06")
    _, _, _, _, count, length, start, _ = struct.unpack("<4s4H2LH", nested[end : end + 22])
    tail = struct.pack(
        "<4s4H2LH", b"PK\x05\x06", 0, 0, count + 1, count + 1, length + len(record), start, 0
    )
    return nested[:end] + record + tail


def _with_zip64(where: int | None, count: int = 2) -> bytes:
    end = GOOD_ZIP.rindex(b"PK\x05\x06")
    record = b"PK\x06\x06" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, 100, 0)
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, end if where is None else where, 1)
    return GOOD_ZIP[:end] + record + locator + GOOD_ZIP[end:]


def _legacies() -> Iterator[tuple[str, bytes, str]]:
    for keep in (3, 12, 30, 100, len(GOOD_LEGACY) - 25, len(GOOD_LEGACY) - 8, len(GOOD_LEGACY) - 1):
        yield f"legacy cut at {keep}", GOOD_LEGACY[:keep], "too soon|damaged|truncated"
    value = mapping(weight=legacy_tensor())
    yield "legacy with a tail", GOOD_LEGACY + b"x", "longer than its storages"
    yield "legacy magic", legacy(value, magic=number(MAGIC + 1)), "plain pickle"
    yield "legacy protocol", legacy(value, protocol=number(7)), "unknown version"
    yield "legacy system", legacy(value, system=b"N"), "unknown version"
    yield "legacy keys missing", legacy(value, keys=b"]"), "does not fit"
    yield "legacy keys twice", legacy(value, keys=b"](" + text("0") * 2 + b"e"), "does not fit"
    yield "legacy keys other", legacy(value, keys=b"](" + text("1") + b"e"), "does not fit"
    yield "legacy keys nested", legacy(value, keys=b"](]e"), "does not fit"
    doubled = b"]q\x00" + b"0]h\x00ah\x00aq\x00" * 80  # each list holds the one before it twice
    yield "legacy keys that laugh", legacy(value, keys=doubled), "does not fit"
    yield "legacy count", legacy(value, raw=struct.pack("<q", 5) + bytes(16)), "has 5 elements"
    yield (
        "legacy negative count",
        legacy(value, raw=struct.pack("<q", -4) + bytes(16)),
        "has -4 elements",
    )
    yield (
        "legacy view",
        legacy(mapping(weight=legacy_tensor(tup(text("v"), number(2), number(3))))),
        "beyond its storage",
    )
    yield "legacy odd view", legacy(mapping(weight=legacy_tensor(text("v")))), "unknown way"
    yield (
        "legacy persistent",
        legacy(tup(text("module"), name("a", "B")) + b"Q" + b"N"),
        "left over",
    )
    yield "legacy zip reference", legacy(mapping(weight=tensor())), "no storage"
    run = call(*RUN)
    yield "legacy runs in its magic", legacy(value, magic=run), "posix.system"
    yield "legacy runs in its facts", legacy(value, system=mapping(x=run)), "posix.system"
    yield "legacy runs", legacy(mapping(weight=legacy_tensor(), x=run)), "posix.system"
    yield "legacy runs in its keys", legacy(value, keys=b"](" + run + b"e"), "posix.system"
    yield "protocol 0", b"cposix\nsystem\n(S'touch x'\ntR.", "not a checkpoint"


def _safetensors() -> Iterator[tuple[str, bytes, str]]:
    def of(*entries: dict, data: bytes = bytes(16)) -> bytes:
        return safetensors({f"w{i}": value for i, value in enumerate(entries)}, data)

    for keep in (3, 9, 20, len(GOOD_SAFETENSORS) - 1):
        yield (
            f"safetensors cut at {keep}",
            GOOD_SAFETENSORS[:keep],
            "truncated|damaged|not a checkpoint",
        )
    yield "safetensors header beyond", safetensors({"w": entry()}, length=1 << 20), "truncated"
    yield "safetensors header huge", safetensors({"w": entry()}, length=1 << 39), "more than"
    yield (
        "safetensors header endless",
        safetensors({"w": entry()}, length=1 << 63),
        "not a checkpoint",
    )
    yield "safetensors header large", safetensors(b"{" + b" " * (17 << 20) + b"}", b""), "more than"
    yield "safetensors header short", safetensors({"w": entry()}, length=7), "no JSON"
    yield "safetensors no JSON", safetensors(b"{'w': 1}"), "no JSON"
    yield "safetensors no UTF-8", safetensors(b'{"\xff\xfe": 1}'), "no JSON"
    yield (
        "safetensors deep",
        safetensors(b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "no JSON",
    )
    yield "safetensors long number", safetensors(b'{"w":' + b"9" * 10_000 + b"}"), "no JSON"
    double = json.dumps(entry()).encode()
    yield (
        "safetensors name twice",
        safetensors(b'{"w":' + double + b',"w":' + double + b"}"),
        "twice",
    )
    yield "safetensors overlap", of(entry(), entry(8, 16, (2,))), "overlaps"
    yield "safetensors same bytes", of(entry(), entry()), "overlaps"
    yield "safetensors hole", of(entry(0, 4, (1,)), entry(8, 16, (2,))), "hole"
    yield "safetensors beyond", of(entry(0, 32, (8,))), "truncated"
    yield "safetensors negative", of(entry(-16, 0)), "overlaps"
    yield "safetensors backwards", of(entry(16, 0)), "do not fit"
    yield "safetensors tail", of(entry(), data=bytes(17)), "the file has 17"
    yield "safetensors shape", of(entry(shape=(5,))), "do not fit"
    yield "safetensors huge shape", of(entry(shape=(1 << 40, 1 << 40))), "too large"
    yield "safetensors negative shape", of(entry(shape=(-2, -2))), "shape"
    yield "safetensors float shape", of(entry(shape=(4.0,))), "shape"
    yield "safetensors dtype", of(entry(dtype="F33")), "not supported"
    yield (
        "safetensors true offset",
        safetensors(b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[false,true]}}', b"x"),
        "do not fit",
    )
    yield "safetensors no offsets", safetensors({"w": {"dtype": "F32", "shape": [4]}}), "properly"
    yield "safetensors list", safetensors({"w": [1, 2]}), "properly"
    yield "safetensors more", of(entry() | {"more": 1}), "not supported"
    yield (
        "safetensors metadata",
        safetensors({"__metadata__": {"a": 1}, "w": entry()}),
        "__metadata__",
    )


def _indexes() -> Iterator[Case]:
    def case(title: str, message: str, index: object, **shards: bytes) -> Case:
        files = {"x.index.json": json.dumps(index).encode()}
        return Case(
            f"index {title}",
            files | {f"{shard}.bin": data for shard, data in shards.items()},
            message,
        )

    names = {"weight": "a.bin"}
    for unsafe in ("../a.bin", "/etc/passwd", "..", "", "b\\a.bin", "a\n.bin"):
        yield case(f"to {unsafe!r}", "not the name of a file", {"weight_map": {"weight": unsafe}})
    yield case("without its shard", "no such file", {"weight_map": names})
    yield case("of no map", "weight_map", {"weight_map": ["a.bin"]})
    yield case("of nothing", "weight_map", {"a": 1})
    yield case(
        "of many",
        "shards",
        {"weight_map": {str(i): f"{i}.bin" for i in range(257)}},
        **{str(i): archive(mapping(**{str(i): tensor()})) for i in range(257)},
    )
    yield case("of itself", "not a checkpoint", {"weight_map": {"weight": "x.index.json"}})
    yield case(
        "missing", "1 tensors missing", {"weight_map": names | {"bias": "a.bin"}}, a=GOOD_ZIP
    )
    yield case(
        "extra",
        "1 not in the index",
        {"weight_map": {}} | {"weight_map": {"v": "b.bin", **names}},
        a=GOOD_ZIP,
        b=GOOD_ZIP,
    )
    yield case("of a shard that runs", "posix.system", {"weight_map": names}, a=archive(call(*RUN)))


def _others() -> Iterator[tuple[str, bytes, str]]:
    yield "empty", b"", "empty"
    yield "one byte", b"\x80", "too soon"
    yield "text", b"hello, this is a text", "not a checkpoint"
    yield "zeros", bytes(1000), "not a checkpoint"
    yield "noise", random.Random(0).randbytes(5000), "not a checkpoint"
    yield "picture", b"\x89PNG\r\n\x1a\n" + bytes(100), "not a checkpoint"
    yield "web page", b"<!DOCTYPE html><html></html>", "web page"
    yield "pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "LFS"
    yield "gzip", b"\x1f\x8b\x08" + bytes(50), "gzip"
    yield "tar", bytes(257) + b"ustar" + bytes(250), "tar"
    yield "JSON", b"{}", "weight_map"
    yield "JSON damaged", b'{"weight_map": ', "no JSON"


def cases() -> list[Case]:
    """Every case, built on each call because some are large."""
    found = [
        Case(f"call {title}", {"x.ckpt": archive(value)}, message)
        for title, value, message in _calls()
    ]
    found += [
        Case(f"pickle {title}", {"x.ckpt": archive(value)}, message)
        for title, value, message in _pickles()
    ]
    found += [
        Case(f"tensor {title}", {"x.ckpt": archive(value)}, message)
        for title, value, message in _tensors()
    ]
    for family in (_archives, _legacies, _safetensors, _others):
        found += [Case(title, {"x.ckpt": data}, message) for title, data, message in family()]
    return [*found, *_indexes()]
