"""What a person asks for, checked against what a model can do, as arrays. Each mistake is a RequestError of one line."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ldm_jax.conditioning.base import (
    BertTokens,
    ClassLabel,
    Embeddings,
    Hybrid,
    Joined,
    RescaledMap,
    Unconditional,
    joined_of,
)
from ldm_jax.conditioning.layouts import layout_tokens
from ldm_jax.errors import RequestError
from ldm_jax.models.ldm import LatentDiffusion
from ldm_jax.sampling.fitting import (
    Canvas,
    picture_canvas,
    read_embeddings,
    semantic_maps,
    small_canvas,
)
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
    wanted = needs(conditioner)
    sentence = (
        "this model takes no condition" if wanted is None else f"this model is asked by {wanted}"
    )
    for name in ("prompts", "classes", "semantic_map", "layout", "embeddings"):
        if getattr(given, name) is not None and name != wanted:
            raise RequestError(f"{sentence}, not by {name}")
    if wanted not in (None, "prompts") and getattr(given, wanted) is None:
        raise RequestError(f"{sentence}: give {wanted}")
    if wanted == "prompts" and not as_list(given.prompts):
        raise RequestError("there is no prompt; give at least one")
    if wanted == "embeddings" and not as_list(given.embeddings):
        raise RequestError("there are no embeddings; give at least one array")
    if given.negative is not None and wanted != "prompts":
        raise RequestError("negative prompts need a model of text")
    if given.toward is not None and wanted not in (None, "prompts", "classes"):
        raise RequestError(
            "interpolation needs a model of text, of classes, or without a condition"
        )

    joined = joined_of(conditioner)
    masked = given.mask is not None or given.outpaint is not None
    for name in ("mask", "outpaint", "strength", "variation"):
        if getattr(given, name) is not None and given.image is None:
            raise RequestError(f"{name} needs an image: give one")
    if joined and masked != joined.masked:
        raise RequestError(
            "this model makes a masked part of an image anew: give a mask or outpaint with the image"
            if joined.masked
            else "this model enlarges an image: it takes no mask and no outpaint"
        )
    started = [name for name in ("strength", "variation") if getattr(given, name) is not None]
    if joined and started:
        alone = "prompts, image and mask" if wanted == "prompts" else "image alone"
        raise RequestError(f"this model is asked by {alone}, without {started[0]}")
    if given.variation is not None and (masked or given.strength is not None):
        raise RequestError("variation takes the whole image: leave out mask, outpaint and strength")
    if given.strength is not None and not 0 < given.strength <= 1:
        raise RequestError(f"strength must be above 0 and up to 1, not {given.strength}")
    far = np.asarray(0.0 if given.variation is None else given.variation)
    if not ((far >= 0) & (far <= 1)).all():
        raise RequestError(f"variation must be from 0 to 1, not {given.variation}")
    if given.image is not None and not (joined or masked or started):
        return dataclasses.replace(given, strength=STRENGTH)
    return given


def check_conditions(model: LatentDiffusion) -> None:
    """RequestError for a model that is told more than its conditioner says."""
    conditioner, told = model.conditioner, 0
    if (joined := joined_of(conditioner)) is not None:
        told = joined.channels
    elif isinstance(conditioner, RescaledMap):
        told = conditioner.module.out_channels or conditioner.module.in_channels
    if extra := model.unet.in_channels - model.first_stage.channels - told:
        raise RequestError(
            f"this model joins {extra} channels to its latents that its conditioner does not make: not supported"
        )
    way = model.config.get("original", {}).get("conditioning_key")
    if isinstance(conditioner, Unconditional) and way == "crossattn":
        raise RequestError(
            "this model is conditioned on something that it holds no network for: not supported"
        )
    if model.unet.num_classes is not None:
        raise RequestError(
            "this model's UNet takes class numbers, which no conditioner gives yet: not supported"
        )


def needs(conditioner: Any) -> str | None:
    """The field of Given that a conditioner encodes; None for no condition."""
    table = {
        ClassLabel: "classes",
        BertTokens: "layout",
        RescaledMap: "semantic_map",
        Joined: "image",
        Embeddings: "embeddings",
    }
    if isinstance(conditioner, Unconditional):
        return None
    return next((name for kind, name in table.items() if isinstance(conditioner, kind)), "prompts")


def as_list(value: Any) -> list[Any]:
    """One or several -> a list; None is none. Arrays, strings and paths are one."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


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


# ------------------------------------------------------------------------------------------------------------ classes and layouts


def class_numbers(
    given: Sequence[int | str], count: int, names: Sequence[str] | None = None
) -> list[int]:
    """Numbers of classes from numbers or names; of names like "tench, Tinca tinca" each part will do."""
    known = {
        part.strip().lower(): i
        for i, name in reversed(list(enumerate(names or [])))
        for part in name.split(",")
    }
    known |= {name.lower(): i for i, name in enumerate(names or [])}
    found = []
    for label in given:
        text = str(label).strip()
        number = int(text) if text.isdecimal() else known.get(text.lower())
        if number is None and not known:
            raise RequestError(
                f"class {text!r}: this model has no names for its classes; give a number below {count}"
            )
        if number is None:
            near = difflib.get_close_matches(text.lower(), known, 3, 0.5)
            hint = (
                f"; the nearest: {', '.join(map(repr, near))}"
                if near
                else f"; it knows {len(names or [])} names"
            )
            raise RequestError(f"class {text!r} does not exist{hint}")
        if not 0 <= number < count:
            raise RequestError(
                f"class {number} does not exist: give a number from 0 to {count - 1}"
            )
        found.append(number)
    return found


