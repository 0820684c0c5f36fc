"""Converts checkpoints of PyTorch's latent diffusion, in and out, without PyTorch.

ldm-convert SRC --out MODEL_DIR      a model directory, and a report about each array of SRC
ldm-convert inspect SRC              what a checkpoint is
ldm-convert export MODEL_DIR --to compvis --out FILE.safetensors
                                     a model directory under the names of the original
ldm-convert export LORA_DIR --to kohya --out FILE.safetensors
                                     a LoRA that was trained here; --to peft for diffusers
ldm-convert merge MODEL --lora FILE:0.8 --out MODEL_DIR
                                     a model with LoRA files merged into its weights
ldm-convert merge A B --weights 0.3 --out MODEL_DIR
                                     0.7 A + 0.3 B; with a third model C: A + 0.3 (B - C)
ldm-convert average RUN --std 0.08 --out MODEL_DIR
                                     an average of another length, of a run with power_ema
"""

import argparse
import sys

from ldm_jax.cli.run import one_line
from ldm_jax.convert.conversion import EXPORTS, Converted, convert, export
from ldm_jax.convert.describe import describe
from ldm_jax.convert.merging import merge
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.verify import verify
from ldm_jax.models.build import DTYPES
from ldm_jax.train.power_ema import reconstruct

_READ = ("config", "ema", "dtype", "report", "variant", "allow_unexpected", "vae", "text_encoder")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "ldm-convert" if command == "convert" else f"ldm-convert {command}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    if command == "export":
        add("model", help="a model directory")
        add("--to", choices=list(EXPORTS), required=True, help="the layout")
        add("--out", required=True, help="the new file or folder; compvis has its .yaml beside it")
        return parser
    if command == "merge":
        add("models", metavar="MODEL", nargs="+", help="a model directory or checkpoint, up to 3")
        add("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="a LoRA file")
        add("--weights", type=float, default=0.5, help="the weight of the second model")
        add("--out", required=True, help="the new model directory")
        return parser
    if command == "average":
        add("run", help="a run folder whose config had power_ema.stds")
        add("--std", type=float, required=True, help="standard deviation, as a part of all steps")
        add("--step", type=int, help="the last step (default: that of the newest snapshot)")
        add("--out", required=True, help="the new model directory")
        return parser
    add("source", metavar="SRC", help="a .ckpt, .pth, .bin or .safetensors, or a folder with one")
    if command == "inspect":
        return parser
    add("--out", required=True, help="the new model directory")
    add("--config", help="the original's YAML (default: inferred from names and shapes)")
    flag = argparse.BooleanOptionalAction
    add("--ema", action=flag, help="take the averaged weights (default: where there are some)")
    add("--dtype", choices=list(DTYPES), help="dtype of the parameters (default: as stored)")
    add("--variant", help="the variant of a folder's files, as fp16 (default: full precision)")
    add("--vae", metavar="PATH", help="take the first stage from another model or checkpoint")
    add("--text_encoder", metavar="PATH", help="take the text encoder from another model")
    add(
        "--allow_unexpected",
        action="store_true",
        help="leave out arrays that the model does not have; the report lists them",
    )
    add("--report", help="the new report (default: conversion.json in the model directory)")
    add(
        "--verify",
        metavar="CASE",
        help="a recorded case, NAME.safetensors: print the error of the forward pass",
    )
    return parser


def _inspect(args: argparse.Namespace) -> None:
    with open_checkpoint(args.source) as checkpoint:
        _print(describe(checkpoint))


def _export(args: argparse.Namespace) -> None:
    export(args.model, args.to, args.out)
    print(f"written: {args.out}")


def _merge(args: argparse.Namespace) -> None:
    merged = merge(args.models, args.out, weight=args.weights, loras=args.lora)
    _print({"written": args.out} | merged)


def _average(args: argparse.Namespace) -> None:
    _print(reconstruct(args.run, args.out, args.std, args.step))


def _convert(args: argparse.Namespace) -> None:
    converted = convert(args.source, args.out, **{name: getattr(args, name) for name in _READ})
    _print(_summary(converted, args))
    if args.verify:
        ema = bool(converted.about.get("ema"))
        errors = verify(converted.config, converted.params, args.verify, ema)
        for name, (error, ratio) in errors.items():
            print(f"verified    {name}: error {error:.3g}, {ratio:.3g} of what is allowed")


def _summary(converted: Converted, args: argparse.Namespace) -> dict[str, str]:
    report = args.report or "conversion.json"
    lines = {
        "written": f"{args.out} ({converted.config['kind']})",
        "parameters": f"{len(converted.entries)} arrays, dtype {args.dtype or 'as stored'}",
    }
    if converted.about.get("ema"):
        lines["EMA"] = "the averaged weights; --no-ema takes the raw ones"
    lines["left out"] = f"{len(converted.left_out)} arrays, each with its reason in {report}"
    lines |= {f"assumed {i}": line for i, line in enumerate(converted.assumed, 1)}
    return lines | {f"lacks {i}": line for i, line in enumerate(converted.lacks, 1)}


def _print(lines: dict[str, str]) -> None:
    for label, text in lines.items():
        print(f"{label:<12}{text}")


COMMANDS = {
    "convert": _convert,
    "inspect": _inspect,
    "export": _export,
    "merge": _merge,
    "average": _average,
}


def main(argv: list[str] | None = None) -> int:
    """Runs ``ldm-convert``; returns the exit status, 2 for an error that the user can fix."""
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("convert", argv)
    return one_line(
        "error", lambda: COMMANDS[command](_parser(command).parse_args(rest)), lists=True
    )
