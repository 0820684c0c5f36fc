"""Checkpoints of PyTorch's latent diffusion in and out, without PyTorch.

python -m ldm_jax.convert SRC --out MODEL_DIR            a model directory of a checkpoint, and a report of what became of each of its arrays
python -m ldm_jax.convert inspect SRC                    what a checkpoint is
python -m ldm_jax.convert export MODEL_DIR --to compvis --out FILE.safetensors   a model directory under the original's names
"""

import argparse
import sys

from ldm_jax.convert.conversion import EXPORTS, Converted, convert, export
from ldm_jax.convert.describe import describe
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.verify import verify
from ldm_jax.models.build import DTYPES


def _parser(command: str) -> argparse.ArgumentParser:
    name = "" if command == "convert" else f" {command}"
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        f"python -m ldm_jax.convert{name}", description=__doc__, formatter_class=form
    )
    if command == "export":
        parser.add_argument("model", help="a model directory")
        parser.add_argument("--to", choices=list(EXPORTS), required=True, help="the layout")
        parser.add_argument(
            "--out", required=True, help="the new file; a .yaml of what it is comes beside it"
        )
        return parser
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a .ckpt, .pth, .bin or .safetensors, or a folder that holds one",
    )
    if command == "convert":
        parser.add_argument("--out", required=True, help="the new model directory")
        parser.add_argument("--config", help="the original's YAML (else names and shapes tell)")
        ema = argparse.BooleanOptionalAction
        parser.add_argument(
            "--ema", action=ema, help="take the averaged weights (default: where there are some)"
        )
        parser.add_argument(
            "--dtype", choices=list(DTYPES), help="of the parameters (default: as stored)"
        )
        parser.add_argument(
            "--report", help="the new report (default: conversion.json in the model directory)"
        )
        parser.add_argument(
            "--verify",
            metavar="CASE",
            help="a recorded case, NAME.safetensors: print the forward error",
        )
    return parser


def _inspect(args: argparse.Namespace) -> None:
    with open_checkpoint(args.source) as checkpoint:
        _print(describe(checkpoint))


def _export(args: argparse.Namespace) -> None:
    export(args.model, args.to, args.out)
    print(f"written: {args.out}")


def _convert(args: argparse.Namespace) -> None:
    options = {name: getattr(args, name) for name in ("config", "ema", "dtype", "report")}
    converted = convert(args.source, args.out, **options)
    _print(_summary(converted, args))
    if args.verify:
        errors = verify(
            converted.config, converted.params, args.verify, bool(converted.about.get("ema"))
        )
        for name, (error, ratio) in errors.items():
            print(f"verified    {name}: error {error:.3g}, {ratio:.3g} of what is allowed")


def _summary(converted: Converted, args: argparse.Namespace) -> dict[str, str]:
    out, told = converted.left_out, {"written": args.out}
    told["parameters"] = f"{len(converted.entries)} arrays, dtype {args.dtype or 'as stored'}"
    if converted.about.get("ema"):
        told["EMA"] = "the averaged weights; --no-ema takes the raw ones"
    told["left out"] = (
        f"{len(out)} arrays, each with its reason in {args.report or 'conversion.json'}"
    )
    return told | {f"assumed {i}": line for i, line in enumerate(converted.assumed, 1)}


def _print(told: dict[str, str]) -> None:
    for label, text in told.items():
        print(f"{label:<12}{text}")


COMMANDS = {"convert": _convert, "inspect": _inspect, "export": _export}


def main(argv: list[str] | None = None) -> int:
    """Runs ``ldm-convert``; returns the exit status, 2 for a mistake of the user's."""
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("convert", argv)
    try:
        COMMANDS[command](_parser(command).parse_args(rest))
    except SystemExit as stop:  # of --help, or a flag that argparse has explained
        return int(stop.code or 0)
    except (
        ValueError,
        OSError,
    ) as error:  # ReaderError, TargetError, ConversionError ... are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
