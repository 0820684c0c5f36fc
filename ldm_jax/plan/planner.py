"""Plans what a training step or a part of sampling needs and how fast it can be.

From shapes and the topology's compiler: nothing is run, no weights and no data are read.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from jax.sharding import AbstractMesh

from ldm_jax.distributed.flops import KINDS, PRODUCTS, count_flops, peak_bytes
from ldm_jax.distributed.mesh import AXES, make_mesh, mesh_sizes, row_shards
from ldm_jax.errors import PlanError, did_you_mean
from ldm_jax.plan.chips import Topology, find_devices
from ldm_jax.plan.programs import Compiled, Decode, Forward, Program, Step
from ldm_jax.train.config import check_config, check_rows, complete
from ldm_jax.train.tasks.base import plain

What = Literal["train", "forward", "decode"]
# Pictures of a trace: enough that what grows with them outweighs what does not.
_TRACED = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one program needs on one topology.

    Attributes:
      config: Its name.
      what: "train" is a step, "forward" a call of the UNet, "decode" latents to pictures.
      topology: The devices.
      mesh: Sizes of the mesh's axes.
      zero1: Whether only the optimiser's state is split.
      batch: Pictures in all.
      accumulate: Parts that a chip takes them in.
      cached: Whether the step takes latents from a cache.
      remat: Of the config.
      parameters: Number of parameters by part.
      flops: FLOPs of all chips by kind (`KINDS`).
      useful: FLOPs of products, without those computed twice to save memory.
      bytes: On one chip, by cause. "activations" is a bound from the program as written, before
        the compiler fuses it.
      per_picture: Bytes of "activations" for one picture on a chip.
      compiled: What the compiler reports; None where it was not used.
      uncompiled: The reason why it was not used.
      largest: Pictures at a time that fit on a chip, if known.
    """

    config: str
    what: What
    topology: Topology
    mesh: dict[str, int]
    zero1: bool
    batch: int
    accumulate: int
    cached: bool
    remat: str
    parameters: dict[str, int]
    flops: dict[str, float]
    useful: float
    bytes: dict[str, float]
    per_picture: float
    compiled: Compiled | None
    uncompiled: str
    largest: int | None = None

    @property
    def rows(self) -> int:
        """Pictures that a chip works on at a time."""
        return self.batch // (self.mesh["data"] * self.mesh["fsdp"]) // self.accumulate

    @property
    def needed(self) -> float:
        """Bytes per chip: the compiler's figure if there is one."""
        return sum(self.bytes.values()) if self.compiled is None else self.compiled.needed

    @property
    def sending(self) -> float | None:
        """Seconds of a chip's collectives at the full speed of its links."""
        if self.compiled is None or self.topology.chip is None:
            return None
        return sum(c.sent for c in self.compiled.collectives) / self.topology.chip.link

    def utilisation(self, overlapped: bool) -> float | None:
        """Model FLOPs utilisation, with collectives hidden behind arithmetic or after it."""
        chip, compiled = self.topology.chip, self.compiled
        if compiled is None or compiled.seconds is None or chip is None or self.sending is None:
            return None
        combine = max if overlapped else sum
        seconds = combine((compiled.seconds, self.sending))
        return self.useful / (self.topology.size * chip.peak * seconds)


