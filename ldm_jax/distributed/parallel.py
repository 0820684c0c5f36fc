"""How work is spread over devices: jit over a mesh (the default, and the way to several hosts), or pmap on one host.

A mesh has the axes "data", "fsdp" and "tensor". Rows of a batch are split over data and fsdp; parameters, their average and the optimiser's moments
over fsdp (Rajbhandari et al. 2020, "ZeRO": stage 3, or stage 1 where the optimiser alone is split); the wide products of attention and
feed-forward over tensor (Shoeybi et al. 2019, "Megatron-LM").
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ldm_jax.errors import MeshError

Mode = Literal["jit", "pmap"]
AXIS = "data"  # pmap's axis, and the mesh's first
AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # of a batch

# What the tensor axis splits: a pattern that a parameter's path ends with -> the dimension. Each layer's last product is summed over the axis.
TENSOR: tuple[tuple[str, int], ...] = (
    (r"(attn|attn\d|attn_\d+)/to_[qkv]/kernel", 1),
    (r"(attn|attn\d|attn_\d+)/to_out/kernel", 0),
    (r"(ff|ff_\d+)/proj_in/kernel", 1),
    (r"(ff|ff_\d+)/proj_in/bias", 0),
    (r"(ff|ff_\d+)/proj_out/kernel", 0),
)
# Tables of words and classes: split by channels, each device looks up its channels of every row, and sends the rows where they belong. Split by words
# each would look up zeros for those that others have, to be summed: a reduction of activations. A codebook is compared with, and split by codes.
_TABLES = re.compile(r"emb(edding)?/embedding$")
_CODES = re.compile(r"quantize/embedding$")
_SMALL = 2**10  # values: what is not larger is on every device
_LANES, _SUBLANES = 128, 16  # of a TPU's registers of bfloat16


# ------------------------------------------------------------------------------------------------------------------------ the mesh


def make_mesh(
    devices: int | Sequence[Any] | None = None, *, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> Mesh:
    """A mesh over ``devices``, or the first so many (all by default); one axis may be -1, for what the others leave.

    Raises MeshError where the axes do not multiply to the number of devices.
    """
    chosen = (
        jax.devices()[:devices] if devices is None or isinstance(devices, int) else list(devices)
    )
    sizes = mesh_sizes(len(chosen), data, fsdp, tensor)
    types = (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=chosen)
    except (
        NotImplementedError
    ):  # no product of a torus' axes: parts of them, whose links make no ring
        split = mesh_utils.create_device_mesh(sizes, chosen, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=types)


def mesh_sizes(count: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> tuple[int, int, int]:
    """The sizes of the axes over ``count`` devices, -1 filled in; MeshError as in `make_mesh`."""
    sizes = [data, fsdp, tensor]
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or min(size for size in (*sizes, 1) if size != -1) < 1:
        raise MeshError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor}: give positive sizes, and -1 for one at most"
        )
    if count % given or (-1 not in sizes and given != count):
        raise MeshError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not make {count} devices"
        )
    data, fsdp, tensor = (count // given if size == -1 else size for size in sizes)
    return data, fsdp, tensor


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


# ----------------------------------------------------------------------------------------------------------- how arrays are split


def spec(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, axis: str = "fsdp"
) -> PartitionSpec:
    """How the array at ``path`` ("unet/middle_block_0/in_conv/kernel") is split.

    The tensor axis takes what `TENSOR` says, ``axis`` another dimension that it divides: of a table of embeddings the channels, of a codebook the
    codes; else, of the last two, the one that a TPU does not lay along its registers' lanes, if the parts fill sublanes (of other parts its compiler
    may sum whole gradients where it could scatter them); else the largest, first among those that it cuts into multiples of 128. Every array has a
    place: what is small or divides nowhere is on every device.
    """
    named: list[str | None] = [None] * len(shape)
    if math.prod(shape) <= _SMALL:
        return PartitionSpec()
    wide = next((dim for pattern, dim in TENSOR if re.search(rf"(^|/){pattern}$", path)), None)
    if wide is not None and mesh.shape["tensor"] > 1 and shape[wide] % mesh.shape["tensor"] == 0:
        named[wide] = "tensor"
    n = mesh.shape[axis]
    free = [
        dim for dim, size in enumerate(shape) if named[dim] is None and size % n == 0 and size >= n
    ]
    named_dim = 1 if _TABLES.search(path) else 0 if _CODES.search(path) else None
    last = range(len(shape))[-2:]
    lanes = max(
        last, key=lambda dim: (-(-shape[dim] % _LANES) / shape[dim], dim)
    )  # the less padded of the two

    def order(dim: int) -> tuple[bool, bool, bool, int]:
        part = shape[dim] // n
        across = dim in last and dim != lanes and part % _SUBLANES == 0
        return dim == named_dim, across, part % _LANES == 0, shape[dim]

    if n > 1 and free:
        named[max(free, key=order)] = axis
    return PartitionSpec(*named)


def shardings(tree: Any, mesh: Mesh | AbstractMesh, axis: str = "fsdp") -> Any:
    """`spec` of every array (or shape) of a pytree, as shardings. Paths of an optimiser's moments end like those of their parameters."""

    def of(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(name, tuple(np.shape(leaf)), mesh, axis))

    return jax.tree.map_with_path(of, tree)


