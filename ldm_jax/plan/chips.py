"""Topologies, and devices to compile for that need not be present."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import jax

from ldm_jax.distributed.chips import CHIPS, GIB, GPUS, TPUS, Chip
from ldm_jax.errors import PlanError

__all__ = ["CHIPS", "GIB", "GPUS", "TPUS", "Chip", "Topology", "find_devices", "parse_topology"]


class Topology(NamedTuple):
    """Devices of one kind.

    Attributes:
      text: As given, "v5e:4x4".
      kind: A key of `CHIPS`, or "cpu".
      size: Number of devices.
      chip: Their limits; None for CPUs, whose limits are not known.
    """

    text: str
    kind: str
    size: int
    chip: Chip | None

    @property
    def platform(self) -> str:
        """The platform as JAX names it: "cpu", "gpu" or "tpu"."""
        return "cpu" if self.chip is None else "gpu" if self.kind in GPUS else "tpu"


def parse_topology(text: str) -> Topology:
    """Parses "v5e:4x4", "h200:8", "cpu" or "cpu:8".

    Raises:
      PlanError: For anything else.
    """
    kind, _, shape = text.partition(":")
    shape = shape or ("1" if kind == "cpu" else "")
    if kind not in (*CHIPS, "cpu") or not re.fullmatch(r"([1-9]\d*x)*[1-9]\d*", shape):
        raise PlanError(
            f"--topology {text!r}: write KIND:SHAPE, for example v5e:4x4, h200:8 or cpu "
            f"(kinds: {', '.join(CHIPS)}, cpu)"
        )
    return Topology(text, kind, math.prod(map(int, shape.split("x"))), CHIPS.get(kind))


def find_devices(topology: Topology) -> tuple[Sequence[Any] | None, str]:
    """Finds devices to compile for. Call it before anything else initialises JAX's backends.

    Returns:
      (devices, ""), or (None, reason) where the compiler of the topology is not installed.

    Raises:
      PlanError: If the compiler is installed but knows no such topology.
    """
    if topology.platform == "cpu":
        # Refused once the backends are initialised; the number of devices is checked below.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", topology.size)
        devices = jax.devices("cpu")
        if len(devices) < topology.size:
            raise PlanError(
                f"--topology {topology.text}: this process has {len(devices)} CPU devices already"
            )
        return devices[: topology.size], ""
    extra, modules, options = "tpu", ("libtpu",), {"topology_name": topology.text}
    if topology.platform == "gpu":
        extra, modules = "cuda", ("jax_cuda13_plugin", "jax_cuda12_plugin")
        target = resources.files("ldm_jax.plan") / "targets" / f"{topology.kind}.txtpb"
        # partitions x hosts x devices of a host
        options = {
            "topology_name": "",
            "topology": f"1x1x{topology.size}",
            "target_config": target.read_text(),
        }
    if not any(map(importlib.util.find_spec, modules)):
        return (
            None,
            f'the {extra.upper()} compiler is not installed: pip install "ldm_jax[{extra}]" '
            f"(no {topology.platform.upper()} is needed)",
        )
    # Without it libtpu waits for the cloud's metadata server.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    platform = "cuda" if extra == "cuda" else "tpu"
    try:
        return topologies.get_topology_desc(platform=platform, **options).devices, ""
    except Exception as error:  # its class depends on the compiler's plugin
        raise PlanError(
            f"--topology {topology.text}: the {extra.upper()} compiler refuses it "
            f"({str(error).splitlines()[0]})"
        ) from None
