"""What a person asks for, checked against what a model can do, as arrays. Each mistake is a RequestError of one line."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ldm_jax.conditioning.base import as_list
from ldm_jax.conditioning.pictures import Canvas, Geometry
from ldm_jax.errors import RequestError
from ldm_jax.models.ldm import LatentDiffusion
from ldm_jax.sampling.program import Rows, Toward

STRENGTH = 0.75  # of image-to-image, unless it is given


@dataclasses.dataclass(frozen=True)
class Given:
    """What a person gives beside seeds and settings. Pictures are paths, PIL images or uint8 arrays of any size: one, or a list of one for each.

    Attributes:
      prompts: for a model of text; one or several.
      classes: for a class-conditional model: numbers, or names where it has them.
      semantic_map: for a model of semantic maps: a picture whose pixels are label numbers.
      layout: for a model of layouts: boxes (label, (left, top, width, height)) in fractions of the picture, the same for all pictures.
      embeddings: for a model of ready-made embeddings: vectors [m, dim], an array or the path of a .npy file; one, or a list of one for each.
      negative: prompts to be guided away from instead of from no prompt.
      image: a picture to begin with; for a super-resolution model, the small picture.
      mask: white where ``image`` is to be made anew; models trained for that need both.
      outpaint: pixels to be added at its (top, right, bottom, left).
      strength: how much of ``image`` goes: the part of the steps that are made, above 0 and up to 1 (default: 0.75).
      variation: how far to go from ``image`` by way of its inverted noise, from 0 to 1; one, or one for each.
      toward: the other ends of an interpolation, ([prompts or classes], [seeds], [mixes]) with one of each for each picture.
    """

    prompts: str | Sequence[str] | None = None
    classes: int | str | Sequence[int | str] | None = None
    semantic_map: Any = None
    layout: Sequence[tuple[int | str, Sequence[float]]] | None = None
    embeddings: Any = None
    negative: str | Sequence[str] | None = None
    image: Any = None
    mask: Any = None
    outpaint: Sequence[int] | None = None
    strength: float | None = None
    variation: float | Sequence[float] | None = None
    condition: Any = None
    toward: tuple[Sequence[Any], Sequence[int], Sequence[float]] | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample. A model's config.json may hold other defaults, under "sampling"."""

    steps: int = 50
    guidance: float | Sequence[float] = 5.0  # one scale, or one for each picture; 1 is none
    eta: float = 0.0
    temperature: float = 1.0  # of the noise that ddim (with eta) and ddpm add; below 1 pictures vary less and are smoother
    sampler: str = "ddim"
    grid: str | Sequence[float] = "uniform"  # of timesteps, or a list of them
    size: Sequence[int] = (64, 64)  # height, width in pixels
    guidance_rescale: float | Sequence[float] = 0.0  # from 0 to 1 (Lin et al. 2023)
    guidance_interval: Sequence[float] | None = (
        None  # the first and the last timestep that is guided
    )
    decode_batch: int | None = (
        None  # pictures decoded at a time on a device; 0 is a whole batch, None what `decode_part` says
    )
    tile: int = 0  # decode pictures with a longer side in tiles of as many pixels; 0 is never, which is exact
    cache_interval: int = 1  # of so many calls of the UNet one is full, the others reuse its deep features; 1 is off, which is exact
    cache_depth: int = 1  # the first and last rows of the UNet that run in every call


# ------------------------------------------------------------------------------------------------------------ what a model takes