def checked_layout(
    boxes: Sequence[tuple[int | str, Sequence[float]]],
    *,
    length: int,
    vocabulary: int,
    names: Sequence[str] | None = None,
) -> list[int]:
    """Boxes (label, (left, top, width, height)) in fractions of the picture -> ``length`` tokens: see `ldm_jax.conditioning.layouts.layout_tokens`."""
    if len(boxes) > length // 3:
        raise RequestError(
            f"{len(boxes)} boxes in the layout; this model takes at most {length // 3}"
        )
    numbered = []
    for label, box in boxes:
        if len(box) != 4 or not all(
            0 <= v <= 1 for v in (*box, box[0] + box[2] - 1e-6, box[1] + box[3] - 1e-6)
        ):
            raise RequestError(
                f"box {list(box)} of {label!r}: give left, top, width, height as parts of 1, inside the picture"
            )
        (number,) = class_numbers([label], vocabulary - 1, names)
        x, y, w, h = (float(v) for v in box)
        numbered.append((number, (x, y, w, h)))
    return layout_tokens(numbered, length=length, vocabulary=vocabulary)


# ------------------------------------------------------------------------------------------------------------ a request in arrays


def arrays(
    model: LatentDiffusion,
    given: Given,
    chosen: Settings,
    seeds: int | Sequence[int] | None,
    size: tuple[int, int] | None,
) -> tuple[Canvas, Rows]:
    """(the canvas, host arrays [n, ...] of n pictures) of what was `checked`; ``size`` is what was asked for, if anything was."""
    conditioner, what = model.conditioner, needs(model.conditioner)
    if isinstance(conditioner, Hybrid):  # what it joins is made of the image, in the program
        conditioner = conditioner.text
    canvas, subjects = prepared(model, given, chosen.size, size)
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

    rows = Rows(np.asarray(seeds, np.uint32), jax.tree.map(spread, encode(conditioner, subjects)))
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
        others = (
            subjects_of(model, dataclasses.replace(given, **{what: list(others)}))
            if what
            else [None] * n
        )
        to = np.asarray(pair(others, list(to), many)[1], np.uint32)
        rows = rows._replace(
            toward=Toward(to, encode(conditioner, others), numbers(mix, n, "mixes"))
        )

    scales, rescale = (
        numbers(v, n, w)
        for v, w in ((chosen.guidance, "guidance scales"), (chosen.guidance_rescale, "rescales"))
    )
    interval = guided_steps(chosen)
    if isinstance(conditioner, Unconditional | Joined | RescaledMap):
        if (scales != 1).any():
            raise RequestError(
                "this model has no condition that means anything to be guided away from: leave guidance at 1"
            )
        return canvas, rows
    if isinstance(conditioner, Embeddings):  # nothing in the place of just as many
        conditioner = dataclasses.replace(conditioner, count=rows.encoded.shape[1])
    negative = as_list(given.negative)
    return canvas, rows._replace(
        null=conditioner.encode(each(negative, n, "negative prompts"))
        if negative
        else jax.tree.map(spread, conditioner.encode_null(1)),
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


def prepared(
    model: LatentDiffusion, given: Given, own: Sequence[int], size: tuple[int, int] | None
) -> tuple[Canvas, list[Any]]:
    """(the canvas, what the conditioner encodes, one or one for each picture)."""
    stage, conditioner = model.first_stage, model.conditioner
    f, multiple = stage.downsampling, 2 ** (len(model.unet.channel_mult) - 1)
    images = as_list(given.image)
    if given.image is not None and not images:
        raise RequestError("there is no image; give at least one")
    if isinstance(conditioner, Joined) and conditioner.of == "picture":
        canvas, small = small_canvas(images, size, f, multiple)
        return canvas, list(small)
    plain = size or (own[0], own[1])
    canvas = Canvas(plain, plain)
    if images:
        canvas = picture_canvas(
            images, as_list(given.mask), given.outpaint, size, own, f * multiple
        )
    if isinstance(conditioner, RescaledMap):
        latent_size = [n // f for n in canvas.size]
        return canvas, list(semantic_maps(as_list(given.semantic_map), conditioner, latent_size))
    return canvas, subjects_of(model, given)


def subjects_of(model: LatentDiffusion, given: Given) -> list[Any]:
    """Prompts, class numbers, tokens of a layout or embeddings; None for a model that is asked by none of them."""
    conditioner, names = model.conditioner, model.config.get("classes")
    if isinstance(conditioner, ClassLabel):
        return class_numbers(as_list(given.classes), conditioner.module.n_classes, names)
    if isinstance(conditioner, BertTokens):
        assert given.layout is not None
        length, vocabulary = conditioner.max_length, conditioner.module.vocab_size
        return [checked_layout(given.layout, length=length, vocabulary=vocabulary, names=names)]
    if isinstance(conditioner, Embeddings):
        found = [read_embeddings(one, conditioner.dim) for one in as_list(given.embeddings)]
        if len({len(vectors) for vectors in found}) > 1:
            raise RequestError(
                f"embeddings of {' and '.join(str(len(v)) for v in found)} vectors: every picture needs equally many"
            )
        return found
    return [None] if isinstance(conditioner, Unconditional | Joined) else as_list(given.prompts)


def encode(conditioner: Any, subjects: list[Any]) -> Any:
    """What the conditioner makes of them; nothing where the program itself does (the masked pictures of inpainting models)."""
    if isinstance(conditioner, Joined) and conditioner.masked:
        return None
    return conditioner.encode(subjects)
