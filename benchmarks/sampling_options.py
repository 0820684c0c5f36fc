"""Measures what each way of sampling faster costs in exactness.

    python -m benchmarks.sampling_options

Every option makes the same images from the same seeds. Distances are PSNR in dB, mean over the
images: to the full run (the model's own sampler and steps), and to the solution of the ODE
(dpmpp_2m with many steps). Times are of one compiled batch: on a CPU the process' processor time,
elsewhere wall-clock time. The options take turns in every round, and the median counts.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ldm_jax
from ldm_jax.cli import run as cli
from ldm_jax.eval import metrics

CONCEPTS = ("red apple", "cat face", "rocket", "house", "fish", "sun", "car", "tree")
STYLES = ("noto", "fluent", "twemoji", "firefox")

FULL = "full"
OPTIONS: dict[str, dict[str, Any]] = {
    FULL: {},
    "guidance_interval 0,750": {"guidance_interval": (0.0, 750.0)},
    "guidance_interval 250,750": {"guidance_interval": (250.0, 750.0)},
    **{f"cache_interval {n}": {"cache_interval": n} for n in (2, 3, 5)},
    **{
        f"{sampler}, {steps} steps": {"sampler": sampler, "steps": steps}
        for sampler in ("ddim", "dpmpp_2m", "unipc")
        for steps in (10, 15, 20)
    },
    "dpmpp_2m, 20 steps, cache_interval 2": {
        "sampler": "dpmpp_2m",
        "steps": 20,
        "cache_interval": 2,
    },
}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each option."""
    rows: list[dict[str, Any]] = []
    pipe = ldm_jax.load(args.model, devices=1)
    prompts = [f"{CONCEPTS[i % 8]}, {STYLES[i // 8 % 4]} style" for i in range(args.num)]

    def make(settings: dict[str, Any]) -> np.ndarray:
        return pipe(prompts, seeds=range(args.num), batch=args.num, **settings)

    exact = make({"sampler": "dpmpp_2m", "steps": args.exact_steps})
    pictures: dict[str, np.ndarray] = {}
    for name, settings in OPTIONS.items():
        cli.say(f"compiling and making: {name}")
        pictures[name] = make(settings)
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in OPTIONS}
    for i in range(args.rounds):
        for name, settings in OPTIONS.items():
            began = clock()
            make(settings)
            seconds[name].append(clock() - began)
        cli.say(f"{i + 1} of {args.rounds} rounds are done")
        rows = [row_of(name, pictures, exact, seconds) for name in OPTIONS]
        if args.json:
            about = {"model": args.model, "num": args.num, "backend": jax.default_backend()}
            args.json.write_text(
                json.dumps({**about, "exact_steps": args.exact_steps, "rows": rows}, indent=1)
                + "\n"
            )
    return rows


def row_of(
    name: str, pictures: dict[str, np.ndarray], exact: np.ndarray, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """The figures of one option."""
    ratio = statistics.median(
        mine / full for mine, full in zip(seconds[name], seconds[FULL], strict=True)
    )
    to_full = None if name == FULL else float(metrics.psnr(pictures[name], pictures[FULL]).mean())
    to_exact = float(metrics.psnr(pictures[name], exact).mean())
    row = {"option": name, "settings": OPTIONS[name], "psnr_full": to_full, "psnr_exact": to_exact}
    return row | {"seconds": seconds[name], "time_saved": 1 - ratio}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    columns = ("option", "PSNR to the full run", "PSNR to the ODE's solution", "time of a batch")
    lines = [f"| {' | '.join((*columns, 'time saved'))} |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        to_full = "" if row["psnr_full"] is None else f"{row['psnr_full']:.1f} dB"
        cells = [
            row["option"],
            to_full,
            f"{row['psnr_exact']:.1f} dB",
            f"{statistics.median(row['seconds']):.2f} s",
        ]
        lines.append(f"| {' | '.join(cells)} | {100 * row['time_saved']:.0f} % |")
    return "\n".join(lines)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--num", type=int, default=8, help="pictures, made in one batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--exact_steps", type=int, default=100, help="of the run that stands for the ODE's solution"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cli.setup()
    rows = measure(args)
    print(
        f"{args.model} on {jax.default_backend()}, {args.num} images, {args.rounds} rounds\n\n"
        f"{table(rows)}"
    )


if __name__ == "__main__":
    main()
