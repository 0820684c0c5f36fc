"""The inputs of the page: what a part of a request is typed, chosen, drawn or uploaded with."""

import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio import processing_utils
from gradio.utils import get_upload_folder
from PIL import Image, ImageDraw

from ldm_jax.app.studio import Studio
from ldm_jax.conditioning.pictures import read_picture
from ldm_jax.data.decode import open_picture
from ldm_jax.errors import RequestError, UnreadablePicture
from ldm_jax.io.png import palette

MOST_TEXT = 20_000  # characters of a text
CANVAS = 512  # pixels along the longer side of what is drawn on
KEEP = gr.skip()  # restores nothing


@dataclasses.dataclass(frozen=True)
class Part:
    """Inputs of a part of a request.

    Attributes:
      components: What the page shows.
      flags: From their values to flags of `ldm-sample`.
      restore: From the settings of a PNG to their values.
    """

    components: list[Any]
    flags: Callable[..., dict[str, Any]]
    restore: Callable[[Mapping[str, Any]], Sequence[Any]]


# Gradio writes a file beside the source of a subclass, so components are changed one by one.


def picture(label: str) -> gr.Image:
    """An upload, as the path of a file: pictures are decoded and refused where requests are."""
    image = gr.Image(
        type="filepath",
        image_mode=None,
        label=label,
        sources=["upload", "clipboard"],
        buttons=[],
        height=240,
    )
    plain = image.preprocess

    def preprocess(payload: Any) -> Any:
        path = getattr(payload, "path", None)
        return path if path is not None else plain(payload)

    image.preprocess = preprocess  # type: ignore[method-assign]
    return image


def editor(label: str, **options: Any) -> gr.ImageEditor:
    """A canvas, as PIL images, that refuses files which are no pictures in one line."""
    canvas = gr.ImageEditor(
        type="pil", label=label, layers=False, transforms=[], buttons=[], **options
    )
    plain = canvas.preprocess

    def preprocess(payload: Any) -> Any:
        if payload is None:
            return None
        for file in (payload.background, payload.composite, *(payload.layers or ())):
            if getattr(file, "path", None):
                readable(Path(file.path).read_bytes())
        return plain(payload)

    canvas.preprocess = preprocess  # type: ignore[method-assign]
    return canvas


def readable(data: bytes) -> None:
    """Raises gr.Error where ``data`` is no picture, or one that is too large."""
    try:
        with open_picture(data):
            pass
    except UnreadablePicture as error:
        raise message(f"the image is no readable picture: {error}") from None


def message(text: object) -> gr.Error:
    """Returns an error whose text the page shows as it is, without HTML."""
    plain = " ".join(str(text).split())
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        plain = plain.replace(character, entity)
    return gr.Error(plain, print_exception=False, title="That does not work")


def png_bytes(image: Image.Image) -> bytes:
    """Returns a picture as the bytes of a PNG."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def served(path: str | Path) -> str:
    """Returns the path of a copy that Gradio serves; of the folder of pictures it serves none."""
    return processing_utils.save_file_to_cache(str(path), get_upload_folder())


def restored(studio: Studio, kept: Mapping[str, Any], name: str) -> str | None:
    """Returns the file that a picture's settings name, if the page keeps it."""
    path = studio.kept(kept.get(name))
    return path and served(path)


def kept_upload(studio: Studio, path: str | None, what: str = "image") -> str | None:
    """Returns the path under which an uploaded picture is kept."""
    if path is None:
        return None
    read_picture(path, what)  # a mistake is named before a file is kept
    return studio.keep(Path(path).read_bytes(), Path(path).suffix.lower()[:8] or ".png")


# ---------------------------------------------------------------------------- kinds of condition


