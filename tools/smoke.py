"""Runs the :smoke variant of every config, from nothing to a sampled image.

    python tools/smoke.py [NAME ...] [--jobs 2]

Prints the time of each, and ends with status 1 if one failed or took more than --limit seconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
# What configs share, none themselves.
SHARED = ("common", "presets", "emoji_presets", "released", "transformers")
STEPS = ["--num=1", "--steps=3"]
ADAPTERS = {"lora": "lora", "inversion": "embedding"}  # kind of a model directory -> the flag


def inputs(folder: Path) -> dict[str, list[str]]:
    """What a model is asked by, by the kind of its conditioner, as flags of sample.py."""
    rng = np.random.default_rng(0)
    files = {
        name: str(folder / name)
        for name in ("picture.png", "mask.png", "labels.png", "boxes.json", "vectors.npy")
    }
    Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(files["picture.png"])
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    Image.fromarray(mask).save(files["mask.png"])
    Image.fromarray(mask // 255).save(files["labels.png"])
    Path(files["boxes.json"]).write_text(json.dumps([{"label": 1, "box": [0.1, 0.1, 0.5, 0.5]}]))
    np.save(files["vectors.npy"], rng.uniform(size=(2, 7)))  # as those of the scenes
    return {
        "bert": ["--prompt=red apple"],
        "clip": ["--prompt=red apple"],
        "class": ["--class=0"],
        "none": [],
        "tokens": [f"--layout={files['boxes.json']}"],
        "embeddings": [f"--embeddings={files['vectors.npy']}"],
        "rescale": [f"--semantic_map={files['labels.png']}"],
        "masked": [f"--image={files['picture.png']}", f"--mask={files['mask.png']}"],
        "picture": [f"--image={files['picture.png']}"],
        "start": [],
        "label": ["--class=0"],
        "coordinates": ["--size=64x96"],
        "coded_map": [f"--semantic_map={files['labels.png']}"],
    }


def run(name: str, folder: Path, asked: dict[str, list[str]]) -> tuple[str, float, str]:
    """(name, seconds, what went wrong if anything did)."""
    began, model = time.perf_counter(), folder / name / "model"
    train = [f"--config={ROOT / 'configs' / name}.py:smoke", f"--workdir={folder / name}"]
    wrong = execute("train.py", train)
    if not wrong:
        config = json.loads((model / "config.json").read_text())
        if config["kind"] != "first_stage":
            conditioner = config["conditioner"]
            steps = STEPS if "schedule" in config else STEPS[:1]
            kind = (
                conditioner.get("of", "picture").split("_")[0]
                if conditioner["kind"] == "joined"
                else conditioner["kind"]
            )
            wrong = execute(
                "sample.py",
                [f"--model={model}", *asked[kind], *steps, f"--out={folder / name / 'out'}"],
            )
        elif config["kind"] in ADAPTERS:
            flag = f"--{ADAPTERS[config['kind']]}={model}"
            adapted = [f"--model={config['base']}", flag, "--prompt=red apple"]
            wrong = execute("sample.py", [*adapted, *STEPS, f"--out={folder / name / 'out'}"])
    return name, time.perf_counter() - began, wrong


def execute(script: str, flags: list[str]) -> str:
    """The end of what a failed program said, or nothing."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *flags], cwd=ROOT, capture_output=True, text=True
    )
    return (
        "" if done.returncode == 0 else f"{script}: status {done.returncode}\n{done.stderr[-2000:]}"
    )


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="configs (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--limit", type=float, default=180, help="seconds for each")
    args = parser.parse_args()
    names = args.names or sorted(
        p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in SHARED
    )
    failed = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        asked = inputs(Path(folder))
        for name, seconds, wrong in pool.map(lambda name: run(name, Path(folder), asked), names):
            late = f", more than {args.limit:.0f}" if seconds > args.limit else ""
            print(f"{name:20} {seconds:5.0f} s{late}{' FAILED' if wrong else ''}", flush=True)
            if wrong or late:
                failed.append(name)
                print(wrong, flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
