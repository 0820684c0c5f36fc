"""The programs that can be planned, as shapes, and what the compiler reports of each."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ldm_jax.data.buckets import batch_sizes
from ldm_jax.distributed.compile import compile_step
from ldm_jax.distributed.flops import count_flops, nbytes
from ldm_jax.distributed.mesh import ROWS, row_shards
from ldm_jax.distributed.shardings import shardings, state_shardings
from ldm_jax.errors import ConfigError, PlanError
from ldm_jax.kernels import Kernels, for_platform
from ldm_jax.models.build import DTYPES
from ldm_jax.models.ldm import to_uint8
from ldm_jax.nn.layers import with_kernels
from ldm_jax.plan.chips import GIB, Topology
from ldm_jax.plan.hlo import Collective, collectives, parse
from ldm_jax.plan.roofline import Kernel
from ldm_jax.plan.roofline import kernels as launches
from ldm_jax.sampling.decoding import decode, decode_part
from ldm_jax.train.optim import make_optimizer
from ldm_jax.train.power_ema import with_averages
from ldm_jax.train.state import create_state
from ldm_jax.train.tasks import task_class
from ldm_jax.train.tasks.base import plain
from ldm_jax.train.tasks.diffusion import prepare_conditions

_COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {},
    # The default effort takes several times as long, and only estimates of one effort compare. The
    # compiler may also fold a gather of weights into a loop around its product, whose body the
    # estimate counts once: not in a plan.
    "tpu": {
        "exec_time_optimization_effort": -1.0,
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    },
    # Without a GPU there is no tuning of Triton's tiles, and the compiler fails on some products.
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler reports of a program on one chip. Unknown figures are None.

    Attributes:
      fits: Whether it fits the chip's memory. Where the compiler refuses it, only this and
        `needed` are known.
      needed: Bytes in all.
      temporary: Bytes of them for intermediate results.
      seconds: Estimate: on a TPU the compiler's, on a GPU the sum of `kernels`.
      pallas_seconds: Part of `seconds`. A TPU's compiler takes Pallas kernels to need no time:
        these are their products, padded to the matrix unit, at the chip's peak.
      collectives: Those of one run.
      kernels: Those of a GPU program.
    """

    fits: bool
    needed: float
    temporary: float | None = None
    seconds: float | None = None
    pallas_seconds: float = 0.0
    collectives: Sequence[Collective] = ()
    kernels: Sequence[Kernel] = ()


class Program:
    """A program of a config, as shapes.

    Attributes:
      in_shardings: Shardings of the arguments, or booleans as `compile_step` takes them.
      out_shardings: The same of the results.
      donated: Arguments whose memory the results take.
      differentiable: Whether it takes gradients.
      cached: Whether it takes latents from a cache.
    """

    in_shardings: tuple[Any, ...]
    out_shardings: Any = False
    donated: tuple[int, ...] = ()
    differentiable = True
    cached = False

    def __init__(self, config: Any, mesh: Mesh | AbstractMesh):
        sizes = batch_sizes(plain(config.data))
        if len(sizes) > 1:  # the largest batch takes the most
            config = config.copy_and_resolve_references()
            config.data.size = max(sizes, key=math.prod)
        self.config, self.mesh = config, mesh
        task = task_class(config).from_config(config, weights=False)
        self.task = task.with_measured({})
        self.frozen = jax.tree.map(_shape, self.task.frozen)

    def arguments(self, rows: int) -> tuple[Any, ...]:
        """Shapes of the arguments of `function` for ``rows`` pictures."""
        raise NotImplementedError

    def function(self, kernels: Kernels, platform: str, parts: int = 1) -> Callable[..., Any]:
        """The function to compile; a training step takes its batch in ``parts``."""
        raise NotImplementedError

    def placed_in(self, kernels: Kernels) -> tuple[Any, ...]:
        """`in_shardings`, with the weights in the layouts of ``kernels`` if they stay for long."""
        return self.in_shardings

    def parameters(self) -> dict[str, int]:
        """Number of parameters of each part."""
        raise NotImplementedError

    def bytes(self, rows: int, fixed: float, per_picture: float) -> dict[str, float]:
        """Bytes on one chip by cause; intermediate results are ``fixed`` and ``per_picture``."""
        raise NotImplementedError

    def batch(self, rows: int) -> Any:
        """Shapes of a training batch of ``rows`` pictures."""
        one = self.task.example_batch(self.cached)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *np.shape(a)[1:]), a.dtype), one)

    def trace(self, rows: int, platform: str) -> Any:
        """Traces ``rows`` pictures on one device with the kernels of ``platform`` ("": none).

        What no result needs is dropped, as a compiler does: a first stage's step pulls back twice
        for the gradient of the last layer alone.
        """
        device = self.mesh.devices.flat[0] if isinstance(self.mesh, Mesh) else None
        function = self.function(
            for_platform(platform, differentiable=self.differentiable), platform
        )
        with capability_of(device):
            jaxpr = jax.make_jaxpr(function)(*self.arguments(rows)).jaxpr
        return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]

    def compile(self, rows: int, topology: Topology) -> Compiled:
        """Compiles the program for ``rows`` pictures at a time on each chip."""
        parts, mesh, platform = self.config.optim.accumulate, self.mesh, topology.platform
        assert isinstance(mesh, Mesh)
        kernels = for_platform(platform, mesh, differentiable=self.differentiable)
        program: Any = compile_step(
            self.function(kernels, platform, parts),
            mesh,
            "jit",
            shared=self.placed_in(kernels),
            donate=self.donated,
            out_shared=self.out_shardings,
        )
        with capability_of(mesh.devices.flat[0]):
            traced = program.trace(*self.arguments(rows * row_shards(mesh) * parts))
            lowered = traced.lower()
        try:
            compiled = lowered.compile(compiler_options=_COMPILER_OPTIONS[platform])
        except jax.errors.JaxRuntimeError as error:
            return Compiled(fits=False, needed=out_of_memory(str(error)))
        memory, text = compiled.memory_analysis(), parse(compiled.as_text())
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes
        needed += memory.temp_size_in_bytes - memory.alias_size_in_bytes
        chip, seconds, pallas, launched = topology.chip, None, 0.0, []
        if platform == "tpu" and chip is not None:
            seconds, pallas = _tpu_seconds(compiled, traced.jaxpr.jaxpr, chip.peak)
        if platform == "gpu" and chip is not None:
            launched = launches(text, chip)
            seconds = sum(kernel.total for kernel in launched)
        return Compiled(
            fits=chip is None or needed <= chip.memory,
            needed=needed,
            temporary=memory.temp_size_in_bytes,
            seconds=seconds,
            pallas_seconds=pallas,
            collectives=collectives(text, topology.size),
            kernels=launched,
        )


