"""What a person asks a model for, jitted as one program and run in batches of one size."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.checkpoint import CheckpointError, load_model
from ldm_jax.conditioning import ASSETS
from ldm_jax.diffusion.samplers import SAMPLERS, step_grid
from ldm_jax.latent import DTYPES, ConfigError, LatentDiffusion, build, generate, nearest
from ldm_jax.parallel import Mode, compile_step, make_mesh


class RequestError(ValueError):
    """A request that the model cannot fulfil; its message is one line that says what to change."""


def find_model(name: str | Path) -> Path:
    """The model directory of a path, or of the name of a model that ships with the package. A path that exists goes first."""
    if Path(name).exists():
        return Path(name)
    shipped = sorted(p.parent.name for p in ASSETS.glob("*/config.json"))
    if str(name) not in shipped:
        raise RequestError(f"model {str(name)!r} is neither a folder nor one that ships with ldm_jax{nearest(str(name), shipped)}")
    return ASSETS / str(name)


def load(name: str | Path = "emoji", *, dtype: str | None = None, parallel: Mode = "jit", devices: int | None = None) -> "Pipeline":
    """Loads a model directory or a shipped model.

    ``dtype`` is what it computes in: "float32" (the default on CPU), "bfloat16" (the default elsewhere) or "float16". ``parallel`` spreads
    batches over the first ``devices`` devices (all by default) with "jit" or "pmap". Raises RequestError, CheckpointError or ConfigError.
    """
    path = find_model(name)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} does not exist{nearest(dtype, DTYPES)}")
    config, params = load_model(path)
    if config.get("kind") != "latent_diffusion":
        raise RequestError(f"{path} is a {config.get('kind')}, which makes no pictures by itself: give the directory of a latent diffusion model")
    try:
        params = jax.tree.map(lambda a: jnp.asarray(a, DTYPES[dtype]), params)
        first_stage = params.pop("first_stage", None)
        params.pop("logvar", None)  # of the training loss alone
        return Pipeline(build(config, params, first_stage, dtype), dtype=dtype, name=str(name), parallel=parallel, devices=devices)
    except ConfigError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from None


@dataclasses.dataclass
class Batch:
    """One finished batch: the places of its pictures in the request, and the pictures uint8 [n, H, W, 3]."""

    places: range
    images: np.ndarray


class Pipeline:
    """Text (or nothing) to pictures. Calling it returns uint8 [n, H, W, 3]; `stream` yields batches as they are done.

    Only the number of steps, the batch, the size and the sampler are compiled in; prompts, seeds, guidance and eta are traced.
    """

    def __init__(self, model: LatentDiffusion, *, dtype: str = "float32", name: str = "", parallel: Mode = "jit", devices: int | None = None):
        if devices is not None and not 1 <= devices <= jax.device_count():
            raise RequestError(f"devices must be from 1 to {jax.device_count()}, not {devices}")
        self.mesh = make_mesh(devices)
        self.model = jax.device_put(model, NamedSharding(self.mesh, PartitionSpec()))
        self.dtype, self.name, self.parallel = dtype, name, parallel
        self.sampling = {"steps": 50, "guidance": 5.0, "eta": 0.0, "sampler": "ddim", "grid": "uniform", **model.config.get("sampling", {})}
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, prompts: str | Sequence[str], **request: Any) -> np.ndarray:
        """Pictures uint8 [n, H, W, 3]; see `stream` for the request."""
        return np.concatenate([batch.images for batch in self.stream(prompts, **request)])

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int | Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        eta: float | None = None,
        sampler: str | None = None,
        grid: str | None = None,
        size: tuple[int, int] | None = None,
        batch: int | None = None,
    ) -> Iterator[Batch]:
        """Checks the request at once, and returns an iterator over finished batches.

        One picture per (prompt, seed): equally many of both, or one of either. ``seeds`` default to 0, 1, ...; ``guidance`` is one scale or one
        per picture, 1 for none; ``size`` is (height, width) in pixels; ``batch`` pictures are made at a time (at most 8 by default). What is None
        is the model's own default.
        """
        prompts, seeds = pair([prompts] if isinstance(prompts, str) else list(prompts), seeds)
        n, devices = len(prompts), self.mesh.devices.size
        steps, guidance = self.pick("steps", steps), self.pick("guidance", guidance)
        sampler, eta = self.pick("sampler", sampler), self.pick("eta", eta)
        size = self.check_size(tuple(self.pick("size", size)))
        batch = batch or min(n, 8)
        if batch < 1:
            raise RequestError(f"batch must be at least 1, not {batch}")
        batch = -(-batch // devices) * devices
        scales = np.broadcast_to(np.asarray(guidance, np.float32), n) if np.ndim(guidance) == 0 or len(guidance) == n else None
        if scales is None:
            raise RequestError(f"{len(guidance)} guidance scales for {n} pictures: give one, or one for each")
        if not np.isfinite(scales).all() or not np.isfinite(eta) or eta < 0:
            raise RequestError("guidance must be a finite number, and eta a finite number of at least 0")
        nodes = self.nodes(sampler, self.pick("grid", grid), steps, eta)

        conditioner = self.model.conditioner
        encoded, null = conditioner.encode(prompts), conditioner.encode_null(batch)
        program = self.program(sampler, size)

        def batches() -> Iterator[Batch]:
            for start in range(0, n, batch):
                # The last batch is filled up with its last picture: every batch has one shape.
                places = np.minimum(np.arange(start, start + batch), n - 1)
                part = jax.tree.map(lambda a: a[places], encoded)
                images = program(self.model, nodes, part, null, np.asarray(seeds, np.uint32)[places], scales[places])
                done = range(start, min(start + batch, n))
                yield Batch(done, np.asarray(images)[: len(done)])

        return batches()

    def pick(self, setting: str, given: Any) -> Any:
        """What was given, or the model's own default."""
        return self.sampling[setting] if given is None else given

    def nodes(self, sampler: str, grid: str, steps: int, eta: float) -> Any:
        """The sampler's tables, or a RequestError."""
        if sampler not in SAMPLERS:
            raise RequestError(f"sampler {sampler!r} does not exist{nearest(sampler, SAMPLERS)}")
        schedule = self.model.schedule
        try:
            timesteps = step_grid(grid, steps, schedule.timesteps)
            return SAMPLERS[sampler].nodes(self._host_schedule(), timesteps, **({} if sampler == "ddpm" and not eta else {"eta": eta}))
        except ValueError as error:
            raise RequestError(str(error)) from None

    def _host_schedule(self) -> Any:
        return jax.device_get(self.model.schedule)

    def check_size(self, size: tuple[int, ...]) -> tuple[int, int]:
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
    seeds = [seeds] if isinstance(seeds, int) else list(range(len(prompts)) if seeds is None else seeds)
    if any(not 0 <= int(seed) < 2**32 for seed in seeds):
        raise RequestError("seeds must be from 0 to 4294967295")
    n = max(len(prompts), len(seeds))
    if len(prompts) not in (1, n) or len(seeds) not in (1, n):
        raise RequestError(f"{len(prompts)} prompts and {len(seeds)} seeds do not pair up: give equally many, or one of either")
    return prompts * (n // len(prompts)), seeds * (n // len(seeds))
