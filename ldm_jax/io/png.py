"""PNG files that carry their settings, animations, and grids of pictures."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ldm_jax.errors import RequestError
from ldm_jax.io.atomic import atomic_path
from ldm_jax.io.paths import local_copy

KEY = "ldm_jax"  # the PNG text chunk that holds every setting as JSON, beside "prompt"


def save_png(
    path: str | Path, image: np.ndarray, settings: Mapping[str, Any] | None = None
) -> None:
    """Writes a PNG, atomically, with ``settings`` in its text chunks.

    Args:
      path: The file.
      image: uint8 [H, W, 3], or uint8 or uint16 [H, W] for a grey picture.
      settings: Kept as JSON.
    """
    info = PngInfo()
    if settings is not None:
        if "prompt" in settings:
            info.add_itxt("prompt", str(settings["prompt"]))
        info.add_itxt(KEY, json.dumps(settings))
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG", pnginfo=info)


def save_gif(path: str | Path, frames: Sequence[np.ndarray], seconds: float = 3.0) -> None:
    """Writes frames uint8 [H, W, 3] as an endless animation of ``seconds`` resting at its end."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    each = max(int(1000 * seconds / len(frames)), 20)
    options: dict[str, Any] = {"duration": [each] * len(rest) + [max(1000, each)], "loop": 0}
    with atomic_path(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=rest, **options)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Returns the settings that `save_png` put into a PNG.

    Raises:
      RequestError: The file is no PNG of this program.
    """
    try:
        with Image.open(local_copy(path)) as image:
            image.load()
            text = getattr(image, "text", {})
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every kind on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"{path} is no readable picture: {reason}") from None
    if KEY not in text:
        raise RequestError(f"{path} was not made by ldm_jax: it has no settings in it")
    try:
        settings = json.loads(text[KEY])
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise RequestError(f"{path}: its settings are damaged")
    return settings


def grid(
    images: np.ndarray | Sequence[np.ndarray], columns: int | None = None, gap: int = 2
) -> np.ndarray:
    """Arranges pictures uint8 [n, H, W, 3] row by row on white; about square by default."""
    images = np.asarray(images)
    n, h, w, c = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        sheet[y : y + h, x : x + w] = image
    return sheet


def sheet(rows: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """Arranges rows of pictures, each uint8 [n, H, W, 3], one below the other on white."""
    lines = [grid(row, columns=len(row), gap=gap) for row in rows]
    lines = [lines[0], *(line[gap:] for line in lines[1:])]  # a gap belongs to the line above
    width = max(line.shape[1] for line in lines)
    return np.concatenate(
        [
            np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255)
            for line in lines
        ]
    )


def labelled_grid(
    images: np.ndarray | Sequence[np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    zoom: int = 1,
    gap: int = 6,
) -> np.ndarray:
    """Arranges pictures uint8 [rows * columns, H, W, 3] with labels, which may have newlines."""
    images, font = np.asarray(images), ImageFont.load_default(11)
    h, w = images.shape[1] * zoom, images.shape[2] * zoom
    left = 14 + max(int(font.getlength(label)) for label in rows)
    width = max(
        w, *(int(font.getlength(line)) + 2 for label in columns for line in label.split("\n"))
    )
    top = 8 + 14 * max(label.count("\n") + 1 for label in columns)
    sheet = Image.new(
        "RGB", (left + len(columns) * (width + gap), top + len(rows) * (h + gap)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for j, label in enumerate(columns):
        middle = left + j * (width + gap) + width // 2
        draw.multiline_text(
            (middle, top // 2), label, fill="black", font=font, anchor="mm", align="center"
        )
    for i, label in enumerate(rows):
        draw.text(
            (left - 8, top + i * (h + gap) + h // 2), label, fill="black", font=font, anchor="rm"
        )
        for j in range(len(columns)):
            picture = Image.fromarray(images[i * len(columns) + j]).resize(
                (w, h), Image.Resampling.NEAREST
            )
            sheet.paste(picture, (left + j * (width + gap) + (width - w) // 2, top + i * (h + gap)))
    return np.asarray(sheet)


def palette(n: int) -> np.ndarray:
    """Returns ``n`` distinct colours, uint8 [n, 3].

    The first is a light grey; then follow hues by the golden angle, in three brightnesses.
    """
    hue = np.arange(n) * 0.61803 % 1 * 6
    rgb = np.clip(np.abs((hue[:, None] + [0, 4, 2]) % 6 - 3) - 1, 0, 1)
    colours = (255 * rgb * np.array([0.95, 0.75, 0.55])[np.arange(n) % 3, None]).astype(np.uint8)
    colours[:1] = 225
    return colours


def contact_sheet(
    pictures: np.ndarray, texts: Sequence[str], beside: np.ndarray | None = None, columns: int = 4
) -> np.ndarray:
    """Arranges pictures uint8 [n, H, W, 3] on a sheet, with a text below each.

    Args:
      pictures: The pictures.
      texts: One for each, wrapped to at most three lines.
      beside: Pictures of the same shape, placed at the right of each.
      columns: Pictures in a row.
    """
    h, w = pictures.shape[1:3]
    zoom = max(1, 160 // w)
    cells = pictures if beside is None else np.concatenate([pictures, beside], axis=2)
    width, height, gap, line = cells.shape[2] * zoom, h * zoom, 8, 13
    wrapped = [textwrap.wrap(text, max(1, width // 6), max_lines=3) for text in texts]
    rows = -(-len(cells) // columns)
    step = height + 3 * line + gap
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * step + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, cell in enumerate(cells):
        x, y = gap + (i % columns) * (width + gap), gap + (i // columns) * step
        large = Image.fromarray(cell).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(large, (x, y))
        text = "\n".join(wrapped[i])
        draw.multiline_text((x, y + height + 1), text, fill="black", font_size=11, spacing=1)
    return np.asarray(sheet)
