"""The programs that are planned: a training step, a call of the UNet, a decoding, as shapes; and what the compiler says of one."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from ldm_jax.conditioning.columns import Mask
from ldm_jax.distributed.parallel import (
    ROWS,
    Target,
    compile_step,
    compiled_for,
    row_shards,
    shardings,
    state_shardings,
    target,
)
from ldm_jax.errors import ConfigError, PlanError
from ldm_jax.models.ldm import DTYPES, to_uint8
from ldm_jax.plan.chips import Topology
from ldm_jax.plan.flops import count_flops, nbytes
from ldm_jax.plan.hlo import Collective, collectives
from ldm_jax.sampling.program import Form, decode, decode_part
from ldm_jax.train.loop import over_rows
from ldm_jax.train.optim import make_optimizer
from ldm_jax.train.state import create_state
from ldm_jax.train.tasks.base import TASKS, DiffusionTask
from ldm_jax.train.tasks.diffusion_step import conditions

# At its default effort the TPU compiler takes several times as long; its estimates must be compared at equal effort only.
# It may also fold a gather of weights into a loop around the product that wants them, whose body its estimate counts once: not in a plan.
_OPTIONS = {
    "exec_time_optimization_effort": -1.0,
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program on one chip: bytes ``needed`` in all and ``temporary`` among them, estimated ``seconds``, ``collectives``.

    It takes Pallas ``kernels`` to need no time: their products at the chip's peak, padded to its matrix unit, are seconds of our own, and part of
    ``seconds``. What it does not say is None, and so is all but ``needed`` where the step does not fit.
    """

    fits: bool
    needed: float
    temporary: float | None = None
    seconds: float | None = None
    kernels: float = 0.0
    collectives: Sequence[Collective] = ()


class Program:
    """A program of a config, as shapes."""

    placed: tuple[Any, ...]  # where its arguments lie: shardings, or as `compile_step` takes them
    placed_out: Any = False
    donated: tuple[int, ...] = ()
    cached = False

    def __init__(self, config: Any, mesh: Mesh | AbstractMesh):
        self.config, self.mesh = config, mesh
        self.task = TASKS[config.task](config, weights=False)
        self.task.use({"scale_factor": 1.0})
        self.frozen = jax.tree.map(_shape, self.task.frozen)

    def arguments(self, rows: int) -> tuple[Any, ...]:
        """Shapes of what `function` takes, for ``rows`` pictures."""
        raise NotImplementedError

    def function(self, parts: int) -> Callable[..., Any]:
        """What is compiled; a training step takes its batch in ``parts``."""
        raise NotImplementedError

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters by part."""
        raise NotImplementedError

    def bytes(self, rows: int, fixed: float, per_picture: float) -> dict[str, float]:
        """Bytes on one chip by cause; intermediate results are ``fixed`` and ``per_picture``."""
        raise NotImplementedError

    def at_once(self, rows: int, platform: str) -> int:
        """Of ``rows`` pictures that a chip works on in one loop, those of one turn."""
        return rows

    def batch(self, rows: int) -> Any:
        """Shapes of a training's batch of ``rows`` pictures."""
        raw: dict[str, Any] = {
            "image": np.zeros((1, *self.config.data.size, 3), np.uint8),
            "caption": [""],
        }
        if isinstance(self.task, DiffusionTask) and self.task.conditions.condition is not None:
            # No data are read: the null condition has the shapes of any other, but for masks, which the step turns into latents.
            masked = isinstance(self.task.conditions.condition, Mask)
            raw["encoded"] = (
                np.zeros((1, *self.config.data.size, 1), np.uint8)
                if masked
                else self.task.conditions.null()
            )
        if self.cached:
            pixels = jax.ShapeDtypeStruct(raw["image"].shape, jnp.float32)
            moments = jax.eval_shape(
                lambda stage, x: stage.moments(x), self.frozen["first_stage"], pixels
            )
            encoded = self.task.host_batch(raw)["encoded"]
            raw = {
                "moments": np.zeros(moments.shape, np.float16),
                "encoded": encoded,
                "caption": [""],
            }
        one = self.task.host_batch(raw)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *np.shape(a)[1:]), a.dtype), one)

    def trace(self, rows: int, platform: str) -> Any:
        """The jaxpr over ``rows`` pictures at once on one device, with the kernels of a platform; "" has none.

        Without what no result needs, which a compiler drops as well: a first stage's step pulls back twice for the last layer's gradient alone.
        """
        with compiled_for(Target(platform)):
            jaxpr = jax.make_jaxpr(self.function(1))(*self.arguments(rows)).jaxpr
        return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]

    def compile(self, rows: int, *, topology: Topology, loops: float) -> Compiled:
        """The program compiled with ``rows`` pictures at a time on each chip.

        ``loops``: its arithmetic over that with each loop run once, which is all that the compiler's estimate counts.
        """
        parts, mesh = self.config.optim.accumulate, self.mesh
        assert isinstance(mesh, Mesh)
        program: Any = compile_step(
            over_rows(self.function(parts), mesh),
            mesh,
            "jit",
            shared=self.placed,
            donate=self.donated,
            out_shared=self.placed_out,
        )
        traced = program.trace(*self.arguments(rows * row_shards(mesh) * parts))
        tpu = topology.kind.startswith("v")
        try:
            compiled = traced.lower().compile(compiler_options=dict(_OPTIONS) if tpu else None)
        except Exception as error:  # RESOURCE_EXHAUSTED of whatever class
            return Compiled(fits=False, needed=out_of_memory(str(error)))
        text, memory, costs = (
            compiled.as_text(),
            compiled.memory_analysis(),
            compiled.cost_analysis(),
        )
        needed = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        )
        needed += memory.temp_size_in_bytes
        seconds, kernels = costs.get("optimal_seconds") if tpu and costs else None, 0.0
        if seconds is not None:  # each of these counts as -1 s
            seconds = loops * (
                seconds + len(re.findall(r'custom_call_target="(ConcatBitcast|ZeroCrop)"', text))
            )
            assert topology.chip is not None
            kernels = count_flops(traced.jaxpr.jaxpr)["padded"] / topology.chip.peak
            seconds += kernels
        fits = topology.chip is None or needed <= topology.chip.memory
        found = collectives(text, topology.size)
        return Compiled(fits, needed, memory.temp_size_in_bytes, seconds, kernels, found)


