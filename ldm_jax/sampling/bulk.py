"""Many pictures for evaluation: batches of one size, in one file, resumable at any time.

While it runs, a folder holds ``run.json``, the request, and ``pictures.partial``, raw pictures
batch after batch. The same request resumes after the last whole batch and ends with the same bytes
as an uninterrupted run.
"""

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.conditioning.base import as_list
from ldm_jax.errors import RequestError
from ldm_jax.io import png
from ldm_jax.io.atomic import atomic_path, write_atomic
from ldm_jax.io.paths import local_only
from ldm_jax.sampling.pipeline import Pipeline

FORMATS = {"npz": "pictures.npz", "zip": "pictures.zip", "png": "pictures"}
CHUNK = 256  # pictures read back at a time
# The date of every member of an archive, so that equal pictures make equal files.
MOMENT = (1980, 1, 1, 0, 0, 0)


def make_many(
    pipe: Pipeline,
    out: str | Path,
    num: int,
    *,
    form: str = "npz",
    seed: int = 0,
    batch: int = 64,
    prompts: str | Sequence[str] | None = None,
    classes: int | str | Sequence[int | str] | None = None,
    report: Callable[[int, int], None] = lambda done, made: None,
    **settings: Any,
) -> Path:
    """Samples ``num`` pictures into the folder ``out``, or resumes there.

    Picture i has the seed ``seed`` + i and the i-th of ``prompts`` or ``classes``, from the first
    again after the last.

    Args:
      pipe: The pipeline.
      out: The folder.
      num: Number of pictures.
      form: "npz", read by ADM's evaluation suite: arr_0 uint8 [num, H, W, 3], and arr_1 int64 [num]
        with the classes, if there are any; "zip" of PNG files; or "png", a folder of them.
      seed: The first seed.
      batch: Pictures computed at a time.
      prompts: For a model of text.
      classes: For a class-conditional model; "all" is every class.
      report: Called with the number of finished pictures, and of those just made.
      settings: Sampling settings.

    Returns:
      The path of the pictures.
    """
    if form not in FORMATS:
        raise RequestError(f"format {form!r} does not exist (known: {', '.join(FORMATS)})")
    if num < 1 or not 0 <= seed <= 2**64 - num:
        raise RequestError(
            f"{num} pictures from seed {seed} on: seeds must be from 0 to 2**64 - 1, at least one"
        )
    own, devices = pipe.settings(**settings), pipe.mesh.devices.size
    assert own.size is not None
    height, width = pipe.check_size(own.size)
    rows = -(-min(batch, num) // devices) * devices
    labels = labels_of(pipe, classes)
    name, subjects = ("classes", labels) if labels else ("prompts", as_list(prompts))
    run: dict[str, Any] = {"num": num, "format": form, "seed": seed, "batch": rows}
    run |= {name: subjects, "model": pipe.name, "dtype": pipe.dtype, **own.settings()}
    subject = {name: [subjects[i % len(subjects)] for i in range(num)]} if subjects else {}

    out = local_only(out, "an array of pictures")
    partial, result = out / "pictures.partial", out / FORMATS[form]
    # Checked before anything is written: one picture stands for all of them.
    pipe.stream(seeds=[seed], **{name: values[:1] for name, values in subject.items()}, **settings)
    begin(out, run)
    if result.exists():
        partial.unlink(missing_ok=True)
        report(num, 0)
        return result

    size = height * width * 3
    done = partial.stat().st_size // size // rows * rows if partial.exists() else 0
    done = min(done, num)
    with open(partial, "ab") as file:
        file.truncate(done * size)  # what a killed run left of its last batch
        report(done, 0)
        if done < num:
            rest = {name: values[done:] for name, values in subject.items()}
            seeds = list(range(seed + done, seed + num))
            for made in pipe.stream(seeds=seeds, batch=rows, **rest, **settings):
                file.write(np.ascontiguousarray(made.images).tobytes())
                file.flush()
                report(done + made.places.stop, len(made.images))

    images = np.memmap(partial, np.uint8, "r", shape=(num, height, width, 3))
    if form == "npz":
        every = np.asarray(subject["classes"], np.int64) if labels else None
        write_npz(result, images, every)
    elif form == "zip":
        write_zip(result, images)
    else:
        common = {"model": pipe.name, **own.settings(), "dtype": pipe.dtype, "batch": rows}
        each = {"prompts": "prompt", "classes": "class"}[name]

        def settings_of(i: int) -> dict[str, Any]:
            row = {each: subjects[i % len(subjects)]} if subjects else {}
            return common | {"seed": seed + i} | row

        write_folder(result, images, settings_of)
    del images
    partial.unlink()
    return result


def labels_of(pipe: Pipeline, classes: Any) -> list[int]:
    """Returns the numbers of classes; of "all" every one that the model has a name for, or all."""
    if classes is None:
        return []
    conditioner: Any = pipe.model.conditioner
    if conditioner.field != "classes":
        raise RequestError("this model has no classes: leave them out")
    return conditioner.numbers(as_list(classes), pipe.model.config.get("classes"))


def begin(out: Path, run: dict[str, Any]) -> None:
    """Writes the request to a new folder; RequestError where the folder holds another."""
    note = out / "run.json"
    run = json.loads(json.dumps(run))
    if note.exists():
        try:
            before = json.loads(note.read_text())
        except ValueError:
            raise RequestError(f"{note} is damaged: give another --out") from None
        for name in run:
            value = before.get(name)
            if name == "batch" and isinstance(value, int):
                value = min(value, max(run["num"], run["batch"]))  # was not limited by num before
            if value != run[name]:
                raise RequestError(
                    f"{out} holds a run with {name}={before.get(name)!r}, not {run[name]!r}: give "
                    "another --out"
                )
        return
    if out.exists() and any(out.iterdir()):
        raise RequestError(f"{out} is not empty and holds no run of ours: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(note, json.dumps(run, indent=1) + "\n")


# ------------------------------------------------------------------------------------------ files


def write_npz(path: Path, images: np.ndarray, labels: np.ndarray | None) -> None:
    """Writes an uncompressed npz piece by piece, in the memory of a few pictures."""
    with (
        atomic_path(path) as fresh,
        zipfile.ZipFile(fresh, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for name, array in {"arr_0": images, "arr_1": labels}.items():
            if array is None:
                continue
            member = zipfile.ZipInfo(f"{name}.npy", MOMENT)
            with archive.open(member, "w", force_zip64=True) as file:
                descr = np.lib.format.dtype_to_descr(array.dtype)
                header = {"descr": descr, "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, len(array), CHUNK):
                    file.write(np.ascontiguousarray(array[start : start + CHUNK]).tobytes())


def write_zip(path: Path, images: np.ndarray) -> None:
    """Writes 000000.png, 000001.png ... to one archive."""
    with (
        atomic_path(path) as fresh,
        zipfile.ZipFile(fresh, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for i, image in enumerate(images):
            data = io.BytesIO()
            Image.fromarray(np.asarray(image)).save(data, "PNG")
            archive.writestr(zipfile.ZipInfo(f"{i:06d}.png", MOMENT), data.getvalue())


def write_folder(path: Path, images: np.ndarray, settings: Callable[[int], dict[str, Any]]) -> None:
    """Writes 000000.png, 000001.png ... to a folder, which appears when it is complete."""
    with atomic_path(path) as fresh:
        fresh.mkdir()
        for i, image in enumerate(images):
            png.save_png(fresh / f"{i:06d}.png", np.asarray(image), settings(i))
