# ruff: noqa: RUF009  (`option` returns a dataclass field)
"""A sampling request: one public record from which flags, PNG settings and exports derive."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.conditioning.base import as_list
from ldm_jax.data.sources.tables import decode_text
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.errors import DataError, RequestError, did_you_mean
from ldm_jax.io.paths import read_bytes

STRENGTH = 0.75  # of image-to-image, where the request gives none
MOST_SEED = 2**64 - 1


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    real = isinstance(value, int | float | np.integer | np.floating)
    return real and not isinstance(value, bool) and math.isfinite(value)


def _all(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def every(value: Any) -> bool:
        values = value if isinstance(value, list | tuple | range) else np.ravel(value).tolist()
        return all(map(check, values))

    return every


def _size(text: str) -> list[int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError
    return [int(match[1]), int(match[2])]


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def _named(text: str) -> dict[str, float]:
    pairs = [part.partition("=") for part in text.split(",")]
    return {name.strip(): float(number) for name, _, number in pairs}


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _grid(text: str) -> str | list[float]:
    return _numbers(float)(text) if re.fullmatch(r"[\d.,\s]+", text) else text


class Kind(NamedTuple):
    """How an option's value is written on a command line, and which values it takes.

    Attributes:
      what: What a value is.
      write: How it is written.
      parse: From text to the value; raises ValueError.
      check: Whether a value is one of the kind.
    """

    what: str
    write: str
    parse: Callable[[str], Any]
    check: Callable[[Any], bool]


def _sequence(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: not isinstance(value, str) and np.ndim(value) == 1 and _all(check)(value)


KINDS = {
    "text": Kind("a text", "text", str, lambda value: isinstance(value, str)),
    "texts": Kind("texts", "text", str, _all(lambda value: isinstance(value, str))),
    "classes": Kind(
        "numbers or names",
        "a number or a name",
        str,
        _all(lambda v: isinstance(v, str) or _whole(v)),
    ),
    "file": Kind("a file", "the path of a file", str, lambda value: True),
    "whole": Kind("a whole number", "a whole number", int, _whole),
    "real": Kind("a finite number", "a number", float, _all(_real)),
    "wholes": Kind(
        "whole numbers", "whole numbers, separated by commas", _numbers(int), _sequence(_whole)
    ),
    "reals": Kind("finite numbers", "numbers, separated by commas", _numbers(float), _all(_real)),
    "named": Kind(
        "names with finite numbers",
        "NAME=NUMBER, separated by commas",
        _named,
        lambda value: isinstance(value, Mapping) and all(map(_real, value.values())),
    ),
    "switch": Kind("True or False", "true or false", _switch, lambda v: isinstance(v, bool)),
    "size": Kind("(height, width)", "HEIGHTxWIDTH, for example 64x96", _size, _sequence(_whole)),
    "grid": Kind(
        "a name or timesteps",
        "a name, or timesteps separated by commas",
        _grid,
        lambda value: isinstance(value, str) or _sequence(_real)(value),
    ),
}


def option(
    kind: str,
    help: str,
    *,
    flag: str | None = None,
    each: str | None = None,
    multi: bool = False,
    own: Any = dataclasses.MISSING,
) -> Any:
    """Returns a field of `Request`.

    Args:
      kind: Of `KINDS`; "" is a field without a flag.
      help: Text of the flag's help.
      flag: Name of the flag, where it is not the field's.
      each: Name of one picture's value in the settings of a PNG, where it is not the field's.
      multi: Whether the flag may be given several times.
      own: Default of a sampling setting; a model config's "sampling" may hold another.
    """
    known = {"kind": kind, "help": help, "flag": flag, "each": each, "multi": multi, "own": own}
    return dataclasses.field(default=None, metadata=known)


@dataclasses.dataclass(frozen=True)
class Request:
    """What to sample. None leaves a setting to the model, and any other field out.

    One picture is made for each prompt (class, image ...) and seed: equally many of both, or one
    of either. Pictures are paths, PIL images or uint8 arrays of any size; one, or a list of one for
    each picture to make.

    Attributes:
      prompts: For a model of text; one or several.
      classes: For a class-conditional model: numbers, or names where the model has them.
      semantic_map: For a model of semantic maps: a picture whose values are labels.
      layout: For a model of layouts: boxes (label, (left, top, width, height)) in parts of the
        picture, or the path of a JSON file.
      embeddings: For a model of ready-made embeddings: vectors [m, dim], or the path of a .npy
        file. With CLIP's text tower such a model takes prompts too.
      neighbors: For a model of embeddings: add so many nearest neighbours from ``database``.
      database: Embeddings that `ldm-data embed` wrote: a folder, or the original's .npz files.
      condition: For kinds of condition registered outside of this package.
      negative: Prompts to be guided away from.
      image: The picture to start from; for a super-resolution model, the small picture.
      mask: Bright where ``image`` is painted.
      depth: For a depth model: a map of inverse depth, brighter where nearer, of any range: a
        picture of one channel (8 or 16 bits, floats) or a .npy file.
      outpaint: Pixels to add at the image's (top, right, bottom, left).
      strength: Denoising strength in (0, 1]: the fraction of the steps that is run on ``image``.
      variation: Distance in [0, 1] from ``image`` by its inverted noise.
      noise: Standard normal latents to start from, in place of the seed's: arrays [h, w, c], or
        PyTorch's [c, h, w], or paths of .npy files; one, or one for each picture to make.
      control_image: The hint of each ControlNet: pictures of edges, depth, poses ...
      control_scale: Factor of the ControlNets' features, one or one for each; 1 by default.
      control_edges: Two thresholds of Canny's method, to make edges of ``control_image``.
      classifier_scale: Scale of the guidance by the pipeline's classifier to ``classes``; 1 by
        default.
      toward: Other ends of an interpolation: ([prompts or classes], [seeds], [mixes]), one of each
        for each picture.
      seeds: Whole numbers in [0, 2**64); 0, 1, ... by default.
      batch: Pictures that are computed at a time; at most 8 by default.
      progress_every: Also returns the prediction of every k-th call of the model; 0 for none.
      steps: Sampling steps.
      guidance: Scale of classifier-free guidance, one or one for each picture; 1 is none.
      eta: Noise of the samplers that have it: 0 is deterministic, 1 the DDPM's; by default the
        sampler's own, which is 0 for ddim.
      temperature: Factor of the noise that ddim and tcd (with eta), ddpm and lcm add; for a
        transformer over codes, of their logits' inverse.
      top_k: For a transformer over codes: choose among the k likeliest codes.
      top_p: For a transformer over codes: choose among the likeliest codes up to this probability
        in (0, 1] (arXiv:1904.09751).
      sampler: Name of the sampler.
      sampler_options: Further options of the sampler: name -> number, as in {"churn": 40}.
      noise_dropout: Rate in [0, 1) of dropout on the noise that the sampler adds.
      grid: Where the steps are: a name, or timesteps.
      size: Height and width in pixels.
      guidance_rescale: Rescaling of guided outputs in [0, 1] (arXiv:2305.08891, section 3.4).
      guidance_interval: First and last timestep that is guided.
      renoise_null: CFG++ (arXiv:2406.08070): ddim and tcd step with the unguided noise; guidance
        is then in [0, 1].
      original_size: For Stable Diffusion XL: (height, width) of the picture before it was resized.
      crop: For Stable Diffusion XL: (top, left) of the crop.
      target_size: For Stable Diffusion XL: (height, width) of the result.
      noise_level: For an upscaler: the noise added to ``image``, a timestep of its schedule.
      aesthetic_score: For the refiner of Stable Diffusion XL, about 1 to 10.
      negative_aesthetic_score: The score to be guided away from.
      switch: With a refiner: the fraction of the noise schedule that the model itself runs.
      decode_batch: Pictures decoded at a time on a device; 0 is the whole batch.
      tile: Decode pictures with a longer side in tiles of this many pixels; 0 is never.
      patch: Run the UNet on overlapping patches of this many pixels where a side is longer; 0 is
        never.
      cache_interval: Run the full UNet every N calls, reusing its deep features in between.
      cache_depth: Rows of the UNet at each end that run in every call.
    """

    prompts: str | Sequence[str] | None = option(
        "texts", "Prompt; may be repeated.", flag="prompt", each="prompt", multi=True
    )
    classes: int | str | Sequence[int | str] | None = option(
        "classes",
        "Class by number or name; may be repeated; with --format also: all.",
        flag="class",
        each="class",
        multi=True,
    )
    semantic_map: Any = option("file", "A picture whose values are labels.")
    layout: Any = option(
        "file", 'JSON file of boxes: [{"label": "cup", "box": [left, top, width, height]}, ...].'
    )
    embeddings: Any = option("file", "A .npy file of vectors [m, dim].")
    neighbors: int | None = option("whole", "Nearest neighbours to add from --database.")
    database: Any = option("file", "Embeddings of ldm-data embed: a folder, or .npz files.")
    condition: Any = option("", "")
    negative: str | Sequence[str] | None = option(
        "texts", "Negative prompt: one for all prompts, or one for each.", multi=True
    )
    image: Any = option(
        "file", "A picture to start from; for a super-resolution model, to enlarge."
    )
    mask: Any = option("file", "A picture that is white where --image is painted.")
    depth: Any = option(
        "file", "A depth map, brighter where nearer: a picture of one channel, or a .npy file."
    )
    outpaint: Sequence[int] | None = option(
        "wholes", "TOP,RIGHT,BOTTOM,LEFT: pixels to add around --image."
    )
    strength: float | None = option(
        "real", "Denoising strength in (0, 1]: fraction of the steps re-run on --image (0.75)."
    )
    variation: float | Sequence[float] | None = option(
        "real", "Distance in [0, 1] from --image by its inverted noise."
    )
    noise: Any = option(
        "file",
        "A .npy file of the noise to start from: latents (h, w, c) or (c, h, w).",
        flag="x_T",
    )
    control_image: Any = option(
        "file",
        "A ControlNet's hint, as edges or a pose; once for each --control.",
        multi=True,
    )
    control_scale: float | Sequence[float] | None = option(
        "reals", "Factor of the ControlNets' features, one or one for each (default: 1)."
    )
    control_edges: Sequence[float] | None = option(
        "reals", "LOW,HIGH: make edges of --control_image (Canny), for example 100,200."
    )
    classifier_scale: float | Sequence[float] | None = option(
        "real", "Scale of the guidance by --classifier to --class (default: 1)."
    )
    toward: tuple[Sequence[Any], Sequence[int], Sequence[float]] | None = option("", "")
    seeds: int | Sequence[int] | None = option("", "", each="seed")
    batch: int | None = option(
        "whole", "Pictures computed at a time (default: at most 8; with --format 64)."
    )
    progress_every: int = dataclasses.field(
        default=0,
        metadata={
            "kind": "whole",
            "help": "Also write the prediction of every k-th call of the model, as a row.",
        },
    )
    steps: int | None = option(
        "whole", "Sampling steps; several, 20,50, make a labelled grid.", own=50
    )
    guidance: float | Sequence[float] | None = option(
        "reals",
        "Scale of classifier-free guidance, 1 is none; several, 1,3,5, make a labelled grid.",
        each="guidance",
        own=5.0,
    )
    eta: float | None = option(
        "real",
        "Noise of ddim, tcd, ancestral and SDE samplers, 0 (deterministic) to 1 (default: the "
        "sampler's own).",
        own=None,
    )
    temperature: float | None = option(
        "real",
        "Factor of the noise that ddim and tcd (with --eta), ddpm and lcm add (default: 1).",
        own=1.0,
    )
    top_k: int | None = option(
        "whole", "Choose each code among the k likeliest (transformers over codes).", own=None
    )
    top_p: float | None = option(
        "real", "Choose each code among the likeliest up to this probability.", own=None
    )
    sampler: str | None = option(
        "text",
        "ddim, ddpm, plms, dpmpp_2m, unipc, euler, heun ...; a wrong name lists them all.",
        own="ddim",
    )
    sampler_options: Mapping[str, float] | None = option(
        "named",
        "NAME=NUMBER,...: further options of the sampler, as churn=40; a wrong name lists them.",
        own=None,
    )
    noise_dropout: float | None = option(
        "real", "Rate in [0, 1) of dropout on the noise that the sampler adds.", own=None
    )
    grid: str | Sequence[float] | None = option(
        "grid",
        "Spacing of the steps: uniform, trailing, karras ..., or timesteps separated by commas.",
        flag="timesteps",
        own="uniform",
    )
    size: Sequence[int] | None = option(
        "size", "HEIGHTxWIDTH in pixels (default: as trained, or as the image).", own=(64, 64)
    )
    guidance_rescale: float | Sequence[float] | None = option(
        "real", "Rescaling of guided outputs in [0, 1] (arXiv:2305.08891).", own=0.0
    )
    guidance_interval: Sequence[float] | None = option(
        "reals", "FIRST,LAST timestep that is guided (default: all).", own=None
    )
    renoise_null: bool | None = option(
        "switch",
        "CFG++ (arXiv:2406.08070) of ddim and tcd: true; --guidance is then in [0, 1].",
        own=None,
    )
    original_size: Sequence[int] | None = option(
        "size", "SDXL: HEIGHTxWIDTH of the picture before resizing (default: the size).", own=None
    )
    crop: Sequence[int] | None = option(
        "wholes", "SDXL: TOP,LEFT of the crop in pixels (default: 0,0).", own=None
    )
    target_size: Sequence[int] | None = option(
        "size", "SDXL: HEIGHTxWIDTH of the result (default: the size).", own=None
    )
    noise_level: int | None = option(
        "whole", "Upscaler: noise added to --image, from 0 (default: 20).", own=None
    )
    aesthetic_score: float | None = option(
        "real", "SDXL refiner: aesthetic score, about 1 to 10 (default: 6).", own=None
    )
    negative_aesthetic_score: float | None = option(
        "real", "SDXL refiner: the score to be guided away from (default: 2.5).", own=None
    )
    switch: float | None = option(
        "real", "Fraction of the schedule before --refiner takes over (default: 0.8).", own=None
    )
    decode_batch: int | None = option(
        "whole",
        "Pictures decoded at a time on a device (default: 512x512 pixels, on a CPU 128x128).",
        own=None,
    )
    tile: int | None = option(
        "whole", "Decode larger pictures in tiles of this many pixels, not exactly.", own=0
    )
    patch: int | None = option(
        "whole", "Run the UNet on patches of this many pixels of larger pictures.", own=0
    )
    cache_interval: int | None = option(
        "whole",
        "Run the full UNet every N calls and reuse its deep features in between (DeepCache).",
        own=1,
    )
    cache_depth: int | None = option(
        "whole", "Rows of the UNet at each end that run in every call (default: 1).", own=1
    )

    def __post_init__(self) -> None:
        for name, field in OPTIONS.items():
            kind, value = field.metadata["kind"], getattr(self, name)
            if kind and value is not None and not KINDS[kind].check(value):
                raise RequestError(f"{name} must be {KINDS[kind].what}, not {_short(value)}")
        if self.size is not None and len(self.size) != 2:
            raise RequestError(f"size must be (height, width), not {_short(self.size)}")
        _, seeds, mixes = self.toward or ((), (), ())
        if not _all(_whole)(self.seeds if self.seeds is not None else 0) or not _all(_whole)(seeds):
            raise RequestError(f"seeds must be whole numbers, not {_short(self.seeds)}")
        if not _all(_real)(mixes):
            raise RequestError(f"mixes must be finite numbers, not {_short(mixes)}")
        if self.batch is not None and self.batch < 1:
            raise RequestError(f"batch must be at least 1, not {self.batch}")
        if self.progress_every < 0:
            raise RequestError(f"progress_every must be at least 0, not {self.progress_every}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise RequestError(f"strength must be above 0 and up to 1, not {self.strength}")
        if self.switch is not None and not 0 < self.switch < 1:
            raise RequestError(f"switch must be between 0 and 1, not {self.switch}")
        far = np.asarray(0.0 if self.variation is None else self.variation)
        if not ((far >= 0) & (far <= 1)).all():
            raise RequestError(f"variation must be from 0 to 1, not {self.variation}")
        masked = self.mask is not None or self.outpaint is not None
        if self.variation is not None and (masked or self.strength is not None):
            raise RequestError(
                "variation takes the whole image: leave out mask, outpaint and strength"
            )
        interval = self.guidance_interval
        if interval is not None and (
            np.shape(interval) != (2,) or not 0 <= interval[0] <= interval[1]
        ):
            raise RequestError(
                f"guidance_interval {interval}: give the first and the last timestep that is guided"
            )
        if self.noise_dropout is not None and not 0 <= self.noise_dropout < 1:
            raise RequestError(
                f"noise_dropout must be at least 0 and below 1, not {self.noise_dropout}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be above 0 and up to 1, not {self.top_p}")
        for name in ("eta", "temperature"):
            if (getattr(self, name) or 0) < 0:
                raise RequestError(
                    f"{name} must be a number of at least 0, not {getattr(self, name)}"
                )

    def settings(self) -> dict[str, Any]:
        """Returns the sampling settings: field -> value."""
        return {name: getattr(self, name) for name in SETTINGS}

    def given(self) -> dict[str, Any]:
        """Returns the fields that are not None."""
        values = {name: getattr(self, name) for name in OPTIONS}
        return {name: value for name, value in values.items() if value is not None}

    # --------------------------------------------------------------- the settings in a picture

    def row(self, i: int) -> dict[str, Any]:
        """Returns what picture ``i`` has of its own, for the settings in its PNG."""
        row = {}
        for name in EACH:
            values = getattr(self, name)
            if values is not None and (name != "guidance" or isinstance(values, list)):
                values = as_list(values)
                row[OPTIONS[name].metadata["each"] or name] = values[i % len(values)]
        if self.toward is not None:
            ends, seeds, mixes = self.toward
            subject = "class" if self.classes is not None else "prompt"
            if self.prompts is not None or self.classes is not None:
                row[f"toward_{subject}"] = ends[i]
            row |= {"toward_seed": seeds[i], "mix": mixes[i]}
        return row

    @classmethod
    def from_row(cls, kept: Mapping[str, Any]) -> "Request":
        """Returns the request of one picture from the settings in its PNG.

        Raises:
          RequestError: A setting has a value that does not fit.
        """
        values = {name: kept[name] for name in (*SETTINGS, *TASK) if name in kept}
        for name in EACH:
            each = OPTIONS[name].metadata["each"] or name
            if each in kept:
                values[name] = kept[each] if name == "guidance" else [kept[each]]
        if "mix" in kept:
            end = kept.get("toward_prompt", kept.get("toward_class"))
            values["toward"] = ([end], [kept["toward_seed"]], [kept["mix"]])
        if "sampler_options" not in kept and kept.get("eta") == 0:
            # A PNG of version 0.1, where eta 0 left the noise to the sampler.
            values["eta"] = own_eta(kept.get("sampler"))
        if "batch" in kept:
            values["batch"] = kept["batch"]
        try:
            return cls(**values)
        except TypeError as error:
            raise RequestError(f"settings do not fit: {error}") from None


OPTIONS: dict[str, dataclasses.Field] = {f.name: f for f in dataclasses.fields(Request)}
# Fields whose default a model config's "sampling" may set.
SETTINGS = tuple(
    name
    for name, field in OPTIONS.items()
    if field.metadata.get("own", dataclasses.MISSING) is not dataclasses.MISSING
)
FILES = tuple(name for name, field in OPTIONS.items() if field.metadata["kind"] == "file")
TASK = (*FILES, "neighbors", "outpaint", "strength", "variation")
TASK += ("control_scale", "control_edges")
TASK += ("classifier_scale",)
EACH = ("prompts", "classes", "negative", "seeds", "guidance")  # one value for each picture


# Settings of one sampler: a model's own hold for its default sampler alone.
OF_SAMPLER = ("eta", "temperature", "sampler_options", "noise_dropout")


def own_eta(sampler: Any) -> float:
    """Returns the eta that a sampler takes by default; 0 where it has none."""
    known = SAMPLERS.get(sampler) if isinstance(sampler, str) else None
    return 0.0 if known is None else known.options.get("eta", 0.0)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises RequestError for a setting that does not exist."""
    for name in names:
        if name not in known:
            raise RequestError(f"setting {name!r} does not exist{did_you_mean(name, known)}")


