r"""Draws how first stages change when their discriminator starts, for docs/first_stages.md.

    python tools/first_stage_report.py --before runs/first --data photos.zip --out docs/photos_kl \
        --after "without=runs/plain" "with=runs/gan" "as the original=runs/parity"

Takes workdirs of finished runs; those of --after started from the model of --before
(``--config.init``), so that their steps follow its. Writes OUT_curves.png (the runs' metrics) and
OUT_pictures.png (held-out images with each model's reconstructions at twice their size). Prints
PSNR and LPIPS of the last validation on all held-out images, and the sharpness of the
reconstructions: the mean gradient magnitude over that of the images.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import ml_collections
import numpy as np

from ldm_jax.io.checkpoint import load_model
from ldm_jax.io.png import labelled_grid, save_png
from ldm_jax.models.build import build_first_stage
from ldm_jax.models.ldm import to_float, to_uint8
from ldm_jax.train.loaders import first_batches, make_loader

ROWS = 5
CURVES = (
    ("psnr", "PSNR in dB, held out"),
    ("p_loss", "LPIPS, held out"),
    ("codebook_use", "codes in use"),
)
ADVERSARY = (
    ("d_weight", "d_weight"),
    ("logits_real", "discriminator on pictures"),
    ("logits_fake", "on reconstructions"),
)


def history(run: Path, part: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, of "train" or "validation"; empty where it was not logged."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [
        (line["step"], line[metric]) for line in lines if line["part"] == part and metric in line
    ]
    return tuple(np.array(found).T) if found else (np.zeros(0), np.zeros(0))  # type: ignore[return-value]


def curves(before: Path, after: dict[str, Path], path: Path) -> None:
    """Validation's metrics and the discriminator's, a line for each run."""
    steps = int(history(before, "train", "loss")[0].max())
    start = json.loads((next(iter(after.values())) / "config.json").read_text())["adversary"][
        "start"
    ]
    wanted = [
        ("validation" if metric in ("psnr", "p_loss") else "train", metric, title)
        for metric, title in CURVES + ADVERSARY
    ]
    there = [
        row for row in wanted if any(len(history(run, row[0], row[1])[0]) for run in after.values())
    ]
    figure, axes = plt.subplots(
        -(-len(there) // 2),
        2,
        figsize=(10, 2.7 * -(-len(there) // 2)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(there) :]:
        axis.axis("off")
    for axis, (part, metric, title) in zip(axes.flat, there, strict=False):
        at, values = history(before, part, metric)
        axis.plot(at, values, color="grey", label="before")
        for name, run in after.items():
            at, values = history(run, part, metric)
            axis.plot(at + steps, values, label=name)
        axis.axvline(steps + start, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if metric == "d_weight":
            axis.set_yscale("log")
        if metric == "codebook_use":
            axis.set_ylim(0, 1.02)
    axes[0, 0].legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("steps; dotted: the discriminator starts", fontsize=9)
    figure.savefig(path, dpi=90)


def sharpness(images: np.ndarray) -> np.ndarray:
    """Mean size of the differences between neighbours, for each of uint8 [n, H, W, 3]."""
    x = images.astype(np.float32)
    return np.abs(np.diff(x, axis=1)).mean((1, 2, 3)) + np.abs(np.diff(x, axis=2)).mean((1, 2, 3))


def reconstructions(run: Path, images: np.ndarray) -> np.ndarray:
    """What a run's model makes of uint8 [n, H, W, 3]."""
    config, params = load_model(run / "model")
    module = build_first_stage(config)
    assert module is not None
    step: Any = jax.jit(
        lambda params, x: to_uint8(module.apply({"params": params}, to_float(x))[0])
    )
    return np.concatenate(
        [np.asarray(step(params["first_stage"], images[i : i + 1])) for i in range(len(images))]
    )


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--before", required=True, type=Path, help="workdir of the run that the others began with"
    )
    parser.add_argument(
        "--after", required=True, nargs="+", help="NAME=WORKDIR of each of the others"
    )
    parser.add_argument(
        "--data", help="where the pictures are, if no longer where the runs had them"
    )
    parser.add_argument("--out", required=True, help="how the names of the PNGs begin")
    args = parser.parse_args()
    after = {name: Path(path) for name, path in (one.split("=", 1) for one in args.after)}

    curves(args.before, after, Path(f"{args.out}_curves.png"))
    config: Any = ml_collections.ConfigDict(json.loads((args.before / "config.json").read_text()))
    config.data.path = args.data or config.data.path
    loader = make_loader(config, "validation")
    batches = first_batches(loader, -(-loader.count // config.batch_size))
    images = np.concatenate([batch["image"] for batch in batches])[: loader.count]
    columns = [images]
    for name, run in ({"before": args.before} | after).items():
        columns.append(reconstructions(run, images))
        sharp = float((sharpness(columns[-1]) / sharpness(images)).mean())
        psnr, lpips = (history(run, "validation", metric)[1] for metric in ("psnr", "p_loss"))
        distance = f", LPIPS {lpips[-1]:.4f}" if len(lpips) else ""
        print(
            f"{name}: PSNR {psnr[-1]:.2f} dB{distance}, sharpness {sharp:.3f}, "
            f"on {len(images)} images"
        )
    at = np.linspace(0, len(images) - 1, ROWS).round().astype(int)
    rows = [column[i].repeat(2, 0).repeat(2, 1) for i in at for column in columns]
    save_png(
        f"{args.out}_pictures.png", labelled_grid(rows, [""] * ROWS, ["picture", "before", *after])
    )


if __name__ == "__main__":
    main()
