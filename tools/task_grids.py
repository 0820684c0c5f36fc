"""Draws the images of the tasks for the docs: python tools/task_grids.py --out docs.

Writes task_image_to_image.png, task_inpainting.png, task_interpolation.png and task_sweep.png from
fixed seeds. The starting images are the model's own, so that nothing else is needed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

import ldm_jax
from ldm_jax.io.png import labelled_grid, save_png
from ldm_jax.sampling.pipeline import Pipeline
from ldm_jax.sampling.request import interpolation

START, OTHER = "red apple, noto style", "rocket, fluent 3d style"
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
SEEDS = (1, 2, 3, 4, 5)  # the picture to begin with has seed 0, whose noise leads back to it


def image_to_image(pipe: Pipeline, start: np.ndarray) -> np.ndarray:
    """A picture under two prompts, at growing strength."""
    prompts = [START, OTHER]
    made = [pipe(prompts, image=start, strength=strength, seeds=1) for strength in STRENGTHS]
    rows = [[start, *(pictures[i] for pictures in made)] for i in range(len(prompts))]
    columns = ["image", *(f"strength {strength}" for strength in STRENGTHS)]
    return labelled_grid(
        np.stack([picture for row in rows for picture in row]),
        [prompt.split(",")[0] for prompt in prompts],
        columns,
    )


def inpainting(pipe: Pipeline, start: np.ndarray) -> np.ndarray:
    """Its right half made anew, and its borders grown."""
    height, width, _ = start.shape
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 255
    hidden = np.where(mask[:, :, None] > 0, np.uint8(127), start)
    half = pipe(START, image=start, mask=mask, seeds=SEEDS)
    other = pipe(OTHER, image=start, mask=mask, seeds=SEEDS)
    columns = ["image", "to be made anew", *(f"seed {seed}" for seed in SEEDS)]
    rows = [start, hidden, *half, start, hidden, *other]
    return labelled_grid(
        np.stack(rows), [prompt.split(",")[0] for prompt in (START, OTHER)], columns
    )


def walk(pipe: Pipeline, start: np.ndarray) -> np.ndarray:
    """Between two seeds of one prompt, and between two prompts of one seed."""
    rows, frames = [], 7
    for prompts, seeds in (([START, START], [0, 3]), ([START, OTHER], [0, 0])):
        starts, first, toward = interpolation(prompts, seeds, frames)
        rows.append(pipe(starts, seeds=first, toward=toward))
    columns = [f"{i / frames:.2f}" for i in range(frames + 1)]
    return labelled_grid(np.concatenate(rows), ["seed to seed", "prompt to prompt"], columns)


def sweep(pipe: Pipeline, start: np.ndarray) -> np.ndarray:
    """Guidance by steps."""
    scales, steps = (1.0, 2.0, 4.0, 7.0), (5, 10, 20, 50)
    rows = [pipe(START, seeds=[0] * len(scales), guidance=scales, steps=n) for n in steps]
    return labelled_grid(
        np.concatenate(rows), [f"{n} steps" for n in steps], [f"guidance {s:g}" for s in scales]
    )


GRIDS: dict[str, Callable[[Pipeline, np.ndarray], np.ndarray]] = {
    "image_to_image": image_to_image,
    "inpainting": inpainting,
    "interpolation": walk,
    "sweep": sweep,
}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="the folder for the PNGs")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--only", nargs="+", choices=GRIDS, default=list(GRIDS))
    args = parser.parse_args()

    ldm_jax.use_cores()
    pipe = ldm_jax.load(args.model)
    start = pipe(START, seeds=0)[0]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name in args.only:
        save_png(Path(args.out) / f"task_{name}.png", GRIDS[name](pipe, start))
        print(name, flush=True)


if __name__ == "__main__":
    main()
