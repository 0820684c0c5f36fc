"""The checks of ``ldm-train --dry_run``: what a training needs, before machines are taken."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from ldm_jax.errors import LdmJaxError, PlanError
from ldm_jax.io.checkpoint import TrainingCheckpoints
from ldm_jax.io.paths import absolute_path, check_writable
from ldm_jax.io.resources import resource_errors
from ldm_jax.kernels.cores import free_memory, mesh_of
from ldm_jax.plan.chips import CHIPS, GIB, Chip, Topology
from ldm_jax.plan.planner import plan
from ldm_jax.train import loop
from ldm_jax.train.config import check_config, check_workdir, complete
from ldm_jax.train.encode import check_cache
from ldm_jax.train.loaders import first_batches, make_loader
from ldm_jax.train.start import load_start
from ldm_jax.train.tasks import task_class

ADVICE = (
    "a smaller batch_size, a larger optim.accumulate, remat='blocks' or mesh.fsdp take less "
    "(docs/scale.md)"
)
NEED_CONFIG = ("model", "data", "memory")


class Check(NamedTuple):
    """The result of a check.

    Attributes:
      name: What was checked.
      passed: Whether the training can start.
      text: What was found, one line.
    """

    name: str
    passed: bool
    text: str


def dry_run(config: Any, workdir: str) -> Iterator[Check]:
    """Checks a training without starting it: nothing stays in ``workdir``.

    Args:
      config: The config.
      workdir: The run folder, on this machine or in a bucket.

    Yields:
      The results for the config with its devices, the model, the data with the first batch, the
      memory of a device, and the storage.
    """
    folder = absolute_path(workdir)
    whole = functools.cache(lambda: complete(config))  # it may warn: once is enough
    checked: dict[str, Callable[[], str]] = {
        "config": lambda: _config(whole(), folder),
        "model": lambda: _model(whole()),
        "data": lambda: _data(whole()),
        "memory": lambda: _memory(whole()),
        "storage": lambda: _storage(folder),
    }
    passed: dict[str, bool] = {}
    for name, check in checked.items():
        if name in NEED_CONFIG and not passed["config"]:
            continue
        try:
            with resource_errors(ADVICE, folder):
                result = Check(name, True, check())
        except (LdmJaxError, OSError) as error:
            result = Check(name, False, " ".join(str(error).split()))
        passed[name] = result.passed
        yield result


def _config(config: Any, folder: Any) -> str:
    check_config(config)
    check_workdir(folder, config)
    mesh = loop.mesh_of(config)
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    steps = TrainingCheckpoints.steps_in(folder)
    start = f"resumes from step {steps[-1]}" if steps else "a new run"
    return (
        f"{config.task}, {config.steps} steps of {config.batch_size} pictures on {devices}"
        f"{f' ({axes})' if axes else ''}; {start}"
    )


def _model(config: Any) -> str:
    task = task_class(config).from_config(config)
    shapes = jax.eval_shape(task.init, jax.random.key(config.seed))
    if config.init:
        load_start(config.init, task, shapes, config.init_strict)
    parts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in shapes.items()
    }
    by_part = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in parts.items())
    return f"{sum(parts.values()) / 1e6:.2f} M parameters to train ({by_part})"


def _data(config: Any) -> str:
    loaders = {part: make_loader(config, part) for part in ("train", "validation")}
    task = task_class(config).from_config(config)
    if config.data.cache:
        check_cache(config, task)
    else:
        task.check_rows(loaders["train"])
    began = time.perf_counter()
    batch = first_batches(loaders["train"], 1)[0]
    seconds = time.perf_counter() - began
    name = "moments" if config.data.cache else "image"
    return (
        f"{loaders['train'].count} pictures to train on, {loaders['validation'].count} held out; "
        f"first batch read in {seconds:.1f} s: {name} {list(batch[name].shape)}"
    )


def _memory(config: Any) -> str:
    topology = devices_here()
    planned = plan(config, topology, compile=False)
    parts = {name: size for name, size in planned.bytes.items() if size}
    text = ", ".join(f"{name} {size / GIB:.3f}" for name, size in parts.items())
    text = f"{planned.needed / GIB:.2f} GiB a device: {text} (activations: a bound)"
    limit = memory_limit(topology)
    if limit is None:
        return text
    # The compiler fuses most of what the bound counts; the state is needed as it is.
    if (state := planned.needed - planned.bytes["activations"]) > limit:
        raise PlanError(
            f"{state / GIB:.2f} GiB a device without activations, of {limit / GIB:.2f}: {ADVICE}"
        )
    if planned.needed > limit:
        return f"{text}, of {limit / GIB:.2f}: may not fit; ldm-plan asks the compiler"
    return f"{text}, of {limit / GIB:.2f}"


def _storage(folder: Any) -> str:
    check_writable(folder)
    return f"{folder} can be written, read and deleted from"


def devices_here() -> Topology:
    """Returns the devices of this run as a topology to plan for."""
    devices = jax.devices()
    platform, kind = devices[0].platform, devices[0].device_kind
    if platform == "cpu":
        return Topology("cpu", "cpu", len(devices), None)
    known = next((k for k, chip in CHIPS.items() if chip.name in kind), None)
    known = known or ("h100" if platform == "gpu" else "v5e")
    stats = devices[0].memory_stats() or {}
    memory = float(stats.get("bytes_limit", CHIPS[known].memory))
    return Topology(kind, known, len(devices), Chip(kind, memory, *CHIPS[known][2:]))


def memory_limit(topology: Topology) -> float | None:
    """Returns the bytes that a device has for a training; None where that is not known."""
    if topology.chip is not None:
        return topology.chip.memory
    free = free_memory(mesh_of(jax.local_devices()))
    return None if free is None else free / len(jax.local_devices())
