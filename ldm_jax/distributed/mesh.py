"""Device meshes with the axes "data", "fsdp" and "tensor".

Rows of a batch are split over data and fsdp; parameters, their average and the optimiser's moments
over fsdp; the wide products of attention and feed-forward over tensor.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ldm_jax.errors import MeshError

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # of a batch


def make_mesh(
    devices: int | Sequence[Any] | None = None, *, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> Mesh:
    """A mesh over devices.

    Args:
      devices: The devices, or the number of them to take; all by default.
      data: Size of the axis "data". One axis may be -1, for all devices that the others leave.
      fsdp: Size of the axis "fsdp".
      tensor: Size of the axis "tensor".

    Raises:
      MeshError: The axes do not multiply to the number of devices.
    """
    every = devices is None or isinstance(devices, int)
    chosen = jax.devices()[:devices] if every else list(devices)  # type: ignore[arg-type]
    sizes = mesh_sizes(len(chosen), data, fsdp, tensor)
    types = (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=chosen)
    except NotImplementedError:
        # No product of the axes of a torus: parts of them, whose links make no ring.
        split = mesh_utils.create_device_mesh(sizes, chosen, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=types)


def mesh_sizes(count: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> tuple[int, int, int]:
    """The sizes of the axes over ``count`` devices, with -1 filled in; raises as `make_mesh`."""
    sizes, what = [data, fsdp, tensor], f"mesh data={data}, fsdp={fsdp}, tensor={tensor}"
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or min(size for size in (*sizes, 1) if size != -1) < 1:
        raise MeshError(f"{what}: give positive sizes, and -1 for one at most")
    if count % given or (-1 not in sizes and given != count):
        raise MeshError(f"{what} does not make {count} devices")
    data, fsdp, tensor = (count // given if size == -1 else size for size in sizes)
    return data, fsdp, tensor


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts into which the mesh splits a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
