"""What a person asks a model for, jitted as one program and run in batches of one size."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.checkpoint import CheckpointError, find_model, load_model
from ldm_jax.convert.conversion import is_foreign, read_model
from ldm_jax.convert.lazy import ReaderError
from ldm_jax.convert.tables import ConversionError
from ldm_jax.convert.targets import TargetError
from ldm_jax.diffusion.samplers import SAMPLERS, time_grid
from ldm_jax.latent import DTYPES, ConfigError, LatentDiffusion, build, check_params, construct, generate, nearest
from ldm_jax.parallel import Mode, compile_step, make_mesh

LOG = logging.getLogger(__name__)


class RequestError(ValueError):
    """A request that the model cannot fulfil; its message is one line that says what to change."""


def load(
    name: str | Path = "emoji",
    *,
    config: str | Path | None = None,
    ema: bool | None = None,
    dtype: str | None = None,
    parallel: Mode = "jit",
    devices: int | None = None,
) -> "Pipeline":
    """Loads a model directory, a shipped model, or a checkpoint of the original, converted in memory.

    ``config`` is a checkpoint's YAML (None: names and shapes tell), ``ema`` whether to take its averaged weights (None: where it has them).
    ``dtype`` is what the model computes in: "float32" (the default on CPU), "bfloat16" (the default elsewhere) or "float16". ``parallel`` spreads
    batches over the first ``devices`` devices (all by default) with "jit" or "pmap". Raises RequestError, CheckpointError or ConfigError.
    """
    path = find_model(name)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} does not exist{nearest(dtype, DTYPES)}")
    foreign = is_foreign(path)
    if not foreign and (config is not None or ema is not None):
        raise RequestError(f"{path} is a model directory, which says itself what it is: leave config and ema out")
    if foreign:
        try:
            converted = read_model(path, config=config, ema=ema)
        except (ConversionError, ReaderError, TargetError) as error:
            raise CheckpointError(str(error)) from error
        for line in converted.assumed:
            LOG.info("%s: assumed %s", path.name, line)
        told, params = converted.config, converted.params
    else:
        told, params = load_model(path)
    if told.get("kind") != "latent_diffusion":
        raise RequestError(
            f"{path} is a {told.get('kind')}, which makes no pictures by itself: give a latent diffusion model"
        )
    try:
        params = jax.tree.map(lambda a: jnp.asarray(a, DTYPES[dtype]), params)
        params = {"conditioner": {}, **params}  # an empty tree leaves no trace on disk
        first_stage = params.pop("first_stage", None)
        params.pop("logvar", None)  # of the training loss alone
        model = build(told, params, first_stage, dtype)
        check_params(model)
        return Pipeline(model, dtype=dtype, name=str(name), parallel=parallel, devices=devices)
    except ConfigError as error:
        raise CheckpointError(f"{path if foreign else path / 'config.json'}: {error}") from None


@dataclasses.dataclass
class Batch:
    """One finished batch: the places of its pictures in the request, and the pictures uint8 [n, H, W, 3]."""

    places: range
    images: np.ndarray


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample. A model's config.json may hold other defaults, under "sampling"."""

    steps: int = 50
    guidance: float | Sequence[float] = 5.0  # one scale, or one for each picture; 1 is none
    eta: float = 0.0
    sampler: str = "ddim"
    grid: str = "uniform"  # of timesteps
    size: Sequence[int] = (64, 64)  # height, width in pixels


