"""Requests to pictures: a model, its compiled programs, and batches of one size."""

import copy
import dataclasses
import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.conditioning.base import REQUEST_OPTIONS
from ldm_jax.conditioning.words import section_of
from ldm_jax.convert.controlnet import read_controlnet
from ldm_jax.convert.conversion import is_foreign, read_model, replace_parts
from ldm_jax.convert.diffusers.hub import fetched
from ldm_jax.convert.embedding import add_embeddings, read_embedding, split_word
from ldm_jax.convert.lora import merge_loras, pairs_of
from ldm_jax.data.pixels import PixelFormat, model_pixels
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
from ldm_jax.io.checkpoint import aligned, find_model, load_model
from ldm_jax.io.resources import release_memory
from ldm_jax.kernels import Kernels, cores, for_platform
from ldm_jax.models.build import (
    DTYPES,
    build,
    build_conditioner,
    build_first_stage,
    check_params,
)
from ldm_jax.models.ldm import FirstStage, LatentDiffusion, to_float, to_uint8
from ldm_jax.models.unet import layout
from ldm_jax.sampling.classifier import load_classifier, take_classes, with_labels
from ldm_jax.sampling.decoding import decode_part
from ldm_jax.sampling.inputs import Inputs, check_request, make_inputs
from ldm_jax.sampling.kinds import pipeline_class
from ldm_jax.sampling.program import Pictures, SamplingConfig, Steps, finish, generate
from ldm_jax.sampling.programs import ProgramStore, shape_and_type
from ldm_jax.sampling.refining import check_pair, divide, without_others
from ldm_jax.sampling.request import (
    OF_SAMPLER,
    OPTIONS,
    SETTINGS,
    Request,
    check_names,
    own_eta,
)

LOG = logging.getLogger(__name__)

# Names of samplers; inversion leads from pictures to noise.
OFFERED = [name for name, sampler in SAMPLERS.items() if not isinstance(sampler, Inversion)]

# Pixels of a batch from which a program's memory is compared with what is free.
LARGE = 2**21

_RELEASED = 2**29  # bytes

Mode = Literal["jit", "pmap"]


@dataclasses.dataclass
class Batch:
    """A finished batch.

    Attributes:
      places: The positions of its pictures in the request.
      images: uint8 [n, H, W, 3].
      progress: The predictions that were requested, uint8 [n, k, H, W, 3].
      done: The fraction of its steps that is done; below 1 the images are predictions, see
        `Pipeline.watch`.
    """

    places: range
    images: np.ndarray
    progress: np.ndarray | None = None
    done: float = 1.0


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked request: what is compiled, and the arrays of its pictures.

    Attributes:
      own: The request with all settings filled in.
      config: What is compiled in beside the sampler.
      steps: The sampler's tables.
      inputs: One row for each picture.
      count: Pictures in a batch.
      keep: Height and width of the pictures; the rest of the canvas is cut off.
      made: Which of the computed predictions are returned.
      then: The job of the refiner, which takes over.
    """

    own: Request
    config: SamplingConfig
    steps: Steps
    inputs: Inputs
    count: int
    keep: tuple[int, int]
    made: list[int]
    then: "Job | None" = None

    @property
    def sampler(self) -> str:
        """Name of the sampler."""
        assert self.own.sampler is not None
        return self.own.sampler

    def rows(self, places: range) -> Inputs:
        """Returns a batch of these pictures, filled up with the last: all have one shape."""
        chosen = np.minimum(np.arange(places.start, places.start + self.count), places.stop - 1)
        return jax.tree.map(lambda a: a[chosen], self.inputs)

    def parts(self) -> Iterator[tuple[range, Inputs]]:
        """Yields the places and the arrays of each batch."""
        n = len(self.inputs.seeds)
        for first in range(0, n, self.count):
            places = range(first, min(first + self.count, n))
            yield places, self.rows(places)

    def cut(self, images: np.ndarray, places: range) -> np.ndarray:
        """Returns the part of [b, ..., H, W, 3] that was requested."""
        height, width = self.keep
        return images[: len(places), ..., :height, :width, :]

    def memory(self) -> "reported_memory":
        """Returns a context in which running out of memory becomes a RequestError."""
        return reported_memory(f"{self.count} pictures of {self.keep[0]}x{self.keep[1]} at a time")


P = ParamSpec("P")
R = TypeVar("R")


def _with_signature_of(other: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Gives a method the explicit parameters of another, for editors and `inspect`."""

    def decorate(method: Callable[..., R]) -> Callable[P, R]:
        result = method.__annotations__["return"]
        signature = inspect.signature(other).replace(return_annotation=result)
        method.__signature__ = signature  # type: ignore[attr-defined]
        method.__annotations__ = {**other.__annotations__, "return": result}
        return method

    return decorate