def checked(model: LatentDiffusion, given: Given) -> Given:
    """``given``, with a strength where nothing else is said of an image. RequestError where the model does not take it, or lacks something."""
    check_conditions(model)
    conditioner = model.conditioner
    conditioner.check_request(given)
    if given.negative is not None and not conditioner.negative:
        raise RequestError("negative prompts need a model of text")
    if given.toward is not None and not conditioner.interpolates:
        raise RequestError(
            "interpolation needs a model of text, of classes, or without a condition"
        )
    masked = given.mask is not None or given.outpaint is not None
    for name in ("mask", "outpaint", "strength", "variation"):
        if getattr(given, name) is not None and given.image is None:
            raise RequestError(f"{name} needs an image: give one")
    started = [name for name in ("strength", "variation") if getattr(given, name) is not None]
    if started and not conditioner.edits:
        raise RequestError(f"{started[0]}: this model does not start from an image's latents")
    if given.variation is not None and (masked or given.strength is not None):
        raise RequestError("variation takes the whole image: leave out mask, outpaint and strength")
    if given.strength is not None and not 0 < given.strength <= 1:
        raise RequestError(f"strength must be above 0 and up to 1, not {given.strength}")
    far = np.asarray(0.0 if given.variation is None else given.variation)
    if not ((far >= 0) & (far <= 1)).all():
        raise RequestError(f"variation must be from 0 to 1, not {given.variation}")
    if given.image is not None and conditioner.edits and not (masked or started):
        return dataclasses.replace(given, strength=STRENGTH)
    return given


def check_conditions(model: LatentDiffusion) -> None:
    """RequestError for a model that is told more than its conditioner says."""
    conditioner, stage = model.conditioner, model.first_stage
    if extra := model.unet.in_channels - stage.channels - conditioner.concat_channels:
        raise RequestError(
            f"this model joins {extra} channels to its latents that its conditioner does not make: not supported"
        )
    way = model.config.get("original", {}).get("conditioning_key")
    if conditioner.field is None and way == "crossattn":
        raise RequestError(
            "this model is conditioned on something that it holds no network for: not supported"
        )
    if model.unet.num_classes is not None:
        raise RequestError(
            "this model's UNet takes class numbers, which no conditioner gives yet: not supported"
        )


