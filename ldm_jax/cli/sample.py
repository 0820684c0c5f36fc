"""What sample.py does: requests from flags or from a picture's own settings, pictures on disk with their settings in them."""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.cli.run import say

# What every picture's settings have, and what they have of a task.
MODEL = ("model", "model_config", "dtype", "batch")  # what a whole run has in common
REPLAYED = ("model", "seed", "steps", "guidance", "eta", "sampler", "size", "dtype", "batch")
FILES = ("image", "mask", "semantic_map", "layout", "embeddings")
TASK = (*FILES, "outpaint", "strength", "variation")
SETTINGS = (
    "eta",
    "temperature",
    "sampler",
    "grid",
    "size",
    "guidance_rescale",
    "guidance_interval",
    "decode_batch",
    "tile",
    "cache_interval",
    "cache_depth",
)


class Run(NamedTuple):
    """Pictures with settings in common.

    ``rows``: what each picture has of its own: "prompt" or "class", "seed", "negative", "guidance", and of an interpolation "toward_prompt" or
    "toward_class", "toward_seed", "mix". ``task``: the task's pictures (paths) and numbers.
    """

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    task: dict[str, Any]


def sample(args: Any) -> None:
    """Makes the pictures that the flags ask for, and writes them."""
    kept = replayed(args.replay) if args.replay else None
    runs = [kept[1]] if kept else asked(args)
    common = kept[0] if kept else {name: getattr(args, name) for name in MODEL}
    out = Path(args.out)
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(
            f"--out {out} cannot be written: {there} is {'read-only' if there.is_dir() else 'not a folder'}"
        )
    began = time.perf_counter()
    say(f"loading {common['model']} ...")
    from ldm_jax.kernels.cores import use_cores
    from ldm_jax.sampling.pipeline import load

    if args.parallel == "jit":
        with contextlib.suppress(
            RuntimeError
        ):  # a process that has used jax before keeps its devices
            use_cores()
    yaml = common["model_config"]
    pipe = load(common["model"], config=yaml, dtype=common["dtype"], parallel=args.parallel)
    if args.format and not kept:
        return many(pipe, args, runs, out, began)
    every = args.progress_every or (1 if args.gif and not args.interpolate else 0)
    batch = common["batch"] or min(len(runs[0].rows), 8)
    chosen = [pipe.settings(**run.settings) for run in runs]
    streams = [pipe.stream(**request(run), batch=batch, progress_every=every) for run in runs]
    total = sum(len(run.rows) for run in runs)
    steps = ", ".join(str(one.steps) for one in chosen)
    say(
        f"making {total} pictures, {steps} steps of {chosen[0].sampler}; the first batch compiles unless it was cached"
    )

    from tqdm import tqdm

    from ldm_jax.io import png as pictures

    out.mkdir(parents=True, exist_ok=True)
    first, paths, images = next_number(out), [], []
    inputs = fingerprints(runs[0].task)
    with tqdm(total=total, unit="picture", dynamic_ncols=True, disable=None) as bar:
        for run, settings, stream in zip(runs, chosen, streams, strict=True):
            # A size that an image brought about is found again, with what is cut off, from the image.
            size = {"size": run.settings.get("size")} if "image" in run.task else {}
            read = {"model": common["model"], **({} if yaml is None else {"model_config": yaml})}
            own = {**read, **vars(settings), **size, **inputs, "dtype": pipe.dtype, "batch": batch}
            for done in stream:
                for i, place in enumerate(done.places):
                    paths.append(out / f"{first + len(paths):05d}-{title(run.rows[place])}.png")
                    pictures.save_png(paths[-1], done.images[i], own | run.rows[place])
                    if done.progress is not None:
                        show(paths[-1], [*done.progress[i], done.images[i]], args.gif)
                images.extend(done.images)
                bar.update(len(done.places))
    if args.gif and args.interpolate:
        paths.append(out / f"{first:05d}-interpolation.gif")
        pictures.save_gif(paths[-1], images, seconds=0.1 * len(images))
    if args.grid and total > 1:
        paths.append(out / f"{first:05d}-grid.png")
        pictures.save_png(paths[-1], sheet(runs, images), vars(chosen[0]) | describe(runs))
    where = paths[-1] if len(paths) < 3 else f"{paths[0]} ... {paths[-1]}"
    say(f"{total} pictures in {time.perf_counter() - began:.1f} s: {where}")


