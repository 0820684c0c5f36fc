"""Times each chosen form of attention against the reference form.

    python -m benchmarks.attention [--shapes 1x1024x1024x8x40 ...] [--dtype float32] [--json F]

A shape is batch x queries x keys x heads x head size. The defaults are those of Stable Diffusion
v1's UNet at 512x512, at a quarter of its width and at all of it, self-attention and 77 words, and
three heads of 48. Both forms take turns in one process. Printed are medians of the forward pass and
of forward and backward passes, their ratios to the reference, and the ratios' quartiles. Where the
chosen form is the reference, both sides are the same program.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.kernels import for_platform
from ldm_jax.kernels.reference import attention as plain

SHAPES = [
    *(f"1x4096x{m}x8x{d}" for d in (10, 40) for m in (4096, 77)),
    *(f"2x1024x{m}x8x{d}" for d in (20, 80) for m in (1024, 77)),
    *(f"4x256x{m}x8x{d}" for d in (40, 160) for m in (256, 77)),
    *(f"8x64x{m}x8x{d}" for d in (40, 160) for m in (64, 77)),
    "8x64x64x3x48",
]


def programs(form: Callable[..., Any], scale: float) -> dict[str, Callable[..., Any]]:
    """The form forwards, and forwards with backwards, compiled when first called."""

    def both(q: Any, k: Any, v: Any, dy: Any) -> Any:
        y, pull = jax.vjp(lambda *qkv: form(*qkv, scale), q, k, v)
        return y, pull(dy)

    return {"forward": jax.jit(lambda q, k, v, dy: form(q, k, v, scale)), "both": jax.jit(both)}


def seconds(program: Callable[..., Any], given: tuple[Any, ...]) -> float:
    """Returns the time of one call in seconds."""
    began = time.perf_counter()
    jax.block_until_ready(program(*given))
    return time.perf_counter() - began


def measure(shape: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Medians in seconds, ratios (plain over chosen) and their quartiles."""
    b, n, m, h, d = map(int, shape.split("x"))
    rng = np.random.default_rng(0)
    q, k, v, dy = (
        jnp.asarray(rng.standard_normal((b, length, h, d)), dtype) for length in (n, m, m, n)
    )
    kernels: Any = for_platform(jax.default_backend())
    form = kernels.attention
    forms = {"plain": programs(plain, d**-0.5), "chosen": programs(form, d**-0.5)}
    result: dict[str, Any] = {"shape": shape, "form": type(kernels).__name__}
    for what in ("forward", "both"):
        times: dict[str, list[float]] = {name: [] for name in forms}
        for repeat in range(repeats + 1):  # the first compiles
            for name, made in forms.items():
                taken = seconds(made[what], (q, k, v, dy))
                if repeat:
                    times[name].append(taken)
        ratios = [p / c for p, c in zip(times["plain"], times["chosen"], strict=True)]
        low, _, high = statistics.quantiles(ratios)
        medians = {name: statistics.median(taken) for name, taken in times.items()}
        ratio = medians["plain"] / medians["chosen"]
        result[what] = {
            **medians,
            "ratio": round(ratio, 2),
            "quartiles": [round(low, 2), round(high, 2)],
        }
    return result


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    parser.add_argument("--dtype", default=default)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args()

    results = []
    for made in map(partial(measure, dtype=args.dtype, repeats=args.repeats), args.shapes):
        results.append(made)
        lines = [
            f"{what} {1e3 * t['plain']:.1f} -> {1e3 * t['chosen']:.1f} ms, x {t['ratio']:.2f} "
            f"({t['quartiles'][0]:.2f} to {t['quartiles'][1]:.2f})"
            for what, t in made.items()
            if isinstance(t, dict)
        ]
        print(f"{made['shape']:>20} {made['form']:>8}: " + "; ".join(lines), flush=True)
    if args.json:
        device = jax.devices()[0].device_kind
        args.json.write_text(
            json.dumps({"device": device, "dtype": args.dtype, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
