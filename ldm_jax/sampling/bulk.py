"""Many pictures, for evaluation: batches of one size, in one file, and a run that can be killed at any time.

While it runs, a folder holds ``run.json``, what was asked for, and ``pictures.partial``, raw pictures batch after batch. The same request goes on
after the last whole batch, and ends with the same bytes as a run that was never stopped.
"""

import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.conditioning.base import as_list
from ldm_jax.errors import RequestError
from ldm_jax.io import png as pictures
from ldm_jax.sampling.pipeline import Pipeline

FORMATS = ("npz", "png", "zip")
CHUNK = 256  # pictures read back at a time
MOMENT = (
    1980,
    1,
    1,
    0,
    0,
    0,
)  # of every member of an archive, so that equal pictures make equal files


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
    said: Callable[[int, int], None] = lambda done, made: None,
    **settings: Any,
) -> Path:
    """Makes ``num`` pictures in the folder ``out``, or goes on with them; the path of what they are in.

    Picture i has the seed ``seed`` + i and the i-th of ``prompts`` or ``classes``, from the first again after the last; classes "all" are all of the
    model's. ``form`` "npz" is what ADM's evaluation suite reads: arr_0 uint8 [num, H, W, 3], and arr_1 int64 [num] with the classes, if there are
    any; "zip" holds PNG files, "png" is a folder of them, with their settings. ``said`` is told the pictures there are and those just made.
    """
    if form not in FORMATS:
        raise RequestError(f"format {form!r} does not exist (known: {', '.join(FORMATS)})")
    if num < 1 or not 0 <= seed <= 2**32 - num:
        raise RequestError(
            f"{num} pictures from seed {seed} on: seeds must be from 0 to 4294967295, at least one"
        )
    chosen, devices = pipe.settings(**settings), pipe.mesh.devices.size
    height, width = pipe.check_size(chosen.size)
    rows = -(-batch // devices) * devices
    labels = labels_of(pipe, classes)
    name, subjects = ("classes", labels) if labels else ("prompts", as_list(prompts))
    asked = {
        "num": num,
        "format": form,
        "seed": seed,
        "batch": rows,
        name: subjects,
        "model": pipe.name,
    }
    asked |= {"dtype": pipe.dtype} | vars(chosen)
    subject = {name: [subjects[i % len(subjects)] for i in range(num)]} if subjects else {}

    out = Path(out)
    partial, result = (
        out / "pictures.partial",
        out / {"npz": "pictures.npz", "zip": "pictures.zip", "png": "pictures"}[form],
    )
    # Checked before anything is written: one picture stands for all of them.
    pipe.stream(seeds=[seed], **{name: values[:1] for name, values in subject.items()}, **settings)
    begin(out, asked)
    if result.exists():
        partial.unlink(missing_ok=True)
        said(num, 0)
        return result

    size = height * width * 3
    done = partial.stat().st_size // size // rows * rows if partial.exists() else 0
    done = min(done, num)
    with open(partial, "ab") as file:
        file.truncate(done * size)  # what a killed run left of its last batch
        said(done, 0)
        if done < num:
            seeds = range(seed + done, seed + num)
            rest = {name: values[done:] for name, values in subject.items()}
            for made in pipe.stream(seeds=list(seeds), batch=rows, **rest, **settings):
                file.write(np.ascontiguousarray(made.images).tobytes())
                file.flush()
                said(done + made.places.stop, len(made.images))

    images = np.memmap(partial, np.uint8, "r", shape=(num, height, width, 3))
    every = np.asarray(subject["classes"], np.int64) if labels else None
    if form == "npz":
        write_npz(result, images, every)
    elif form == "zip":
        write_zip(result, images)
    else:
        common = {"model": pipe.name, **vars(chosen), "dtype": pipe.dtype, "batch": rows}
        singular = {"prompts": "prompt", "classes": "class"}[name]
        write_folder(
            result,
            images,
            lambda i: (
                common
                | {"seed": seed + i}
                | ({singular: subjects[i % len(subjects)]} if subjects else {})
            ),
        )
    del images
    partial.unlink()
    return result


def labels_of(pipe: Pipeline, classes: Any) -> list[int]:
    """Numbers of classes; of "all" every one that the model has a name for, or all."""
    if classes is None:
        return []
    if pipe.model.conditioner.field != "classes":
        raise RequestError("this model knows no classes: leave them out")
    return pipe.model.conditioner.numbers(as_list(classes), pipe.model.config.get("classes"))


def begin(out: Path, asked: dict[str, Any]) -> None:
    """Writes down what was asked for in a new folder; RequestError where the folder holds something else."""
    note = out / "run.json"
    asked = json.loads(json.dumps(asked))
    if note.exists():
        try:
            before = json.loads(note.read_text())
        except ValueError:
            raise RequestError(f"{note} is damaged: give another --out") from None
        for name in asked:
            if before.get(name) != asked[name]:
                raise RequestError(
                    f"{out} holds a run with {name}={before.get(name)!r}, not {asked[name]!r}: give another --out"
                )
        return
    if out.exists() and any(out.iterdir()):
        raise RequestError(f"{out} is not empty and holds no run of ours: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    fresh = note.with_suffix(".new")
    fresh.write_text(json.dumps(asked, indent=1) + "\n")
    os.replace(fresh, note)


# ------------------------------------------------------------------------------------------------------------------------ files


def write_npz(path: Path, images: np.ndarray, labels: np.ndarray | None) -> None:
    """An uncompressed npz, written piece by piece: memory is that of a few pictures."""
    fresh = path.with_suffix(".new")
    with zipfile.ZipFile(fresh, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in {"arr_0": images, "arr_1": labels}.items():
            if array is None:
                continue
            with archive.open(
                zipfile.ZipInfo(f"{name}.npy", MOMENT), "w", force_zip64=True
            ) as file:
                header = {
                    "descr": np.lib.format.dtype_to_descr(array.dtype),
                    "fortran_order": False,
                    "shape": array.shape,
                }
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, len(array), CHUNK):
                    file.write(np.ascontiguousarray(array[start : start + CHUNK]).tobytes())
    os.replace(fresh, path)


def write_zip(path: Path, images: np.ndarray) -> None:
    """000000.png and so on in one archive."""
    fresh = path.with_suffix(".new")
    with zipfile.ZipFile(fresh, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for i, image in enumerate(images):
            data = io.BytesIO()
            Image.fromarray(np.asarray(image)).save(data, "PNG")
            archive.writestr(zipfile.ZipInfo(f"{i:06d}.png", MOMENT), data.getvalue())
    os.replace(fresh, path)


def write_folder(path: Path, images: np.ndarray, settings: Callable[[int], dict[str, Any]]) -> None:
    """000000.png and so on in a folder, which appears when it is complete."""
    fresh = path.with_suffix(".new")
    fresh.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        pictures.save_png(fresh / f"{i:06d}.png", np.asarray(image), settings(i))
    os.replace(fresh, path)
