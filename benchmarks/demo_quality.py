"""Measures whether the demo's images show what their prompts name, also for left-out prompts.

    python -m benchmarks.demo_quality --data emoji64.zip --vgg VGG.safetensors [--model emoji]
        [--json out.json]

Images are generated for --n training prompts and for as many (concept, style) pairs left out of
training, whose concepts were trained in other styles only. An image counts as right when its
prompt's concept is among the 10 nearest of all concepts (the data's column "hexcode"); a concept
is as near as its nearest real image. The feature of an image is VGG-16 relu4_3, average-pooled to
4x4, square root, unit length, minus the mean of all real images of its style (of the prompt's
style for a generated image), unit length again; nearness is the cosine.

Two galleries of real images are reported. "all" has every image except the prompt's own (same
concept and style); most misses there go to other flags, keycaps and people in the prompt's style.
"other styles" leaves out the prompt's whole style, so that only the concept can match. Two
controls stand beside the generated images: real ones in their place (about 85 % in "all", 93 % in
"other styles") and images under each other's prompts (1 % or less).

The first stage's figure is the mean PSNR in dB, as uint8, over the images of held-out concepts.

--controls prints only the controls, with real images, and needs no model. Features of real images
are kept in --cache: the first run computes them in 2 to 10 minutes on two CPU cores (11,000
images, 180 MB).
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax import data
from ldm_jax.eval import metrics
from ldm_jax.kernels.cores import use_cores
from ldm_jax.models.ldm import to_float, to_uint8
from ldm_jax.models.perceptual import VGG_VARIABLE, load_vgg16

NEAREST = 10
BATCH = 50
GALLERIES = ("all", "other styles")
CONCEPT, STYLE = "hexcode", "style"


class Gallery(NamedTuple):
    """Real pictures, sorted by concept."""

    features: np.ndarray  # [n, d] float32, style removed, unit length
    concepts: np.ndarray  # [n] str, sorted
    styles: np.ndarray  # [n] str
    style_means: dict[str, np.ndarray]  # [d]


# --- features ---


@jax.jit(static_argnums=0)
def _vgg_features(module: Any, params: Any, images: jax.Array) -> jax.Array:
    """uint8 [b, s, s, 3] -> [b, 16 * 512]: relu4_3 averaged over a 4x4 grid."""
    maps = module.apply({"params": params}, to_float(images))[3]
    b, h, w, c = maps.shape
    return maps.reshape(b, 4, h // 4, 4, w // 4, c).mean(axis=(2, 4)).reshape(b, -1)


def embed(vgg: tuple[Any, Any], images: np.ndarray, note: str = "") -> np.ndarray:
    """Returns float32 unit features [n, 8192] of uint8 images [n, s, s, 3], 32 dividing s."""
    if images.shape[1] % 32 or images.shape[1] != images.shape[2]:
        raise ValueError(
            f"square pictures of a multiple of 32 pixels are needed, not {images.shape[1:3]}"
        )
    parts = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        parts.append(np.asarray(_vgg_features(*vgg, _padded(batch)))[: len(batch)])
        if note and start % (20 * BATCH) == 0:
            print(f"{note}: {start} of {len(images)}", file=sys.stderr, flush=True)
    return _unit_length(np.sqrt(np.concatenate(parts)))


def _padded(batch: np.ndarray) -> np.ndarray:
    """The batch filled up to BATCH, so that one compiled program serves all."""
    return np.concatenate([batch, np.repeat(batch[-1:], BATCH - len(batch), axis=0)])


def _unit_length(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def read_images(source: data.Source, indices: Sequence[int] | range) -> np.ndarray:
    """The source's pictures, uint8 [n, s, s, 3]; raises ValueError when their sizes differ."""
    images = [data.to_rgb(source[i]["image"]) for i in indices]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"{source.path}: pictures of one size are needed")
    return np.stack(images)


def cached_features(
    source: data.Source, weights: str, vgg: tuple[Any, Any], folder: Path
) -> np.ndarray:
    """Returns `embed` of the source's images, cached in a file named by its inputs' hash."""
    digest = hashlib.sha256(Path(weights).read_bytes())
    for i in range(len(source)):
        digest.update(source[i]["image"])
    file = folder / f"relu4_3-{digest.hexdigest()[:16]}.npz"
    if file.is_file():
        return np.load(file)["features"].astype(np.float32)
    features = embed(vgg, read_images(source, range(len(source))), note="features of real pictures")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz", delete=False) as part:
        np.savez(part, features=features.astype(np.float16))
    os.replace(part.name, file)  # a run that is stopped leaves no half file under the final name
    return features


