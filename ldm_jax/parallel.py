"""How a step is spread over devices: jit over a mesh (the default, and the way to several hosts), or pmap on one host."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Mode = Literal["jit", "pmap"]
AXIS = "data"


def make_mesh(devices: int | None = None) -> jax.sharding.Mesh:
    """A mesh of one axis, "data", over the first ``devices`` devices (all by default)."""
    count = devices or jax.device_count()
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def compile_step(
    step: Callable[..., Any],
    mesh: jax.sharding.Mesh,
    mode: Mode,
    *,
    shared: tuple[bool, ...],
    donate: tuple[int, ...] = (),
    out_shared: Any = True,
) -> Callable[..., Any]:
    """``step(*args, axis_name=None)`` compiled over the mesh's "data" axis.

    ``shared[i]`` says whether argument i is the same on every device or a pytree whose leaves are split along their first axis; ``out_shared``
    says the same of the result (a tuple of flags for a tuple). In both modes arguments and results have their global shapes, so that callers
    need not know the mode. ``axis_name`` is given under pmap, where the step must average over it what it shares.
    """
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))

    def place(flag: bool) -> NamedSharding:
        return whole if flag else rows

    if mode == "jit":
        return jax.jit(
            step,
            in_shardings=tuple(map(place, shared)),
            out_shardings=jax.tree.map(place, out_shared),
            donate_argnums=donate,
        )

    n = mesh.devices.size
    mapped = jax.pmap(
        lambda *args: step(*args, axis_name=AXIS),
        axis_name=AXIS,
        in_axes=tuple(None if flag else 0 for flag in shared),
        out_axes=jax.tree.map(lambda flag: None if flag else 0, out_shared),
        devices=list(mesh.devices.flat),
    )

    def split(a: Any) -> Any:
        return jnp.reshape(a, (n, a.shape[0] // n, *a.shape[1:]))

    def join(a: Any) -> Any:
        return a.reshape(-1, *a.shape[2:])

    def call(*args: Any) -> Any:
        out = mapped(*(a if flag else jax.tree.map(split, a) for a, flag in zip(args, shared, strict=True)))
        return jax.tree.map(lambda flag, part: part if flag else jax.tree.map(join, part), out_shared, out)

    return call