def state_shardings(state: Any, mesh: Mesh | AbstractMesh, zero1: bool = False) -> Any:
    """`shardings` of a training state (anything with ``params``, ``ema`` and ``opt_state``).

    With ``zero1`` parameters stay on every device, and the average and the optimiser's moments are split (ZeRO stage 1): for models that fit a
    chip, whose weights need not be gathered in every step. They are split over "fsdp", or over "data" where that axis is 1; few arrays divide over
    all of a large pod.
    """
    if not zero1:
        return shardings(state, mesh)
    whole = jax.tree.map(lambda _: replicated(mesh), state)
    split = shardings(state, mesh, "data" if mesh.shape["fsdp"] == 1 else "fsdp")
    return whole.replace(ema=split.ema, opt_state=split.opt_state)


# ---------------------------------------------------------------------------------------------------------------- compiled steps


def make_placed(
    make: Callable[[jax.Array], Any], key: jax.Array, placed: Any, most: int = 2**28
) -> Any:
    """``make(key)`` as arrays placed by ``placed``, about ``most`` bytes of it at a time.

    One program for all of a large model would hold the random numbers of many parameters beside those that are done. Each program here draws the
    numbers of its own leaves alone; a model of up to ``most`` bytes takes one program.
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
    # It runs once: a CPU's compiler takes twice as long for its best, and the numbers are the same to rounding.
    on_cpu = all(device.platform == "cpu" for device in where[0].device_set)
    options = {"xla_backend_optimization_level": 1} if on_cpu else {}
    made: list[Any] = []
    for group in groups:
        some = jax.jit(
            _part(closed, group), out_shardings=[where[i] for i in group], compiler_options=options
        )
        made += jax.block_until_ready(some(key))
    return tree.unflatten(made)


def _part(closed: Any, outputs: Sequence[int]) -> Callable[..., list[Any]]:
    """A traced function with some of its outputs alone, and what they do not need left out: lowering a whole network each time takes minutes."""
    wanted = [i in outputs for i in range(len(closed.jaxpr.outvars))]
    part, _ = dce_jaxpr(closed.jaxpr, wanted, instantiate=True)
    return jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(part, closed.consts))


class Target(NamedTuple):
    """What a program is traced for: a platform ("cpu", "gpu", "tpu"; "" for none in particular), the mesh that splits it, None for one device, and
    the cores of a CPU that divide what goes through a network, if there are several.
    """

    platform: str
    mesh: Mesh | None = None
    cores: Mesh | None = None


_TARGET: ContextVar[Target | None] = ContextVar("target", default=None)


def target() -> Target | None:
    """What the program that is being traced is for; None where nobody said so."""
    return _TARGET.get()


def for_one_cpu() -> bool:
    """Whether the program that is being traced is for a single CPU, or nobody said what for."""
    told = target()
    return told is None or (told.platform == "cpu" and told.mesh is None)


def for_tpu() -> bool:
    """Whether the program that is being traced is for TPUs."""
    told = target()
    return told is not None and told.platform == "tpu"


@contextlib.contextmanager
def compiled_for(told: Target | None) -> Iterator[None]:
    """While a program is traced inside, `target` is ``told``: kernels are chosen by it, and split as its mesh splits rows."""
    token = _TARGET.set(told)
    try:
        yield
    finally:
        _TARGET.reset(token)


def compile_step(
    step: Callable[..., Any],
    mesh: Mesh,
    mode: Mode,
    *,
    shared: tuple[Any, ...],
    donate: tuple[int, ...] = (),
    out_shared: Any = True,
) -> Callable[..., Any]:
    """``step(*args, axis_name=None)`` compiled over the mesh.

    ``shared[i]`` says whether argument i is the same on every device (True) or a pytree whose rows are split (False); under jit it may be a pytree
    of shardings instead. ``out_shared`` says the same of the result (a tuple for a tuple). In both modes arguments and results have their global
    shapes, so that callers need not know the mode. ``axis_name`` is given under pmap, where the step must average over it what it shares.
    """
    told = Target(mesh.devices.flat[0].platform, mesh if mode == "jit" and mesh.size > 1 else None)

    def traced(*args: Any, **options: Any) -> Any:
        with compiled_for(told):
            return step(*args, **options)

    def place(flag: Any) -> Any:
        return (
            NamedSharding(mesh, PartitionSpec() if flag else ROWS)
            if isinstance(flag, bool)
            else flag
        )

    if mode == "jit":
        return jax.jit(
            traced,
            in_shardings=jax.tree.map(place, shared),
            out_shardings=jax.tree.map(place, out_shared),
            donate_argnums=donate,
        )

    n = mesh.devices.size
    mapped = jax.pmap(
        lambda *args: traced(*args, axis_name=AXIS),
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
        out = mapped(
            *(a if flag else jax.tree.map(split, a) for a, flag in zip(args, shared, strict=True))
        )
        return jax.tree.map(
            lambda flag, part: part if flag else jax.tree.map(join, part), out_shared, out
        )

    return call


# ------------------------------------------------------------------------------------------------------------- several processes


def start(
    coordinator: str | None = None, processes: int | None = None, index: int | None = None
) -> None:
    """Joins the processes of one run, before anything else touches a device.

    With an address ("10.0.0.1:1234"), the number of processes and this one's index; or with none of them where jax finds them itself (a TPU pod,
    GKE, SLURM, Open MPI). Raises MeshError.
    """
    given = [coordinator, processes, index]
    if any(g is None for g in given) and any(g is not None for g in given):
        raise MeshError(
            "give --coordinator, --processes and --process_index together, or none of them with --distributed"
        )
    try:
        jax.distributed.initialize(coordinator, processes, index)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise MeshError(
            f"the processes could not join ({reason}): outside a TPU pod, GKE, SLURM or Open MPI give --coordinator=HOST:PORT, "
            "--processes and --process_index"
        ) from None


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return jax.process_index() == 0


def global_rows(batch: Any, mesh: Mesh) -> Any:
    """Each process' rows of a batch (numpy) -> arrays of the whole batch, split over the mesh."""
    if jax.process_count() == 1:
        return batch
    sharding = NamedSharding(mesh, ROWS)
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), batch
    )