def prompts(studio: Studio) -> Part:
    """Prompts, one on each line, and a negative one where the model takes it."""
    text = gr.Textbox(
        label="Prompt",
        info="One on each line.",
        lines=2,
        max_lines=8,
        max_length=MOST_TEXT,
        placeholder="red apple, noto style",
        autofocus=True,
    )
    components = [text]
    if studio.conditioner.negative:
        components.append(
            gr.Textbox("", label="Negative prompt", max_length=MOST_TEXT, placeholder="optional")
        )

    def flags(text: str | None, negative: str | None = "") -> dict[str, Any]:
        lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
        if not lines:
            raise RequestError("there is no prompt: write one")
        negatives = [(negative or "").strip()]
        return {"prompt": lines} | ({"negative": negatives} if negatives[0] else {})

    def restore(kept: Mapping[str, Any]) -> list[Any]:
        ends = [kept.get("prompt", ""), *([kept["toward_prompt"]] if "mix" in kept else [])]
        return ["\n".join(map(str, dict.fromkeys(ends))), str(kept.get("negative") or "")][
            : len(components)
        ]

    return Part(components, flags, restore)


def classes(studio: Studio) -> Part:
    """One or several classes."""
    box = gr.Dropdown(
        studio.labels, value=studio.labels[:1], label="Class", multiselect=True, filterable=True
    )

    def restore(kept: Mapping[str, Any]) -> list[Any]:
        ends = [kept.get("class"), *([kept["toward_class"]] if "mix" in kept else [])]
        known = [str(one) for one in ends]
        return [[one for one in dict.fromkeys(known) if one in studio.labels]]

    return Part([box], lambda chosen: {"class": [str(one) for one in chosen or []]}, restore)


def embeddings(studio: Studio) -> Part:
    """A file of vectors."""
    file = gr.File(label="Vectors [m, dim], a .npy file", file_types=[".npy"], height=120)

    def flags(path: str | None) -> dict[str, Any]:
        return {"embeddings": studio.keep(Path(path).read_bytes(), ".npy")} if path else {}

    return Part([file], flags, lambda kept: [restored(studio, kept, "embeddings")])