class Step(Program):
    """The training step."""

    donated = (0,)

    def __init__(self, config: Any, mesh: Mesh | AbstractMesh, zero1: bool, cached: bool):
        super().__init__(config, mesh)
        self.cached = cached
        tx = make_optimizer(config.optim, config.steps, self.task.decays)
        self.tx = with_averages(tx, config.power_ema)

        def create(key: jax.Array) -> Any:
            params, extra = self.task.init(key), self.task.extra(key)
            return create_state(params, self.tx, config.ema > 0, extra)

        self.state = jax.eval_shape(create, jax.random.key(0))
        state, frozen = state_shardings(self.state, mesh, zero1), shardings(self.frozen, mesh)
        self.in_shardings, self.out_shardings = (state, frozen, False), (state, True)

    def arguments(self, rows: int) -> tuple[Any, ...]:
        """The state, the frozen weights and a batch."""
        return self.state, self.frozen, self.batch(rows)

    def function(self, kernels: Kernels, platform: str, parts: int = 1) -> Callable[..., Any]:
        """The task's step."""
        return with_kernels(self.task, kernels).make_step(self.tx, parts)

    def parameters(self) -> dict[str, int]:
        """Those that are trained, and those that are frozen."""
        parts = {name: _count(part) for name, part in self.state.params.items()}
        if self.task.exported_part:
            parts = {self.task.exported_part: sum(parts.values())}
        for name, part in self.frozen.items():
            weights = part.params if name == "first_stage" else part
            if name in ("base", "conditioner", "perceptual", "first_stage") and weights is not None:
                parts[f"{name} (frozen)"] = _count(weights)
        return parts

    def bytes(self, rows: int, fixed: float, per_picture: float) -> dict[str, float]:
        """Gradients, most of what is fixed, are split as parameters; accumulated there are two."""
        state, frozen, _ = self.in_shardings
        parts = self.config.optim.accumulate
        whole = self.batch(rows * row_shards(self.mesh) * parts)
        split = jax.tree.map(lambda a: NamedSharding(self.mesh, ROWS), whole)
        params = _held(self.state.params, state.params)
        return {
            "parameters": params,
            "average": _held(self.state.ema, state.ema),
            "optimiser": _held(self.state.opt_state, state.opt_state),
            "frozen": _held(self.frozen, frozen),
            "batch": _held(whole, split),
            "gradients": params * (1 if parts == 1 else 2),
            "activations": rows * per_picture,
        }