class Step(Program):
    """The training step."""

    donated = (0,)

    def __init__(self, config: Any, mesh: Mesh | AbstractMesh, zero1: bool, cached: bool):
        if cached and config.task != "diffusion":
            raise ConfigError(
                "a latent cache is for a diffusion stage: plan this one without --cached"
            )
        super().__init__(config, mesh)
        self.cached = cached
        self.tx = make_optimizer(config.optim, config.steps)
        self.state = jax.eval_shape(
            lambda key: create_state(
                self.task.init(key), self.tx, config.ema > 0, self.task.extra(key)
            ),
            jax.random.key(0),
        )
        state, self.frozen_placed = (
            state_shardings(self.state, mesh, zero1),
            shardings(self.frozen, mesh),
        )
        self.placed, self.placed_out = (state, self.frozen_placed, False), (state, True)

    def arguments(self, rows: int) -> tuple[Any, ...]:
        return self.state, self.frozen, self.batch(rows)

    def function(self, parts: int) -> Callable[..., Any]:
        return self.task.make_step(self.tx, seed=self.config.seed, ema=self.config.ema, parts=parts)

    def parameters(self) -> dict[str, int]:
        parts = {name: _count(part) for name, part in self.state.params.items()}
        if self.config.task == "autoencoder":
            parts = {"first_stage": sum(parts.values())}
        first_stage = self.frozen.get("first_stage")
        frozen = {
            name: _count(part)
            for name, part in self.frozen.items()
            if name in ("conditioner", "perceptual")
        }
        if first_stage is not None and first_stage.params is not None:
            frozen["first_stage"] = _count(first_stage.params)
        return {**parts, **{f"{name} (frozen)": n for name, n in frozen.items()}}

    def bytes(self, rows: int, fixed: float, per_picture: float) -> dict[str, float]:
        """Gradients, which are most of what is fixed, lie as the parameters do; where they are accumulated there are a sum and a summand."""
        batch = jax.tree.map(lambda a: NamedSharding(self.mesh, ROWS), self.batch(1))
        whole = self.batch(rows * row_shards(self.mesh) * self.config.optim.accumulate)
        state = self.placed[0]
        params = _held(self.state.params, state.params)
        return {
            "parameters": params,
            "average": _held(self.state.ema, state.ema),
            "optimiser": _held(self.state.opt_state, state.opt_state),
            "frozen": _held(self.frozen, self.frozen_placed),
            "batch": _held(whole, batch),
            "gradients": params * (1 if self.config.optim.accumulate == 1 else 2),
            "activations": rows * per_picture,
        }


