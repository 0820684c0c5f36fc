"""What a training step, a call of the UNet or a decoding needs, and how fast it can be, from shapes and from the compiler: nothing is run, no weights
and no data are read.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from jax.sharding import AbstractMesh

from ldm_jax.distributed.parallel import AXES, make_mesh, mesh_sizes, row_shards
from ldm_jax.errors import PlanError
from ldm_jax.plan.chips import Topology, find_devices
from ldm_jax.plan.flops import KINDS, PRODUCTS, count_flops, peak_bytes
from ldm_jax.plan.programs import Compiled, Decode, Forward, Program, Step
from ldm_jax.train.loop import check_config, check_rows
from ldm_jax.train.tasks.base import plain

What = Literal["train", "forward", "decode"]
# Pictures of a trace: enough that what grows with them outweighs what does not. Tracing more costs no more.
_FEW = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """``what`` is planned: "train" is a step, "forward" a call of the UNet, "decode" latents to pictures.

    ``flops`` are of that over all chips, by kind; ``useful`` are those of products alone, without what is computed twice to save memory. ``bytes``
    are of one chip, by cause; "activations" is a bound from the program as it is written, before the compiler fuses it.
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
    per_picture: float  # of "activations", one picture at a time on a chip
    compiled: Compiled | None
    uncompiled: str  # why there is nothing compiled
    largest: int | None = None  # pictures at a time on a chip

    @property
    def rows(self) -> int:
        """Pictures that a chip works on at a time."""
        return self.batch // (self.mesh["data"] * self.mesh["fsdp"]) // self.accumulate

    @property
    def needed(self) -> float:
        """Bytes per chip, as well as they are known."""
        return sum(self.bytes.values()) if self.compiled is None else self.compiled.needed

    @property
    def sending(self) -> float | None:
        """Seconds that a chip's collectives take at the full speed of its links."""
        if self.compiled is None or self.topology.chip is None:
            return None
        return sum(c.sent for c in self.compiled.collectives) / self.topology.chip.link

    def utilisation(self, overlapped: bool) -> float | None:
        """The share of the chips' peak that useful arithmetic reaches, with the collectives behind the arithmetic or after it."""
        chip, compiled = self.topology.chip, self.compiled
        if compiled is None or compiled.seconds is None or chip is None or self.sending is None:
            return None
        seconds = (
            max(compiled.seconds, self.sending) if overlapped else compiled.seconds + self.sending
        )
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
    """Plans the training of ``config`` on ``topology``, or of sampling from what it trains a call of the UNet ("forward", plain: a guided one has
    two rows for each picture) or the decoding of latents ("decode").

    ``per_chip`` pictures at a time on a chip take the place of ``config.batch_size``; of sampling it is 1 where it is not given, and the mesh is
    that of `ldm_jax.sampling.pipeline`: whole weights on every chip. ``cached``: from a latent cache (as with config.data.cache).
    ``compile`` False gives the analytic part alone. ``find_batch`` compiles up to four times to find the largest number of pictures that fits.

    Raises ConfigError, MeshError, PlanError.
    """
    config = config.copy_and_resolve_references()
    check_config(config)
    devices, uncompiled = find_devices(topology) if compile else (None, "it was not asked for")
    if what not in get_args(What):
        raise PlanError(f"what {what!r} cannot be planned (known: {', '.join(get_args(What))})")
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

    def make(config: Any) -> Program:
        if what == "train":
            return Step(config, mesh, zero1, cached or bool(config.data.cache))
        return (Forward if what == "forward" else Decode)(config, mesh)

    step = make(config)
    # A GPU's kernels can be traced only where there is one.
    untold = "cpu" if topology.chip is None else "tpu" if topology.kind.startswith("v") else ""
    platform = untold if devices is None else devices[0].platform
    # A CPU's own form of a convolution's gradient would count as products, and is chosen by the number of pictures, of which these traces have more.
    counted = "" if platform == "cpu" else platform
    traces = {name: [step.trace(n, name) for n in (_FEW, 2 * _FEW)] for name in {platform, counted}}
    arithmetic = partial(_line, *map(count_flops, traces[counted]))
    flops = arithmetic(rows * parts)
    plainly = config.copy_and_resolve_references()
    plainly.remat = "none"  # and no kernel, whose backward pass computes weights again
    kept = count_flops(make(plainly).trace(_FEW, ""))
    useful = rows * parts / _FEW * sum(kept[kind] for kind in PRODUCTS)
    peak, larger = map(peak_bytes, traces[platform])
    per_picture = (larger - peak) / _FEW

    loops = sum(flops.values()) / sum(arithmetic(step.at_once(rows, platform)).values())
    run = partial(step.compile, topology=topology, loops=loops)
    compiled = None if devices is None else run(rows)
    result = Plan(
        config=name,
        what=what,
        topology=topology,
        mesh=dict(mesh.shape),
        zero1=zero1,
        batch=config.batch_size,
        accumulate=parts,
        cached=step.cached,
        remat=config.remat,
        parameters=step.parameters(),
        flops={kind: n * shards for kind, n in flops.items()},
        useful=useful * shards,
        bytes=step.bytes(rows, peak - _FEW * per_picture, per_picture),
        per_picture=per_picture,
        compiled=compiled,
        uncompiled=uncompiled,
    )
    if topology.chip is None or (compiled is not None and not find_batch):
        return result
    if compiled is None:
        fixed = result.needed - rows * per_picture
        return dataclasses.replace(
            result, largest=max(int((topology.chip.memory - fixed) / per_picture), 0)
        )
    largest = largest_batch(lambda n: compiled if n == rows else run(n), topology.chip.memory, rows)
    return dataclasses.replace(result, largest=largest)


def largest_batch(run: Callable[[int], Compiled], memory: float, start: int, tries: int = 4) -> int:
    """The most pictures at a time that fit in ``memory`` bytes, as far as ``tries`` compilations tell.

    Each guess is where a line through the last two crosses the limit, between the largest that fits and the smallest that does not.
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


def _line(few: Counter[str], many: Counter[str], rows: int) -> dict[str, float]:
    """What grows with the batch in a straight line, at ``rows`` pictures."""
    slope = {kind: (many[kind] - few[kind]) / _FEW for kind in KINDS}
    return {kind: few[kind] + (rows - _FEW) * slope[kind] for kind in KINDS}