def plan(
    config: Any,
    topology: Topology,
    *,
    name: str = "",
    what: What = "train",
    cached: bool = False,
    per_chip: int = 0,
    compile: bool = True,
    find_batch: bool = False,
) -> Plan:
    """Plans one program of a config on a topology.

    Args:
      config: A training config. Sampling takes whole weights on every chip, whatever its mesh.
      topology: From `parse_topology`.
      name: Of the config, for the report.
      what: "train", a step; "forward", a call of the UNet (guidance takes two rows for each
        picture); "decode", latents to pictures.
      cached: Train from a latent cache (as with ``config.data.cache``).
      per_chip: Pictures at a time on a chip, in place of ``config.batch_size`` (sampling: 1).
      compile: Use the topology's compiler; without it the plan has its analytic part alone.
      find_batch: Compile up to four times to find the largest number of pictures that fits.

    Raises:
      ConfigError: The config does not fit the program.
      MeshError: The mesh does not fit the topology.
      PlanError: There is no such program or topology, or the compiler fails.
    """
    if what not in get_args(What):
        raise PlanError(f"--what {what!r} does not exist{did_you_mean(what, get_args(What))}")
    config = complete(config)
    check_config(config)
    devices, uncompiled = find_devices(topology) if compile else (None, "--nocompile")
    if what != "train":
        config.mesh.update(data=-1, fsdp=1, tensor=1, zero1=False)
        config.optim.accumulate, config.remat, per_chip = 1, "none", per_chip or 1
    axes = plain(config.mesh)
    zero1 = axes.pop("zero1")
    sizes = mesh_sizes(topology.size, **axes)
    mesh = AbstractMesh(sizes, AXES) if devices is None else make_mesh(devices, **axes)
    shards, parts = row_shards(mesh), config.optim.accumulate
    if per_chip:
        config.batch_size = per_chip * shards * parts
    check_rows(config, shards)
    rows = config.batch_size // shards // parts

    def build(config: Any) -> Program:
        if what == "train":
            return Step(config, mesh, zero1, cached or bool(config.data.cache))
        return (Forward if what == "forward" else Decode)(config, mesh)

    program = build(config)
    # cuDNN's kernels can be traced only where the CUDA wheels are installed.
    platform = "" if devices is None and topology.platform == "gpu" else topology.platform
    # Not in the CPU's own forms: they make products of convolutions, by the number of pictures.
    counted = "" if platform == "cpu" else platform
    traces = {
        name: [program.trace(n, name) for n in (_TRACED, 2 * _TRACED)]
        for name in {platform, counted}
    }
    few, many = map(count_flops, traces[counted])
    flops = _extrapolate(few, many, rows * parts)
    peak, larger = map(peak_bytes, traces[platform])
    per_picture = (larger - peak) / _TRACED
    # Without rematerialisation, and without kernels that compute weights again.
    config_once = config.copy_and_resolve_references()
    config_once.remat = "none"
    once = count_flops(build(config_once).trace(_TRACED, ""))
    useful = rows * parts / _TRACED * sum(once[kind] for kind in PRODUCTS)

    run = partial(program.compile, topology=topology)
    compiled = None if devices is None else run(rows)
    result = Plan(
        config=name,
        what=what,
        topology=topology,
        mesh=dict(mesh.shape),
        zero1=zero1,
        batch=config.batch_size,
        accumulate=parts,
        cached=program.cached,
        remat=config.remat,
        parameters=program.parameters(),
        flops={kind: n * shards for kind, n in flops.items()},
        useful=useful * shards,
        bytes=program.bytes(rows, peak - _TRACED * per_picture, per_picture),
        per_picture=per_picture,
        compiled=compiled,
        uncompiled=uncompiled,
    )
    largest, chip = None, topology.chip
    if compiled is None and chip is not None:
        fixed = result.needed - rows * per_picture
        largest = max(int((chip.memory - fixed) / per_picture), 0)
    elif compiled is not None and chip is not None and find_batch:
        largest = largest_batch(lambda n: compiled if n == rows else run(n), chip.memory, rows)
    return dataclasses.replace(result, largest=largest)


def largest_batch(run: Callable[[int], Compiled], memory: float, start: int, tries: int = 4) -> int:
    """Finds the most pictures at a time that fit in ``memory`` bytes with ``tries`` compilations.

    Each guess is where a line through the last two crosses the limit, between the largest number
    that fits and the smallest that does not.
    """
    seen = {start: run(start)}
    while len(seen) < tries:
        low = max((n for n, c in seen.items() if c.fits), default=0)
        high = min((n for n, c in seen.items() if not c.fits), default=2 * max(seen))
        if len(seen) == 1:
            guess = 2 * start if low else start // 2
        else:
            (a, at_a), (b, at_b) = list(seen.items())[-2:]
            slope = (at_b.needed - at_a.needed) / (b - a)
            guess = int(a + (memory - at_a.needed) / slope) if slope > 0 else high
            highest = high - 1 if any(not c.fits for c in seen.values()) else 4 * high
            guess = min(max(guess, low + 1), highest)
        if guess in seen or guess <= low:
            break
        seen[guess] = run(guess)
    return max((n for n, c in seen.items() if c.fits), default=0)


def _extrapolate(few: Counter[str], many: Counter[str], rows: int) -> dict[str, float]:
    """FLOPs of ``rows`` pictures, on the line through two traces."""
    slope = {kind: (many[kind] - few[kind]) / _TRACED for kind in KINDS}
    return {kind: few[kind] + (rows - _TRACED) * slope[kind] for kind in KINDS}