def fetch(array: Any) -> np.ndarray:
    """An array's values on this host, wherever they lie; every process must ask."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


class Preemption:
    """Notices that this run is asked to stop (SIGTERM, or the cluster's notice), or to save and go on (SIGUSR1), at one step on all processes."""

    def __init__(self) -> None:
        self._asked = self._save_asked = False

    @contextlib.contextmanager
    def watch(self) -> Iterator["Preemption"]:
        """Takes both signals while inside. Under jax.distributed its own handler notices SIGTERM, and tells the other processes."""
        import signal
        import threading

        def stop(*_: Any) -> None:
            self._asked = True

        def save(*_: Any) -> None:
            self._save_asked = True

        taken: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            if hasattr(signal, "SIGUSR1"):  # not on Windows
                taken[signal.SIGUSR1] = save
            if jax.process_count() == 1:
                taken[signal.SIGTERM] = stop
        before = {number: signal.signal(number, handler) for number, handler in taken.items()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether to stop after ``step``; every process asks at every step, and all get the same answer."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def save_wanted(self, meeting: bool) -> bool:
        """Whether any process was asked to save since this last said so. Several processes agree where they are ``meeting``, which all say at the
        same steps; it makes them wait for one another, and so is not for every step.
        """
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if not meeting:
                return False
            wanted = bool(np.any(multihost_utils.process_allgather(np.array(self._save_asked))))
        else:
            wanted = self._save_asked
        if wanted:
            self._save_asked = False
        return wanted


STOPPED = os.EX_TEMPFAIL  # exit status of a run that saved and can be started again
