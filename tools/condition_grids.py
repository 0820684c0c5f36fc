r"""Draws what models of other conditions make of held-out images, for docs/conditions.md.

    python tools/condition_grids.py runs/emoji_class runs/emoji_inpaint --data emoji64.zip \
        --out docs

Takes workdirs of finished runs and writes a condition_NAME.png of each, from fixed seeds: a row for
each condition, drawn where it can be, then samples, and the image that the condition was made of.
For tasks with one right answer it prints how close the samples are.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

import ldm_jax
from ldm_jax.conditioning.class_label import RowClass
from ldm_jax.conditioning.config import row_condition
from ldm_jax.conditioning.layout import RowLayout, boxes_of_tokens
from ldm_jax.conditioning.masked import RowMask, filled
from ldm_jax.conditioning.semantic_map import RowLabelMap
from ldm_jax.conditioning.small_picture import RowSmallPicture
from ldm_jax.io.png import labelled_grid, save_png
from ldm_jax.models.ldm import to_float, to_uint8
from ldm_jax.train.loaders import first_batches, make_loader

SEEDS, ROWS, ZOOM = (0, 1, 2, 3), 6, 2
WIDE_SEEDS = tuple(range(8))  # of classes, which have no picture beside them


def classes(pipe: Any, condition: RowClass) -> np.ndarray:
    """A row for each class."""
    rows = [pipe(classes=name, seeds=WIDE_SEEDS) for name in condition.names]
    return labelled_grid(
        np.concatenate(rows).repeat(ZOOM, 1).repeat(ZOOM, 2),
        condition.names,
        [f"seed {s}" for s in WIDE_SEEDS],
    )


def others(pipe: Any, condition: Any, raw: dict[str, Any]) -> np.ndarray:
    """A row for each of the pictures in ``raw``: its condition, samples, itself."""
    images, given = raw["image"], raw["condition"]
    large = {"image": images.repeat(ZOOM, 1).repeat(ZOOM, 2), "condition": given}
    if isinstance(condition, RowSmallPicture | RowLayout):
        drawn = condition.draw(large["image"], given)
    else:
        drawn = condition.draw(images, given)
        drawn = None if drawn is None else drawn.repeat(ZOOM, 1).repeat(ZOOM, 2)
    assert drawn is not None
    columns, rows = ["condition", *(f"seed {s}" for s in SEEDS), "the picture"], []
    errors, plain, places = [], [], []
    for i in range(len(images)):
        made = pipe(seeds=SEEDS, **request(condition, images[i], given[i]))
        errors.append(np.square(made.astype(np.float32) - images[i]).mean((1, 2, 3)))
        rows += [drawn[i], *made.repeat(ZOOM, 1).repeat(ZOOM, 2), large["image"][i]]
        if isinstance(condition, RowLabelMap | RowLayout):
            places.append(placed(made, objects(condition, given[i], images.shape[1:3])))
        if isinstance(condition, RowSmallPicture | RowMask):
            plain.append(np.square(plainly(condition, images[i], given[i]) - images[i]).mean())
    if plain:
        way = "bicubic" if isinstance(condition, RowSmallPicture) else "filled smoothly"
        print(f"PSNR of samples {psnr(np.array(errors)):.2f} dB, {way} {psnr(plain):.2f} dB")
    if places:
        inside, covered = np.mean(places, 0)
        print(
            f"{inside:.0%} of the painted area lies in the objects, "
            f"{covered:.0%} of the objects are painted"
        )
    return labelled_grid(rows, [""] * len(images), columns)


def plainly(
    condition: RowSmallPicture | RowMask, image: np.ndarray, given: np.ndarray
) -> np.ndarray:
    """Returns the baseline without a model, float32 [H, W, 3]: bicubic, or a smooth fill."""
    if isinstance(condition, RowSmallPicture):
        resized = Image.fromarray(given).resize(image.shape[1::-1], Image.Resampling.BICUBIC)
        return np.asarray(resized, np.float32)
    return np.asarray(
        to_uint8(filled(to_float(jnp.asarray(image[None])), jnp.asarray(1.0 - given[None])))[0],
        np.float32,
    )


def objects(condition: Any, given: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where a condition wants something on the white: boolean [H, W]."""
    if isinstance(condition, RowLabelMap):
        return given > 0
    wanted, (h, w) = np.zeros(size, bool), size
    for _, (left, top, width, height) in boxes_of_tokens(given.tolist(), condition.vocabulary):
        wanted[
            round(top * h) : round((top + height) * h), round(left * w) : round((left + width) * w)
        ] = True
    return wanted


def placed(made: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Returns (share of the painted area that is wanted, share of the wanted area painted)."""
    painted = made.min(-1) < 235
    both = (painted & wanted).sum((1, 2))
    return float((both / np.maximum(painted.sum((1, 2)), 1)).mean()), float(
        (both / max(wanted.sum(), 1)).mean()
    )


def spread(loader: Any) -> dict[str, Any]:
    """So many pictures of the held-out ones, evenly spread: neighbours are alike."""
    batches = first_batches(loader, -(-loader.count // ROWS))
    at = np.linspace(0, loader.count - 1, ROWS).round().astype(int)
    return {
        name: np.concatenate([batch[name] for batch in batches])[at]
        for name in ("image", "condition")
    }


def psnr(errors: Any) -> float:
    """The mean PSNR of mean squared errors of pixels from 0 to 255."""
    return float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-6))))


def request(condition: Any, image: np.ndarray, given: np.ndarray) -> dict[str, Any]:
    """A held-out picture's condition, as a pipeline is asked."""
    if isinstance(condition, RowMask):
        return {"image": image, "mask": given[:, :, 0] * np.uint8(255)}
    if isinstance(condition, RowSmallPicture):
        return {"image": given}
    if isinstance(condition, RowLayout):
        names = condition.names
        boxes = boxes_of_tokens(given.tolist(), condition.vocabulary)
        return {"layout": [(names[label] if names else label, box) for label, box in boxes]}
    return {"semantic_map": given.astype(np.uint8)}


def save(out: str, run: Path, sheet: np.ndarray) -> None:
    """Writes condition_NAME.png."""
    save_png(Path(out) / f"condition_{run.name.removeprefix('emoji_')}.png", sheet)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="workdirs of finished runs")
    parser.add_argument(
        "--data", help="where the pictures are, if no longer where the run had them"
    )
    parser.add_argument("--out", required=True, help="the folder for the PNGs")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for run in map(Path, args.runs):
        config: Any = ml_collections.ConfigDict(json.loads((run / "config.json").read_text()))
        config.data.path = args.data or config.data.path
        config.batch_size = ROWS
        pipe, condition = ldm_jax.load(str(run / "model")), row_condition(config.to_dict())
        print(run.name, flush=True)
        if isinstance(condition, RowClass):
            save(args.out, run, classes(pipe, condition))
        else:
            save(args.out, run, others(pipe, condition, spread(make_loader(config, "validation"))))


if __name__ == "__main__":
    main()