def pair(
    prompts: list[Any], seeds: int | Sequence[int] | None, what: str = "prompts"
) -> tuple[list[Any], list[int]]:
    """Equally many prompts (classes ...) and seeds, or a RequestError."""
    seeds = (
        [int(seeds)]
        if isinstance(seeds, int | np.integer)
        else list(range(len(prompts)) if seeds is None else seeds)
    )
    if any(not 0 <= int(seed) < 2**32 for seed in seeds):
        raise RequestError("seeds must be from 0 to 4294967295")
    n = max(len(prompts), len(seeds))
    if len(prompts) not in (1, n) or len(seeds) not in (1, n):
        raise RequestError(
            f"{len(prompts)} {what} and {len(seeds)} seeds do not pair up: give equally many, or one of either"
        )
    return prompts * (n // len(prompts)), seeds * (n // len(seeds))


def each(values: list[Any], n: int, what: str) -> list[Any]:
    """One for each of ``n`` pictures, from one or as many."""
    if len(values) not in (1, n):
        raise RequestError(f"{len(values)} {what} for {n} pictures: give one, or one for each")
    return values * (n // len(values))


def numbers(value: Any, n: int, what: str) -> np.ndarray:
    """float32 [n] from one finite number, or from one for each."""
    array = np.asarray(value, np.float32)
    if array.shape not in ((), (n,)):
        raise RequestError(f"{array.size} {what} for {n} pictures: give one, or one for each")
    if not np.isfinite(array).all():
        raise RequestError(f"{what} must be finite numbers")
    return np.broadcast_to(array, n)


def interpolation(
    subjects: Sequence[Any], seeds: Sequence[int], frames: int
) -> list[dict[str, Any]]:
    """The pictures of a walk over the ends (subject, seed), ``frames`` for each stretch and the last end.

    Each is {"subject", "seed", "toward_subject", "toward_seed", "mix"}.
    """
    if len(seeds) < 2 or frames < 1:
        raise RequestError(
            "interpolation needs at least two ends and one frame for each stretch between them"
        )
    names = ("subject", "seed", "toward_subject", "toward_seed", "mix")
    walk = [
        (subjects[i], seeds[i], subjects[i + 1], seeds[i + 1], k / frames)
        for i in range(len(seeds) - 1)
        for k in range(frames)
    ]
    walk.append((subjects[-1], seeds[-1], subjects[-1], seeds[-1], 0.0))
    return [dict(zip(names, frame, strict=True)) for frame in walk]


# ------------------------------------------------------------------------------------------------------------ a request in arrays


def arrays(
    model: LatentDiffusion,
    given: Given,
    chosen: Settings,
    seeds: int | Sequence[int] | None,
    size: tuple[int, int] | None,
) -> tuple[Canvas, Rows]:
    """(the canvas, host arrays [n, ...] of n pictures) of what was `checked`; ``size`` is what was asked for, if anything was."""
    conditioner, what = model.conditioner, model.conditioner.field
    geometry = Geometry(
        size,
        (chosen.size[0], chosen.size[1]),
        model.first_stage.downsampling,
        2 ** (len(model.unet.channel_mult) - 1),
        model.config.get("classes"),
    )
    canvas = conditioner.canvas(given, geometry)
    subjects = conditioner.parse(getattr(given, what or "", None), canvas, geometry)
    pictures = max(
        (len(part) for part in (canvas.image, canvas.mask) if part is not None), default=1
    )
    many = "pictures" if what is None else what if what.endswith("s") else f"{what}s"
    _, seeds = pair(subjects * pictures if len(subjects) == 1 else subjects, seeds, many)
    n = len(seeds)

    def spread(part: Any) -> Any:
        if len(part) not in (1, n):
            raise RequestError(
                f"{len(part)} images or masks for {n} pictures: give one, or one for each"
            )
        return np.broadcast_to(part, (n, *part.shape[1:]))  # not a copy

    rows = Rows(np.asarray(seeds, np.uint32), jax.tree.map(spread, conditioner.encode(subjects)))
    rows = rows._replace(
        image=None if canvas.image is None else spread(canvas.image),
        mask=None if canvas.mask is None else spread(canvas.mask),
        variation=None if given.variation is None else numbers(given.variation, n, "variations"),
    )
    if given.toward is not None:
        others, to, mix = given.toward
        if not n == len(to) == len(mix) or (what and len(others) != n):
            raise RequestError(
                f"toward needs as many ends, seeds and mixes as there are pictures, {n}"
            )
        others = conditioner.parse(list(others), canvas, geometry) if what else [None] * n
        to = np.asarray(pair(others, list(to), many)[1], np.uint32)
        rows = rows._replace(
            toward=Toward(to, conditioner.encode(others), numbers(mix, n, "mixes"))
        )

    scales, rescale = (
        numbers(v, n, w)
        for v, w in ((chosen.guidance, "guidance scales"), (chosen.guidance_rescale, "rescales"))
    )
    interval = guided_steps(chosen)
    if not conditioner.guided:
        if (scales != 1).any():
            raise RequestError(
                "this model has no condition that means anything to be guided away from: leave guidance at 1"
            )
        return canvas, rows
    negative = as_list(given.negative)
    return canvas, rows._replace(
        null=conditioner.encode(each(negative, n, "negative prompts"))
        if negative
        else jax.tree.map(spread, conditioner.null_row(rows.encoded)),
        guidance=scales,
        interval=None if interval is None else spread(interval),
        rescale=rescale if rescale.any() else None,
    )


def guided_steps(chosen: Settings) -> np.ndarray | None:
    """The first and the last timestep that is guided, float32 [1, 2]; None for all."""
    interval = chosen.guidance_interval
    if interval is not None and (len(interval) != 2 or not 0 <= interval[0] <= interval[1]):
        raise RequestError(
            f"guidance_interval {list(interval)}: give the first and the last timestep that is guided"
        )
    return None if interval is None else np.asarray([interval], np.float32)