class Sampling(Program):
    """A part of sampling, with the weights whole on every chip and in the type that products are computed in, as `ldm_jax.load` has them."""

    name = ""  # of the part whose weights it reads

    def __init__(self, config: Any, mesh: Mesh | AbstractMesh):
        if config.task != "diffusion":
            raise ConfigError(
                "only a diffusion stage has pictures to sample: plan the training of this one"
            )
        super().__init__(config, mesh)
        assert isinstance(self.task, DiffusionTask)
        self.model, stage = self.task.model, self.frozen["first_stage"]
        if stage.module is None and self.name == "first_stage":
            raise ConfigError("this model makes pixels: there is nothing to decode")
        dtype = DTYPES[config.dtype]
        params = jax.eval_shape(self.task.init, jax.random.key(0)) | {
            "conditioner": self.frozen.get("conditioner")
        }
        if params["conditioner"] is None:
            params["conditioner"] = jax.eval_shape(self.model.conditioner.init, jax.random.key(0))
        cast = partial(jax.tree.map, lambda s: jax.ShapeDtypeStruct(s.shape, dtype))
        self.params, self.stage = cast(params), stage.replace(params=cast(stage.params))
        height, width = (side // stage.downsampling for side in config.data.size)
        self.latent = (height, width, stage.channels)

    def weights(self) -> Any:
        """Shapes of `name`'s."""
        return self.stage.params if self.name == "first_stage" else self.params[self.name]

    def parameters(self) -> dict[str, int]:
        return {self.name: _count(self.weights())}

    def bytes(self, rows: int, fixed: float, per_picture: float) -> dict[str, float]:
        _, *given = self.arguments(rows)
        return {
            "parameters": float(sum(map(nbytes, jax.tree.leaves(self.weights())))),
            "batch": float(sum(map(nbytes, jax.tree.leaves(given)))),
            "activations": fixed + rows * per_picture,
        }


class Forward(Sampling):
    """The UNet called once on latents [rows, h, w, c] under conditions that are embedded already."""

    name = "unet"
    placed = (True, False, False, False)

    def arguments(self, rows: int) -> tuple[Any, ...]:
        def condition(params: Any, stage: Any, batch: Any) -> Any:
            return self.model.conditioner(params, conditions(self.model, stage, batch))

        cond = jax.eval_shape(condition, self.params["conditioner"], self.stage, self.batch(rows))
        z = jax.ShapeDtypeStruct((rows, *self.latent), jnp.float32)
        return {"unet": self.weights()}, z, jax.ShapeDtypeStruct((rows,), jnp.float32), cond

    def function(self, parts: int) -> Callable[..., Any]:
        return lambda params, z, t, cond: self.model.apply(params, z, t, cond)


class Decode(Sampling):
    """Latents [rows, h, w, c] to uint8 pictures, as many at a time as sampling decodes by itself."""

    name = "first_stage"
    placed = (True, False)

    def arguments(self, rows: int) -> tuple[Any, ...]:
        return self.stage, jax.ShapeDtypeStruct((rows, *self.latent), jnp.float32)

    def function(self, parts: int) -> Callable[..., Any]:
        size = self._size

        def run(stage: Any, z: jax.Array) -> jax.Array:
            told = target()
            assert told is not None
            chips = 1 if told.mesh is None else row_shards(told.mesh)
            part = decode_part(told.platform, size, z.shape[0] // chips)
            return to_uint8(decode(stage, z, Form(size, decode_batch=chips * part)))

        return run

    def at_once(self, rows: int, platform: str) -> int:
        return decode_part(platform, self._size, rows) or rows

    @property
    def _size(self) -> tuple[int, int]:
        height, width = self.config.data.size
        return height, width


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
        lambda s, where: nbytes(jax.ShapeDtypeStruct(where.shard_shape(s.shape), s.dtype)),
        shapes,
        placed,
    )
    return float(sum(jax.tree.leaves(held)))
