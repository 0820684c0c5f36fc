"""Programs over the devices of a mesh, and the initialisation of arrays that it splits."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.extend
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.distributed.mesh import ROWS

Mode = Literal["jit", "pmap"]
AXIS = "data"  # the mapped axis of mode "pmap"

# Left to itself XLA joins products of one input on a GPU, and concatenates their weights each time.
_COMPILER_OPTIONS = {"gpu": {"xla_gpu_dot_merger_threshold_mb": 0}}


def compile_step(
    step: Callable[..., Any],
    mesh: Mesh,
    mode: Mode,
    *,
    shared: tuple[Any, ...],
    donate: tuple[int, ...] = (),
    out_shared: Any = True,
) -> jax.stages.Wrapped:
    """``step(*args, axis_name=None)`` compiled over the mesh.

    In both modes arguments and results have their global shapes.

    Args:
      step: The function. Its modules have the kernels of the mesh's platform, in mode "jit" over
        the mesh (`ldm_jax.kernels.for_platform`).
      mesh: The devices.
      mode: "jit", where the compiler splits the program; or "pmap", where each device runs the step
        on its own rows, and the step averages over ``axis_name`` whatever all share.
      shared: Of each argument, whether it is the same on every device (True) or a pytree whose rows
        are split (False); in mode "jit" it may be a pytree of shardings instead.
      donate: Positions of the arguments whose memory the results may take.
      out_shared: The same as ``shared`` of the result; a tuple for a tuple.
    """

    def place(flag: Any) -> Any:
        spec = PartitionSpec() if flag is True else ROWS
        return NamedSharding(mesh, spec) if isinstance(flag, bool) else flag

    options = _COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)
    if mode == "jit":
        return jax.jit(
            step,
            compiler_options=options,
            in_shardings=jax.tree.map(place, shared),
            out_shardings=jax.tree.map(place, out_shared),
            donate_argnums=donate,
        )
    specs = partial(jax.tree.map, lambda flag: PartitionSpec() if flag else ROWS)
    # Without check_vma a step that averages its gradients over the axis gets those of pmap.
    each = jax.shard_map(
        partial(step, axis_name=AXIS),
        mesh=mesh,
        in_specs=specs(shared),
        out_specs=specs(out_shared),
        check_vma=False,
    )
    return jax.jit(each, donate_argnums=donate, compiler_options=options)


def make_placed(
    make: Callable[[jax.Array], Any], key: jax.Array, placed: Any, most: int = 2**28
) -> Any:
    """``make(key)`` as arrays with the shardings ``placed``, about ``most`` bytes at a time.

    One program for all of a large model would hold the random numbers of many parameters beside the
    finished ones. Each program here draws those of its own leaves alone; a model of up to ``most``
    bytes takes one program.
    """
    closed, shapes = jax.make_jaxpr(make, return_shape=True)(key)
    leaves, tree = jax.tree.flatten(shapes)
    where = tree.flatten_up_to(placed)
    groups: list[list[int]] = []
    room = 0
    for i, leaf in enumerate(leaves):
        size = leaf.size * leaf.dtype.itemsize
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(i)
        room -= size
    # It runs once: a CPU's compiler takes twice as long for its best, with the same numbers to
    # rounding.
    on_cpu = all(device.platform == "cpu" for device in where[0].device_set)
    options = {"xla_backend_optimization_level": 1} if on_cpu else {}
    made: list[Any] = []
    for group in groups:
        shardings = [where[i] for i in group]
        program = jax.jit(_part(closed, group), out_shardings=shardings, compiler_options=options)
        made += jax.block_until_ready(program(key))
    return tree.unflatten(made)


def _part(closed: Any, outputs: Sequence[int]) -> Callable[..., list[Any]]:
    """A traced function with some of its outputs; lowering all for each would take minutes."""
    wanted = [i in outputs for i in range(len(closed.jaxpr.outvars))]
    part, _ = dce_jaxpr(closed.jaxpr, wanted, instantiate=True)
    return jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(part, closed.consts))