def many(pipe: Any, args: Any, runs: Sequence[Run], out: Path, began: float) -> None:
    """--format: as many pictures as --num says, in one file."""
    from tqdm import tqdm

    from ldm_jax.sampling.bulk import make_many

    (run, *more), made = runs, 0
    scales = {row.get("guidance") for row in run.rows}
    others = (run.task, args.interpolate, args.progress_every, args.gif, args.negative)
    if more or len(scales) > 1 or any(others):
        raise ValueError(
            "--format makes pictures of prompts, of classes or of nothing, with one --steps and one --guidance"
        )
    subjects = {"prompts": [row["prompt"] for row in run.rows if "prompt" in row]}
    subjects["classes"] = [row["class"] for row in run.rows if "class" in row]
    with tqdm(total=args.num, unit="picture", dynamic_ncols=True, disable=None) as bar:

        def said(done: int, new: int) -> None:
            nonlocal made
            made += new
            bar.update(done - bar.n)

        settings = run.settings | {"guidance": scales.pop()}
        options: dict[str, Any] = {
            name: values for name, values in subjects.items() if values
        } | settings
        path = make_many(
            pipe,
            out,
            args.num,
            form=args.format,
            seed=args.seed,
            batch=args.batch or 64,
            said=said,
            **options,
        )
    seconds = time.perf_counter() - began
    rate = f"{made / seconds:.2f} pictures/s with loading and compiling"
    say(f"{args.num} pictures in {path}, {made} of them made now in {seconds:.1f} s, {rate}")


# ---------------------------------------------------------------------------------------------------------------------- requests


