"""What is done to data before a training.

python -m ldm_jax.data check CONFIG --out=sheet.png looks through the data: counts, a contact sheet, what is wrong in a line each (exit status 1).
python -m ldm_jax.data encode CONFIG --out=DIR makes a latent cache of a diffusion stage; train from it with --config.data.cache=DIR. A run that
was stopped goes on where it was.

CONFIG is as train.py takes it, and any field of it can be changed as there: --config.data.path=pictures.zip.
"""

import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from ldm_jax.cli import run as cli

config_flags.DEFINE_config_file(
    "config", None, "The config file, also without --config=.", lock_config=True
)
flags.DEFINE_string(
    "out", None, "encode: folder of the latent cache. check: the contact sheet (contact_sheet.png)."
)
flags.DEFINE_integer(
    "sample", 2000, "check: how many pictures of a part to decode, spread over it; 0 decodes all."
)
flags.DEFINE_enum(
    "dtype", "float16", ["float16", "bfloat16"], "encode: type of the cached moments."
)
flags.DEFINE_integer("shard_size", 1024, "encode: pictures per file, a multiple of 64.")
flags.mark_flag_as_required("config")


def encode(args: Any) -> None:
    """Makes a latent cache."""
    from ldm_jax.train.encode import encode

    if not args.out:
        raise ValueError("missing --out=...; --help explains every flag")
    encode(args.config, args.out, dtype=args.dtype, shard_size=args.shard_size)


def check(args: Any) -> None:
    """Looks through the data."""
    from ldm_jax.train.check import check

    sys.exit(1 if check(args.config, args.out or "contact_sheet.png", sample=args.sample) else 0)


COMMANDS = {"check": check, "encode": encode}


def main() -> None:
    """Runs ``ldm-data``."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS and name not in ("--help", "-h"):
        print(f"error: usage: ldm-data {'|'.join(COMMANDS)} CONFIG --out=...", file=sys.stderr)
        sys.exit(2)
    rest = sys.argv[2:] if name in COMMANDS else ["--help"]
    sys.argv = [
        sys.argv[0],
        *(f"--config={a}" if i == 0 and not a.startswith("-") else a for i, a in enumerate(rest)),
    ]
    cli.run(COMMANDS.get(name, encode))
