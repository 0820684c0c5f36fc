"""Draws pictures of the emoji archive in a style that it does not have: white lines on blue.

    python tools/make_style.py emoji64.zip --out blueprint64.zip [--of noto] [--count 600]

A pixel is as white as the colour changes there (the largest Sobel gradient of the three channels,
over 0.35 of its range, with a gamma of 0.8); where nothing changes it has the blue of a blueprint.
The metadata is that of the pictures drawn from, with the style "blueprint". The pictures are every
k-th by name, so that the same archive always gives the same ones.
"""

import argparse
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

BLUE, WHITE = np.array([22.0, 62.0, 138.0]), np.array([245.0, 248.0, 255.0])
STYLE = "blueprint"


def blueprint(image: np.ndarray) -> np.ndarray:
    """Returns a picture uint8 [h, w, 3] as white lines on blue."""
    x = np.pad(image.astype(np.float64) / 255, ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = x[:, 2:] - x[:, :-2]
    down = x[2:] - x[:-2]
    gx = (across[:-2] + 2 * across[1:-1] + across[2:]) / 4
    gy = (down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]) / 4
    strength = np.hypot(gx, gy).max(axis=2, keepdims=True)
    line = np.clip(strength / 0.35, 0, 1) ** 0.8
    return np.round(BLUE + line * (WHITE - BLUE)).astype(np.uint8)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, help="the emoji archive")
    parser.add_argument("--out", type=Path, required=True, help="the archive to write")
    parser.add_argument("--of", default="noto", help="the style that is drawn from")
    parser.add_argument("--count", type=int, default=600, help="pictures at most")
    args = parser.parse_args()
    with zipfile.ZipFile(args.archive) as source, zipfile.ZipFile(args.out, "w") as archive:
        rows = [json.loads(line) for line in source.read("metadata.jsonl").splitlines()]
        rows = sorted((r for r in rows if r["style"] == args.of), key=lambda r: r["file_name"])
        rows = rows[:: max(1, -(-len(rows) // args.count))]
        if not rows:
            parser.error(f"{args.archive} has no pictures of the style {args.of!r}")
        for row in rows:
            with Image.open(io.BytesIO(source.read(row["file_name"]))) as picture:
                image = blueprint(np.asarray(picture.convert("RGB")))
            written = io.BytesIO()
            Image.fromarray(image).save(written, "PNG")
            row["file_name"] = f"{STYLE}/{Path(row['file_name']).stem}.png"
            row["style"] = STYLE
            archive.writestr(zipfile.ZipInfo(row["file_name"]), written.getvalue())
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        archive.writestr(zipfile.ZipInfo("metadata.jsonl"), text.encode(), zipfile.ZIP_DEFLATED)
    print(f"{args.out}: {len(rows)} pictures, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