def asked(args: Any) -> list[Run]:
    """The requests in the flags: one for each number of steps."""
    prompts, classes = list(args.prompt), list(getattr(args, "class"))
    if args.prompts_file:
        try:
            lines = Path(args.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--prompts_file {args.prompts_file} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from None
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts_file {args.prompts_file} has no prompt in it")
    if prompts and classes:
        raise ValueError("give prompts or classes, not both")
    size = None
    if args.size:
        if not (match := re.fullmatch(r"(\d+)x(\d+)", args.size)):
            raise ValueError(f"--size {args.size!r}: write HEIGHTxWIDTH, for example 64x96")
        size = [int(match[1]), int(match[2])]
    guidance, steps = numbers(args.guidance, "guidance", float), numbers(args.steps, "steps", int)
    plain = [name for name in SETTINGS if name not in ("grid", "size", "guidance_interval")]
    settings: dict[str, Any] = {name: getattr(args, name) for name in plain}
    settings |= {"size": size, "grid": grid_of(args.timesteps)}
    settings["guidance_interval"] = (
        numbers(args.guidance_interval, "guidance_interval", float) or None
    )
    task = {name: getattr(args, name) for name in TASK if getattr(args, name) is not None}
    if args.outpaint:
        task["outpaint"] = numbers(args.outpaint, "outpaint", int)

    subjects = (
        [{"prompt": prompt} for prompt in prompts]
        or [{"class": label} for label in classes]
        or [{}]
    )
    if args.negative and len(args.negative) not in (1, len(subjects)):
        raise ValueError(
            f"{len(args.negative)} of --negative for {len(subjects)} prompts: give one, or one for each"
        )
    for i, subject in enumerate(subjects):
        if args.negative:
            subject["negative"] = args.negative[i % len(args.negative)]
    count = 1 if args.format else args.num
    rows = [{**subject, "seed": args.seed + i} for subject in subjects for i in range(count)]
    if args.interpolate:
        rows = walk(rows, args.interpolate)
    scaled = (
        [{**row, "guidance": scale} for row in rows for scale in guidance] if guidance else rows
    )
    return [Run({**settings, "steps": n}, scaled, task) for n in steps or [None]]


def numbers(text: Sequence[str] | None, flag: str, kind: type) -> list[Any]:
    """The numbers of a flag, apart by commas."""
    try:
        return [kind(part) for part in text or []]
    except ValueError:
        raise ValueError(
            f"--{flag}={','.join(text or [])}: write {'whole ' * (kind is int)}numbers, apart by commas"
        ) from None


def grid_of(text: Sequence[str] | None) -> str | list[float] | None:
    """A grid's name, or timesteps."""
    if not text:
        return None
    return (
        text[0]
        if len(text) == 1 and not re.fullmatch(r"[\d.]+", text[0])
        else numbers(text, "timesteps", float)
    )


def walk(rows: list[dict[str, Any]], frames: int) -> list[dict[str, Any]]:
    """The pictures between each request and the next."""
    from ldm_jax.sampling.requests import interpolation

    name = next((name for name in ("prompt", "class") if name in rows[0]), None)
    negative = {"negative": rows[0]["negative"]} if "negative" in rows[0] else {}
    found = []
    for frame in interpolation(
        [row.get(name or "") for row in rows], [row["seed"] for row in rows], frames
    ):
        subject, toward = frame.pop("subject"), frame.pop("toward_subject")
        found.append(({name: subject, f"toward_{name}": toward} if name else {}) | frame | negative)
    return found


def request(run: Run) -> dict[str, Any]:
    """What `Pipeline.stream` takes."""
    rows, first = run.rows, run.rows[0]
    call: dict[str, Any] = {**run.settings, **run.task, "seeds": [row["seed"] for row in rows]}
    for name, field in (("prompt", "prompts"), ("class", "classes"), ("negative", "negative")):
        if name in first:
            call[field] = [row[name] for row in rows]
    if "mix" in first:
        ends = [row.get("toward_prompt", row.get("toward_class")) for row in rows]
        call["toward"] = (ends, [row["toward_seed"] for row in rows], [row["mix"] for row in rows])
    if "guidance" in first:
        scales = [row["guidance"] for row in rows]
        call["guidance"] = scales[0] if len(set(scales)) == 1 else scales
    if "layout" in run.task:
        call["layout"] = read_layout(run.task["layout"])
    return call


def read_layout(path: str) -> list[tuple[Any, list[float]]]:
    """Boxes from a JSON file: [{"label": "cup", "box": [left, top, width, height]}, ...]."""
    try:
        boxes = json.loads(Path(path).read_text(encoding="utf-8"))
        return [(box["label"], [float(v) for v in box["box"]]) for box in boxes]
    except OSError as error:
        raise ValueError(f"--layout {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f'--layout {path}: write [{{"label": ..., "box": [left, top, width, height]}}, ...]'
        ) from None


def fingerprints(task: Mapping[str, Any]) -> dict[str, Any]:
    """A task for a picture's settings: files by their full path and their sha256."""
    kept = dict(task)
    for name in set(FILES) & set(task):
        kept[name] = str(Path(task[name]).absolute())
        kept[f"{name}_sha256"] = hashlib.sha256(Path(task[name]).read_bytes()).hexdigest()
    return kept


def replayed(path: str) -> tuple[dict[str, Any], Run]:
    """The request that made a picture: alone, but in a batch of the same size, so that it comes out the same to the bit."""
    from ldm_jax.io.png import read_settings

    kept = read_settings(path)
    missing = [name for name in REPLAYED if name not in kept]
    if missing:
        raise ValueError(
            f"{path}: its settings lack {missing[0]!r}, so it cannot be made again (a grid?)"
        )
    for name in set(FILES) & set(kept):
        file = Path(kept[name])
        if not file.is_file():
            raise ValueError(
                f"{path} was made from the {name} {file}, which is missing: put it back"
            )
        if hashlib.sha256(file.read_bytes()).hexdigest() != kept[f"{name}_sha256"]:
            raise ValueError(
                f"{path} was made from the {name} {file}, which has changed since: put the old one back"
            )
    own = (
        "prompt",
        "class",
        "negative",
        "seed",
        "guidance",
        "toward_prompt",
        "toward_class",
        "toward_seed",
        "mix",
    )
    row, task = ({name: kept[name] for name in names if name in kept} for names in (own, TASK))
    settings = {name: kept.get(name) for name in (*SETTINGS, "steps")}
    return {name: kept.get(name) for name in MODEL}, Run(settings, [row], task)


# ------------------------------------------------------------------------------------------------------------------------- files


def title(row: Mapping[str, Any]) -> str:
    """A part of a file name that tells what a picture is of."""
    subject = (
        slug(str(row["prompt"]))
        if "prompt" in row
        else slug(f"class {row['class']}")
        if "class" in row
        else "picture"
    )
    return f"{subject}-{row['seed']}"


def show(path: Path, frames: Sequence[Any], gif: bool) -> None:
    """The steps of the picture at ``path``, as a row and as an animation."""
    from ldm_jax.io import png as pictures

    pictures.save_png(path.with_suffix(".progress.png"), pictures.grid(frames, len(frames)))
    if gif:
        pictures.save_gif(path.with_suffix(".gif"), frames)


def sheet(runs: Sequence[Run], images: Sequence[Any]) -> Any:
    """One picture of all: labelled by guidance and steps where there are several, else a plain grid."""
    from ldm_jax.io import png as pictures

    scales = list(dict.fromkeys(row.get("guidance") for row in runs[0].rows))
    if len(scales) == 1 and len(runs) == 1:
        subjects = len({title({**row, "seed": 0}) for row in runs[0].rows})
        each = len(images) // subjects
        interpolated = "mix" in runs[0].rows[0]
        return pictures.grid(images, None if interpolated or not 1 < each <= 16 else each)
    several = len(runs[0].rows) > len(scales)
    rows = [
        ", ".join(
            filter(None, [f"{run.settings['steps'] or 'own'} steps", title(row) if several else ""])
        )
        for run in runs
        for row in runs[0].rows[:: len(scales)]
    ]
    columns = [f"guidance {scale:g}" if scale is not None else "" for scale in scales]
    return pictures.labelled_grid(images, rows, columns)


def describe(runs: Sequence[Run]) -> dict[str, Any]:
    """What a grid of pictures was asked by."""
    named: dict[str, Any] = {
        "prompts": list(dict.fromkeys(row["prompt"] for row in runs[0].rows if "prompt" in row))
    }
    named["guidance"] = (
        list(dict.fromkeys(row["guidance"] for row in runs[0].rows if "guidance" in row)) or None
    )
    sweep = {"steps": [run.settings["steps"] for run in runs]} if len(runs) > 1 else {}
    return {name: value for name, value in named.items() if value is not None} | sweep


def next_number(out: Path) -> int:
    """One more than the highest number that a picture in ``out`` begins with."""
    numbers = [
        int(match[1]) for path in out.iterdir() if (match := re.match(r"(\d{5,})-", path.name))
    ]
    return max(numbers, default=-1) + 1


def slug(text: str) -> str:
    """A part of a file name that tells the prompt."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "picture"