class Pipeline:
    """Text (or nothing) to pictures. Calling it returns uint8 [n, H, W, 3]; `stream` yields batches as they are done.

    Only the number of steps, the batch, the size and the sampler are compiled in; prompts, seeds, guidance and eta are traced.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        *,
        dtype: str = "float32",
        name: str = "",
        parallel: Mode = "jit",
        devices: int | None = None,
    ):
        if devices is not None and not 1 <= devices <= jax.device_count():
            raise RequestError(f"devices must be from 1 to {jax.device_count()}, not {devices}")
        if parallel not in get_args(Mode):
            raise RequestError(f"parallel {parallel!r} does not exist{nearest(parallel, get_args(Mode))}")
        self.mesh = make_mesh(devices)
        self.model = jax.device_put(model, NamedSharding(self.mesh, PartitionSpec()))
        self.dtype, self.name = dtype, name
        self.parallel: Mode = parallel
        self.defaults: Settings = construct(Settings, "sampling", model.config.get("sampling", {}))
        self._schedule = jax.device_get(model.schedule)
        self._programs: dict[Any, Callable[..., Any]] = {}

    def settings(self, **given: Any) -> Settings:
        """The model's own settings but for what is given and not None."""
        known = [field.name for field in dataclasses.fields(Settings)]
        for name in given:
            if name not in known:
                raise RequestError(f"setting {name!r} does not exist{nearest(name, known)}")
        return dataclasses.replace(self.defaults, **{k: v for k, v in given.items() if v is not None})

    def __call__(self, prompts: str | Sequence[str], **request: Any) -> np.ndarray:
        """Pictures uint8 [n, H, W, 3]; see `stream` for the request."""
        return np.concatenate([batch.images for batch in self.stream(prompts, **request)])

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int | Sequence[int] | None = None,
        batch: int | None = None,
        **settings: Any,
    ) -> Iterator[Batch]:
        """Checks the request at once, and returns an iterator over finished batches.

        One picture per (prompt, seed): equally many of both, or one of either. ``seeds`` default to 0, 1, ...; ``batch`` pictures are made at a
        time (at most 8 by default); the rest are `Settings`.
        """
        prompts, seeds = pair([prompts] if isinstance(prompts, str) else list(prompts), seeds)
        chosen, n, devices = self.settings(**settings), len(prompts), self.mesh.devices.size
        self.check_conditions()
        if batch is not None and batch < 1:
            raise RequestError(f"batch must be at least 1, not {batch}")
        rows = -(-(batch or min(n, 8)) // devices) * devices
        scales = np.asarray(chosen.guidance, np.float32)
        if scales.shape not in ((), (n,)):
            raise RequestError(f"{scales.size} guidance scales for {n} pictures: give one, or one for each")
        if not np.isfinite(scales).all():
            raise RequestError("guidance must be a finite number")
        scales = np.broadcast_to(scales, n)
        nodes, program = self.nodes(chosen), self.program(chosen.sampler, self.check_size(chosen.size))
        conditioner = self.model.conditioner
        encoded, null = conditioner.encode(prompts), conditioner.encode_null(rows)

        def batches() -> Iterator[Batch]:
            for start in range(0, n, rows):
                # The last batch is filled up with its last picture: every batch has one shape.
                places = np.minimum(np.arange(start, start + rows), n - 1)
                part = jax.tree.map(lambda a, places=places: a[places], encoded)
                images = program(self.model, nodes, part, null, np.asarray(seeds, np.uint32)[places], scales[places])
                done = range(start, min(start + rows, n))
                yield Batch(done, np.asarray(images)[: len(done)])

        return batches()

    def check_conditions(self) -> None:
        """A RequestError for a model that is told more than prompts can say."""
        config = self.model.config
        kind, unet = config["conditioner"]["kind"], self.model.unet
        if kind != "rescale" and (extra := unet.in_channels - self.model.first_stage.channels):
            raise RequestError(
                f"this model needs a picture beside the prompt ({extra} channels joined to the latents), which is not supported yet"
            )
        way = config.get("original", {}).get("conditioning_key")
        if kind == "none" and (unet.num_classes is not None or way == "crossattn"):
            raise RequestError(
                "this model is conditioned on something that it holds no network for, which is not supported yet"
            )

    def nodes(self, chosen: Settings) -> Any:
        """The sampler's tables, or a RequestError."""
        if chosen.sampler not in SAMPLERS:
            raise RequestError(f"sampler {chosen.sampler!r} does not exist{nearest(chosen.sampler, SAMPLERS)}")
        if not np.isfinite(chosen.eta) or chosen.eta < 0:
            raise RequestError(f"eta must be a number of at least 0, not {chosen.eta}")
        try:
            timesteps = time_grid(chosen.grid, chosen.steps, self._schedule)
            eta = {"eta": chosen.eta} if chosen.eta else {}  # 0 is the sampler's own: 0 for ddim, 1 for ancestral ones
            return SAMPLERS[chosen.sampler].nodes(self._schedule, timesteps, **eta)
        except ValueError as error:
            raise RequestError(str(error)) from None

    def check_size(self, size: Sequence[int]) -> tuple[int, int]:
        """(height, width) if the model can make it."""
        factor = self.model.first_stage.downsampling * 2 ** (len(self.model.unet.channel_mult) - 1)
        if len(size) != 2 or min(size) < factor or size[0] % factor or size[1] % factor:
            raise RequestError(f"size {'x'.join(map(str, size))}: height and width must be multiples of {factor}")
        return size[0], size[1]

    def program(self, sampler: str, size: tuple[int, int]) -> Callable[..., Any]:
        """The compiled function of a sampler and a size; jit compiles it once for each batch and number of steps."""
        if (sampler, size) not in self._programs:
            whole, rows = True, False
            self._programs[sampler, size] = compile_step(
                partial(_generate, sampler=sampler, size=size),
                self.mesh,
                self.parallel,
                shared=(whole, whole, rows, rows, rows, rows),
                out_shared=rows,
            )
        return self._programs[sampler, size]


def _generate(*args: Any, sampler: str, size: tuple[int, int], axis_name: str | None = None) -> jax.Array:
    model, nodes, encoded, null, seeds, guidance = args
    return generate(model, SAMPLERS[sampler], nodes, encoded, null, seeds, guidance, size)


def pair(prompts: list[str], seeds: int | Sequence[int] | None) -> tuple[list[str], list[int]]:
    """Equally many prompts and seeds, or a RequestError."""
    if not prompts:
        raise RequestError("there is no prompt; give at least one")
    seeds = (
        [int(seeds)] if isinstance(seeds, int | np.integer) else list(range(len(prompts)) if seeds is None else seeds)
    )
    if any(not 0 <= int(seed) < 2**32 for seed in seeds):
        raise RequestError("seeds must be from 0 to 4294967295")
    n = max(len(prompts), len(seeds))
    if len(prompts) not in (1, n) or len(seeds) not in (1, n):
        raise RequestError(
            f"{len(prompts)} prompts and {len(seeds)} seeds do not pair up: give equally many, or one of either"
        )
    return prompts * (n // len(prompts)), seeds * (n // len(seeds))
