"""The cores of a CPU as devices of jax, among which the rows of a batch are divided.

XLA computes small products, convolutions with small weights, and most of what lies between, on one core of a CPU. A program of several devices
computes on as many: each takes some rows (a guided picture has two) through the network, and all have the results. The weights are not copied for it:
they share their memory.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.distributed.parallel import Target, compiled_for

AXIS = "core"
_used = False


def available() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cores() -> None:
    """Makes each core that this process may use a device of jax's CPU backend, for the pipelines that are made after it without ``devices``.

    To be called before anything has asked jax for its devices, else RuntimeError. Where jax computes on something else than a CPU, nothing changes.
    """
    global _used
    if _used:
        return
    try:
        jax.config.update("jax_num_cpu_devices", available())
    except RuntimeError:
        raise RuntimeError(
            "use_cores() comes too late: call it before anything else of jax"
        ) from None
    _used = True


def devices() -> list[Any]:
    """The cores, where `use_cores` has made them devices and jax computes on them; else none."""
    return jax.local_devices() if _used and jax.default_backend() == "cpu" else []


def enough(rows: int, most: int) -> int:
    """The fewest of at most ``most`` cores that are done with so many rows as soon as all would be: of 5 rows on 4 cores one has 2, so 3 suffice."""
    return -(-rows // -(-rows // most))


def mesh_of(chosen: list[Any]) -> Mesh:
    """Those cores as a mesh of one axis."""
    return Mesh(np.array(chosen), (AXIS,))


def shared(tree: Any, mesh: Mesh) -> Any:
    """A pytree's arrays on all cores of the mesh, without a copy."""
    whole = NamedSharding(mesh, PartitionSpec())

    def place(array: Any) -> jax.Array:
        array = np.asarray(array)  # a view, as is what `device_put` makes of it
        views = [jax.device_put(array, core) for core in mesh.devices.flat]
        return jax.make_array_from_single_device_arrays(array.shape, whole, views)

    return jax.tree.map(place, tree)


def compile_step(step: Callable[..., Any], mesh: Mesh, by_rows: tuple[bool, ...] = ()) -> Any:
    """``step`` as a program of all cores of the mesh.

    ``by_rows`` says of which arguments, pytrees of arrays [b, ...] with a multiple of the cores for b, each core has its part: it then does its part
    of ``step``, whose result has rows too, without the others. Without it arguments and results are the same on each, and what calls `over_rows` is
    divided.
    """
    whole, part = PartitionSpec(), PartitionSpec(AXIS)
    told = Target("cpu", cores=None if by_rows else mesh)

    def traced(*args: Any) -> Any:
        with compiled_for(told):
            return step(*args)

    if not by_rows:
        same = NamedSharding(mesh, whole)
        return jax.jit(traced, in_shardings=same, out_shardings=same)
    places = tuple(part if flag else whole for flag in by_rows)
    return jax.jit(
        jax.shard_map(traced, mesh=mesh, in_specs=places, out_specs=part, check_vma=False)
    )


def over_rows(call: Callable[[Any, Any], Any], mesh: Mesh, params: Any, rows: Any) -> Any:
    """``call(params, rows)``, each core with its part of ``rows``, a pytree of arrays [b, ...], as is the result. Where b does not divide, the last
    row is computed more than once.
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
