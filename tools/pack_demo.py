"""Packs a trained model for shipping.

    python tools/pack_demo.py runs/emoji/model --data emoji64.zip --out ldm_jax/assets/emoji

Weights become bfloat16. Embeddings of words that no training caption contains are set to the mean
of the trained ones, so that an unknown word is neutral and its row compresses to almost nothing.
"""

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import make_conditioner
from ldm_jax.data import caption_template, make_source
from ldm_jax.io.checkpoint import load_model, save_model

LIMIT = 20 * 2**20


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the model directory of the run")
    parser.add_argument("--data", required=True, help="the pictures that it was trained on")
    parser.add_argument("--out", required=True, help="the model directory to write")
    args = parser.parse_args()

    config, params = load_model(args.model)
    split, pairs = config["data"]["split"], config["data"]["pairs"]
    source = make_source(
        {
            "path": args.data,
            "split_column": split["column"],
            "holdout": split["holdout"],
            "split_seed": split["seed"],
            "pair_columns": tuple(pairs["columns"]),
            "pair_holdout": pairs["holdout"],
        }
    )
    captions = {caption_template(config["data"]["caption"], row) for row in source.rows}
    conditioner = make_conditioner(config["conditioner"], jnp.float32)
    seen = np.unique(conditioner.encode([*sorted(captions), ""]))
    table = np.array(params["conditioner"]["token_emb"]["embedding"])
    unseen = np.setdiff1d(np.arange(len(table)), seen)
    table[unseen] = table[seen].mean(0)
    params["conditioner"]["token_emb"]["embedding"] = table

    save_model(args.out, config, params, dtype="bfloat16")
    size = sum(file.stat().st_size for file in Path(args.out).rglob("*") if file.is_file())
    print(
        f"{args.out}: {size / 2**20:.1f} MiB, "
        f"{len(seen)} of {len(table)} words occur in {len(captions)} captions"
    )
    if size > LIMIT:
        sys.exit(f"{args.out} is larger than {LIMIT / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