def read_prompts(path: str | Path) -> list[str]:
    """Returns the prompts of a text file, one on each line."""
    try:
        lines = decode_text(read_bytes(path), f"--prompts_file {path}").splitlines()
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(f"--prompts_file {path} cannot be read: {reason}") from None
    except DataError as error:
        raise RequestError(str(error)) from None
    prompts = [line.strip().removeprefix("\ufeff") for line in lines]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise RequestError(f"--prompts_file {path} has no prompt in it")
    return prompts


def interpolation(
    subjects: Sequence[Any], seeds: Sequence[int], frames: int
) -> tuple[list[Any], list[int], tuple[list[Any], list[int], list[float]]]:
    """Returns (subjects, seeds, toward) of a walk over several ends.

    Args:
      subjects: Prompts or classes, one for each end.
      seeds: One for each end.
      frames: Pictures for each stretch between two ends; the last end follows.
    """
    if len(seeds) < 2 or frames < 1:
        raise RequestError(
            "interpolation needs at least two ends and one frame for each stretch between them"
        )
    stretches = [(i, i + 1, k / frames) for i in range(len(seeds) - 1) for k in range(frames)]
    walk = [*stretches, (len(seeds) - 1, len(seeds) - 1, 0.0)]
    starts, ends, mixes = (list(part) for part in zip(*walk, strict=True))
    toward = ([subjects[i] for i in ends], [seeds[i] for i in ends], mixes)
    return [subjects[i] for i in starts], [seeds[i] for i in starts], toward