def semantic_map(studio: Studio) -> Part:
    """A map that is painted, a colour for each label, or uploaded."""
    colours = palette(max(len(studio.labels), 1))
    names = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in colours.tolist()]
    side = max(studio.pipe.defaults.size)
    height, width = (CANVAS * n // side for n in studio.pipe.defaults.size)
    blank = Image.new("RGB", (width, height), names[0])
    paint = editor(
        "Paint a map: a colour for each label",
        value={"background": blank, "layers": [], "composite": blank},
        sources=[],
        brush=gr.Brush(default_size=48, colors=[*names[:24]], default_color=names[1 % len(names)]),
        canvas_size=(width, height),
        height=CANVAS,
    )
    swatches = "".join(
        f'<span class="swatch" style="background:{colour}"></span>{gr_text(label)} '
        for colour, label in zip(names, studio.labels[:24], strict=False)
    )
    gr.HTML(f'<div class="legend">{swatches}</div>', visible=bool(studio.labels))
    file = gr.File(
        label="Or a picture of one channel whose values are the labels",
        file_types=["image"],
        height=100,
    )

    def flags(painted: Any, path: str | None) -> dict[str, Any]:
        if path:
            return {"semantic_map": studio.keep(Path(path).read_bytes(), Path(path).suffix[:8])}
        if painted is None or painted["composite"] is None:
            return {}
        pixels = np.asarray(painted["composite"].convert("RGB"))
        if not studio.labels:
            return {"semantic_map": studio.keep(png_bytes(Image.fromarray(pixels)), ".png")}
        labels = nearest(pixels, colours)
        labels = labels.astype(np.uint8 if len(studio.labels) <= 256 else np.uint16)
        return {"semantic_map": studio.keep(png_bytes(Image.fromarray(labels)), ".png")}

    return Part([paint, file], flags, lambda kept: [KEEP, restored(studio, kept, "semantic_map")])


def nearest(pixels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Returns the index [h, w] of the colour [n, 3] that is nearest to each pixel [h, w, 3]."""
    flat, place = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    squares = np.square(flat[:, None].astype(int) - colours[None].astype(int)).sum(-1)
    return squares.argmin(1)[place.ravel()].reshape(pixels.shape[:2])


def gr_text(text: object) -> str:
    """Returns a text for HTML."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def layout(studio: Studio) -> Part:
    """Boxes that are drawn by two clicks each."""
    side = max(studio.pipe.defaults.size)
    height, width = (CANVAS * n // side for n in studio.pipe.defaults.size)
    label = gr.Dropdown(studio.labels, value=studio.labels[0], label="Label of the next box")
    canvas = gr.Image(
        draw_boxes([], (height, width)),
        interactive=False,
        buttons=[],
        height=CANVAS,
        label="Click two opposite corners of a box",
    )
    table = gr.Dataframe(
        headers=["label", "left", "top", "width", "height"],
        type="array",
        interactive=True,
        label="Boxes, in parts of the picture",
        row_count=1,
        column_count=5,
    )
    clear = gr.Button("Remove all boxes", size="sm")
    corner = gr.State(None)

    def boxes(rows: Any) -> list[list[Any]]:
        return [row for row in rows or [] if row and str(row[0] or "").strip()]

    def click(name: str, rows: Any, first: Any, event: gr.SelectData) -> tuple[Any, Any, Any]:
        x, y = event.index
        if first is None:
            drawn = draw_boxes(boxes(rows), (height, width), (x, y))
            return drawn, KEEP, (x, y)
        left, top = min(x, first[0]) / width, min(y, first[1]) / height
        box = [left, top, abs(x - first[0]) / width, abs(y - first[1]) / height]
        rows = [*boxes(rows), [name, *(round(v, 3) for v in box)]]
        return draw_boxes(rows, (height, width)), rows, None

    canvas.select(click, [label, table, corner], [canvas, table, corner], api_visibility="private")
    clear.click(
        lambda: (draw_boxes([], (height, width)), [], None),
        None,
        [canvas, table, corner],
        api_visibility="private",
    )

    def flags(rows: Any) -> dict[str, Any]:
        found = []
        for row in boxes(rows):
            try:
                found.append({"label": str(row[0]), "box": [float(v) for v in row[1:5]]})
            except (TypeError, ValueError):
                raise RequestError(f"box {row}: left, top, width, height are numbers") from None
        if not found:
            raise RequestError("there is no box: click two opposite corners on the canvas")
        return {"layout": studio.keep(json.dumps(found).encode(), ".json")}

    def restore(kept: Mapping[str, Any]) -> list[Any]:
        path = studio.kept(kept.get("layout"))
        if path is None:
            return [KEEP]
        found = json.loads(Path(path).read_text("utf-8"))
        return [[[box["label"], *box["box"]] for box in found]]

    return Part([table], flags, restore)


def draw_boxes(
    rows: Sequence[Sequence[Any]], size: tuple[int, int], corner: tuple[int, int] | None = None
) -> np.ndarray:
    """Draws boxes (label, left, top, width, height) on a canvas of ``size`` (H, W)."""
    height, width = size
    sheet = Image.new("RGB", (width, height), "white")
    draw, colours = ImageDraw.Draw(sheet), palette(25)[1:]
    for i, (label, *box) in enumerate(rows):
        try:
            left, top, w, h = (float(v) for v in box)
        except (TypeError, ValueError):
            continue  # a row that is being typed
        ends = (left * width, top * height, (left + w) * width - 1, (top + h) * height - 1)
        colour = tuple(map(int, colours[i % len(colours)]))
        if w > 0 and h > 0:
            draw.rectangle(ends, outline=colour, width=3)
        draw.text((ends[0] + 6, ends[1] + 4), str(label), fill="black", font_size=18)
    if corner is not None:
        x, y = corner
        draw.line((x - 8, y, x + 8, y), fill="black", width=2)
        draw.line((x, y - 8, x, y + 8), fill="black", width=2)
    return np.asarray(sheet)


def nothing(studio: Studio) -> Part:
    """No input: a model without a condition, or one whose condition is the image."""
    return Part([], dict, lambda kept: [])


# The field of a request that holds the model's condition -> its inputs.
CONDITIONS: dict[str | None, Callable[[Studio], Part]] = {
    "prompts": prompts,
    "classes": classes,
    "semantic_map": semantic_map,
    "layout": layout,
    "embeddings": embeddings,
    "image": nothing,
    None: nothing,
}


def condition(studio: Studio) -> Part:
    """The inputs of the model's condition."""
    return CONDITIONS[studio.conditioner.field](studio)


# --------------------------------------------------------------------------------- kinds of task


def strength_slider() -> gr.Slider:
    """The denoising strength."""
    return gr.Slider(
        0.05,
        1.0,
        0.75,
        step=0.05,
        label="Strength",
        info="The fraction of the steps that is run on the image: more changes more.",
    )


def start_image(studio: Studio) -> Part:
    """A picture to start from, by denoising strength or by its inverted noise."""
    image = picture("Image to start from")
    strength = strength_slider()
    variation = gr.Checkbox(
        label="Variation",
        info="Invert the image to noise and move from there: closer in style and layout.",
    )

    def flags(path: str | None, strength: float, variation: bool) -> dict[str, Any]:
        value = f"{strength:g}"
        how = {"variation": value} if variation else {"strength": value}
        return {"image": needed(kept_upload(studio, path))} | how

    def restore(kept: Mapping[str, Any]) -> list[Any]:
        distance = kept.get("variation")
        amount = distance if distance is not None else kept.get("strength") or 0.75
        return [restored(studio, kept, "image"), amount, distance is not None]

    return Part([image, strength, variation], flags, restore)


def needed(image: str | None) -> str:
    """Returns the image, or raises RequestError where there is none."""
    if image is None:
        raise RequestError("there is no image: upload one")
    return image


def brush(studio: Studio) -> Part:
    """A picture with a mask painted over it."""
    canvas = editor(
        "Image: paint over the part to replace",
        sources=["upload", "clipboard"],
        brush=gr.Brush(default_size=60, colors=["#ff3b6b"], color_mode="fixed"),
        canvas_size=(CANVAS, CANVAS),
        height=CANVAS + 80,
    )
    scale = gr.State(1)
    components: list[Any] = [canvas, scale]
    if studio.conditioner.edits:
        components.append(strength_slider())
    canvas.upload(
        lambda drawn: enlarged(drawn and drawn["background"]),
        canvas,
        [canvas, scale],
        api_visibility="private",
        show_progress="hidden",
    )

    def flags(drawn: Any, scale: int, strength: float = 0.0) -> dict[str, Any]:
        if drawn is None or drawn["background"] is None:
            raise RequestError("there is no image: upload one")
        masks = [np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in drawn["layers"]]
        mask = np.any(masks, axis=0) if masks else np.zeros(1, bool)
        if not mask.any():
            raise RequestError("nothing is painted: paint over the part of the image to replace")
        image = drawn["background"].convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        small = (flat.width // scale, flat.height // scale)
        flat = flat.resize(small, Image.Resampling.NEAREST)  # the upload's own pixels
        files = {
            "image": studio.keep(png_bytes(flat), ".png"),
            "mask": studio.keep(png_bytes(Image.fromarray(np.uint8(255) * mask)), ".png"),
        }
        return files | ({"strength": f"{strength:g}"} if strength else {})

    def restore(kept: Mapping[str, Any]) -> list[Any]:
        image, mask = studio.kept(kept.get("image")), studio.kept(kept.get("mask"))
        values = list(painted(image, mask)) if image and mask else [None, 1]
        return [*values, kept.get("strength") or 0.75][: len(components)]

    return Part(components, flags, restore)


def enlarged(image: Image.Image | None) -> tuple[Any, Any]:
    """Returns an editor's value of a picture, and by what it is enlarged to have room to paint."""
    if image is None:
        return KEEP, KEEP
    scale = max(CANVAS // max(image.size), 1)
    size = (image.width * scale, image.height * scale)
    large = image.resize(size, Image.Resampling.NEAREST)
    return {"background": large, "layers": [], "composite": large}, scale


def painted(image: str, mask: str) -> tuple[Any, int]:
    """Returns an editor's value of a picture with a mask painted over it, and its scale."""
    value, scale = enlarged(Image.open(image).convert("RGBA"))
    below = value["background"]
    hole = Image.open(mask).convert("L").resize(below.size, Image.Resampling.NEAREST)
    layer = Image.new("RGBA", below.size, (255, 59, 107, 255))
    layer.putalpha(hole)
    return {**value, "layers": [layer], "composite": Image.alpha_composite(below, layer)}, scale


def outpaint(studio: Studio) -> Part:
    """A picture and the pixels to add around it."""
    image = picture("Image to extend")
    own = min(studio.pipe.defaults.size) // 4
    with gr.Row():
        sides = [
            gr.Number(
                own if side in ("Right", "Left") else 0,
                label=side,
                precision=0,
                minimum=0,
                min_width=80,
            )
            for side in ("Top", "Right", "Bottom", "Left")
        ]
    components: list[Any] = [image, *sides]
    if studio.conditioner.edits:
        components.append(strength_slider())

    def flags(path: str | None, *values: Any) -> dict[str, Any]:
        borders = ",".join(str(int(value or 0)) for value in values[:4])
        start = {"strength": f"{values[4]:g}"} if len(values) > 4 else {}
        return {"image": needed(kept_upload(studio, path)), "outpaint": borders} | start

    def restore(kept: Mapping[str, Any]) -> list[Any]:
        borders = kept.get("outpaint") or [0, 0, 0, 0]
        values = [restored(studio, kept, "image"), *borders[:4], kept.get("strength") or 0.75]
        return values[: len(components)]

    return Part(components, flags, restore)


def small_image(studio: Studio) -> Part:
    """A picture to enlarge."""
    image = picture("Image to enlarge")
    return Part(
        [image],
        lambda path: {"image": needed(kept_upload(studio, path))},
        lambda kept: [restored(studio, kept, "image")],
    )


def frames(studio: Studio) -> Part:
    """The number of pictures between two ends."""
    slider = gr.Slider(
        1,
        24,
        8,
        step=1,
        label="Frames between two ends",
        info="From each line to the next; one line alone walks from a seed to the next.",
    )
    return Part([slider], lambda count: {"interpolate": int(count)}, lambda kept: [KEEP])


# ----------------------------------------------------------------------------------------- tabs


@dataclasses.dataclass(frozen=True)
class Task:
    """A tab of the page.

    Attributes:
      name: Of the endpoint.
      title: Of the tab.
      offered: Whether a conditioner takes such requests.
      parts: The inputs.
      made: Whether a picture with these settings was made so.
    """

    name: str
    title: str
    offered: Callable[[Any], bool]
    parts: Sequence[Callable[[Studio], Part]]
    made: Callable[[Mapping[str, Any]], bool]


TITLES = {
    "prompts": "Text to image",
    "classes": "Class to image",
    "semantic_map": "Map to image",
    "layout": "Boxes to image",
    "embeddings": "Vectors to image",
    None: "Images",
}


def paints(conditioner: Any) -> bool:
    """Whether a model replaces a part of an image."""
    return conditioner.edits or conditioner.needs_mask


TASKS = (
    Task(
        "generate",
        "",
        lambda c: c.field != "image" and not c.needs_mask,
        [condition],
        lambda kept: not kept.get("image") and "mix" not in kept,
    ),
    Task(
        "enlarge",
        "Super-resolution",
        lambda c: c.field == "image" and not c.needs_mask,
        [small_image],
        lambda kept: True,
    ),
    Task(
        "image_to_image",
        "Image to image",
        lambda c: c.edits,
        [condition, start_image],
        lambda kept: bool(kept.get("image")) and not kept.get("mask") and not kept.get("outpaint"),
    ),
    Task(
        "inpaint",
        "Inpainting",
        paints,
        [condition, brush],
        lambda kept: bool(kept.get("mask")),
    ),
    Task(
        "outpaint",
        "Outpainting",
        paints,
        [condition, outpaint],
        lambda kept: bool(kept.get("outpaint")),
    ),
    Task(
        "interpolate",
        "Interpolation",
        lambda c: c.interpolates and not c.needs_mask,
        [condition, frames],
        lambda kept: "mix" in kept,
    ),
)