# --- retrieval ---


def make_gallery(features: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> Gallery:
    """The gallery of real pictures' features [n, d] with their metadata."""
    concepts, styles = (np.array([row[column] for row in rows]) for column in (CONCEPT, STYLE))
    means = {str(style): features[styles == style].mean(axis=0) for style in np.unique(styles)}
    order = np.argsort(concepts, kind="stable")
    features = _without_style(features[order], styles[order], means)
    return Gallery(features, concepts[order], styles[order], means)


def _without_style(
    features: np.ndarray, styles: Sequence[str] | np.ndarray, means: dict[str, np.ndarray]
) -> np.ndarray:
    return _unit_length(features - np.stack([means[str(style)] for style in styles]))


def found(
    gallery: Gallery, features: np.ndarray, prompts: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """Returns for each gallery whether each prompt's concept is among the NEAREST, bool [n].

    features [n, d]: `embed` of the pictures, in the order of the prompts (rows of metadata).
    """
    queries = _without_style(features, [p[STYLE] for p in prompts], gallery.style_means)
    similarity = queries @ gallery.features.T
    same_style = np.stack([gallery.styles == p[STYLE] for p in prompts])
    own = same_style & np.stack([gallery.concepts == p[CONCEPT] for p in prompts])
    concepts, starts = np.unique(gallery.concepts, return_index=True)
    truth = np.searchsorted(concepts, [p[CONCEPT] for p in prompts])[:, None]
    result = {}
    for name, left_out in zip(GALLERIES, (own, same_style), strict=True):
        per_concept = np.maximum.reduceat(np.where(left_out, -np.inf, similarity), starts, axis=1)
        nearness = np.take_along_axis(per_concept, truth, axis=1)
        result[name] = ((per_concept > nearness).sum(axis=1) < NEAREST) & np.isfinite(
            nearness[:, 0]
        )
    return result


def choose(part: data.Source, others: data.Source, n: int, seed: int) -> list[int]:
    """Returns n random indices of images whose concept `others` has in another style too."""
    styles: dict[str, set[str]] = {}
    for row in others.rows:
        styles.setdefault(row[CONCEPT], set()).add(row[STYLE])
    able = [i for i, row in enumerate(part.rows) if styles.get(row[CONCEPT], set()) - {row[STYLE]}]
    return np.random.default_rng(seed).permutation(able)[:n].tolist()


def shuffled(prompts: Sequence[Mapping[str, Any]], seed: int) -> list[Mapping[str, Any]]:
    """Every prompt in the place of another one."""
    order = np.random.default_rng(seed).permutation(len(prompts))
    moved: list[Mapping[str, Any]] = list(prompts)
    for here, there in zip(order, np.roll(order, 1), strict=True):
        moved[here] = prompts[there]
    return moved


# --- first stage ---


@jax.jit
def _reconstruct(first_stage: Any, images: jax.Array) -> jax.Array:
    return to_uint8(first_stage.decode(first_stage.encode(to_float(images))))


def reconstruction_psnr(first_stage: Any, images: np.ndarray) -> float:
    """Mean PSNR in dB of uint8 images [n, h, w, c] through the first stage and back to uint8."""
    values = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        values.append(
            metrics.psnr(np.asarray(_reconstruct(first_stage, _padded(batch)))[: len(batch)], batch)
        )
    return float(np.concatenate(values).mean())


# --- the report ---


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, by name."""
    source = data.ImageFolder(args.data)
    if not all({CONCEPT, STYLE} <= row.keys() for row in source.rows):
        raise ValueError(
            f"{source.path}: every picture needs the columns {CONCEPT!r} and {STYLE!r}"
        )
    vgg = load_vgg16(args.vgg)
    pipe = None if args.controls else load_model(args.model)
    gallery = make_gallery(cached_features(source, args.vgg, vgg, args.cache), source.rows)

    result: dict[str, Any] = {"concepts": len(np.unique(gallery.concepts)), "retrieval": {}}
    prompts, originals, pictures = [], [], []
    if pipe is None:
        chosen = choose(source, source, 2 * args.n, args.seed)
        prompts = [source.rows[i] for i in chosen]
        originals = pictures = [embed(vgg, read_images(source, chosen))]
    else:
        for name, part, training in prompt_parts(source, pipe.model.config["data"]):
            chosen = choose(part, training, args.n, args.seed)
            rows = [part.rows[i] for i in chosen]
            originals.append(embed(vgg, read_images(part, chosen)))
            pictures.append(embed(vgg, generate(pipe, rows, args)))
            result["retrieval"][name] = shares(found(gallery, pictures[-1], rows))
            prompts += rows
    real, drawn = np.concatenate(originals), np.concatenate(pictures)
    result["retrieval"]["real pictures"] = shares(found(gallery, real, prompts))
    result["retrieval"]["shuffled captions"] = shares(
        found(gallery, drawn, shuffled(prompts, args.seed))
    )
    if pipe is not None:
        unseen = data.split_by(source, *_split(pipe.model.config["data"]), "validation")
        images = read_images(unseen, range(len(unseen)))
        result["first stage"] = {
            "psnr_db": reconstruction_psnr(pipe.model.first_stage, images),
            "n": len(images),
        }
    return result


def prompt_parts(
    source: data.Source, config: Mapping[str, Any]
) -> list[tuple[str, data.Source, data.Source]]:
    """Returns (name, the prompts' images, the training images) for each kind of prompt."""
    seen = data.split_by(source, *_split(config), "train")
    pairs = config["pairs"]
    train, left_out = (
        data.hold_out_pairs(seen, pairs["columns"], pairs["holdout"], pairs["seed"], part)
        for part in ("train", "validation")
    )
    return [("training prompts", train, train), ("left-out pairs", left_out, train)]


def _split(config: Mapping[str, Any]) -> tuple[str, float, int]:
    return config["split"]["column"], config["split"]["holdout"], config["split"]["seed"]


def load_model(name: str) -> Any:
    """The pipeline; raises ValueError when its config does not say what it was trained on."""
    import ldm_jax

    pipe = ldm_jax.load(name)
    known = pipe.model.config.get("data", {})
    missing = [key for key in ("caption", "split", "pairs") if key not in known]
    if missing:
        raise ValueError(
            f"the config of model {name!r} has no data.{missing[0]}: its training data is unknown"
        )
    return pipe


def generate(pipe: Any, rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> np.ndarray:
    """One picture for each row's caption, uint8 [n, s, s, 3]."""
    caption = pipe.model.config["data"]["caption"]
    return pipe(
        [data.caption_template(caption, row) for row in rows],
        seeds=[args.seed + i for i in range(len(rows))],
        steps=args.steps,
        guidance=args.guidance,
        sampler=args.sampler,
        batch=args.batch,
    )


def shares(hits: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Percentage, its standard error and the number of pictures, for each gallery."""
    means = {name: float(h.mean()) for name, h in hits.items()}
    return {
        name: {
            "percent": 100 * p,
            "error": 100 * float(np.sqrt(p * (1 - p) / len(hits[name]))),
            "n": len(hits[name]),
        }
        for name, p in means.items()
    }


def show(result: Mapping[str, Any]) -> None:
    """Print the figures as a table."""
    print(f"concept among the {NEAREST} nearest of {result['concepts']}")
    print(f"{'':30}" + "".join(f"{'gallery: ' + name:>24}" for name in GALLERIES))
    for name, row in result["retrieval"].items():
        n = row[GALLERIES[0]]["n"]
        cells = (f"{row[g]['percent']:.1f} ± {row[g]['error']:.1f} %" for g in GALLERIES)
        print(f"{name + f' ({n})':30}" + "".join(f"{cell:>24}" for cell in cells))
    if "first stage" in result:
        stage = result["first stage"]
        print(f"first stage: mean PSNR {stage['psnr_db']:.2f} dB on {stage['n']} unseen pictures")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.demo_quality", description="Quality of the emoji model."
    )
    parser.add_argument(
        "--data", required=True, help="the pictures: emoji64.zip or a folder with metadata.jsonl"
    )
    parser.add_argument(
        "--vgg",
        default=os.environ.get(VGG_VARIABLE),
        help=f"VGG-16 weights (default: ${VGG_VARIABLE})",
    )
    parser.add_argument(
        "--model", default="emoji", help="a model that ldm_jax.load knows, or a model directory"
    )
    parser.add_argument("--n", type=int, default=300, help="prompts of each kind")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="pictures generated at a time")
    parser.add_argument(
        "--controls",
        action="store_true",
        help="only the controls, with real pictures: needs no model",
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "ldm_jax-demo_quality"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = parse(argv)
    use_cores()  # before VGG16 asks for a device
    try:
        result = measure(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"demo_quality: {error}") from None
    show(result)
    if args.json:
        settings = {
            k: getattr(args, k)
            for k in ("model", "n", "steps", "guidance", "sampler", "seed", "controls")
        }
        args.json.write_text(json.dumps({"settings": settings, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
