"""A training step's needs and speed, from shapes and from the compiler: nothing is run, no weights and no data are read."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from ldm_jax.data import Mask
from ldm_jax.latent import ConfigError
from ldm_jax.parallel import (
    AXES,
    ROWS,
    Target,
    compile_step,
    compiled_for,
    make_mesh,
    mesh_sizes,
    row_shards,
    shardings,
    state_shardings,
)
from ldm_jax.plan.chips import PlanError, Topology, find_devices
from ldm_jax.plan.flops import KINDS, PRODUCTS, count_flops, nbytes, peak_bytes
from ldm_jax.plan.hlo import Collective, collectives
from ldm_jax.train.loop import check_config, check_rows, over_rows
from ldm_jax.train.optim import make_optimizer
from ldm_jax.train.state import create_state
from ldm_jax.train.tasks import TASKS, DiffusionTask, plain

# At its default effort the TPU compiler takes several times as long; its estimates must be compared at equal effort only.
# It may also fold a gather of weights into a loop around the product that wants them, whose body its estimate counts once: not in a plan.
_OPTIONS = {
    "exec_time_optimization_effort": -1.0,
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
}
# Pictures of a trace: enough that what grows with them outweighs what does not. Tracing more costs no more.
_FEW = 64


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step on one chip: bytes ``needed`` in all and ``temporary`` among them, estimated ``seconds``, ``collectives``.

    It takes Pallas ``kernels`` to need no time: their products at the chip's peak, padded to its matrix unit, are seconds of our own, and part of
    ``seconds``. What it does not say is None, and so is all but ``needed`` where the step does not fit.
    """

    fits: bool
    needed: float
    temporary: float | None = None
    seconds: float | None = None
    kernels: float = 0.0
    collectives: Sequence[Collective] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """``flops`` are of a step over all chips, by kind; ``useful`` are those of products alone, without what is computed twice to save memory.

    ``bytes`` are of one chip, by cause; "activations" is a bound from the program as it is written, before the compiler fuses it.
    """

    config: str
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
        seconds = max(compiled.seconds, self.sending) if overlapped else compiled.seconds + self.sending
        return self.useful / (self.topology.size * chip.peak * seconds)


def plan(
    config: Any,
    topology: Topology,
    *,
    name: str = "",
    cached: bool = False,
    per_chip: int = 0,
    compile: bool = True,
    find_batch: bool = False,
) -> Plan:
    """Plans the training of ``config`` on ``topology``.

    ``per_chip`` pictures at a time on a chip take the place of ``config.batch_size``. ``cached``: from a latent cache (as with config.data.cache).
    ``compile`` False gives the analytic part alone. ``find_batch`` compiles up to four times to find the largest number of pictures that fits.

    Raises ConfigError, MeshError, PlanError.
    """
    config = config.copy_and_resolve_references()
    check_config(config)
    devices, uncompiled = find_devices(topology) if compile else (None, "it was not asked for")
    axes = plain(config.mesh)
    zero1 = axes.pop("zero1")
    sizes = mesh_sizes(topology.size, **axes)
    mesh = AbstractMesh(sizes, AXES) if devices is None else make_mesh(devices, **axes)
    shards, parts = row_shards(mesh), config.optim.accumulate
    if per_chip:
        config.batch_size = per_chip * shards * parts
    check_rows(config, shards)
    rows = config.batch_size // shards // parts

    step = Step(config, mesh, zero1, cached or bool(config.data.cache))
    # A GPU's kernels can be traced only where there is one.
    untold = "cpu" if topology.chip is None else "tpu" if topology.kind.startswith("v") else ""
    platform = untold if devices is None else devices[0].platform
    few, many = step.trace(_FEW, platform), step.trace(2 * _FEW, platform)
    arithmetic = partial(_line, count_flops(few), count_flops(many))
    flops = arithmetic(rows * parts)
    plainly = config.copy_and_resolve_references()
    plainly.remat = "none"  # and no kernel, whose backward pass computes weights again
    kept = count_flops(Step(plainly, mesh, zero1, step.cached).trace(_FEW, ""))
    useful = rows * parts / _FEW * sum(kept[kind] for kind in PRODUCTS)
    per_picture = (peak_bytes(many) - peak_bytes(few)) / _FEW

    loops = sum(flops.values()) / sum(arithmetic(rows).values())
    run = partial(step.compile, topology=topology, loops=loops)
    compiled = None if devices is None else run(rows)
    result = Plan(
        config=name,
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
        bytes=step.bytes(rows, per_picture),
        per_picture=per_picture,
        compiled=compiled,
        uncompiled=uncompiled,
    )
    if topology.chip is None or (compiled is not None and not find_batch):
        return result
    if compiled is None:
        fixed = result.needed - rows * per_picture
        return dataclasses.replace(result, largest=max(int((topology.chip.memory - fixed) / per_picture), 0))
    largest = largest_batch(lambda n: compiled if n == rows else run(n), topology.chip.memory, rows)
    return dataclasses.replace(result, largest=largest)


