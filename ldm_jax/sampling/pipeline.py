"""What a person asks a model for, jitted as one program and run in batches of one size."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.convert.conversion import is_foreign, read_model
from ldm_jax.convert.diffusers.hub import fetched
from ldm_jax.diffusion.adaptive import DPMAdaptive
from ldm_jax.diffusion.samplers import SAMPLERS, Inversion, padded, time_grid
from ldm_jax.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    ReaderError,
    RequestError,
    TargetError,
    did_you_mean,
)
from ldm_jax.io.checkpoint import find_model, load_model
from ldm_jax.kernels import Kernels, cores, for_platform
from ldm_jax.models.build import DTYPES, build, check_params, construct
from ldm_jax.models.ldm import LatentDiffusion
from ldm_jax.models.unet import layout
from ldm_jax.sampling.program import Form, Made, Plan, Rows, decode_part, generate
from ldm_jax.sampling.requests import Given, Settings, arrays, checked

LOG = logging.getLogger(__name__)

__all__ = ["OFFERED", "Batch", "Given", "Pipeline", "RequestError", "Settings", "load"]

# Names of samplers; inversion leads from pictures to noise.
OFFERED = [name for name, sampler in SAMPLERS.items() if not isinstance(sampler, Inversion)]

Mode = Literal["jit", "pmap"]


def load(
    name: str | Path = "emoji",
    *,
    config: str | Path | None = None,
    ema: bool | None = None,
    dtype: str | None = None,
    parallel: Mode = "jit",
    devices: int | None = None,
) -> "Pipeline":
    """Loads a model directory, a shipped model, or, converted in memory, a checkpoint of the original or a folder of diffusers.

    "org/name" is one on the Hugging Face Hub.

    ``config`` is a checkpoint's YAML (None: names and shapes tell), ``ema`` whether to take its averaged weights (None: where it has them).
    ``dtype`` is what the model computes in: "float32" (the default on CPU), "bfloat16" (the default elsewhere) or "float16". ``parallel`` spreads
    batches over the first ``devices`` devices (all by default) with "jit" or "pmap". Raises RequestError, CheckpointError or ConfigError.
    """
    path = find_model(fetched(name))
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} does not exist{did_you_mean(dtype, DTYPES)}")
    foreign = is_foreign(path)
    if not foreign and (config is not None or ema is not None):
        raise RequestError(
            f"{path} is a model directory, which says itself what it is: leave config and ema out"
        )
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
    """One finished batch: the places of its pictures in the request, the pictures uint8 [n, H, W, 3], and their ``progress`` [n, k, H, W, 3]."""

    places: range
    images: np.ndarray
    progress: np.ndarray | None = None


class Pipeline:
    """A person's request to pictures. Calling it returns uint8 [n, H, W, 3]; `stream` yields batches as they are done.

    Rows of a batch are split over all devices, or the first ``devices``. After `cores.use_cores` a pipeline without ``devices`` is of one CPU, whose
    cores divide what goes through the networks.

    Which task it is follows from what is given (`Given`). Only the number of steps, the batch, the size, the sampler, its cache and the kind of
    task are compiled in; prompts, seeds, pictures, masks, strength, guidance, eta and temperature are traced.
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
            raise RequestError(
                f"parallel {parallel!r} does not exist{did_you_mean(parallel, get_args(Mode))}"
            )
        self.cores = cores.devices() if devices is None and parallel == "jit" else []
        self.mesh = cores.mesh_of(jax.devices()[: 1 if self.cores else devices])
        whole = NamedSharding(self.mesh, PartitionSpec())
        kernels = for_platform(self.mesh.devices.flat[0].platform)
        self.model = jax.device_put(model, kernels.weight_formats(model, whole))
        self.dtype, self.name = dtype, name
        self.parallel: Mode = parallel
        own = model.config.get("sampling", {})
        if not model.conditioner.guided:
            own = own | {"guidance": 1.0}
        elif (scale := model.conditioner.default_guidance) is not None:
            own = {"guidance": scale} | own
        self.defaults: Settings = construct(Settings, "sampling", own)
        self._schedule = jax.device_get(model.schedule)
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._shared: dict[int, LatentDiffusion] = {}

    def settings(self, **given: Any) -> Settings:
        """The model's own settings but for what is given and not None; its eta and temperature are of its own sampler alone, its temperature of an
        eta that is not given as 0.
        """
        known = [field.name for field in dataclasses.fields(Settings)]
        for name in given:
            if name not in known:
                raise RequestError(f"setting {name!r} does not exist{did_you_mean(name, known)}")
        own = self.defaults
        if given.get("sampler") not in (None, own.sampler):
            own = dataclasses.replace(own, eta=Settings.eta, temperature=Settings.temperature)
        elif given.get("eta") == 0:
            own = dataclasses.replace(own, temperature=Settings.temperature)
        return dataclasses.replace(own, **{k: v for k, v in given.items() if v is not None})

    def __call__(self, prompts: str | Sequence[str] | None = None, **request: Any) -> np.ndarray:
        """Pictures uint8 [n, H, W, 3]; see `stream` for the request."""
        return np.concatenate([batch.images for batch in self.stream(prompts, **request)])

    def stream(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        seeds: int | Sequence[int] | None = None,
        batch: int | None = None,
        progress_every: int = 0,
        **request: Any,
    ) -> Iterator[Batch]:
        """Checks the request at once, and returns an iterator over finished batches.

        ``request`` are fields of `Given` and of `Settings`. One picture per (prompt or class or image, seed): equally many of both, or one of
        either. ``seeds`` default to 0, 1, ...; ``batch`` pictures are made at a time (at most 8 by default). ``progress_every`` k > 0 also shows the
        x0 predicted in every k-th call of the model.
        """
        fields = {field.name for field in dataclasses.fields(Given)}
        known = [*sorted(fields), *(field.name for field in dataclasses.fields(Settings))]
        for name in set(request) - set(known):
            raise RequestError(f"setting {name!r} does not exist{did_you_mean(name, known)}")
        given = Given(prompts, **{name: request.pop(name) for name in fields & set(request)})
        given, chosen = checked(self.model, given), self.settings(**request)
        if batch is not None and batch < 1:
            raise RequestError(f"batch must be at least 1, not {batch}")
        if progress_every < 0:
            raise RequestError(f"progress_every must be at least 0, not {progress_every}")
        size = self.check_size(chosen.size)
        canvas, rows = arrays(
            self.model, given, chosen, seeds, size if request.get("size") else None
        )
        plan, n, devices = self.plan(chosen, given), len(rows.seeds), self.mesh.devices.size
        count = -(-(batch or min(n, 8)) // devices) * devices
        calls = range(
            0
            if isinstance(SAMPLERS[chosen.sampler], DPMAdaptive)
            else len(jax.tree.leaves(plan.nodes)[0])
        )
        shown = tuple(calls[progress_every - 1 :: progress_every]) if progress_every else ()
        if progress_every and not shown:
            raise RequestError(
                f"progress_every {progress_every}: {chosen.sampler} shows no such step here"
            )
        made = [i for i, call in enumerate(shown) if plan.start is None or call >= plan.start]
        form, (height, width) = self.form(chosen, canvas.size, count, shown), canvas.keep

        def batches() -> Iterator[Batch]:
            for first in range(0, n, count):
                # The last batch is filled up with its last picture: every batch has one shape.
                places = np.minimum(np.arange(first, first + count), n - 1)
                part = jax.tree.map(lambda a, places=places: a[places], rows)
                images, progress = (
                    None if a is None else np.asarray(a)[..., :height, :width, :]
                    for a in self.run(chosen.sampler, form, plan, part)
                )
                assert images is not None
                done = range(first, min(first + count, n))
                yield Batch(
                    done,
                    images[: len(done)],
                    None if progress is None else progress[: len(done)][:, np.array(made, int)],
                )

        return batches()

    def plan(self, chosen: Settings, given: Given) -> Plan:
        """The sampler's tables, or a RequestError."""
        if chosen.sampler not in OFFERED:
            raise RequestError(
                f"sampler {chosen.sampler!r} does not exist{did_you_mean(chosen.sampler, OFFERED)}"
            )
        sampler, noise = SAMPLERS[chosen.sampler], noise_of(chosen)
        adaptive = isinstance(sampler, DPMAdaptive)
        if (
            adaptive
            and given.image is not None
            and (given.mask is not None or given.outpaint is not None)
        ):
            raise RequestError(
                f"{chosen.sampler} chooses its own steps and keeps no part of an image: take another sampler"
            )
        try:
            timesteps = time_grid(chosen.grid, chosen.steps, self._schedule)
            nodes = sampler.nodes(self._schedule, timesteps, **noise)
            if given.variation is not None:
                return Plan(
                    nodes, inversion=SAMPLERS["ddim_inversion"].nodes(self._schedule, timesteps)
                )
            if given.strength is None:
                return Plan(nodes)
            # The last steps alone, padded to as many as all: every strength is one program, which skips what it does not make.
            count = max(int(given.strength * len(timesteps)), 1)
            part = sampler.nodes(self._schedule, timesteps[:count], **noise)
        except ValueError as error:
            raise RequestError(str(error)) from None
        # DDIM's noise is the original's, of the step above the first that is made; others begin where their first call stands.
        last = np.asarray(self._schedule.timesteps - 1, timesteps.dtype)
        above = timesteps[count] if count < len(timesteps) else last
        level = (above if chosen.sampler == "ddim" else timesteps[count - 1]).astype(
            jax.dtypes.canonicalize_dtype(timesteps.dtype)
        )
        if adaptive:
            return Plan(part, level=level)
        return Plan(*padded(part, len(jax.tree.leaves(nodes)[0])), level)

    def check_size(self, size: Sequence[int]) -> tuple[int, int]:
        """(height, width) if the model can make it."""
        factor = self.model.first_stage.downsampling * 2 ** (len(self.model.unet.channel_mult) - 1)
        if len(size) != 2 or min(size) < factor or size[0] % factor or size[1] % factor:
            raise RequestError(
                f"size {'x'.join(map(str, size))}: height and width must be multiples of {factor}"
            )
        return size[0], size[1]

    def form(
        self, chosen: Settings, size: tuple[int, int], rows: int, progress: tuple[int, ...] = ()
    ) -> Form:
        """What is compiled in for batches of ``rows``, or a RequestError. Under jit, ``decode_batch`` is that of all devices together."""
        tile, least = chosen.tile, 4 * self.model.first_stage.downsampling
        if tile and (tile < least or tile % self.model.first_stage.downsampling):
            raise RequestError(
                f"tile must be 0 or a multiple of {least // 4} from {least} pixels on, not {tile}"
            )
        if chosen.decode_batch is not None and chosen.decode_batch < 0:
            raise RequestError(f"decode_batch must be at least 0, not {chosen.decode_batch}")
        devices, platform = self.mesh.devices.size, self.mesh.devices.flat[0].platform
        part = decode_part(platform, size, rows // devices, chosen.decode_batch)
        part *= devices if self.parallel == "jit" else 1
        interval, depth, deepest = (
            chosen.cache_interval,
            chosen.cache_depth,
            len(layout(self.model.unet).input),
        )
        if interval < 1:
            raise RequestError(f"cache_interval must be at least 1, not {interval}")
        if not 1 <= depth <= deepest:
            raise RequestError(f"cache_depth must be from 1 to {deepest}, not {depth}")
        if interval > 1 and isinstance(SAMPLERS[chosen.sampler], DPMAdaptive):
            raise RequestError(f"{chosen.sampler} chooses its own steps: leave cache_interval at 1")
        form = Form(size, progress, decode_batch=part, tile=tile)
        return (
            form
            if interval == 1
            else dataclasses.replace(form, cache_interval=interval, cache_depth=depth)
        )

    def run(self, sampler: str, form: Form, plan: Plan, rows: Rows) -> Made:
        """A batch, made by `program`."""
        program, model, _ = self.prepared(sampler, form, rows)
        return program(model, plan, rows)

    def prepared(
        self, sampler: str, form: Form, rows: Rows
    ) -> tuple[Callable[..., Made], LatentDiffusion, int]:
        """(program, the model where it runs, on how many cores) for a batch: a CPU's cores are as many as there are rows for that go through the
        network, two for a guided picture.
        """
        n = len(rows.seeds)
        count = cores.fewest(n if rows.null is None else 2 * n, len(self.cores) or 1)
        if apart := count > 1 and n % count == 0:
            each = math.gcd(-(-form.decode_batch // count), n // count)  # 0 is all
            form = dataclasses.replace(form, decode_batch=each if form.decode_batch else 0)
        return self.program(sampler, form, count, apart), self._on_cores(count), count

    def _on_cores(self, count: int) -> LatentDiffusion:
        """The model, where ``count`` cores of the CPU have it."""
        if count == 1:
            return self.model
        if count not in self._shared:
            self._shared[count] = cores.replicate(self.model, cores.mesh_of(self.cores[:count]))
        return self._shared[count]

    def program(
        self, sampler: str, form: Form, count: int = 1, apart: bool = False
    ) -> Callable[..., Made]:
        """The compiled function of a sampler and a form; jit compiles it once for each batch, number of steps and kind of task. On ``count`` cores of
        the CPU each makes pictures of its own if ``apart``, else they go through every call of the network together.
        """
        key = sampler, form, count, apart
        if key not in self._programs:
            mesh = self.mesh if count == 1 else cores.mesh_of(self.cores[:count])
            whole, rows = PartitionSpec(), PartitionSpec(cores.AXIS)
            platform = mesh.devices.flat[0].platform
            kernels = partial(for_platform, platform, differentiable=False)
            step = partial(_generate, sampler=sampler, form=form)
            if apart or (count == 1 and self.parallel == "pmap"):
                each = jax.shard_map(
                    partial(step, kernels=kernels()),
                    mesh=mesh,
                    in_specs=(whole, whole, rows),
                    out_specs=rows,
                    check_vma=False,
                )
                program = jax.jit(each)
            elif count == 1:
                program = jax.jit(
                    partial(step, kernels=kernels(mesh)),
                    in_shardings=tuple(NamedSharding(mesh, spec) for spec in (whole, whole, rows)),
                    out_shardings=NamedSharding(mesh, rows),
                )
            else:
                same = NamedSharding(mesh, whole)
                step = partial(step, kernels=kernels(cores=mesh))
                program = jax.jit(step, in_shardings=same, out_shardings=same)
            self._programs[key] = program
        return self._programs[key]


def noise_of(chosen: Settings) -> dict[str, float]:
    """What is said to the sampler of the noise it adds, or RequestError. An eta of 0 is not said: it is the sampler's own, 1 for ancestral ones."""
    for name in ("eta", "temperature"):
        if not np.isfinite(value := getattr(chosen, name)) or value < 0:
            raise RequestError(f"{name} must be a number of at least 0, not {value}")
    said = {"eta": chosen.eta} if chosen.eta else {}
    if chosen.temperature == 1:
        return said
    options = SAMPLERS[chosen.sampler].options
    if "temperature" not in options:
        raise RequestError(
            f"the {chosen.sampler} sampler has no temperature; take ddim with eta, or ddpm"
        )
    if "eta" in options and not chosen.eta:
        raise RequestError(
            "temperature is of the noise that ddim adds, which is none without eta: give eta too, up to 1"
        )
    return said | {"temperature": chosen.temperature}


def _generate(
    model: Any, plan: Plan, rows: Rows, *, sampler: str, form: Form, kernels: Kernels
) -> Made:
    return generate(model.with_kernels(kernels), SAMPLERS[sampler], plan, rows, form)
