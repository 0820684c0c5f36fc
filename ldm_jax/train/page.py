"""report.html: a run on one page that needs no other file and no network."""

import base64
import io
import json
import math
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from ldm_jax.io.atomic import write_atomic
from ldm_jax.train.report import clock
from ldm_jax.train.tasks.base import plain

Points = list[tuple[int, float]]

WIDTH, HEIGHT, MARGIN = 420, 200, 46
MOST_POINTS = 400  # of a curve; more are averaged
PREVIEWS = 4
PACKAGES = ("ldm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
COLOURS = {"train": "#3b82f6", "validation": "#f97316"}

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td { padding: .15rem 1.2rem .15rem 0; vertical-align: top; }
.curves { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; }
figcaption { font-weight: 600; } svg text { font: 11px system-ui; fill: currentColor; }
svg { max-width: 100%; height: auto; } svg .axis { stroke: currentColor; opacity: .35; }
img { max-width: 100%; image-rendering: auto; } pre { overflow-x: auto; font-size: 13px; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
"""


def write_page(workdir: Path, config: Any, facts: Mapping[str, Any]) -> Path:
    """Writes ``report.html`` of a run folder.

    Args:
      workdir: The folder, with metrics.jsonl and previews/.
      config: The config of the run.
      facts: Further rows of the summary: name -> value.

    Returns:
      The path of the page.
    """
    curves = read_curves(workdir / "metrics.jsonl")
    speeds = [value for _, value in curves.get("images_per_second", {}).get("train", [])]
    rows = {"steps": config.steps, "batch": config.batch_size, **facts}
    if speeds:
        seconds = config.batch_size * config.steps / (len(speeds) / sum(1 / s for s in speeds))
        rows["images per second"] = f"{np.median(speeds):.1f} (median)"
        rows["time of the steps"] = clock(round(seconds))
    previews = sorted((workdir / "previews").glob("*.png"))
    chosen = sorted({round(i) for i in np.linspace(0, len(previews) - 1, PREVIEWS)})
    images = [(previews[i].stem, embedded(previews[i])) for i in chosen if previews]
    figures = [draw(name, parts) for name, parts in sorted(curves.items(), key=_order)]
    key = "".join(
        f'<span class="key" style="background:{colour}"></span>{part}'
        for part, colour in COLOURS.items()
    )
    body = [
        f"<h1>{escape(workdir.name)}</h1>",
        table(rows),
        f"<h2>Curves</h2><p>{key}</p><div class=curves>{''.join(figures)}</div>",
        "<h2>Previews</h2>" if images else "",
        *(
            f'<p>Step {int(step)}<br><img alt="step {int(step)}" src="{uri}">'
            for step, uri in images
        ),
        f"<h2>Environment</h2>{table(environment())}",
        f"<h2>Config</h2><pre>{escape(json.dumps(plain(config), indent=1))}</pre>",
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(workdir.name)}</title><style>{STYLE}</style>{''.join(body)}</html>\n"
    )
    path = workdir / "report.html"
    write_atomic(path, page)
    return path


def read_curves(file: Path) -> dict[str, dict[str, Points]]:
    """Reads metrics.jsonl: metric -> part -> [(step, value)], finite values only."""
    curves: dict[str, dict[str, Points]] = defaultdict(lambda: defaultdict(list))
    lines = file.read_text().splitlines() if file.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a killed run
            continue
        step, part = record.pop("step"), record.pop("part")
        for name, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves[name][part].append((step, value))
    return curves


def draw(name: str, parts: Mapping[str, Points]) -> str:
    """Draws a metric as an SVG; logarithmic where it spans more than a factor of 50."""
    parts = {part: thinned(points) for part, points in parts.items() if points}
    xs = [x for points in parts.values() for x, _ in points]
    ys = [y for points in parts.values() for _, y in points]
    low, high = min(ys), max(ys)
    log = low > 0 and high / low > 50
    scale = math.log10 if log else float
    bottom, top = scale(low), scale(high)
    left, right = min(xs), max(xs)

    def place(x: float, y: float) -> str:
        across = (x - left) / ((right - left) or 1)
        up = (scale(y) - bottom) / ((top - bottom) or 1)
        px = MARGIN + across * (WIDTH - MARGIN - 10)
        return f"{px:.1f},{HEIGHT - 20 - up * (HEIGHT - 36):.1f}"

    lines = "".join(
        f'<polyline fill="none" stroke="{COLOURS.get(part, "#888")}" stroke-width="1.6" points="'
        f'{" ".join(place(x, y) for x, y in points)}"/>'
        if len(points) > 1
        else f'<circle r="2.5" fill="{COLOURS.get(part, "#888")}" '
        f'transform="translate({place(*points[0]).replace(",", " ")})"/>'
        for part, points in parts.items()
    )
    axis, floor = MARGIN - 4, HEIGHT - 16
    return (
        f"<figure><figcaption>{escape(name)}{' (logarithmic)' if log else ''}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(name)}">'
        f'<path class="axis" fill="none" d="M{axis} 8V{floor}H{WIDTH - 6}"/>'
        f'<text x="{axis - 4}" y="18" text-anchor="end">{high:.3g}</text>'
        f'<text x="{axis - 4}" y="{HEIGHT - 20}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{axis}" y="{HEIGHT - 3}">{left}</text>'
        f'<text x="{WIDTH - 6}" y="{HEIGHT - 3}" text-anchor="end">{right}</text>'
        f"{lines}</svg></figure>"
    )


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Averages neighbouring points until at most ``most`` are left."""
    if len(points) <= most:
        return points
    pieces = np.array_split(np.asarray(points, np.float64), most)
    return [(int(piece[-1, 0]), float(piece[:, 1].mean())) for piece in pieces]


def embedded(file: Path) -> str:
    """Returns a picture as a data URI of WebP."""
    data = io.BytesIO()
    with Image.open(io.BytesIO(file.read_bytes())) as picture:
        picture.convert("RGB").save(data, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def table(rows: Mapping[str, Any]) -> str:
    """Returns names and values as an HTML table."""
    cells = (f"<tr><td>{escape(str(k))}<td>{escape(str(v))}" for k, v in rows.items())
    return f"<table>{''.join(cells)}</table>"


def environment() -> dict[str, str]:
    """Returns the devices, the processes and the versions of what computed."""
    devices = jax.devices()
    found = {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": str(jax.process_count()),
        "Python": platform.python_version(),
        "system": platform.platform(),
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout that is not installed
            continue
    return found


def _order(item: tuple[str, Sequence[Any] | Mapping[str, Any]]) -> tuple[bool, str]:
    name, _ = item
    return not name.startswith("loss"), name