class Step:
    """The training step of a config, as shapes."""

    def __init__(self, config: Any, mesh: Mesh | AbstractMesh, zero1: bool, cached: bool):
        self.config, self.mesh, self.cached = config, mesh, cached
        if cached and config.task != "diffusion":
            raise ConfigError("a latent cache is for a diffusion stage: plan this one without --cached")
        self.task = TASKS[config.task](config, weights=False)
        self.task.use({"scale_factor": 1.0})
        self.tx = make_optimizer(config.optim, config.steps)
        self.state = jax.eval_shape(
            lambda key: create_state(self.task.init(key), self.tx, config.ema > 0, self.task.extra(key)),
            jax.random.key(0),
        )
        self.frozen = jax.tree.map(_shape, self.task.frozen)
        self.placed = state_shardings(self.state, mesh, zero1)
        self.frozen_placed = shardings(self.frozen, mesh)

    def batch(self, rows: int) -> Any:
        """Shapes of a batch of ``rows`` pictures."""
        raw: dict[str, Any] = {"image": np.zeros((1, *self.config.data.size, 3), np.uint8), "caption": [""]}
        if isinstance(self.task, DiffusionTask) and self.task.conditions.condition is not None:
            # No data are read: the null condition has the shapes of any other, but for masks, which the step turns into latents.
            masked = isinstance(self.task.conditions.condition, Mask)
            raw["encoded"] = (
                np.zeros((1, *self.config.data.size, 1), np.uint8) if masked else self.task.conditions.null()
            )
        if self.cached:
            pixels = jax.ShapeDtypeStruct(raw["image"].shape, jnp.float32)
            moments = jax.eval_shape(lambda stage, x: stage.moments(x), self.frozen["first_stage"], pixels)
            encoded = self.task.host_batch(raw)["encoded"]
            raw = {"moments": np.zeros(moments.shape, np.float16), "encoded": encoded, "caption": [""]}
        one = self.task.host_batch(raw)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *np.shape(a)[1:]), a.dtype), one)

    def function(self, parts: int) -> Callable[..., Any]:
        return self.task.make_step(self.tx, seed=self.config.seed, ema=self.config.ema, parts=parts)

    def trace(self, rows: int, platform: str) -> Any:
        """The jaxpr of a step over ``rows`` pictures at once on one device, with the kernels of a platform; "" has none.

        Without what no result needs, which a compiler drops as well: a first stage's step pulls back twice for the last layer's gradient alone.
        """
        with compiled_for(Target(platform)):
            jaxpr = jax.make_jaxpr(self.function(1))(self.state, self.frozen, self.batch(rows)).jaxpr
        return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]

    def compile(self, rows: int, *, topology: Topology, loops: float) -> Compiled:
        """The step compiled with ``rows`` pictures at a time on each chip.

        ``loops``: the step's arithmetic over that with each loop run once, which is all that the compiler's estimate counts.
        """
        parts, mesh = self.config.optim.accumulate, self.mesh
        assert isinstance(mesh, Mesh)
        program: Any = compile_step(
            over_rows(self.function(parts), mesh),
            mesh,
            "jit",
            shared=(self.placed, self.frozen_placed, False),
            donate=(0,),
            out_shared=(self.placed, True),
        )
        batch = self.batch(rows * row_shards(mesh) * parts)
        traced = program.trace(self.state, self.frozen, batch)
        tpu = topology.kind.startswith("v")
        try:
            compiled = traced.lower().compile(compiler_options=dict(_OPTIONS) if tpu else None)
        except Exception as error:  # RESOURCE_EXHAUSTED of whatever class
            return Compiled(fits=False, needed=out_of_memory(str(error)))
        text, memory, costs = compiled.as_text(), compiled.memory_analysis(), compiled.cost_analysis()
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        needed += memory.temp_size_in_bytes
        seconds, kernels = costs.get("optimal_seconds") if tpu and costs else None, 0.0
        if seconds is not None:  # a ConcatBitcast counts as -1 s
            seconds = loops * (seconds + len(re.findall(r'custom_call_target="ConcatBitcast"', text)))
            assert topology.chip is not None
            kernels = count_flops(traced.jaxpr.jaxpr)["padded"] / topology.chip.peak
            seconds += kernels
        fits = topology.chip is None or needed <= topology.chip.memory
        found = collectives(text, topology.size)
        return Compiled(fits, needed, memory.temp_size_in_bytes, seconds, kernels, found)

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters by part."""
        parts = {name: _count(part) for name, part in self.state.params.items()}
        if self.config.task == "autoencoder":
            parts = {"first_stage": sum(parts.values())}
        first_stage = self.frozen.get("first_stage")
        frozen = {name: _count(part) for name, part in self.frozen.items() if name in ("conditioner", "perceptual")}
        if first_stage is not None and first_stage.params is not None:
            frozen["first_stage"] = _count(first_stage.params)
        return {**parts, **{f"{name} (frozen)": n for name, n in frozen.items()}}

    def bytes(self, rows: int, per_picture: float) -> dict[str, float]:
        """Bytes on one chip by cause. Gradients lie as the parameters do; where they are accumulated there are a sum and a summand."""
        batch = jax.tree.map(lambda a: NamedSharding(self.mesh, ROWS), self.batch(1))
        whole = self.batch(rows * row_shards(self.mesh) * self.config.optim.accumulate)
        params = _held(self.state.params, self.placed.params)
        return {
            "parameters": params,
            "average": _held(self.state.ema, self.placed.ema),
            "optimiser": _held(self.state.opt_state, self.placed.opt_state),
            "frozen": _held(self.frozen, self.frozen_placed),
            "batch": _held(whole, batch),
            "gradients": params * (1 if self.config.optim.accumulate == 1 else 2),
            "activations": rows * per_picture,
        }


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


def out_of_memory(message: str) -> float:
    """The bytes that the compiler would have needed; PlanError where it failed for another reason."""
    match = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    if match is None:
        raise PlanError(f"the compiler failed: {message.splitlines()[0]}")
    return float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), getattr(leaf, "dtype", jnp.float32))


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _held(shapes: Any, placed: Any) -> float:
    """Bytes of one device's part."""
    held = jax.tree.map(
        lambda s, where: nbytes(jax.ShapeDtypeStruct(where.shard_shape(s.shape), s.dtype)), shapes, placed
    )
    return float(sum(jax.tree.leaves(held)))


def _line(few: Counter[str], many: Counter[str], rows: int) -> dict[str, float]:
    """What grows with the batch in a straight line, at ``rows`` pictures."""
    slope = {kind: (many[kind] - few[kind]) / _FEW for kind in KINDS}
    return {kind: few[kind] + (rows - _FEW) * slope[kind] for kind in KINDS}
