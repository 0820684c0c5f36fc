"""Measures what computing in bfloat16 changes in an image.

    python -m benchmarks.half_precision [--model emoji] [--num 16]

The same prompts and seeds with the model's own sampler, in float32 and in bfloat16: PSNR in dB
between the two, and their distance in levels of 255. For comparison, the same with twice as many
steps in float32.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import ldm_jax
from benchmarks.sampling_options import CONCEPTS, STYLES
from ldm_jax.eval import metrics


def distances(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Returns mean and minimum PSNR in dB and the mean absolute difference in levels."""
    psnr = metrics.psnr(a, b)
    levels = np.abs(a.astype(int) - b).mean()
    return {
        "psnr_mean": float(psnr.mean()),
        "psnr_lowest": float(psnr.min()),
        "levels": float(levels),
    }


def measure(model: str, num: int, steps: int) -> dict[str, Any]:
    """Distances of bfloat16, and of twice the steps, to the float32 pictures."""
    request = {"seeds": range(num), "batch": min(num, 8)}
    prompts = [f"{CONCEPTS[i % 8]}, {STYLES[i // 8 % 4]} style" for i in range(num)]
    full, half = (ldm_jax.load(model, dtype=dtype, devices=1) for dtype in ("float32", "bfloat16"))
    exact = full(prompts, steps=steps, **request)
    return {
        "bfloat16": distances(half(prompts, steps=steps, **request), exact),
        f"float32, {2 * steps} steps": distances(full(prompts, steps=2 * steps, **request), exact),
    }


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--num", type=int, default=16, help="pictures")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = measure(args.model, args.num, args.steps)
    for name, row in result.items():
        print(
            f"{name} against float32, {args.steps} steps, {args.num} images: "
            f"mean PSNR {row['psnr_mean']:.1f} dB, minimum {row['psnr_lowest']:.1f} dB; "
            f"{row['levels']:.2f} levels of 255"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
