"""What chips can do, and the devices of a topology that need not be there."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from ldm_jax.errors import PlanError

GIB = 2.0**30


class Chip(NamedTuple):
    """``memory`` and its ``bandwidth`` in bytes and bytes/s, ``peak`` in dense bfloat16 FLOP/s, ``link`` in bytes/s that a chip sends."""

    name: str
    memory: float
    bandwidth: float
    peak: float
    link: float


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (v5e: 1600 Gbit/s between chips; v5p: 4800; v6e: 3200). GPUs: NVIDIA's data sheets of the SXM
# modules, dense arithmetic; their NVLink figures count both directions, `link` is one.
CHIPS = {
    "v4": Chip("TPU v4", 32 * GIB, 1.2e12, 275e12, 300e9),
    "v5e": Chip("TPU v5e", 16 * GIB, 0.819e12, 197e12, 200e9),
    "v5p": Chip("TPU v5p", 95 * GIB, 2.765e12, 459e12, 600e9),
    "v6e": Chip("TPU v6e", 32 * GIB, 1.6e12, 918e12, 400e9),
    "a100": Chip("NVIDIA A100", 80e9, 2.0e12, 312e12, 300e9),
    "h100": Chip("NVIDIA H100", 80e9, 3.35e12, 989e12, 450e9),
    "h200": Chip("NVIDIA H200", 141e9, 4.8e12, 989e12, 450e9),
}


class Topology(NamedTuple):
    """``size`` devices of one kind; ``chip`` is None on a CPU, whose limits are not known."""

    text: str
    kind: str
    size: int
    chip: Chip | None


def parse_topology(text: str) -> Topology:
    """ "v5e:4x4", "h200:8", "cpu" or "cpu:8" -> a Topology; PlanError for anything else."""
    kind, _, shape = text.partition(":")
    if kind not in (*CHIPS, "cpu") or not re.fullmatch(
        r"([1-9]\d*x)*[1-9]\d*", shape or ("1" if kind == "cpu" else "")
    ):
        raise PlanError(
            f"--topology {text!r}: write KIND:SHAPE, for example v5e:4x4, h200:8 or cpu (kinds: {', '.join(CHIPS)}, cpu)"
        )
    return Topology(text, kind, math.prod(map(int, (shape or "1").split("x"))), CHIPS.get(kind))


def find_devices(topology: Topology) -> tuple[Sequence[Any] | None, str]:
    """Devices to compile for and "", or None and why there are none. Call it before anything else asks for a device."""
    if topology.kind == "cpu":
        with contextlib.suppress(RuntimeError):  # this process has its devices already
            jax.config.update("jax_num_cpu_devices", topology.size)
        there = jax.devices("cpu")
        if len(there) < topology.size:
            raise PlanError(
                f"--topology {topology.text}: this process has {len(there)} CPU devices already"
            )
        return there[: topology.size], ""
    if not topology.kind.startswith("v"):
        try:
            there = [d for d in jax.devices("gpu") if topology.kind in d.device_kind.lower()]
        except RuntimeError:
            there = []
        if len(there) >= topology.size:
            return there[: topology.size], ""
        return (
            None,
            f'a GPU program compiles on a machine with {topology.text}: pip install "ldm_jax[cuda]" there and plan again',
        )
    if importlib.util.find_spec("libtpu") is None:
        return (
            None,
            'the TPU compiler is not installed: pip install "ldm_jax[tpu]" (no TPU is needed)',
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it would ask the cloud for a TPU
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.text).devices, ""
    except Exception as error:  # of whatever kind libtpu's message becomes
        raise PlanError(
            f"--topology {topology.text}: the TPU compiler refuses it ({str(error).splitlines()[0]})"
        ) from None
