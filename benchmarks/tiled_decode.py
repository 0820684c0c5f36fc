"""Measures what decoding in tiles costs in exactness and saves in memory.

    python -m benchmarks.tiled_decode

A mosaic of the bundled images is encoded, then decoded as a whole and in tiles. Errors are those of
tiles against the whole, in levels of 255 (mean and maximum) and as PSNR; "against the image" is the
PSNR of either reconstruction.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

import ldm_jax
from ldm_jax.data import ImageTransform, make_source
from ldm_jax.eval import metrics
from ldm_jax.models.ldm import to_float, to_uint8
from ldm_jax.sampling.decoding import decode


def mosaic(side: int, picture: int = 64) -> np.ndarray:
    """uint8 [1, side, side, 3] of the first pictures that ship with the package."""
    source, fitted = (
        make_source({"path": "pkg:assets/emoji_subset.zip"}),
        ImageTransform((picture, picture)),
    )
    n, rng = -(-side // picture), np.random.default_rng(0)
    rows = [
        np.concatenate([fitted(source[i * n + j]["image"], rng) for j in range(n)], axis=1)
        for i in range(n)
    ]
    return np.concatenate(rows)[None, :side, :side]


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--side", type=int, default=512, help="of the mosaic, in pixels")
    parser.add_argument("--tiles", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    stage, picture = ldm_jax.load(args.model, devices=1).model.first_stage, mosaic(args.side)
    z = jax.jit(lambda stage, x: stage.encode(to_float(x)))(stage, picture)
    results, whole = [], None
    for tile in (0, *args.tiles):
        program = (
            jax.jit(lambda stage, z, tile=tile: to_uint8(decode(stage, z, tile=tile)))
            .lower(stage, z)
            .compile()
        )
        out = np.asarray(program(stage, z))
        began = time.perf_counter()
        jax.block_until_ready(program(stage, z))
        seconds = time.perf_counter() - began
        whole = out if whole is None else whole
        off = np.abs(out.astype(int) - whole)
        memory = program.memory_analysis()
        results.append(
            {
                "tile": tile,
                "mean_error": float(off.mean()),
                "largest_error": int(off.max()),
                "psnr_against_whole": float(metrics.psnr(out, whole)[0]) if tile else None,
                "psnr_against_picture": float(metrics.psnr(out, picture)[0]),
                "seconds": seconds,
                "temporary_mib": None if memory is None else memory.temp_size_in_bytes / 2**20,
            }
        )
    print(f"{args.model}, {args.side}x{args.side} on {jax.default_backend()}")
    print("tile   mean  largest  PSNR to whole  PSNR to picture  seconds  temporaries MiB")
    for r in results:
        name = r["tile"] or "none"
        psnr = f"{r['psnr_against_whole']:.1f} dB" if r["tile"] else "-"
        memory = "?" if r["temporary_mib"] is None else f"{r['temporary_mib']:.0f}"
        print(
            f"{name:<5} {r['mean_error']:5.2f} {r['largest_error']:8d} {psnr:>14} "
            f"{r['psnr_against_picture']:13.1f} dB {r['seconds']:8.2f} {memory:>16}"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"side": args.side, "backend": jax.default_backend(), "results": results})
            + "\n"
        )


if __name__ == "__main__":
    main()