class Sampling(Program):
    """A part of sampling, with whole weights on every chip, in the dtype of the products."""

    part = ""  # whose weights it reads
    differentiable = False

    def __init__(self, config: Any, mesh: Mesh | AbstractMesh):
        super().__init__(config, mesh)
        model = self.task.sampling_model()
        if model is None:
            raise ConfigError("only a diffusion stage samples: plan the training of this one")
        self.model, stage = model, self.frozen["first_stage"]
        if stage.module is None and self.part == "first_stage":
            raise ConfigError("this model makes pixels: there is nothing to decode")
        params = jax.eval_shape(self.task.init, jax.random.key(0))
        params["conditioner"] = self.frozen.get("conditioner") or jax.eval_shape(
            self.model.conditioner.init, jax.random.key(0)
        )
        dtype = DTYPES[config.dtype]
        cast = partial(jax.tree.map, lambda s: jax.ShapeDtypeStruct(s.shape, dtype))
        self.params, self.stage = cast(params), stage.replace(params=cast(stage.params))
        self.size: tuple[int, int] = tuple(config.data.size)
        height, width = (side // stage.downsampling for side in self.size)
        self.latent = (height, width, stage.channels)

    def placed_in(self, kernels: Kernels) -> tuple[Any, ...]:
        """Sampling loads its weights once, in the layouts that the program reads."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        first, *_ = self.arguments(1)
        return kernels.weight_formats(first, whole), *self.in_shardings[1:]

    def weights(self) -> Any:
        """Shapes of the weights of `part`."""
        return self.stage.params if self.part == "first_stage" else self.params[self.part]

    def parameters(self) -> dict[str, int]:
        """Those of `part`."""
        return {self.part: _count(self.weights())}

    def bytes(self, rows: int, fixed: float, per_picture: float) -> dict[str, float]:
        """Weights, inputs and activations."""
        _, *inputs = self.arguments(rows)
        return {
            "parameters": float(sum(map(nbytes, jax.tree.leaves(self.weights())))),
            "batch": float(sum(map(nbytes, jax.tree.leaves(inputs)))),
            "activations": fixed + rows * per_picture,
        }


class Forward(Sampling):
    """One call of the UNet on latents [b, h, w, c] with conditions that are encoded already."""

    part = "unet"
    in_shardings = (True, False, False, False)

    def arguments(self, rows: int) -> tuple[Any, ...]:
        """Weights, z, t and the condition."""

        def condition(params: Any, stage: Any, batch: Any) -> Any:
            return self.model.conditioner(params, prepare_conditions(self.model, stage, batch))

        cond = jax.eval_shape(condition, self.params["conditioner"], self.stage, self.batch(rows))
        z = jax.ShapeDtypeStruct((rows, *self.latent), jnp.float32)
        return {"unet": self.weights()}, z, jax.ShapeDtypeStruct((rows,), jnp.float32), cond

    def function(self, kernels: Kernels, platform: str, parts: int = 1) -> Callable[..., Any]:
        """The UNet."""
        model = self.model.with_kernels(kernels)
        return lambda params, z, t, cond: model.apply(params, z, t, cond)


class Decode(Sampling):
    """Latents [b, h, w, c] to uint8 pictures, as many at a time as sampling decodes."""

    part = "first_stage"
    in_shardings = (True, False)

    def arguments(self, rows: int) -> tuple[Any, ...]:
        """The first stage and z."""
        return self.stage, jax.ShapeDtypeStruct((rows, *self.latent), jnp.float32)

    def function(self, kernels: Kernels, platform: str, parts: int = 1) -> Callable[..., Any]:
        """The decoder."""
        chips = 1 if kernels.mesh is None else row_shards(kernels.mesh)

        def run(stage: Any, z: jax.Array) -> jax.Array:
            part = decode_part(platform, self.size, z.shape[0] // chips)
            return to_uint8(decode(stage.with_kernels(kernels), z, chips * part))

        return run


@contextlib.contextmanager
def capability_of(device: Any) -> Iterator[None]:
    """Lets JAX's checks for cuDNN see the GPU that is compiled for instead of a local one."""
    capability = getattr(device, "compute_capability", None)
    if capability is None:
        yield
        return

    def check(wanted: str) -> bool:
        return [int(n) for n in capability.split(".")] >= [int(n) for n in wanted.split(".")]

    checks = "jax._src.cudnn.fused_attention_stablehlo.check_compute_capability"
    with mock.patch(checks, check):
        yield


def out_of_memory(message: str) -> float:
    """Reads from the compiler's message how many bytes it would have needed.

    Raises:
      PlanError: If the compiler failed for another reason.
    """
    match = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    if match is None:
        raise PlanError(f"the compiler failed: {message.splitlines()[0]}")
    return float(match[1]) * GIB * 1024.0 ** ("KMGT".index(match[2]) - 2)


def _tpu_seconds(compiled: Any, jaxpr: Any, peak: float) -> tuple[float | None, float]:
    """(the compiler's estimate in seconds, part of it for Pallas kernels).

    The estimate counts a loop's body once, so that it is multiplied by the ratio of the arithmetic
    with loops to that without.
    """
    costs = compiled.cost_analysis() or {}
    if (seconds := costs.get("optimal_seconds")) is None:
        return None, 0.0
    counted, once = count_flops(jaxpr), count_flops(jaxpr, loops=False)
    loops = (counted.total() - counted["padded"]) / (once.total() - once["padded"])
    # The compiler counts each of these as -1 s.
    unknown = re.findall(r'custom_call_target="(ConcatBitcast|ZeroCrop)"', compiled.as_text())
    pallas = counted["padded"] / peak
    return loops * (seconds + len(unknown)) + pallas, pallas


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), getattr(leaf, "dtype", jnp.float32))


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _held(shapes: Any, placed: Any) -> float:
    """Bytes of one device's part."""

    def part(shape: Any, sharding: Any) -> int:
        return nbytes(jax.ShapeDtypeStruct(sharding.shard_shape(shape.shape), shape.dtype))

    return float(sum(jax.tree.leaves(jax.tree.map(part, shapes, placed))))
