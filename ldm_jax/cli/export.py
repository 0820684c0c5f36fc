"""ldm-export: writes a model's sampling as a program that runs without this package."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_jax.cli.run import one_line
from ldm_jax.models.build import DTYPES
from ldm_jax.sampling.export import COMPILED, export
from ldm_jax.sampling.export import __doc__ as description
from ldm_jax.sampling.request import KINDS, OPTIONS


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line; flags are those of ldm-sample, the model's own by default."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("ldm-export", description=description, formatter_class=form)
    parser.add_argument("model", metavar="MODEL", help="as --model of ldm-sample")
    parser.add_argument("--out", help="the new folder (default: MODEL_export, here)")
    for name in COMPILED:
        known = OPTIONS[name].metadata
        flag, kind = known["flag"] or name, KINDS[known["kind"]]
        text = known["help"].replace("%", "%%")
        parser.add_argument(f"--{flag}", dest=name, type=_typed(kind), help=text)
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of weights and products"
    )
    return parser.parse_args(argv)


def _typed(kind: Any) -> Callable[[str], Any]:
    def typed(text: str) -> Any:
        try:
            return kind.parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: write {kind.write}") from None

    return typed


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 for an expected error."""

    def run() -> None:
        options = vars(parse(sys.argv[1:] if argv is None else argv))
        model = options.pop("model")
        out = export(model, options.pop("out") or f"{Path(model).name}_export", **options)
        files = sorted(out.iterdir())
        sizes = [f"{file.name} {file.stat().st_size / 2**20:.1f} MiB" for file in files]
        print(f"written: {out} ({', '.join(sizes)})")

    return one_line("error", run)
