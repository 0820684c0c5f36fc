"""Several processes of one run."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ldm_jax.distributed.mesh import ROWS
from ldm_jax.errors import MeshError


def start(
    coordinator: str | None = None, processes: int | None = None, index: int | None = None
) -> None:
    """Joins the processes of one run, before anything else touches a device.

    Args:
      coordinator: Address of the first process ("10.0.0.1:1234"). Without any argument JAX finds
        the processes itself: on a TPU pod, GKE, SLURM, Open MPI.
      processes: Number of processes.
      index: Index of this one.

    Raises:
      MeshError: Some arguments are missing, or the processes cannot join.
    """
    given = [coordinator, processes, index]
    if any(g is None for g in given) and any(g is not None for g in given):
        raise MeshError(
            "give --coordinator, --processes and --process_index together, "
            "or none of them with --distributed"
        )
    try:
        jax.distributed.initialize(coordinator, processes, index)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise MeshError(
            f"the processes could not join ({reason}): outside a TPU pod, GKE, SLURM or Open MPI "
            "give --coordinator=HOST:PORT, --processes and --process_index"
        ) from None


def is_first() -> bool:
    """Whether this process writes the files and the log of the run."""
    return jax.process_index() == 0


def global_rows(batch: Any, mesh: Mesh) -> Any:
    """The rows of each process (numpy) -> arrays of the whole batch, split over the mesh."""
    if jax.process_count() == 1:
        return batch
    sharding = NamedSharding(mesh, ROWS)
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), batch
    )


def fetch(array: Any) -> np.ndarray:
    """An array's values on this host, wherever they lie; every process must call it."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def barrier(name: str) -> None:
    """Waits for every process."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
