"""Writes a model's sampling as a program that runs without this package."""

import argparse
import sys
from pathlib import Path

from ldm_jax.models.build import DTYPES
from ldm_jax.sampling.export import __doc__ as description
from ldm_jax.sampling.export import export


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; flags are named as sample.py's, and what is not given is the model's own."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("ldm-export", description=description, formatter_class=form)
    parser.add_argument(
        "model", metavar="MODEL", help="a model directory, or a model that ships with ldm_jax"
    )
    parser.add_argument("--out", help="the new folder (default: MODEL_export, here)")
    parser.add_argument("--sampler", help="ddim, dpmpp_2m, unipc ... (a wrong name lists them all)")
    parser.add_argument("--steps", type=int)
    parser.add_argument(
        "--timesteps", dest="grid", help="where to stop: uniform, trailing, karras ..."
    )
    parser.add_argument("--eta", type=float, help="noise of the DDIM sampler, from 0 to 1")
    parser.add_argument("--temperature", type=float, help="of that noise, and of DDPM's")
    parser.add_argument("--size", type=_size, metavar="HEIGHTxWIDTH", help="in pixels")
    parser.add_argument(
        "--guidance_interval",
        type=_interval,
        metavar="FIRST,LAST",
        help="timesteps that are guided",
    )
    parser.add_argument("--guidance_rescale", type=float)
    parser.add_argument(
        "--tile", type=int, help="decode larger pictures in tiles of so many pixels, not exactly"
    )
    parser.add_argument(
        "--cache_interval", type=int, help="calls of the UNet of which one is full; see sample.py"
    )
    parser.add_argument("--cache_depth", type=int)
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of weights and products"
    )
    return parser.parse_args(argv)


def _size(text: str) -> list[int]:
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write HEIGHTxWIDTH, for example 64x96"
        ) from None
    return [height, width]


def _interval(text: str) -> list[float]:
    try:
        first, last = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write FIRST,LAST") from None
    return [first, last]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 for whatever the person has to change."""
    try:
        options = vars(parse(sys.argv[1:] if argv is None else argv))
        model = options.pop("model")
        out = export(model, options.pop("out") or f"{Path(model).name}_export", **options)
    except SystemExit as stop:  # of --help, or a flag that argparse has explained
        return int(stop.code or 0)
    except (
        ValueError,
        OSError,
        ImportError,
    ) as error:  # RequestError, CheckpointError ... are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 2
    sizes = ", ".join(
        f"{file.name} {file.stat().st_size / 2**20:.1f} MiB" for file in sorted(out.iterdir())
    )
    print(f"written: {out} ({sizes})")
    return 0
