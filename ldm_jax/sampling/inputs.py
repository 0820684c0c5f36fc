"""Validates a sampling request against the model and converts it to arrays."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.conditioning.base import as_list
from ldm_jax.conditioning.pictures import Canvas, Geometry
from ldm_jax.errors import RequestError
from ldm_jax.models.ldm import LatentDiffusion
from ldm_jax.sampling.hints import Control, read_control
from ldm_jax.sampling.request import MOST_SEED, STRENGTH, Request

Array = Any  # jax.Array or np.ndarray


class Toward(NamedTuple):
    """The other ends of an interpolation.

    Attributes:
      seeds: As in `Inputs`.
      encoded: As in `Inputs`.
      mix: Position between the ends [b], in [0, 1].
    """

    seeds: Array
    encoded: Any
    mix: Array


class Inputs(NamedTuple):
    """The arrays of a request, one row for each picture: every leaf is [b, ...].

    Every field is traced, so changing a value does not recompile; a field that is None is compiled
    out.

    Attributes:
      seeds: uint32 [b], or [b, 2] (high and low words) where one has more than 32 bits.
      encoded: Conditions as `Conditioner.encode` returns them.
      null: The conditions to be guided away from.
      guidance: Guidance scales [b].
      interval: First and last timestep that is guided [b, 2].
      rescale: Rescaling of guided outputs [b].
      image: The picture to start from, uint8 [b, H, W, 3].
      mask: uint8 [b, H, W, 1], 1 where ``image`` is painted.
      variation: Distance from ``image`` [b], in [0, 1].
      toward: The other ends of an interpolation.
      noise: The latents to start from [b, h, w, c], in place of the seeds' noise.
      latents: Latents at the first step [b, h, w, c], in place of noise.
      control: The hints of the model's ControlNets.
      labels: Classes that the model's classifier guides to, int32 [b].
      label_scale: Scales of that guidance [b].
      state: Where a run stands that is made in parts: (the sampler's carry, x).
    """

    seeds: Array
    encoded: Any
    null: Any = None
    guidance: Array | None = None
    interval: Array | None = None
    rescale: Array | None = None
    image: Array | None = None
    mask: Array | None = None
    variation: Array | None = None
    toward: Toward | None = None
    noise: Array | None = None
    latents: Array | None = None
    control: Control | None = None
    labels: Array | None = None
    label_scale: Array | None = None
    state: Any = None


def check_request(model: LatentDiffusion, request: Request) -> Request:
    """Returns the request, with a strength where an image is given without another use for it.

    Raises:
      RequestError: The model does not take the request, or lacks something.
    """
    check_model(model)
    conditioner = model.conditioner
    conditioner.check_request(request)
    if request.negative is not None and not conditioner.negative:
        raise RequestError("negative prompts need a model of text")
    if request.toward is not None and not conditioner.interpolates:
        raise RequestError(
            "interpolation needs a model of text, of classes, or without a condition"
        )
    for name in ("mask", "outpaint", "strength", "variation"):
        if getattr(request, name) is not None and request.image is None:
            raise RequestError(f"{name} needs an image: give one")
    started = [name for name in ("strength", "variation") if getattr(request, name) is not None]
    if started and not conditioner.edits:
        raise RequestError(f"{started[0]}: this model does not start from an image's latents")
    plain = request.mask is request.outpaint is None and not started
    if request.image is not None and conditioner.edits and plain:
        return dataclasses.replace(request, strength=STRENGTH)
    return request


def check_model(model: LatentDiffusion) -> None:
    """Raises RequestError for a UNet that needs more conditions than the conditioner gives."""
    conditioner, stage = model.conditioner, model.first_stage
    if extra := model.unet.in_channels - stage.channels - conditioner.concat_channels:
        raise RequestError(
            f"this model concatenates {extra} channels to its latents that its conditioner does "
            "not make: not supported"
        )
    way = model.config.get("original", {}).get("conditioning_key")
    if conditioner.field is None and way == "crossattn":
        raise RequestError(
            "this model has no text encoder or other network for its condition: give one by "
            "--text_encoder (text_encoder=)"
        )
    if model.unet.num_classes is not None and not conditioner.gives_vector:
        raise RequestError(
            "this model's UNet takes class numbers, which its conditioner does not give: not "
            "supported"
        )


def make_inputs(model: LatentDiffusion, request: Request, own: Request) -> tuple[Canvas, Inputs]:
    """Returns the canvas and the host arrays of n pictures.

    Args:
      model: The model.
      request: The request, checked; its ``size`` is None where none was requested.
      own: The request with all settings filled in.
    """
    conditioner, field = model.conditioner, model.conditioner.field
    assert own.size is not None
    geometry = Geometry(
        size=None if request.size is None else (request.size[0], request.size[1]),
        own=(own.size[0], own.size[1]),
        factor=model.first_stage.downsampling,
        multiple=model.multiple,
        names=model.config.get("classes"),
    )
    canvas = conditioner.canvas(request, geometry)
    value = None if field is None else getattr(request, field)
    subjects = conditioner.parse(value, canvas, geometry)
    pictures = max((len(a) for a in (canvas.image, canvas.mask) if a is not None), default=1)
    what = field or "pictures"
    _, seeds = pair(subjects * pictures if len(subjects) == 1 else subjects, request.seeds, what)
    n = len(seeds)

    def spread(part: Any) -> Any:
        if len(part) not in (1, n):
            raise RequestError(
                f"{len(part)} images or masks for {n} pictures: give one, or one for each"
            )
        return np.broadcast_to(part, (n, *part.shape[1:]))  # not a copy

    def encode(values: list[Any]) -> Any:
        encoded = conditioner.encode(values)
        return conditioner.from_request(encoded, own, canvas, seeds=seeds)

    cells = (canvas.size[0] // geometry.factor, canvas.size[1] // geometry.factor)
    inputs = Inputs(seed_words(seeds), jax.tree.map(spread, encode(subjects)))
    inputs = inputs._replace(
        image=None if canvas.image is None else spread(canvas.image),
        mask=None if canvas.mask is None else spread(canvas.mask),
        variation=None if own.variation is None else numbers(own.variation, n, "variations"),
        control=read_control(request, len(model.controls), cells, n),
    )
    if request.noise is not None:
        shape = (*cells, model.first_stage.channels)
        several = isinstance(request.noise, list | tuple)
        noises = [read_noise(one, shape) for one in (request.noise if several else [request.noise])]
        if len(noises) not in (1, n):
            raise RequestError(f"{len(noises)} noises for {n} pictures: give one, or one for each")
        inputs = inputs._replace(noise=spread(np.stack(noises)))
    if request.toward is not None:
        others, to, mix = request.toward
        if not n == len(to) == len(mix) or (field and len(others) != n):
            raise RequestError(
                f"toward needs as many ends, seeds and mixes as there are pictures, {n}"
            )
        others = conditioner.parse(list(others), canvas, geometry) if field else [None] * n
        words = seed_words(pair(others, list(to), what)[1])
        inputs = inputs._replace(toward=Toward(words, encode(others), numbers(mix, n, "mixes")))

    scales = numbers(own.guidance, n, "guidance scales")
    rescale = numbers(own.guidance_rescale, n, "rescales")
    if not conditioner.guided:
        if (scales != 1).any():
            raise RequestError(
                "this model has no null condition to be guided away from: leave guidance at 1"
            )
        return canvas, aligned(conditioner, inputs)
    if negative := as_list(request.negative):
        if len(negative) not in (1, n):
            raise RequestError(
                f"{len(negative)} negative prompts for {n} pictures: give one, or one for each"
            )
        null = conditioner.encode(negative * (n // len(negative)))
    else:
        null = conditioner.null_row(inputs.encoded)
    null = conditioner.from_request(null, own, canvas, seeds=seeds, negative=True)
    null = jax.tree.map(spread, null)
    interval = own.guidance_interval
    inputs = inputs._replace(
        null=null,
        guidance=scales,
        interval=None if interval is None else spread(np.asarray([interval], np.float32)),
        rescale=rescale if rescale.any() else None,
    )
    return canvas, aligned(conditioner, inputs)


def read_noise(value: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Reads the noise of one picture, an array or the path of a .npy file.

    Args:
      value: [h, w, c] or PyTorch's [c, h, w], either also with a first dimension of 1.
      shape: (h, w, c) of the latents.

    Returns:
      float32 [h, w, c].
    """
    path = isinstance(value, str | Path)
    name = f"noise {value}" if path else "noise"
    try:
        noise = np.load(value, allow_pickle=False) if path else value
        noise = np.asarray(noise, np.float32)
    except OSError as error:
        raise RequestError(f"{name} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, EOFError):
        form = "no .npy file of numbers" if path else "no array of numbers"
        raise RequestError(f"{name}: this is {form}") from None
    given = noise.shape
    noise = noise[0] if noise.ndim == 4 and len(noise) == 1 else noise
    if noise.shape != shape and noise.shape == (shape[2], *shape[:2]):
        noise = noise.transpose(1, 2, 0)
    if noise.shape != shape:
        raise RequestError(f"{name} of shape {given}: the latents of this picture are {shape}")
    if not np.isfinite(noise).all():
        raise RequestError(f"{name} must be finite numbers")
    return noise


def aligned(conditioner: Any, inputs: Inputs) -> Inputs:
    """Returns the inputs with conditions of the same shapes."""
    given = [inputs.encoded]
    given += [] if inputs.null is None else [inputs.null]
    given += [] if inputs.toward is None else [inputs.toward.encoded]
    encoded, *rest = conditioner.aligned(given)
    inputs = inputs._replace(encoded=encoded)
    if inputs.null is not None:
        inputs = inputs._replace(null=rest.pop(0))
    if inputs.toward is not None:
        inputs = inputs._replace(toward=inputs.toward._replace(encoded=rest.pop(0)))
    return inputs


def pair(
    subjects: list[Any], seeds: int | Sequence[int] | None, what: str = "prompts"
) -> tuple[list[Any], list[int]]:
    """Returns equally many subjects and seeds; raises RequestError where they do not pair up."""
    if isinstance(seeds, int | np.integer):
        seeds = [int(seeds)]
    seeds = list(range(len(subjects))) if seeds is None else [int(seed) for seed in seeds]
    if any(not 0 <= seed <= MOST_SEED for seed in seeds):
        raise RequestError(f"seeds must be from 0 to {MOST_SEED}")
    n = max(len(subjects), len(seeds))
    if len(subjects) not in (1, n) or len(seeds) not in (1, n):
        raise RequestError(
            f"{len(subjects)} {what} and {len(seeds)} seeds do not pair up: give equally many, or "
            "one of either"
        )
    return subjects * (n // len(subjects)), seeds * (n // len(seeds))


def seed_words(seeds: Sequence[int]) -> np.ndarray:
    """Returns seeds as uint32 [n], or [n, 2], high and low words, where one has more bits."""
    if max(seeds, default=0) < 2**32:
        return np.asarray(seeds, np.uint32)
    return np.asarray([divmod(seed, 2**32) for seed in seeds], np.uint32)


def numbers(value: Any, n: int, what: str) -> np.ndarray:
    """Returns float32 [n] of one finite number, or of one for each picture."""
    array = np.asarray(value, np.float32)
    if array.shape not in ((), (n,)):
        raise RequestError(f"{array.size} {what} for {n} pictures: give one, or one for each")
    if not np.isfinite(array).all():
        raise RequestError(f"{what} must be finite numbers")
    return np.broadcast_to(array, n)
