"""The cores of a CPU as devices of JAX that divide the rows of a batch between them.

XLA computes small products, convolutions with small weights and most of what lies between on one
core. A program of several devices computes on as many: each takes some rows (a guided picture has
two) through the network, and all get the results. The weights are not copied: they share memory.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.kernels import heap

AXIS = "data"
_used = False


def available() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cores() -> None:
    """Makes each core that this process may use a device of JAX's CPU backend.

    Pipelines made after it without ``devices`` compute on all of them. Where JAX computes on
    something else than a CPU, nothing changes.

    Raises:
      RuntimeError: JAX has its devices already.
    """
    global _used
    if _used:
        return
    try:
        jax.config.update("jax_num_cpu_devices", available())
    except RuntimeError:
        raise RuntimeError("use_cores() must be called before any other use of JAX") from None
    _used = True


def devices() -> list[Any]:
    """The cores if `use_cores` made them devices and JAX computes on them, else none."""
    return jax.local_devices() if _used and jax.default_backend() == "cpu" else []


def all_devices() -> list[Any]:
    """All devices of the default backend."""
    return jax.devices()


def platform_of(mesh: Mesh) -> str:
    """The platform of a mesh, as `ldm_jax.kernels.for_platform` names it."""
    return mesh.devices.flat[0].platform


def default_dtype() -> str:
    """The type that models compute in by default: "float32" on a CPU, "bfloat16" elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def free_memory(mesh: Mesh) -> int | None:
    """Bytes that a program on a CPU may still allocate; None on what reports a lack by itself.

    The least of what the system, the process's limit of address space and its control group leave.
    """
    if platform_of(mesh) != "cpu":
        return None
    left = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        left += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):
        most, used = (Path(f"/sys/fs/cgroup/memory.{n}").read_text() for n in ("max", "current"))
        left.append(int(most) - int(used))  # "max" where there is no limit
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        if limit != resource.RLIM_INFINITY:
            left.append(limit - pages * resource.getpagesize() + heap.free_bytes())
    return max(min(left), 0) if left else None


def check_free(mesh: Mesh, need: int, what: str = "") -> None:
    """Raises MemoryError where a CPU has less than ``need`` bytes left.

    The system would end the process without a message.

    Args:
      mesh: The devices; on other platforms nothing is checked.
      need: Bytes on all devices together.
      what: What needs them, for the message.
    """
    free = free_memory(mesh)
    if free is not None and need > free:
        figures = f"{need / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free"
        raise MemoryError(f"{what}: {figures}" if what else figures)


def check_program(compiled: Any, mesh: Mesh, what: str = "") -> None:
    """Raises MemoryError where a compiled program needs more than a CPU has left.

    Args:
      compiled: A `jax.stages.Compiled`.
      mesh: The devices that it runs on.
      what: The program, for the message.
    """
    if (stats := compiled.memory_analysis()) is not None:
        new = max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
        check_free(mesh, len(mesh.local_devices) * (stats.temp_size_in_bytes + new), what)


def fewest(rows: int, most: int) -> int:
    """The fewest of ``most`` cores with the same longest share: 3 of 4 for 5 rows."""
    return -(-rows // -(-rows // most))


def mesh_of(chosen: list[Any]) -> Mesh:
    """Devices as a mesh of one axis, over which rows are split."""
    return Mesh(np.array(chosen), (AXIS,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A pytree's arrays on all cores of a mesh, without a copy."""
    whole = NamedSharding(mesh, PartitionSpec())

    def place(array: Any) -> jax.Array:
        array = np.asarray(array)  # a view, as is what `device_put` makes of it
        views = [jax.device_put(array, core) for core in mesh.devices.flat]
        return jax.make_array_from_single_device_arrays(array.shape, whole, views)

    return jax.tree.map(place, tree)


def divide_rows(call: Callable[[Any, Any], Any], mesh: Mesh, params: Any, rows: Any) -> Any:
    """``call(params, rows)``, each core with its part of the rows; inside a program of all cores.

    Args:
      call: A function of parameters and a pytree of arrays [b, ...], whose result has rows too.
      mesh: The cores.
      params: The same on each core.
      rows: Arrays [b, ...]. Where the cores do not divide b the last row is computed repeatedly.
    """
    b = len(jax.tree.leaves(rows)[0])
    missing = -b % mesh.size
    if missing:
        rows = jax.tree.map(lambda a: jnp.concatenate([a, jnp.repeat(a[-1:], missing, 0)]), rows)
    whole, part = PartitionSpec(), PartitionSpec(AXIS)
    divided = jax.shard_map(
        call, mesh=mesh, in_specs=(whole, part), out_specs=part, check_vma=False
    )
    out = jax.lax.with_sharding_constraint(divided(params, rows), NamedSharding(mesh, whole))
    return jax.tree.map(lambda a: a[:b], out) if missing else out
