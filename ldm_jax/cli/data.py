"""Prepares the data of a training.

    ldm-data check CONFIG --out=sheet.png
    ldm-data encode CONFIG --out=DIR
    ldm-data embed CONFIG --clip=MODEL --out=DIR

check inspects the data: counts, a contact sheet, and problems, one line each (exit status 1).
encode writes a latent cache for a diffusion stage, which trains from it with
--config.data.cache=DIR. embed writes the vectors that a CLIP model makes of the pictures: a
database for retrieval-augmented models. Both resume after a stop. CONFIG is as for ldm-train, and
any field of it can be changed: --config.data.path=pictures.zip.
"""

import sys
from typing import Any

from absl import flags

from ldm_jax.cli import run as cli
from ldm_jax.cli.config import define_config_flag, with_config_path
from ldm_jax.errors import ConfigError


def encode(args: Any) -> None:
    """Writes a latent cache."""
    from ldm_jax.train.encode import encode

    if not args.out:
        raise ConfigError("missing --out=...; --help explains every flag")
    encode(args.config, args.out, dtype=args.dtype or "float16", shard_size=args.shard_size)


def embed(args: Any) -> None:
    """Writes the embeddings of the pictures."""
    from ldm_jax.convert.conversion import read_any
    from ldm_jax.io.checkpoint import find_model
    from ldm_jax.train.embed import embed

    for name in ("clip", "out"):
        if not getattr(args, name):
            raise ConfigError(f"missing --{name}=...; --help explains every flag")
    options = {"part": args.part, "dtype": args.dtype or "float32", "shard_size": args.shard_size}
    embed(args.config, read_any(find_model(args.clip)), args.out, **options)


def check(args: Any) -> None:
    """Inspects the data."""
    from ldm_jax.train.check import check

    sys.exit(1 if check(args.config, args.out or "contact_sheet.png", sample=args.sample) else 0)


COMMANDS = {"check": check, "encode": encode, "embed": embed}


def main() -> None:
    """Runs ``ldm-data``."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS and name not in ("--help", "-h"):
        print(f"error: usage: ldm-data {'|'.join(COMMANDS)} CONFIG --out=...", file=sys.stderr)
        sys.exit(2)
    define_config_flag()
    flags.DEFINE_string(
        "out", None, "encode, embed: the new folder. check: contact sheet (contact_sheet.png)."
    )
    flags.DEFINE_integer(
        "sample", 2000, "check: pictures of each part to decode, spread over it; 0 decodes all."
    )
    text = "Type on disk (encode: float16 or bfloat16; embed: float32 or float16)."
    flags.DEFINE_enum("dtype", None, ["float16", "bfloat16", "float32"], text)
    flags.DEFINE_integer("shard_size", 1024, "Pictures per file, a multiple of 64.")
    flags.DEFINE_string("clip", None, "embed: a CLIP model directory, or a checkpoint of one.")
    parts, text = ["train", "validation"], "embed: the part of the data."
    flags.DEFINE_enum("part", "train", parts, text)
    flags.mark_flag_as_required("config")
    rest = sys.argv[2:] if name in COMMANDS else ["--help"]
    sys.argv = with_config_path([sys.argv[0], *rest], positional=1)
    cli.run(COMMANDS.get(name, encode))