class Pipeline:
    """A model that samples pictures.

    Calling it returns uint8 [n, H, W, 3]; `stream` yields each finished batch. Rows of a
    batch are split over all devices, or the first ``devices``. After `ldm_jax.use_cores` a pipeline
    without ``devices`` computes on the cores of one CPU.

    The number of steps, the batch, the size, the sampler, its cache and the kind of task are
    compiled in; prompts, seeds, pictures, masks, strength, guidance, eta and temperature are
    traced, as are the sampler's options but for those that change its number of calls.

    A subclass samples another kind of model; `ldm_jax.sampling.kinds` lists them.

    Attributes:
      refused: Settings that this kind of model does not have.
      refused_parts: Options of `load` that it has no use for.
    """

    refused: ClassVar[tuple[str, ...]] = ("top_k", "top_p")
    refused_parts: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: Any,
        *,
        dtype: str = "float32",
        name: str = "",
        parallel: Mode = "jit",
        devices: int | None = None,
        programs: ProgramStore | None = None,
        refiner: "Pipeline | None" = None,
    ):
        if devices is not None and not 1 <= devices <= jax.device_count():
            raise RequestError(f"devices must be from 1 to {jax.device_count()}, not {devices}")
        if parallel not in get_args(Mode):
            raise RequestError(
                f"parallel {parallel!r} does not exist{did_you_mean(parallel, get_args(Mode))}"
            )
        self.cores = cores.devices() if devices is None and parallel == "jit" else []
        self.mesh = cores.mesh_of(cores.all_devices()[: 1 if self.cores else devices])
        whole = NamedSharding(self.mesh, PartitionSpec())
        kernels = for_platform(cores.platform_of(self.mesh))
        self.model = jax.device_put(model, kernels.weight_formats(model, whole))
        if refiner is not None:
            check_pair(model, refiner.model)
        self.dtype, self.name, self.refiner = dtype, name, refiner
        self.parallel: Mode = parallel
        self.defaults = default_settings(model)
        self._schedule = jax.device_get(getattr(model, "schedule", None))
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._executables: dict[Any, Callable[..., Any]] = {}
        self._store = programs
        self._shared: dict[int, LatentDiffusion] = {}

    # ------------------------------------------------------------------------------- adapters

    def with_lora(self, *loras: str | Path | tuple[str | Path, float]) -> "Pipeline":
        """Returns a pipeline whose weights have LoRA files merged in; this one stays as it is.

        Both share their compiled programs, and the weights that the files do not change.

        Args:
          loras: Files of kohya, LyCORIS, peft or diffusers, each as "FILE", "FILE:STRENGTH" or
            (FILE, strength).

        Raises:
          CheckpointError: A file cannot be read, or does not fit the model.
        """
        self.check_parts(lora=loras)
        try:
            pairs = pairs_of(loras)
            params = merge_loras(self.model.config, self.model.params, pairs)
        except (ConversionError, ReaderError, TargetError) as error:
            raise CheckpointError(" ".join(str(error).split())[:600]) from error
        merged = self._with_model(dataclasses.replace(self.model, params=params))
        merged.name = " + ".join([self.name, *(f"{file}:{s:g}" for file, s in pairs)])
        return merged

    def with_control(self, *controls: str | Path) -> "Pipeline":
        """Returns a pipeline whose UNet is also controlled by ControlNets, after those it has.

        Args:
          controls: Files of the original's, or folders or files of diffusers.

        Raises:
          CheckpointError: A file cannot be read, or does not fit the model.
        """
        self.check_parts(control=controls)
        model, dtype = self.model, DTYPES[self.dtype]
        nets, params = list(model.controls), dict(model.params.get("controls", {}))
        for path in controls:
            try:
                net, arrays = read_controlnet(find_model(fetched(path)), model.unet)
            except (ConversionError, ReaderError, TargetError) as error:
                raise CheckpointError(" ".join(str(error).split())[:600]) from error
            params[str(len(nets))] = jax.tree.map(lambda a: jnp.asarray(a, dtype), arrays)
            nets.append(net)
        params = {**model.params, "controls": params}
        controlled = self._with_model(model.replace(controls=tuple(nets), params=params))
        controlled.name = " + ".join([self.name, *map(str, controls)])
        return controlled

    def _with_model(self, model: LatentDiffusion) -> "Pipeline":
        """Returns a copy of this pipeline, sharing its programs, with another model.

        A program is traced again where the model's networks or the shapes of its weights differ.
        """
        copied = copy.copy(self)
        whole = NamedSharding(self.mesh, PartitionSpec())
        kernels = for_platform(cores.platform_of(self.mesh))
        copied.model = jax.device_put(model, kernels.weight_formats(model, whole))
        copied._shared = {}
        return copied

    @classmethod
    def check_parts(cls, **parts: Any) -> None:
        """Raises RequestError for an option of `load` that this kind of model has no use for."""
        for name, value in parts.items():
            if value and name in cls.refused_parts:
                raise RequestError(f"{name} is not for this kind of model: leave it out")

    @staticmethod
    def build(config: dict[str, Any], params: dict[str, Any], dtype: str) -> Any:
        """Builds the model of a model directory; raises ConfigError.

        Args:
          config: Of ``config.json``.
          params: By part; "conditioner" is {} where it has none.
          dtype: The type that the model computes in.
        """
        first_stage = params.pop("first_stage", None)
        params.pop("logvar", None)  # of the training loss alone
        return build(config, params, first_stage, dtype)

    check_params: ClassVar[Callable[[Any], None]] = staticmethod(check_params)

    # ------------------------------------------------------------------------------- requests

    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        classes: int | str | Sequence[int | str] | None = None,
        semantic_map: Any = None,
        layout: Any = None,
        embeddings: Any = None,
        neighbors: int | None = None,
        database: Any = None,
        condition: Any = None,
        negative: str | Sequence[str] | None = None,
        image: Any = None,
        mask: Any = None,
        depth: Any = None,
        outpaint: Sequence[int] | None = None,
        strength: float | None = None,
        variation: float | Sequence[float] | None = None,
        noise: Any = None,
        control_image: Any = None,
        control_scale: float | Sequence[float] | None = None,
        control_edges: Sequence[float] | None = None,
        classifier_scale: float | Sequence[float] | None = None,
        toward: tuple[Sequence[Any], Sequence[int], Sequence[float]] | None = None,
        seeds: int | Sequence[int] | None = None,
        batch: int | None = None,
        progress_every: int = 0,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        eta: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        sampler: str | None = None,
        sampler_options: Mapping[str, float] | None = None,
        noise_dropout: float | None = None,
        grid: str | Sequence[float] | None = None,
        size: Sequence[int] | None = None,
        guidance_rescale: float | Sequence[float] | None = None,
        guidance_interval: Sequence[float] | None = None,
        renoise_null: bool | None = None,
        original_size: Sequence[int] | None = None,
        crop: Sequence[int] | None = None,
        target_size: Sequence[int] | None = None,
        noise_level: int | None = None,
        aesthetic_score: float | None = None,
        negative_aesthetic_score: float | None = None,
        switch: float | None = None,
        decode_batch: int | None = None,
        tile: int | None = None,
        patch: int | None = None,
        cache_interval: int | None = None,
        cache_depth: int | None = None,
    ) -> np.ndarray:
        """Samples pictures; the arguments are the fields of `Request`.

        Returns:
          uint8 [n, H, W, 3].

        Raises:
          RequestError: The model does not take the request.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        return np.concatenate([batch.images for batch in self.stream(**given)])

    @_with_signature_of(__call__)
    def stream(self, prompts: str | Sequence[str] | None = None, **given: Any) -> Iterator[Batch]:
        """Checks the request at once and returns an iterator over finished batches.

        The arguments are those of calling the pipeline.
        """
        return self.batches(Request(prompts=prompts, **given))

    def settings(self, **given: Any) -> Request:
        """Returns a request with all settings: those given and not None, else the model's own."""
        check_names(list(given), SETTINGS)
        return self.complete(Request(**given))

    def complete(self, request: Request) -> Request:
        """Returns the request with the model's own settings where it has None.

        The model's eta, temperature, options and dropout of noise apply only to its default
        sampler; temperature falls back to 1 where eta is 0. Without an eta the sampler's own
        holds.
        """
        own = self.defaults.settings()
        plain = {name: OPTIONS[name].metadata["own"] for name in OF_SAMPLER}
        if request.sampler not in (None, own["sampler"]):
            own |= plain
        elif request.eta == 0:
            own["temperature"] = plain["temperature"]
        given = {name: v for name, v in request.settings().items() if v is not None}
        settings = {**own, **given}
        if settings["eta"] is None:
            settings["eta"] = own_eta(settings["sampler"])
        return dataclasses.replace(request, **settings)

    def batches(self, request: Request) -> Iterator[Batch]:
        """Like `stream`, of a `Request`."""
        return self.run(self.job(request))

    def job(self, request: Request) -> Job:
        """Checks a request and returns the arrays of its pictures.

        Raises:
          RequestError: The model does not take the request.
        """
        if self.refiner is not None:
            return self._refined(request, self.refiner)
        request, labels = take_classes(self.model, request)
        request = self.check(request)
        own = self.complete(request)
        if request.switch is not None:
            raise RequestError("switch needs a refiner: give one")
        assert own.size is not None
        self.check_size(own.size)
        conditioner = self.model.conditioner
        request = conditioner.resolve(self.model.params["conditioner"], request, self.mesh)
        canvas, inputs = make_inputs(self.model, request, own)
        inputs = with_labels(self.model, inputs, labels, own)
        steps, devices = self.steps(own), self.mesh.devices.size
        count = -(-(request.batch or min(len(inputs.seeds), 8)) // devices) * devices
        shown, made = self._shown(own, steps)
        config = self.config(own, canvas.size, count, shown)
        return Job(own, config, steps, inputs, count, canvas.keep, made)

    def run(self, job: Job) -> Iterator[Batch]:
        """Samples the pictures of a job, batch after batch."""
        for places, part in job.parts():
            with job.memory():
                result = self._compute(job, part)
                pipe, last = self, job
                if job.then is not None and self.refiner is not None:
                    pipe, last = self.refiner, job.then
                    part = last.rows(places)._replace(latents=result.latents)
                    result = pipe._compute(last, part)
                images = np.asarray(result.images)
                progress = None if result.progress is None else np.asarray(result.progress)
            images = pipe._finite(images, result, last.own, last.config, part)
            if progress is not None:
                progress = job.cut(progress[:, np.array(job.made, int)], places)
            yield Batch(places, job.cut(images, places), progress)

    def watch(self, request: Request, every: int) -> Iterator[Batch]:
        """Like `batches`, but also yields each batch every ``every`` steps, as predicted then.

        Every part of a batch is a call of one compiled program, so a caller that stops iterating
        ends the sampling. A sampler that chooses its own steps, variations, cached features and a
        model with a refiner are sampled at once.
        """
        if every < 1:
            raise RequestError(f"every must be at least 1, not {every}")
        job = self.job(request)
        whole = SAMPLERS[job.sampler].adaptive or job.steps.inversion is not None
        whole |= job.then is not None
        if whole or job.config.cache_interval > 1 or job.config.progress:
            return self.run(job)
        return self._run_in_parts(job, every)

    def _run_in_parts(self, job: Job, every: int) -> Iterator[Batch]:
        steps = job.steps
        stop = len(jax.tree.leaves(steps.nodes)[0])
        first = 0 if steps.start is None else int(steps.start)
        for places, part in job.parts():
            state = jax.tree.map(
                lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._state(job, part)
            )
            for begin in range(first, stop, every):
                end = min(begin + every, stop)
                now = steps._replace(part=np.array([begin, end], np.int32))
                with job.memory():
                    part = part._replace(state=state)
                    result = self.compute(job.sampler, job.config, now, part)
                    images = np.asarray(result.images)
                    # From the host, as at first: arrays of devices would be another program.
                    state = jax.device_get(result.state)
                if end == stop:
                    images = self._finite(images, result, job.own, job.config, part)
                done = (end - first) / (stop - first)
                yield Batch(places, job.cut(images, places), done=done)

    def _state(self, job: Job, inputs: Inputs) -> Any:
        """Returns the shapes of `Inputs.state`."""
        stage, (h, w) = self.model.first_stage, job.config.size
        f = stage.downsampling
        x = jax.ShapeDtypeStruct((len(inputs.seeds), h // f, w // f, stage.channels), jnp.float32)
        return jax.eval_shape(lambda x: (SAMPLERS[job.sampler].init(x), x), x)

    def _compute(self, job: Job, part: Inputs) -> Pictures:
        return self.compute(job.sampler, job.config, job.steps, part)

    @_with_signature_of(__call__)
    def warmup(self, prompts: str | Sequence[str] | None = None, **given: Any) -> None:
        """Compiles the program of a request, or loads it, without running it.

        The arguments are those of calling the pipeline. A later call samples at once if its number
        of steps, batch, size, sampler and kind of task are the same.
        """
        job = self.job(Request(prompts=prompts, **given))
        n = len(job.inputs.seeds)
        self.executable(job.sampler, job.config, job.steps, job.rows(range(min(n, job.count))))
        if job.then is not None and self.refiner is not None:
            last, stage = job.then, self.model.first_stage
            sides = (side // stage.downsampling for side in last.config.size)
            latents = np.zeros((last.count, *sides, stage.channels), np.float32)
            rows = last.rows(range(min(n, last.count)))._replace(latents=latents)
            self.refiner.executable(job.sampler, last.config, last.steps, rows)

    def _refined(self, request: Request, refiner: "Pipeline") -> Job:
        """`job` of the model, with that of its refiner."""
        mine = check_request(self.model, without_others(request, self.model, refiner.model))
        other = without_others(request, refiner.model, self.model)
        hints: dict[str, Any] = dict.fromkeys(("control_image", "control_scale", "control_edges"))
        other = dataclasses.replace(other, **hints, strength=mine.strength)
        other = check_request(refiner.model, other)
        own = self.complete(mine)
        options: dict[str, Any] = {name: getattr(other, name) for name in REQUEST_OPTIONS}
        theirs = dataclasses.replace(own, **options, **hints)
        if own.progress_every:
            raise RequestError("progress_every takes no refiner: leave one of them out")
        assert own.size is not None
        self.check_size(own.size)
        canvas, first = make_inputs(self.model, mine, own)
        _, second = make_inputs(refiner.model, other, theirs)
        # Its latents are given: of an image it needs only the part that is kept.
        image = None if second.mask is None else second.image
        second = second._replace(variation=None, image=image)
        steps, left = divide(self.steps(own), own, self._schedule, sampler_options(own))
        devices = self.mesh.devices.size
        count = -(-(request.batch or min(len(first.seeds), 8)) // devices) * devices
        config = dataclasses.replace(self.config(own, canvas.size, count), decodes=False)
        last = refiner.config(theirs, canvas.size, count)
        then = Job(theirs, last, left, second, count, canvas.keep, [])
        return Job(own, config, steps, first, count, canvas.keep, [], then)

    def check(self, request: Request) -> Request:
        """Returns the request, checked against the model; see `check_request`."""
        self.refuse(request)
        return check_request(self.model, request)

    def refuse(self, request: Request) -> None:
        """Raises RequestError for a setting that this kind of model does not have.

        The value that `complete` gives it, as in the settings of a picture, is none.
        """
        for name in self.refused:
            value = getattr(request, name)
            if value is not None and value != getattr(self.defaults, name):
                raise RequestError(f"{name} is no setting of this kind of model: leave it out")

    def _shown(self, own: Request, steps: Steps) -> tuple[tuple[int, ...], list[int]]:
        """Returns the calls whose predictions are computed, and which of them are returned."""
        assert own.sampler is not None
        if not own.progress_every:
            return (), []
        adaptive = SAMPLERS[own.sampler].adaptive
        calls = range(0 if adaptive else len(jax.tree.leaves(steps.nodes)[0]))
        shown = tuple(calls[own.progress_every - 1 :: own.progress_every])
        if not shown:
            raise RequestError(
                f"progress_every {own.progress_every}: {own.sampler} has no such step here"
            )
        start = 0 if steps.start is None else steps.start
        return shown, [i for i, call in enumerate(shown) if call >= start]

    def steps(self, own: Request) -> Steps:
        """Returns the sampler's tables, or raises RequestError."""
        if own.sampler not in OFFERED:
            raise RequestError(
                f"sampler {own.sampler!r} does not exist{did_you_mean(own.sampler, OFFERED)}"
            )
        assert own.sampler is not None
        assert own.grid is not None
        assert own.steps is not None
        sampler, options, dropout = SAMPLERS[own.sampler], sampler_options(own), own.noise_dropout
        if sampler.adaptive and not own.mask is own.outpaint is None:
            raise RequestError(
                f"{own.sampler} chooses its own steps and keeps no part of an image: take another "
                "sampler"
            )
        try:
            timesteps = time_grid(own.grid, own.steps, self._schedule)
            nodes = sampler.nodes(self._schedule, timesteps, **options)
            if own.sampler_options and not all(
                np.isfinite(a).all() for a in jax.tree.leaves(nodes)
            ):
                raise RequestError(f"sampler_options {own.sampler_options} give NaN or infinity")
            if own.variation is not None:
                inversion = SAMPLERS["ddim_inversion"].nodes(self._schedule, timesteps)
                return Steps(nodes, inversion=inversion, noise_dropout=dropout)
            if own.strength is None:
                return Steps(nodes, noise_dropout=dropout)
            # The last steps alone, padded to as many as all: every strength is one program, which
            # skips the others.
            count = max(int(own.strength * len(timesteps)), 1)
            part = sampler.nodes(self._schedule, timesteps[:count], **options)
        except ValueError as error:
            raise RequestError(str(error)) from None
        # DDIM's noise is the original's, of the step above the first that is run; others start at
        # the timestep of their first call.
        last = np.asarray(self._schedule.timesteps - 1, timesteps.dtype)
        above = timesteps[count] if count < len(timesteps) else last
        level = above if own.sampler == "ddim" else timesteps[count - 1]
        level = level.astype(jax.dtypes.canonicalize_dtype(timesteps.dtype))
        if sampler.adaptive:
            return Steps(part, level=level)
        rows = len(jax.tree.leaves(nodes)[0])
        return Steps(*padded(part, rows), level, noise_dropout=dropout)

    def check_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Returns (height, width) if the model can make it."""
        factor = self.model.first_stage.downsampling * self.model.multiple
        if len(size) != 2 or min(size) < factor or size[0] % factor or size[1] % factor:
            raise RequestError(
                f"size {'x'.join(map(str, size))}: height and width must be multiples of {factor}"
            )
        return size[0], size[1]

    def config(
        self, own: Request, size: tuple[int, int], rows: int, progress: tuple[int, ...] = ()
    ) -> SamplingConfig:
        """Returns what is compiled in for batches of ``rows``, or raises RequestError.

        Under jit, ``decode_batch`` is that of all devices together.
        """
        assert own.tile is not None
        assert own.sampler is not None
        tile, f = own.tile, self.model.first_stage.downsampling
        if tile and (tile < 4 * f or tile % f):
            raise RequestError(f"tile must be 0 or a multiple of {f} from {4 * f} on, not {tile}")
        if own.decode_batch is not None and own.decode_batch < 0:
            raise RequestError(f"decode_batch must be at least 0, not {own.decode_batch}")
        devices, platform = self.mesh.devices.size, cores.platform_of(self.mesh)
        part = decode_part(platform, size, rows // devices, own.decode_batch)
        part *= devices if self.parallel == "jit" else 1
        patch = self._patch(own, size)
        interval, depth = own.cache_interval, own.cache_depth
        assert interval is not None
        assert depth is not None
        deepest = len(layout(self.model.unet).input)
        if interval < 1:
            raise RequestError(f"cache_interval must be at least 1, not {interval}")
        if not 1 <= depth <= deepest:
            raise RequestError(f"cache_depth must be from 1 to {deepest}, not {depth}")
        if interval > 1 and SAMPLERS[own.sampler].adaptive:
            raise RequestError(f"{own.sampler} chooses its own steps: leave cache_interval at 1")
        if own.renoise_null and not self.model.conditioner.guided:
            raise RequestError("renoise_null: this model has no null condition to step with")
        if own.renoise_null and not SAMPLERS[own.sampler].renoises:
            raise RequestError(
                f"renoise_null: {own.sampler} does not step with the model's noise; take "
                f"{' or '.join(name for name in OFFERED if SAMPLERS[name].renoises)}"
            )
        if own.renoise_null and not ((scale := np.asarray(own.guidance)) <= 1).all():
            raise RequestError(
                f"renoise_null (CFG++) takes a guidance from 0 to 1, not {scale.max():g}"
            )
        config = SamplingConfig(
            size,
            progress,
            decode_batch=part,
            tile=tile,
            patch=patch,
            renoise_null=bool(own.renoise_null),
        )
        if interval == 1:
            return config
        return dataclasses.replace(config, cache_interval=interval, cache_depth=depth)

    def _patch(self, own: Request, size: tuple[int, int]) -> int:
        """Returns the pixels of a patch that the UNet runs on, 0 for the whole picture."""
        model, patch = self.model, own.patch or 0
        step = 2 * model.first_stage.downsampling * 2 ** (len(model.unet.channel_mult) - 1)
        if patch < 0 or patch % step:
            raise RequestError(f"patch must be 0 or a multiple of {step}, not {patch}")
        if not patch or max(size) <= patch:
            return 0
        if not model.conditioner.by_patch:
            raise RequestError("patch: this condition has places in the whole picture: leave it 0")
        if (own.cache_interval or 1) > 1:
            raise RequestError("patch: leave cache_interval at 1")
        if model.controls:
            raise RequestError("patch: hints of a ControlNet are not cut along: leave it 0")
        return patch

    # ------------------------------------------------------------------------------- programs

    def compute(
        self, sampler: str, config: SamplingConfig, steps: Steps, inputs: Inputs
    ) -> Pictures:
        """Samples a batch by the compiled `program`."""
        program, model = self.executable(sampler, config, steps, inputs)
        return program(model, steps, inputs)

    def executable(
        self, sampler: str, config: SamplingConfig, steps: Steps, inputs: Inputs
    ) -> tuple[Callable[..., Pictures], LatentDiffusion]:
        """Returns (the compiled program of a batch, the model where it runs)."""
        program, model, count = self.prepare(sampler, config, inputs)
        leaves, tree = jax.tree.flatten((steps, inputs))
        # The program is its own function for every sampler, config and number of cores.
        key = program, tree, tuple(map(shape_and_type, leaves))
        if key not in self._executables:
            arguments = model, steps, inputs
            if self._store is None:
                compiled = program.lower(*arguments).compile()
            else:
                result = Pictures(0, 0 if config.progress else None, 0, 0, inputs.state)
                described = sampler, config, count, self.parallel, self.dtype
                compiled = self._store.get(program, arguments, result, *described)
            if math.prod(config.size) * len(inputs.seeds) >= LARGE:
                mesh = self.mesh if count == 1 else cores.mesh_of(self.cores[:count])
                cores.check_program(compiled, mesh)
            self._executables[key] = compiled
        return self._executables[key], model

    def prepare(
        self, sampler: str, config: SamplingConfig, inputs: Inputs
    ) -> tuple[Any, LatentDiffusion, int]:
        """Returns (the jitted function of a batch, the model where it runs, the number of cores).

        A CPU's cores are as many as there are rows for in the network, two for a guided picture.
        """
        n = len(inputs.seeds)
        count = cores.fewest(n if inputs.null is None else 2 * n, len(self.cores) or 1)
        if apart := count > 1 and n % count == 0:
            each = math.gcd(-(-config.decode_batch // count), n // count)  # 0 is all
            config = dataclasses.replace(config, decode_batch=each if config.decode_batch else 0)
        if count > 1 and count not in self._shared:
            mesh = cores.mesh_of(self.cores[:count])
            self._shared[count] = cores.replicate(self.model, mesh)
        model = self.model if count == 1 else self._shared[count]
        return self.program(sampler, config, count, apart), model, count

    def step_of(self, sampler: str, config: Any) -> Callable[..., Pictures]:
        """Returns the pure function of (model, steps, inputs, kernels=) that is compiled."""
        return partial(_generate, sampler=sampler, config=config)

    def program(
        self, sampler: str, config: SamplingConfig, count: int = 1, apart: bool = False
    ) -> Callable[..., Pictures]:
        """Returns the compiled function of a sampler and a config.

        jit compiles it once for each batch, number of steps and kind of task. On ``count`` cores of
        the CPU each makes pictures of its own if ``apart``, else they divide the rows of every call
        of the network.
        """
        key = sampler, config, count, apart
        if key not in self._programs:
            mesh = self.mesh if count == 1 else cores.mesh_of(self.cores[:count])
            whole, rows = PartitionSpec(), PartitionSpec(cores.AXIS)
            kernels = partial(for_platform, cores.platform_of(mesh), differentiable=False)
            step = self.step_of(sampler, config)
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

    # ------------------------------------------------------------------- numbers out of range

    def _finite(
        self,
        images: np.ndarray,
        result: Pictures,
        own: Request,
        config: SamplingConfig,
        inputs: Inputs,
    ) -> np.ndarray:
        """Returns the pictures if they are of finite numbers; decodes again in float32 if not.

        Raises:
          RequestError: They are not finite in float32 either; the message names the cause.
        """
        if np.asarray(result.finite).all():
            return images
        latents = np.asarray(result.latents)
        if np.isfinite(latents).all() and self.dtype != "float32":
            LOG.warning("the first stage overflows in %s: it decodes in float32", self.dtype)
            stage = self.model.first_stage
            params = jax.tree.map(lambda a: a.astype(jnp.float32), stage.params)
            stage = stage.replace(module=stage.module.clone(dtype=jnp.float32), params=params)
            pixels, finite = jax.jit(partial(finish, config=config))(stage, latents, inputs)
            if np.asarray(finite).all():
                return np.asarray(pixels)
        raise RequestError(self._cause(latents, own))

    def _cause(self, latents: np.ndarray, own: Request) -> str:
        """Returns why a result has NaN or infinite numbers, and what to change."""
        model = self.model
        params = {**model.params, "first_stage": model.first_stage.params}
        for path, leaf in jax.tree.leaves_with_path(params):
            if not bool(jnp.isfinite(leaf).all()):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                return f"the model's weights hold NaN or infinite numbers: {name}; get a sound file"
        if np.isfinite(latents).all():
            return "the first stage gives NaN or infinite pixels for these latents"
        last = float(jax.tree.leaves(self._schedule.alphas_cumprod)[0][-1])
        if model.objective == "eps" and last < 1e-6:
            return (
                "the latents are NaN: the schedule has zero terminal SNR, from which an epsilon "
                "model cannot start; the model's prediction type or rescale_betas_zero_snr is wrong"
            )
        hint = "--dtype float32 or bfloat16" if self.dtype == "float16" else "more --steps"
        return (
            f"the latents are NaN or infinite with sampler {own.sampler}, {own.steps} steps and "
            f"guidance {own.guidance}: try {hint}, another --sampler or a lower --guidance"
        )


class reported_memory:
    """Context in which running out of memory becomes a RequestError."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        text = str(error)
        ours = isinstance(error, MemoryError) or (
            isinstance(error, jax.errors.JaxRuntimeError)
            and re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory|bad_alloc", text)
        )
        if not ours:
            return
        found = re.search(r"allocat\w* (\d+) bytes", text)
        needed = f" ({text})" if isinstance(error, MemoryError) and text else ""
        needed = f" (one array needs {int(found[1]) / 2**30:.1f} GiB)" if found else needed
        raise RequestError(
            f"out of memory: {self.what}{needed}; lower --batch or --size, or try --decode_batch=1 "
            "and --tile"
        ) from None


def default_settings(model: LatentDiffusion) -> Request:
    """Returns a model's own settings: those of its config's "sampling", else the general ones."""
    own = dict(model.config.get("sampling", {}))
    if not model.conditioner.guided:
        own["guidance"] = 1.0
    elif model.conditioner.default_guidance is not None:
        own = {"guidance": model.conditioner.default_guidance, **own}
    try:
        check_names(list(own), SETTINGS)
        return Request(**{name: OPTIONS[name].metadata["own"] for name in SETTINGS} | own)
    except RequestError as error:
        raise ConfigError(f"sampling: {error}") from None


def sampler_options(own: Request) -> dict[str, float]:
    """Returns the sampler's options, or raises RequestError."""
    assert own.sampler is not None
    assert own.temperature is not None
    sampler, options = SAMPLERS[own.sampler], dict(own.sampler_options or {})
    known = sampler.options
    further = [name for name in known if name not in ("eta", "temperature")]
    for name, value in options.items():
        if name in ("eta", "temperature"):
            raise RequestError(f"sampler_options: {name} is a setting of its own")
        if name not in further:
            have = ", ".join(f"{each} ({known[each]:g})" for each in further) or "none"
            raise RequestError(
                f"sampler_options: the {own.sampler} sampler has no {name!r} (its options, and "
                f"their defaults: {have})"
            )
        if value < 0:
            raise RequestError(f"sampler_options: {name} must be at least 0, not {value}")
    if "eta" in known or own.eta:
        options["eta"] = own.eta or 0.0
    if own.noise_dropout:
        if not sampler.draws:
            raise RequestError(f"noise_dropout: the {own.sampler} sampler adds no noise")
        if "eta" in known and not own.eta:
            raise RequestError(f"noise_dropout: {own.sampler} adds no noise at eta 0: give eta too")
    if own.temperature == 1:
        return options
    if "temperature" not in known:
        raise RequestError(
            f"the {own.sampler} sampler has no temperature; take ddim with eta, or ddpm"
        )
    if "eta" in known and not own.eta:
        raise RequestError(
            f"temperature scales the noise that {own.sampler} adds, which is none without eta: "
            "give eta too"
        )
    return options | {"temperature": own.temperature}


def _generate(
    model: Any,
    steps: Steps,
    inputs: Inputs,
    *,
    sampler: str,
    config: SamplingConfig,
    kernels: Kernels,
) -> Pictures:
    return generate(model.with_kernels(kernels), SAMPLERS[sampler], steps, inputs, config)


# ----------------------------------------------------------------------------------- loading


def load(
    name: str | Path = "emoji",
    *,
    config: str | Path | None = None,
    ema: bool | None = None,
    dtype: str | None = None,
    parallel: Mode = "jit",
    devices: int | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    clip: str | Path | None = None,
    programs: str | Path | None = None,
    refiner: str | Path | None = None,
    lora: Sequence[str | Path | tuple[str | Path, float]] = (),
    embedding: Sequence[str | Path] = (),
    control: Sequence[str | Path] = (),
    prompt_weights: bool = False,
    clip_skip: int | None = None,
    classifier: str | Path | None = None,
) -> Pipeline:
    """Loads a model.

    Args:
      name: A model directory, a shipped model, a checkpoint of the original, a folder of diffusers
        (converted in memory), or "org/name" on the Hugging Face Hub.
      config: A checkpoint's YAML; None infers it from names and shapes.
      ema: Whether to take a checkpoint's averaged weights; None: where it has them.
      dtype: The type that the model computes in: "float32" (the default on CPU), "bfloat16" (the
        default elsewhere) or "float16".
      parallel: How batches are spread over devices: "jit" or "pmap".
      devices: The number of devices, the first ones; None for all.
      vae: A model or checkpoint whose first stage takes the place of the model's.
      text_encoder: A model or checkpoint whose text encoder takes the place of the model's.
      clip: A CLIP model that makes the vectors of prompts, for a model of embeddings.
      programs: A folder where compiled programs are kept, so that a later process does not compile
        them again; only its user may write there. See `ldm_jax.sampling.programs.ProgramStore`.
      refiner: A second model, which takes over at the request's ``switch``.
      lora: LoRA files to merge into the weights, as `Pipeline.with_lora` takes them.
      embedding: Textual inversion files, each "FILE" or "WORD=FILE"; without a word that of the
        file.
      control: ControlNets, as `Pipeline.with_control` takes them.
      prompt_weights: Whether prompts have weights, "(word:1.3)", and any length; see
        `ldm_jax.conditioning.prompts`.
      clip_skip: Which layer of CLIP's text encoder gives the context: 1 is the model's own, 2 the
        one before.
      classifier: A model of the task classifier, which guides pictures to ``classes``.

    Raises:
      RequestError, CheckpointError: The model cannot be loaded.
    """
    if refiner is not None and classifier is not None:
        raise RequestError("a refiner and a classifier do not go together: leave one of them out")
    dtype = check_dtype(dtype)
    parts = {"vae": vae, "text_encoder": text_encoder, "clip": clip}
    path, fields, params = read_parts(name, config, ema, **parts)
    cls = pipeline_class(fields.get("kind"))
    if cls is None:
        raise RequestError(
            f"{path} is a {fields.get('kind')}, which makes no pictures by itself: give a latent "
            "diffusion model, or --reconstruct a folder of pictures"
        )
    cls.check_parts(**parts, refiner=refiner, classifier=classifier, lora=lora, control=control)
    cls.check_parts(embedding=embedding, prompt_weights=prompt_weights, clip_skip=clip_skip)
    try:
        params = {"conditioner": {}, **as_dtype(params, dtype)}  # {} leaves no trace on disk
        fields, params = with_embeddings(fields, params, embedding)
        fields = with_prompts(fields, prompt_weights, clip_skip)
        model = cls.build(fields, params, dtype)
        store = None if programs is None else ProgramStore(programs)
        if store is None:
            cls.check_params(model)
        else:
            store.once(cls.check_params, model)
        if classifier is not None:
            guide = load_classifier(classifier, model)
            model = dataclasses.replace(model, classifier=guide)
        options: dict[str, Any] = {"parallel": parallel, "devices": devices}
        second = None
        if refiner is not None:
            second = load(refiner, dtype=dtype, programs=programs, **options)
        pipe = cls(model, dtype=dtype, name=str(name), programs=store, refiner=second, **options)
    except ConfigError as error:
        where = path if is_foreign(path) else path / "config.json"
        raise CheckpointError(f"{where}: {error}") from None
    pipe = pipe.with_lora(*lora) if lora else pipe
    return pipe.with_control(*control) if control else pipe


def with_embeddings(
    fields: dict[str, Any], params: dict[str, Any], files: Sequence[str | Path]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (model config, parameters) with the words of textual inversion files."""
    if not files:
        return fields, params
    try:
        words = [read_embedding(*split_word(str(file))) for file in files]
        return add_embeddings(fields, params, words)
    except (ConversionError, ReaderError, TargetError) as error:
        raise CheckpointError(" ".join(str(error).split())[:600]) from error


def with_prompts(fields: dict[str, Any], weights: bool, clip_skip: int | None) -> dict[str, Any]:
    """Returns a model config whose text encoders read prompts as `load` says."""
    own = {"weighted": True} if weights else {}
    own |= {} if clip_skip is None else {"clip_skip": clip_skip}
    if not own:
        return fields
    fields = json.loads(json.dumps(fields))
    towers = build_conditioner(fields).towers
    # Other conditioners of CLIP's towers say themselves which layer they take.
    if clip_skip is not None and not hasattr(towers.get(""), "clip_skip"):
        raise RequestError("clip_skip needs a model whose only text encoder is CLIP's")
    for name in towers:
        section_of(fields["conditioner"], name).update(own)
    if not towers:
        raise RequestError(f"{', '.join(own)}: this model has no text encoder")
    return fields


def read_parts(
    name: str | Path,
    config: str | Path | None = None,
    ema: bool | None = None,
    **parts: str | Path | None,
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Returns (path, model config, parameters) of what `load` and `load_first_stage` take.

    ``parts`` are those of `replace_parts`.
    """
    given: dict[str, Any] = {part: path for part, path in parts.items() if path is not None}
    path = find_model(fetched(name))
    try:
        if is_foreign(path):
            converted = read_model(path, config=config, ema=ema, **given)
            for line in converted.assumed:
                LOG.info("%s: assumed %s", path.name, line)
            if converted.lacks:
                raise RequestError(f"{path}: {converted.lacks[0]}")
            return path, converted.config, converted.params
        if config is not None or ema is not None:
            raise RequestError(
                f"{path} is a model directory with a config of its own: leave config and ema out"
            )
        fields, params = load_model(path)
        if given:
            fields, params = replace_parts(fields, params, **given)
        return path, fields, params
    except (ConversionError, ReaderError, TargetError) as error:
        raise CheckpointError(str(error)) from error


def load_first_stage(name: str | Path, *, dtype: str | None = None) -> FirstStage:
    """Returns the first stage of a model, or a first stage alone; see `load`."""
    return load_reconstructor(name, dtype=dtype)[0]


def load_reconstructor(
    name: str | Path, *, dtype: str | None = None
) -> tuple[FirstStage, PixelFormat]:
    """Returns a model's first stage as `load_first_stage`, and the format of its pictures."""
    dtype = check_dtype(dtype)
    path, fields, params = read_parts(name)
    if "first_stage" not in params:
        raise RequestError(f"{path} has no first stage")
    pixels = model_pixels(fields)
    try:
        module = build_first_stage(fields, dtype)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    params = jax.device_put(as_dtype(params["first_stage"], dtype))
    stage = FirstStage(params, fields.get("scale_factor", 1.0), module)
    mesh = cores.mesh_of(cores.all_devices()[:1])
    kernels = for_platform(cores.platform_of(mesh), differentiable=False)
    return stage.with_kernels(kernels), pixels


def reconstruct(stage: FirstStage, picture: np.ndarray) -> np.ndarray:
    """Returns what a first stage keeps of a picture.

    Edges are padded to a multiple of the downsampling factor; the padding is cut off again.

    Args:
      stage: The first stage.
      picture: uint8 [h, w, c], or float32 from 0 to 255.

    Returns:
      [h, w, c] of the same type and range.
    """
    h, w = picture.shape[:2]
    padding = ((0, -h % stage.downsampling), (0, -w % stage.downsampling), (0, 0))
    padded = np.pad(picture, padding, mode="edge")[None]
    with reported_memory(f"a picture of {h}x{w}"):
        pixels = np.asarray(_reconstruct(stage, padded), np.float32)
    if not np.isfinite(pixels).all():
        raise RequestError(
            "the reconstruction is NaN or infinite: try --dtype=float32, or get a sound file"
        )
    pixels = pixels[0, :h, :w]
    if picture.dtype == np.uint8:
        return np.asarray(to_uint8(jnp.asarray(pixels)))
    return np.clip((pixels + 1) * np.float32(127.5), 0, 255)


@jax.jit
def _reconstruct(stage: FirstStage, picture: jax.Array) -> jax.Array:
    return stage.decode(stage.encode(to_float(picture)))


def as_dtype(params: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns parameters in a type, on the host: eager conversions would each be compiled.

    The dicts are changed in place, so that each array is released before the next is converted.
    """
    changed = 0  # bytes that were released

    def convert(tree: dict[str, Any]) -> None:
        nonlocal changed
        for name, value in tree.items():
            if isinstance(value, dict):
                convert(value)
                continue
            array = np.asarray(value)
            tree[name] = aligned(array, DTYPES[dtype])
            changed += 0 if tree[name] is array else array.nbytes
            del array, value
            if changed > _RELEASED:
                release_memory()
                changed = 0

    convert(params)
    return params


def check_dtype(dtype: str | None) -> str:
    """Returns the name of a type that models compute in; None is the platform's default."""
    dtype = dtype or cores.default_dtype()
    if dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} does not exist{did_you_mean(dtype, DTYPES)}")
    return dtype
