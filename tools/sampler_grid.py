"""Draws the grid of samplers: python tools/sampler_grid.py --out docs/sampler_grid.png.

Every sampler at 10, 20 and 50 steps, from one seed, for each prompt. dpm_adaptive chooses its own
steps, so its images are the same.
"""

import argparse
from pathlib import Path

import numpy as np

import ldm_jax
from ldm_jax.io.png import labelled_grid, save_png
from ldm_jax.sampling.pipeline import OFFERED

PROMPTS = ("red apple, noto style", "rocket, fluent 3d style")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="the PNG to write")
    parser.add_argument("--model", default="emoji")
    parser.add_argument(
        "--prompt", action="append", help=f"several if need be (default: {', '.join(PROMPTS)})"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--samplers", nargs="+", default=OFFERED)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    ldm_jax.use_cores()
    pipe, prompts, rows = ldm_jax.load(args.model), args.prompt or list(PROMPTS), []
    for sampler in args.samplers:
        made = [
            pipe(prompts, seeds=args.seed, steps=steps, sampler=sampler) for steps in args.steps
        ]
        rows += [pictures[i] for i in range(len(prompts)) for pictures in made]
        print(sampler, flush=True)
    columns = [
        f"{prompt.split(',')[0]}\n{steps} steps" for prompt in prompts for steps in args.steps
    ]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    save_png(args.out, labelled_grid(np.stack(rows), args.samplers, columns))


if __name__ == "__main__":
    main()
