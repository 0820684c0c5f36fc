"""Compares every fast form of this machine's platform with the reference, values and gradients.

    python tools/kernel_checks.py [--dry] [--json checks.json]

Ends with status 1 if one differs by more than its type allows. On a GPU or TPU it also times both.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.kernels import REFERENCE, Kernels, for_platform

# Largest difference over the largest value of the reference. The reference computes in the same
# dtype, and rounds as often.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}


class Case(NamedTuple):
    """An operation on arrays of random numbers.

    Attributes:
      name: Operation and shapes.
      run: ``run(kernels, *arrays)``.
      shapes: Of the arrays; the first has the dtype under test, as have those after it if they are
        weights.
    """

    name: str
    run: Callable[..., jax.Array]
    shapes: list[tuple[int, ...]]


def cases(dry: bool) -> Iterator[Case]:
    """The shapes of Stable Diffusion v1 and SDXL at two pictures, or small ones."""
    b, side, c = (1, 8, 64) if dry else (2, 64, 320)
    for n, m, heads, d in [
        (side**2, side**2, 8, c // 8),
        (side**2, 77, 8, c // 8),
        (side**2 // 16, side**2 // 16, 8, 160),
        (side**2 // 4, side**2 // 4, 10, 64),
        (side**2 // 4, 77, 10, 64),
    ]:
        shapes = [(b, n, heads, d), (b, m, heads, d), (b, m, heads, d)]
        yield Case(
            f"attention {n}x{m}, {heads} heads of {d}",
            lambda k, q, key, v, d=d: k.attention(q, key, v, d**-0.5),
            shapes,
        )
    for silu in (True, False):
        yield Case(
            f"group_norm {side}x{side}x{c}" + (" with SiLU" if silu else ""),
            lambda k, x, s, bias, silu=silu: k.group_norm(x, s, bias, 32, 1e-5, silu),
            [(b, side, side, c), (c,), (c,)],
        )
    yield Case(
        f"layer_norm {side**2}x{c}",
        lambda k, x, s, bias: k.layer_norm(x, s, bias, 1e-5),
        [(b, side**2, c), (c,), (c,)],
    )
    yield Case(f"geglu {side**2}x{8 * c}", lambda k, x: k.geglu(x), [(b, side**2, 8 * c)])
    yield Case(f"gelu {side**2}x{c}", lambda k, x: k.gelu(x), [(b, side**2, c)])
    yield Case(
        f"conv 3x3 {side}x{side}x{c}",
        lambda k, x, w: k.conv(x, w, (1, 1), ((1, 1), (1, 1))),
        [(b, side, side, c), (3, 3, c, c)],
    )
    yield Case(
        f"upsample_conv {side // 2}x{side // 2}x{c}",
        lambda k, x, w: k.upsample_conv(x, w),
        [(b, side // 2, side // 2, c), (3, 3, c, c)],
    )
    yield Case(f"dense {side**2}x{c}", lambda k, x, w: k.dense(x, w), [(b, side**2, c), (c, c)])


def compare(case: Case, fast: Kernels, dtype: str, timed: bool) -> dict[str, Any]:
    """Differences of one case, and milliseconds of both forms where ``timed``."""
    keys = jax.random.split(jax.random.key(0), len(case.shapes) + 1)
    arrays = [
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys[1:], case.shapes, strict=True)
    ]
    weight = jax.random.normal(keys[0], jax.eval_shape(partial_run(case, REFERENCE), *arrays).shape)

    def loss(kernels: Kernels) -> Callable[..., Any]:
        def run(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = case.run(kernels, *arrays).astype(jnp.float32)
            return (y * weight).mean(), y

        return jax.jit(jax.value_and_grad(run, tuple(range(len(arrays))), has_aux=True))

    results, milliseconds = {}, {}
    for name, kernels in (("fast", fast), ("reference", REFERENCE)):
        program = loss(kernels)
        (_, y), gradients = jax.block_until_ready(program(*arrays))
        results[name] = [y, *gradients]
        if timed:
            began = time.perf_counter()
            for _ in range(10):
                jax.block_until_ready(program(*arrays))
            milliseconds[name] = 100 * (time.perf_counter() - began)
    differences = []
    for a, b in zip(results["fast"], results["reference"], strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        differences.append(float(jnp.abs(a - b).max() / (jnp.abs(b).max() + 1e-30)))
    agree = all(d <= TOLERANCE[dtype] for d in differences)  # NaN does not agree
    return {
        "case": case.name,
        "dtype": dtype,
        "value": differences[0],
        "gradients": differences[1:],
        "agree": agree,
        "milliseconds": milliseconds,
    }


def partial_run(case: Case, kernels: Kernels) -> Callable[..., jax.Array]:
    """``case.run`` with its kernels."""
    return lambda *arrays: case.run(kernels, *arrays)


def main() -> int:
    """Runs the command; 1 if a form differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="small shapes")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args()
    platform = jax.default_backend()
    fast, found = for_platform(platform), []
    for dtype in TOLERANCE:
        for case in cases(args.dry):
            found.append(compare(case, fast, dtype, timed=platform != "cpu"))
            last = found[-1]
            print(
                f"{'agrees' if last['agree'] else 'DIFFERS':8} {dtype:9} {case.name}: "
                f"value {last['value']:.1e}, gradients {max(last['gradients']):.1e}",
                *(f"{name} {ms:.2f} ms" for name, ms in last["milliseconds"].items()),
                flush=True,
            )
    if args.json:
        args.json.write_text(
            json.dumps({"device": jax.devices()[0].device_kind, "checks": found}, indent=1) + "\n"
        )
    return 0 if all(each["agree"] for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
