"""Samples pictures.

    ldm-sample --prompt "red apple, noto style"

Every setting is kept inside each PNG; --replay PICTURE.png makes the same picture again.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from ldm_jax.cli import run as cli
from ldm_jax.cli.run import say
from ldm_jax.conditioning.base import as_list
from ldm_jax.data.pixels import PixelFormat
from ldm_jax.errors import DataError, RequestError, UnreadablePicture
from ldm_jax.io import png
from ldm_jax.io.atomic import atomic_path
from ldm_jax.io.paths import absolute_path, as_path, check_writable, exists, is_bucket, local_copy
from ldm_jax.sampling.request import (
    EACH,
    FILES,
    KINDS,
    OPTIONS,
    TASK,
    Request,
    interpolation,
    read_prompts,
)

# Settings of a run, beside those of its request, that a PNG keeps, and their types.
MODEL: dict[str, type] = {
    **dict.fromkeys(("model", "model_config", "vae", "text_encoder"), str),
    **dict.fromkeys(("clip", "refiner", "classifier", "dtype"), str),
    **dict.fromkeys(("lora", "embedding", "control"), list),
    "prompt_weights": bool,
    "clip_skip": int,
}
# Settings without which a picture cannot be made again.
REPLAYED = ("model", "seed", "steps", "guidance", "eta", "sampler", "size", "dtype", "batch")
SWEPT = ("steps", "guidance")  # flags that take several values
PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif")
PNG_PIXELS = ((3, "uint8"), (1, "uint8"), (1, "uint16"))  # channels and numbers of a PNG


def main() -> None:
    """Runs ``ldm-sample``."""
    define_flags()
    cli.run(sample)


def define_flags() -> None:
    """Defines the flags: those of `Request`, and those of the command."""
    for name, field in OPTIONS.items():
        known = field.metadata
        if known["kind"]:
            define = flags.DEFINE_multi_string if known.get("multi") else flags.DEFINE_string
            define(known.get("flag") or name, None, known["help"])
    flags.DEFINE_string("prompts_file", None, "A text file with a prompt on each line.")
    text = "Pictures for each prompt, with seeds --seed, --seed + 1, ...; with --format: in all."
    flags.DEFINE_integer("num", 4, text, lower_bound=1)
    flags.DEFINE_integer("seed", 0, "The first seed, below 2**64.", lower_bound=0)
    text = "Pictures on the way from each (prompt, seed) to the next."
    flags.DEFINE_integer("interpolate", None, text, lower_bound=1)

    define_model_flags()
    text = "How a batch is spread over several devices."
    flags.DEFINE_enum("parallel", "jit", ["jit", "pmap"], text)

    text = "Output folder; existing files are never overwritten."
    flags.DEFINE_string("out", "outputs", text)
    flags.DEFINE_bool("grid", True, "Also write one picture of all pictures.")
    flags.DEFINE_bool("gif", False, "Also write an animation of the steps, or of --interpolate.")
    text = "Write many pictures to one file (png: a folder); resumes if stopped."
    flags.DEFINE_enum("format", None, ["npz", "png", "zip"], text)
    flags.DEFINE_string("replay", None, "A PNG of this program: make the same picture again.")
    text = "A folder of pictures, or one: write what the first stage of --model keeps of them."
    flags.DEFINE_string("reconstruct", None, text)
    text = "A folder of NAME.png and NAME_mask.png: paint each mask, at the pictures' own sizes."
    flags.DEFINE_string("pairs", None, text)


def define_model_flags() -> None:
    """Defines the flags in `MODEL`."""
    text = "A model directory, a checkpoint, a folder of diffusers, or a model of the package."
    flags.DEFINE_string("model", "emoji", text)
    text = "The original's YAML of a checkpoint (default: inferred from names and shapes)."
    flags.DEFINE_string("model_config", None, text)
    flags.DEFINE_string("vae", None, "A model or checkpoint to take the first stage (VAE) from.")
    text = "A model or checkpoint to take the text encoder from."
    flags.DEFINE_string("text_encoder", None, text)
    text = "A CLIP model that makes the vectors of prompts, for a model of embeddings."
    flags.DEFINE_string("clip", None, text)
    text = "A second model that takes over at --switch, such as the refiner of SDXL."
    flags.DEFINE_string("refiner", None, text)
    text = "A model of the task classifier that guides the pictures to --class."
    flags.DEFINE_string("classifier", None, text)
    text = "A LoRA file, FILE[:STRENGTH]; may be repeated; FILE:0,0.5,1 makes a labelled grid."
    flags.DEFINE_multi_string("lora", None, text)
    text = "A textual inversion, [WORD=]FILE, a new word for prompts; may be repeated."
    flags.DEFINE_multi_string("embedding", None, text)
    text = "A ControlNet: a file, or a folder of diffusers; may be repeated."
    flags.DEFINE_multi_string("control", None, text)
    text = "Read weights, (word:1.3), and prompts of any length, as A1111's web UI does."
    flags.DEFINE_bool("prompt_weights", None, text)
    text = "Layer of CLIP's text encoder, from the end: 1 is the model's own, 2 the one before."
    flags.DEFINE_integer("clip_skip", None, text, lower_bound=1)
    text = "float32, bfloat16 or float16 (default: float32 on a CPU, bfloat16 elsewhere)."
    flags.DEFINE_string("dtype", None, text)


def load_model(model: Mapping[str, Any], parallel: Any = "jit") -> Any:
    """Loads the pipeline of the settings in `MODEL`, without its LoRA files."""
    from ldm_jax.sampling.pipeline import load

    return load(
        model["model"],
        config=model.get("model_config"),
        dtype=model.get("dtype"),
        parallel=parallel,
        vae=model.get("vae"),
        text_encoder=model.get("text_encoder"),
        clip=model.get("clip"),
        refiner=model.get("refiner"),
        classifier=model.get("classifier"),
        programs=cli.program_folder(),
        embedding=model.get("embedding") or (),
        control=model.get("control") or (),
        prompt_weights=bool(model.get("prompt_weights")),
        clip_skip=model.get("clip_skip"),
    )


def sample(args: Any) -> None:
    """Samples as the flags say, and writes the pictures."""
    if args.reconstruct:
        return reconstruct_all(args)
    if args.pairs:
        return inpaint_pairs(args)
    kept = None
    if args.replay:
        kept, request = replayed(args.replay)
        requests = [request]
    else:
        requests = requests_of(args)
    model = kept or {name: getattr(args, name) for name in MODEL}
    loras = lora_sweep(model.get("lora") or [])
    out = check_out(args.out)
    began = time.perf_counter()
    say(f"loading {model['model']} ...")
    from ldm_jax.kernels.cores import use_cores

    if args.parallel == "jit":
        with contextlib.suppress(RuntimeError):  # JAX has its devices already, and keeps them
            use_cores()
    pipe = load_model(model, args.parallel)
    merged = pipe.with_lora(*loras[0]) if loras[0] else pipe
    if args.format and kept is None:
        if len(loras) > 1:
            raise RequestError("--format takes one strength of each --lora")
        return many(merged, args, requests, out, began)
    batch = requests[0].batch or min(pictures_of(requests[0]), 8)
    every = requests[0].progress_every or (1 if args.gif and not args.interpolate else 0)
    changes: dict[str, Any] = {"batch": batch, "progress_every": every}
    requests = [dataclasses.replace(request, **changes) for request in requests]
    own = [pipe.complete(request) for request in requests]
    first_streams = [merged.batches(request) for request in requests]  # checks the requests
    del merged
    total = len(loras) * sum(map(pictures_of, requests))
    steps = ", ".join(str(one.steps) for one in own)
    say(
        f"sampling {total} pictures, {steps} steps of {own[0].sampler}; the first batch compiles "
        "unless it was cached"
    )

    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    first, paths, images = next_number(out), [], []
    inputs = fingerprints(requests[0])
    with tqdm(total=total, unit="picture", dynamic_ncols=True, disable=None) as bar:
        for used, i, stream in streams_of(pipe, loras, requests, first_streams):
            request, chosen = requests[i], own[i]
            common = common_settings(model, request, chosen) | inputs | {"dtype": pipe.dtype}
            common |= {"lora": used} if used else {}
            for done in stream:
                for k, place in enumerate(done.places):
                    row = request.row(place)
                    paths.append(out / f"{first + len(paths):05d}-{title(row)}.png")
                    png.save_png(paths[-1], done.images[k], common | row)
                    if done.progress is not None:
                        frames = [*done.progress[k], done.images[k]]
                        png.save_png(
                            paths[-1].with_suffix(".progress.png"), png.grid(frames, len(frames))
                        )
                        if args.gif:
                            png.save_gif(paths[-1].with_suffix(".gif"), frames)
                images.extend(done.images)
                bar.update(len(done.places))
    if args.gif and args.interpolate:
        paths.append(out / f"{first:05d}-interpolation.gif")
        png.save_gif(paths[-1], images, seconds=0.1 * len(images))
    if args.grid and total > 1:
        paths.append(out / f"{first:05d}-grid.png")
        named = describe(requests, own[0])
        named |= {"lora": loras if len(loras) > 1 else loras[0]} if loras[0] else {}
        png.save_png(paths[-1], sheet(requests, images, loras), named)
    where = paths[-1] if len(paths) < 3 else f"{paths[0]} ... {paths[-1]}"
    say(f"{total} pictures in {time.perf_counter() - began:.1f} s: {where}")


def lora_sweep(given: Sequence[str]) -> list[list[str]]:
    """Returns the LoRA files of each model to sample from, every combination of strengths."""
    from ldm_jax.convert.lora import split_strengths

    files = [split_strengths(text) for text in given]
    return [
        [f"{file}:{strength:g}" for (file, _), strength in zip(files, strengths, strict=True)]
        for strengths in itertools.product(*(strengths for _, strengths in files))
    ]


def streams_of(
    pipe: Any, loras: Sequence[list[str]], requests: Sequence[Request], first: list[Any]
) -> Iterator[tuple[list[str], int, Any]]:
    """Yields (LoRA files, place of the request, its batches), with one merged model at a time.

    Args:
      pipe: The model without LoRA files.
      loras: Of `lora_sweep`. All their models run the same compiled programs.
      requests: The requests.
      first: The batches of the first model.
    """
    for k, chosen in enumerate(loras):
        if k:
            merged = pipe.with_lora(*chosen)
            first[:] = [merged.batches(request) for request in requests]
            del merged
        for i in range(len(requests)):
            yield chosen, i, first[i]
        first.clear()


def many(pipe: Any, args: Any, requests: Sequence[Request], out: Path, began: float) -> None:
    """Writes --num pictures to one file, for --format."""
    from tqdm import tqdm

    from ldm_jax.sampling.bulk import make_many

    request, made = requests[0], 0
    others = [getattr(request, name) for name in (*TASK, "negative", "toward")]
    if args.classifier:
        raise RequestError("--format takes no --classifier: sample without --format")
    swept = len(requests) > 1 or isinstance(request.guidance, list)
    if swept or args.interpolate or args.gif or request.progress_every or any(others):
        raise RequestError(
            "--format takes prompts, classes or no condition, one --steps and one --guidance"
        )
    with tqdm(total=args.num, unit="picture", dynamic_ncols=True, disable=None) as bar:

        def report(done: int, new: int) -> None:
            nonlocal made
            made += new
            bar.update(done - bar.n)

        path = make_many(
            pipe,
            out,
            args.num,
            form=args.format,
            seed=args.seed,
            batch=request.batch or 64,
            report=report,
            prompts=request.prompts,
            classes=request.classes,
            **{name: value for name, value in request.settings().items() if value is not None},
        )
    seconds = time.perf_counter() - began
    rate = f"{made / seconds:.2f} pictures/s with loading and compiling"
    say(f"{args.num} pictures in {path}, {made} of them made now in {seconds:.1f} s, {rate}")


def reconstruct_all(args: Any) -> None:
    """Writes what a first stage keeps of a picture, or of all pictures of a folder.

    Pictures that are no 8-bit RGB are read as in the first stage's training, and written as PNG
    where that can hold them (grey, 8 or 16 bits), else as .npy files of the same numbers.
    """
    from ldm_jax.sampling.pipeline import load_reconstructor, reconstruct

    given = local_copy(args.reconstruct)
    files = [given] if given.is_file() else sorted(given.rglob("*")) if given.is_dir() else []
    arrays = [file for file in files if file.suffix.lower() == ".npy"]
    files = [file for file in files if file.suffix.lower() in PICTURES] or arrays
    if not files:
        raise RequestError(f"--reconstruct {given}: there is no picture ({', '.join(PICTURES)})")
    out = check_out(args.out)
    stage, pixels = load_reconstructor(args.model, dtype=args.dtype)
    out.mkdir(parents=True, exist_ok=True)
    first, errors = next_number(out), []
    for i, file in enumerate(files):
        picture, dtype = read_pixels(file, pixels)
        kept = reconstruct(stage, picture)
        errors.append(np.square(picture.astype(np.float32) - kept).mean())
        settings = {"model": args.model, "reconstruct": str(file.absolute())}
        name = f"{first + i:05d}-{slug(file.stem)}"
        numbers = kept if picture.dtype == np.uint8 else pixels.restore(kept, dtype)
        if (pixels.channels, dtype.name) in PNG_PIXELS:
            image = numbers[:, :, 0] if pixels.channels == 1 else numbers
            png.save_png(out / f"{name}.png", image, settings)
        else:
            with atomic_path(out / f"{name}.npy") as temporary, temporary.open("wb") as opened:
                np.save(opened, numbers)
    psnr = 10 * np.log10(255**2 / max(float(np.mean(errors)), 1e-12))
    say(f"{len(files)} pictures in {out}, PSNR {psnr:.2f} dB")


def read_pixels(file: Path, pixels: PixelFormat) -> tuple[np.ndarray, np.dtype]:
    """Returns a picture as a first stage takes it, and the type of its numbers."""
    from ldm_jax.conditioning.pictures import read_picture

    if pixels.is_plain and file.suffix.lower() != ".npy":
        picture = read_picture(file)
        return picture, picture.dtype
    try:
        data = file.read_bytes()
        return pixels(data), pixels.read(data).dtype
    except OSError as error:
        raise RequestError(f"image {file} cannot be read: {error.strerror or error}") from None
    except (UnreadablePicture, DataError) as error:
        raise RequestError(f"image {file}: {error}") from None


def inpaint_pairs(args: Any) -> None:
    """Paints the masked parts of the pictures of a folder."""
    from tqdm import tqdm

    from ldm_jax.sampling.pairs import find_pairs, inpaint

    for name in ("image", "mask", "size", "outpaint", "interpolate", "format", "gif", "replay"):
        if getattr(args, name):
            raise RequestError(f"--{name} does not go with --pairs: leave it out")
    pairs = find_pairs(local_copy(args.pairs))
    request, *others = requests_of(args)
    each = {name: [*dict.fromkeys(as_list(getattr(request, name)))] for name in EACH[:3]}
    scales = {*as_list(request.guidance)}
    loras = lora_sweep(args.lora or [])
    if others or len(loras) > 1 or len(scales) > 1 or max(map(len, each.values())) > 1:
        raise RequestError("--pairs takes one prompt, one --steps, one --guidance and one --lora")
    changes: dict[str, Any] = {name: values or None for name, values in each.items()}
    changes["guidance"] = scales.pop() if scales else None
    request = dataclasses.replace(request, seeds=[args.seed], batch=1, **changes)
    out = check_out(args.out)
    model = {name: getattr(args, name) for name in MODEL}
    say(f"loading {model['model']} ...")
    pipe = load_model(model)
    pipe = pipe.with_lora(*loras[0]) if loras[0] else pipe
    if not all(hasattr(pipe.model, name) for name in ("multiple", "conditioner")):
        raise RequestError("--pairs needs a latent diffusion model")
    settings = {**common_settings(model, request, pipe.complete(request)), "seed": args.seed}
    del settings["batch"]  # a picture's border is not kept, so it cannot be replayed
    out.mkdir(parents=True, exist_ok=True)
    first, made = next_number(out), inpaint(pipe, request, pairs)
    for i, (pair, image) in enumerate(zip(pairs, tqdm(made, total=len(pairs)), strict=True)):
        files = {"image": str(pair.image.absolute()), "mask": str(pair.mask.absolute())}
        name = f"{first + i:05d}-{slug(pair.image.stem)}.png"
        png.save_png(out / name, image, settings | files)
    say(f"{len(pairs)} pictures in {out}")


# -------------------------------------------------------------------------------------- requests


def requests_of(args: Any) -> list[Request]:
    """Returns the requests in the flags: one for each number of steps."""
    values: dict[str, Any] = {}
    for name, field in OPTIONS.items():
        known = field.metadata
        flag = known.get("flag") or name
        if known["kind"] and name not in SWEPT and (text := getattr(args, flag)) is not None:
            values[name] = text if known.get("multi") else parsed(flag, KINDS[known["kind"]], text)
    if args.prompts_file:
        values["prompts"] = [*values.get("prompts", []), *read_prompts(args.prompts_file)]
    for name in ("prompts", "classes", "negative"):
        if not values.get(name, True):
            del values[name]
    if "prompts" in values and "classes" in values and not args.classifier:
        raise RequestError("give prompts or classes, not both")
    name = next((name for name in ("prompts", "classes") if name in values), "")
    subjects = values.get(name, [None])
    negative = values.get("negative", [])
    if len(negative) not in (0, 1, len(subjects)):
        raise RequestError(
            f"{len(negative)} of --negative for {len(subjects)} prompts: give one, or one for each"
        )
    count = 1 if args.format else args.num
    guidance = swept("guidance", float, args.guidance)
    each = max(len(guidance), 1)
    # The order of pictures: subjects, then seeds, then guidance scales.
    rows = [(i, args.seed + k) for i in range(len(subjects)) for k in range(count)]
    if args.interpolate:
        ends = [subjects[i] for i, _ in rows]
        starts, seeds, toward = interpolation(ends, [seed for _, seed in rows], args.interpolate)
        values["toward"] = tuple([v for v in part for _ in range(each)] for part in toward)
        if negative:
            values["negative"] = [negative[0]] * len(starts) * each
    else:
        starts, seeds = [subjects[i] for i, _ in rows], [seed for _, seed in rows]
        if negative:
            values["negative"] = [negative[i % len(negative)] for i, _ in rows for _ in range(each)]
    values["seeds"] = [seed for seed in seeds for _ in range(each)]
    if name:
        values[name] = [start for start in starts for _ in range(each)]
    if guidance:
        values["guidance"] = guidance * len(starts) if not args.format else guidance[0]
        if args.format and len(guidance) > 1:
            raise RequestError("--format takes one --guidance")
    steps: list[Any] = swept("steps", int, args.steps) or [None]
    return [Request(**values, steps=n) for n in steps]


def parsed(flag: str, kind: Any, text: str) -> Any:
    """Returns the value of a flag; raises RequestError where the text does not fit."""
    try:
        return kind.parse(text)
    except ValueError:
        raise RequestError(f"--{flag}={text}: write {kind.write}") from None


def swept(flag: str, number: Callable[[str], Any], text: str | None) -> list[Any]:
    """Returns the numbers of a flag that takes several."""
    try:
        return [number(part) for part in text.split(",")] if text else []
    except ValueError:
        whole = "whole numbers" if number is int else "numbers"
        raise RequestError(f"--{flag}={text}: write {whole}, separated by commas") from None


def pictures_of(request: Request) -> int:
    """Returns the number of pictures of a request made by this program."""
    return len(as_list(request.seeds))


def fingerprints(request: Request) -> dict[str, Any]:
    """Returns a request's task for its pictures' settings: files by full path and sha256.

    A folder's is that of its tables (.json) and of the names and sizes of its other files.
    """
    kept = {name: v for name in TASK if (v := getattr(request, name)) is not None}
    for name in set(FILES) & set(kept):
        several = isinstance(kept[name], list)
        files = [absolute_path(file) for file in as_list(kept[name])]
        digests = [digest_of(file) for file in files]
        kept[name] = [*map(str, files)] if several else str(files[0])
        kept[f"{name}_sha256"] = digests if several else digests[0]
    return kept


def digest_of(path: Path) -> str:
    """Returns the SHA-256 of a file, or of a folder's tables and of its other files' sizes."""
    path = local_copy(path)
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = hashlib.sha256()
    for file in sorted(path.iterdir()):
        content = file.read_bytes() if file.suffix == ".json" else b""
        found.update(f"{file.name} {file.stat().st_size}\n".encode() + content)
    return found.hexdigest()


def common_settings(model: Mapping[str, Any], request: Request, own: Request) -> dict[str, Any]:
    """Returns what the PNGs of a request keep of its model and settings.

    Args:
      model: The settings named in `MODEL`.
      request: The request.
      own: The request with the model's own settings.
    """
    read = {name: model[name] for name in MODEL if model.get(name) is not None}
    # A size that follows from an image is found again from it, with what is cut off.
    size = {} if request.image is None else {"size": request.size}
    return {**read, **own.settings(), **size, "batch": request.batch}


def replayed(path: str) -> tuple[dict[str, Any], Request]:
    """Returns the model and the request that made a picture.

    The picture is sampled alone, but in a batch of the same size, so that it is the same to the
    bit.
    """
    kept = png.read_settings(path)
    missing = [name for name in REPLAYED if name not in kept]
    if missing:
        raise RequestError(
            f"{path}: its settings lack {missing[0]!r}, so it cannot be made again (a grid?)"
        )
    for name in set(FILES) & set(kept):
        files, digests = as_list(kept[name]), as_list(kept.get(f"{name}_sha256"))
        for file, digest in itertools.zip_longest(map(as_path, map(str, files)), digests):
            if file is None or not exists(file):
                raise RequestError(
                    f"{path} was made from the {name} {file}, which is missing: put it back"
                )
            if digest_of(file) != digest:
                raise RequestError(
                    f"{path} was made from the {name} {file}, which has changed since: put the old "
                    "one back"
                )
    for name, kind in MODEL.items():
        value = kept.get(name)
        texts = value if isinstance(value, list) else []
        if not isinstance(value, kind | None) or not all(isinstance(one, str) for one in texts):
            raise RequestError(f"{path}: its settings have {name}={value!r}")
    try:
        request = Request.from_row(kept)
    except RequestError as error:
        raise RequestError(f"{path}: its settings do not fit: {error}") from None
    return {name: kept.get(name) for name in MODEL}, request


# ----------------------------------------------------------------------------------------- files


def check_out(path: str) -> Path:
    """Returns the output folder; raises RequestError where nothing can be written there."""
    if is_bucket(path):
        check_writable(path)
        return as_path(path)
    out = Path(path)
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "read-only" if there.is_dir() else "not a folder"
        raise RequestError(f"--out {out} cannot be written: {there} is {reason}")
    return out


def title(row: Mapping[str, Any]) -> str:
    """Returns the part of a file name that describes a picture."""
    subject = "picture"
    if "prompt" in row:
        subject = slug(str(row["prompt"]))
    elif "class" in row:
        subject = slug(f"class {row['class']}")
    return f"{subject}-{row['seed']}"


def sheet(
    requests: Sequence[Request], images: Sequence[Any], loras: Sequence[list[str]] = ([],)
) -> Any:
    """Returns one picture of all, labelled by LoRA, steps and guidance where there are several."""
    rows = [requests[0].row(i) for i in range(pictures_of(requests[0]))]
    scales = list(dict.fromkeys(row.get("guidance") for row in rows))
    if len(scales) == len(requests) == len(loras) == 1:
        subjects = len({title({**row, "seed": 0}) for row in rows})
        each = len(images) // subjects
        return png.grid(images, None if "mix" in rows[0] or not 1 < each <= 16 else each)
    several = len(rows) > len(scales)
    names = [", ".join(Path(one).stem + one[one.rindex(":") :] for one in used) for used in loras]
    labels = [
        ", ".join(
            filter(
                None,
                [
                    name if len(loras) > 1 else "",
                    f"{request.steps or 'own'} steps" if len(requests) > 1 else "",
                    title(row) if several else "",
                ],
            )
        )
        for name in names
        for request in requests
        for row in rows[:: len(scales)]
    ]
    columns = [f"guidance {scale:g}" if scale is not None else "" for scale in scales]
    return png.labelled_grid(images, labels, columns)


def describe(requests: Sequence[Request], own: Request) -> dict[str, Any]:
    """Returns the settings that a grid of pictures has in common."""
    named: dict[str, Any] = own.settings()
    if requests[0].prompts is not None:
        named["prompts"] = list(dict.fromkeys(as_list(requests[0].prompts)))
    if isinstance(requests[0].guidance, list):
        named["guidance"] = list(dict.fromkeys(requests[0].guidance))
    return named | ({"steps": [one.steps for one in requests]} if len(requests) > 1 else {})


def next_number(out: Path) -> int:
    """Returns one more than the highest number that a picture in ``out`` starts with."""
    names = (path.name for path in out.iterdir()) if exists(out) else ()
    numbers = [int(m[1]) for name in names if (m := re.match(r"(\d{5,})-", name))]
    return max(numbers, default=-1) + 1


def slug(text: str) -> str:
    """Returns a text as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "picture"
