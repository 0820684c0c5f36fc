"""Draws the README's first image: python tools/demo_grid.py --data emoji64.zip --out FILE.

Eight concepts drawn at random (seed 0) among those that exist in all four styles and were not held
out of training, each in the four styles, with seed 0 for every image.
"""

import argparse
import random
from pathlib import Path

import ldm_jax
from ldm_jax.data import make_source
from ldm_jax.io.png import labelled_grid, save_png

STYLES = ("noto", "twemoji", "fluent flat", "fluent 3d")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="the pictures that the model was trained on")
    parser.add_argument("--out", required=True, help="the PNG to write")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--concepts", type=int, default=8)
    args = parser.parse_args()

    ldm_jax.use_cores()
    pipe = ldm_jax.load(args.model)
    split = pipe.model.config["data"]["split"]
    part = {
        "split_column": split["column"],
        "holdout": split["holdout"],
        "split_seed": split["seed"],
    }
    styles_of: dict[str, set[str]] = {}
    for row in make_source({"path": args.data, **part}).rows:
        styles_of.setdefault(row["text"], set()).add(row["style"])
    everywhere = sorted(text for text, styles in styles_of.items() if styles.issuperset(STYLES))
    concepts = random.Random(0).sample(everywhere, args.concepts)

    prompts = [f"{concept}, {style} style" for style in STYLES for concept in concepts]
    images = pipe(prompts, seeds=[0] * len(prompts))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    save_png(
        args.out, labelled_grid(images, STYLES, [c.replace(" ", "\n", 1) for c in concepts], zoom=1)
    )


if __name__ == "__main__":
    main()
