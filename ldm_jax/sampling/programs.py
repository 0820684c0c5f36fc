"""Compiled programs on disk, so that a new process samples without tracing or compiling.

JAX's persistent compilation cache saves the compiler's time. A program still has to be traced and
lowered to find its entry there, which takes seconds for a large network. A `ProgramStore` finds it
by a description of what would be traced.
"""

import contextlib
import hashlib
import logging
import os
import platform
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from ldm_jax.io.atomic import write_atomic

LOG = logging.getLogger(__name__)

SUFFIX = ".program"
_DIGEST = 32  # bytes of SHA-256
# Settings of JAX that change what is compiled.
_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_disable_most_optimizations",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)


class ProgramStore:
    """A folder of compiled programs.

    A program's name is a hash of its arguments' structure, shapes and shardings, the static parts
    of the model, this package's source, the versions of JAX and of the platform, the devices and
    the compiler's flags. A change of any of them compiles again.

    Loading a program runs its code: like the compilation cache of JAX, the folder must be one that
    only its user can write to. Damaged files are noticed by a checksum and made again.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = 2**31):
        """Uses ``folder``, which is made when it is needed.

        Args:
          folder: The folder.
          max_bytes: Its largest size; the programs that were not used for the longest time are
            removed first.
        """
        self.folder, self.max_bytes = Path(folder).expanduser(), max_bytes

    def get(
        self, program: Any, arguments: tuple[Any, ...], result: Any, *described: Any
    ) -> Callable[..., Any]:
        """Returns ``program`` compiled for ``arguments``, from the folder if it is there.

        Args:
          program: A function under `jax.jit`.
          arguments: Its arguments, or their shapes.
          result: A pytree of the structure of its result.
          described: What else decides the program: values whose `repr` is the same in every
            process.
        """
        devices = _devices_of(arguments)
        path = self.folder / (_name(arguments, described, devices) + SUFFIX)
        if (payload := _read(path)) is not None:
            trees = jax.tree.structure((arguments, {})), jax.tree.structure(result)
            path.touch()
            return serialize_executable.deserialize_and_load(
                payload, *trees, execution_devices=devices
            )
        lowered = program.lower(*arguments)
        with _no_compilation_cache():
            compiled = lowered.compile()
        try:
            payload, *_ = serialize_executable.serialize(compiled)
            self._write(path, payload)
        except (OSError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            # The program itself is sound.
            LOG.warning("a compiled program cannot be kept in %s: %s", self.folder, error)
        return compiled

    def once(self, check: Callable[[Any], None], model: Any) -> None:
        """Calls ``check(model)``, unless it has passed before for this structure and these shapes.

        A check that traces the networks would cost as much time as the program saves.
        """
        name = _hash(_structure(model), check.__qualname__, _source())
        path = self.folder / f"{name}.checked"
        if not path.exists():
            check(model)
            with contextlib.suppress(OSError):  # then it is checked again next time
                self._make_folder()
                write_atomic(path, b"")

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _write(self, path: Path, payload: bytes) -> None:
        self._make_folder()
        write_atomic(path, hashlib.sha256(payload).digest() + payload)
        files = sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime)
        excess = sum(file.stat().st_size for file in files) - self.max_bytes
        for file in files[:-1]:  # never the new one
            if excess <= 0:
                break
            excess -= file.stat().st_size
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """Context without JAX's compilation cache.

    A CPU program that came from there loses its functions when it is serialised again.
    """
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _read(path: Path) -> bytes | None:
    """Returns a program's bytes, or None if there is no whole one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, payload = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(payload).digest() == digest:
        return payload
    LOG.warning("%s is damaged: the program is compiled again", path)
    return None


def _name(arguments: tuple[Any, ...], described: tuple[Any, ...], devices: list[Any]) -> str:
    return _hash(
        _structure(arguments),
        described,
        [(device.id, device.device_kind) for device in devices],
        devices[0].client.platform_version,
        _machine(),
        [(name, jax.config.values.get(name)) for name in _SETTINGS],
        [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
        _source(),
    )


def _structure(tree: Any) -> str:
    """Describes a pytree: its static parts, and the shapes, types and layouts of its leaves."""
    leaves, structure = jax.tree.flatten(tree)
    shapes = [(*shape_and_type(a), str(getattr(a, "format", ""))) for a in leaves]
    return f"{structure} {shapes}"


def shape_and_type(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Returns what a program is compiled for of an argument: an array or a number."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return leaf.shape, leaf.dtype.name


def _hash(*parts: Any) -> str:
    text = repr(parts)
    if " at 0x" in text:  # it would differ in every process
        raise TypeError("a static part of the model has no repr but its address")
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _devices_of(arguments: tuple[Any, ...]) -> list[Any]:
    """Returns the devices of the first array that is on one."""
    for leaf in jax.tree.leaves(arguments):
        if isinstance(leaf, jax.Array):
            return list(leaf.sharding._device_assignment)  # in the program's order
    raise ValueError("no argument is on a device")


@cache
def _machine() -> str:
    """Describes the processor that CPU programs are compiled for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@cache
def _source() -> str:
    """Returns a hash of this package's source and of the versions of JAX, jaxlib and Flax."""
    versions = [version(name) for name in ("jax", "jaxlib", "flax")]
    digest = hashlib.sha256(repr(versions).encode())
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
