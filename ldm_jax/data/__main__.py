"""What is done to data before a training: python -m ldm_jax.data encode CONFIG --out=DIR

CONFIG is a diffusion stage's, as train.py takes it, and any field of it can be changed as there: --config.data.path=pictures.zip. Train from
the result with --config.data.cache=DIR. A run that was stopped goes on where it was.
"""

import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from ldm_jax import cli

config_flags.DEFINE_config_file("config", None, "The config file, also without --config=.", lock_config=True)
flags.DEFINE_string("out", None, "Folder of the latent cache.")
flags.DEFINE_enum("dtype", "float16", ["float16", "bfloat16"], "Type of the cached moments.")
flags.DEFINE_integer("shard_size", 1024, "Pictures per file, a multiple of 64.")
flags.mark_flags_as_required(["config", "out"])


def encode(args: Any) -> None:
    """Runs the command."""
    from ldm_jax.train.encode import encode

    encode(args.config, args.out, dtype=args.dtype, shard_size=args.shard_size)


COMMANDS = {"encode": encode}

if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS and name not in ("--help", "-h"):
        print(f"error: usage: python -m ldm_jax.data {'|'.join(COMMANDS)} CONFIG --out=DIR", file=sys.stderr)
        sys.exit(2)
    rest = sys.argv[2:] if name in COMMANDS else ["--help"]
    sys.argv = [sys.argv[0], *(f"--config={a}" if i == 0 and not a.startswith("-") else a for i, a in enumerate(rest))]
    cli.run(COMMANDS.get(name, encode))
