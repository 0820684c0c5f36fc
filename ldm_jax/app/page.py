"""The page: tabs for what the model can do, settings, previews, results."""

import html
import inspect
import json
import keyword
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ldm_jax.app.inputs import (
    CONDITIONS,
    KEEP,
    MOST_TEXT,
    TASKS,
    TITLES,
    Part,
    Task,
    message,
    served,
)
from ldm_jax.app.recipes import advanced, command_line, python, text_of
from ldm_jax.app.studio import Frame, Studio, Warnings
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.errors import LdmJaxError, RequestError
from ldm_jax.io import png
from ldm_jax.sampling.pipeline import OFFERED
from ldm_jax.sampling.request import MOST_SEED, OPTIONS, Request

PREVIEW = 384  # pixels that a small preview is enlarged to
MOST_SETTINGS = 100_000  # characters of a picture's settings

CSS = """
.gradio-container { width: 100% !important; max-width: 1280px !important;
  margin: 0 auto !important; }
#head h1 { margin: 0.2rem 0; font-size: 1.35rem; }
#head p { margin: 0; opacity: 0.75; }
#status { min-height: 1.6rem; }
/* The gallery's height, PREVIEW + 100, less its padding: a square of pictures is not cut off. */
#gallery .grid-container { max-width: 454px; margin: 0 auto; }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 0.8rem; align-items: center; }
.swatch { display: inline-block; width: 1rem; height: 1rem; border-radius: 0.2rem;
  border: 1px solid #8888; vertical-align: -0.15rem; }
footer { display: none !important; }
"""


def build(studio: Studio) -> gr.Blocks:
    """Returns the page of a model.

    Raises:
      RequestError: The page has no input for the model's condition.
    """
    field = studio.conditioner.field
    if field not in CONDITIONS:
        raise RequestError(
            f"the page has no input for the condition {field!r}: use ldm-sample, or Python"
        )
    tasks = [task for task in TASKS if task.offered(studio.conditioner)]
    if "toward" in studio.pipe.refused:
        tasks = [task for task in tasks if task.name != "interpolate"]
    with gr.Blocks(
        title=f"ldm_jax: {studio.model['model']}",
        analytics_enabled=False,
        delete_cache=(3600, 86400),
        fill_width=True,
    ) as page:
        with gr.Column(elem_id="head"):
            gr.HTML(head(studio))
        with gr.Row():
            with gr.Column(scale=6, min_width=320):
                with gr.Tabs() as tabs:
                    built = [tab(studio, task) for task in tasks]
                settings = Settings(studio)
            with gr.Column(scale=5, min_width=320):
                results = Results()
        runs = []
        for task, part, button in built:
            texts = [one for one in part.components if isinstance(one, gr.Textbox)]
            run = gr.on(
                [button.click, *(text.submit for text in texts)],
                named(runner(studio, part, settings), [*part.components, *settings.components]),
                [*part.components, *settings.components],
                results.components,
                api_name=task.name,
                concurrency_id="run",
                concurrency_limit=1,
                show_progress="hidden",
                trigger_mode="once",
            )
            runs.append(run)
        results.cancel.click(
            results.cancelled,
            None,
            results.components,
            cancels=runs,
            queue=False,
            api_visibility="private",
        )
        parts = [part for _, part, _ in built]
        restored = [tabs, *(c for part in parts for c in part.components), *settings.components]
        settings.restore.upload(
            restorer(studio, tasks, parts, settings),
            settings.restore,
            [settings.restore, *restored],
            api_name="restore",
            show_progress="hidden",
        )
    page.queue(max_size=32, default_concurrency_limit=4)
    return page


def head(studio: Studio) -> str:
    """Returns the title of the page, as HTML."""
    height, width = studio.pipe.defaults.size
    what = (
        f"{html.escape(str(studio.model['model']))}, {height}x{width} pixels, {studio.pipe.dtype}"
    )
    return f"<h1>ldm_jax</h1><p>{what}</p>"


def tab(studio: Studio, task: Task) -> tuple[Task, Part, gr.Button]:
    """Adds a tab; returns the task, all its inputs as one part, and its button."""
    with gr.Tab(task.title or TITLES[studio.conditioner.field], id=task.name):
        parts = [make(studio) for make in task.parts]
        button = gr.Button("Generate", variant="primary", elem_id=f"run_{task.name}")
    ends = np.cumsum([0, *(len(part.components) for part in parts)]).tolist()

    def flags(*values: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part, first, last in zip(parts, ends, ends[1:], strict=False):
            found |= part.flags(*values[first:last])
        return found

    def restore(kept: Mapping[str, Any]) -> list[Any]:
        return [value for part in parts for value in part.restore(kept)]

    return task, Part([c for part in parts for c in part.components], flags, restore), button


class Settings:
    """The settings of all tabs, and the drop zone that restores them."""

    def __init__(self, studio: Studio):
        own, conditioner = studio.pipe.defaults, studio.conditioner
        refused = studio.pipe.refused
        guided = conditioner.guided and "guidance" not in refused
        schedule = getattr(studio.pipe.model, "schedule", None)
        most = own.steps if schedule is None else min(schedule.timesteps, 200)
        self.own = own
        with gr.Row():
            self.num = gr.Slider(
                1, 16, 4, step=1, label="Pictures", info="For each line, with seeds in a row."
            )
            self.seed = gr.Textbox(
                "0",
                label="Seed",
                info="The first seed; it stays until you change it.",
                max_length=20,
                max_lines=1,
            )
        with gr.Row():
            dice = gr.Button("Random seed", size="sm", min_width=120)
            onward = gr.Button("Next seeds", size="sm", min_width=120)
        dice.click(lambda: str(random.randrange(2**32)), None, self.seed, api_visibility="private")
        onward.click(
            lambda seed, num: text_seed(whole_seed(seed) + int(num)),
            [self.seed, self.num],
            self.seed,
            api_visibility="private",
            show_progress="hidden",
        )
        with gr.Row():
            self.steps = gr.Slider(
                1,
                max(most, own.steps),
                own.steps,
                step=1,
                label="Steps",
                visible="steps" not in refused,
            )
            self.guidance = gr.Slider(
                1.0,
                max(20.0, own.guidance),
                own.guidance,
                step=0.1,
                label="Guidance",
                visible=guided,
            )
            self.sampler = gr.Dropdown(
                [own.sampler] if "sampler" in refused else OFFERED,
                value=own.sampler,
                label="Sampler",
                filterable=True,
                visible="sampler" not in refused,
            )
        self.names = advanced(refused)
        with gr.Accordion("Compare in a grid", open=False, visible="steps" not in refused):
            gr.Markdown("Several values make a labelled grid.")
            with gr.Row():
                self.many_steps = gr.Textbox(
                    "", label="Several steps", placeholder="10,20,50", max_length=200
                )
                self.many_guidance = gr.Textbox(
                    "",
                    label="Several guidance scales",
                    placeholder="1,3,5",
                    max_length=200,
                    visible=guided,
                )
        with gr.Accordion("All settings", open=False):
            gr.Markdown("Empty fields are the model's own.")
            texts = []
            for name in self.names:
                known, value = OPTIONS[name].metadata, getattr(own, name)
                hint = "" if value is None else text_of(value, known["kind"])
                flag = known.get("flag") or name
                texts.append(
                    gr.Textbox(
                        "", label=flag, info=known["help"], placeholder=hint, max_length=2000
                    )
                )
        self.components = [
            self.num,
            self.seed,
            self.steps,
            self.guidance,
            self.sampler,
            self.many_steps,
            self.many_guidance,
            *texts,
        ]
        with gr.Accordion("Restore the settings of a picture", open=False):
            self.restore = gr.File(
                label="Drop a PNG that ldm_jax made", file_types=[".png"], height=110
            )

    def flags(
        self,
        num: Any,
        seed: str,
        steps: Any,
        guidance: Any,
        sampler: str,
        many_steps: str,
        many_guidance: str,
        *texts: str,
    ) -> dict[str, Any]:
        """Returns flags of the values of the components: those that are not the model's own."""
        found: dict[str, Any] = {"num": int(num or 1), "seed": whole_seed(seed)}
        if text := stripped(many_steps):
            found["steps"] = text
        elif steps is not None and int(steps) != self.own.steps:
            found["steps"] = str(int(steps))
        if text := stripped(many_guidance):
            found["guidance"] = text
        elif guidance is not None and float(guidance) != self.own.guidance:
            found["guidance"] = f"{guidance:g}"
        if sampler and sampler != self.own.sampler:
            found["sampler"] = sampler
        for name, value in zip(self.names, texts, strict=True):
            if text := stripped(value):
                found[OPTIONS[name].metadata.get("flag") or name] = text
        return found

    def restored(self, kept: Mapping[str, Any]) -> list[Any]:
        """Returns the values of the components from a picture's settings."""
        own, plain = self.own, self.own.settings()
        texts = []
        for name in self.names:
            value, kind = kept.get(name), OPTIONS[name].metadata["kind"]
            same = value is None or (name in plain and comparable(value) == comparable(plain[name]))
            # A batch of another size may differ in the last bit.
            texts.append("" if same else text_of(value, kind))
        return [
            1,
            text_seed(kept.get("seed", 0)),
            kept.get("steps", own.steps),
            kept.get("guidance", own.guidance),
            kept.get("sampler", own.sampler),
            "",
            "",
            *texts,
        ]


def stripped(text: str | None) -> str:
    """Returns a text without space around it; an empty field of the browser may be None."""
    return (text or "").strip()


def comparable(value: Any) -> Any:
    """Returns a setting in the form that JSON gives it."""
    return json.loads(json.dumps(value))


def whole_seed(text: Any) -> int:
    """Returns a seed as a whole number: exact, which a number of the browser is not."""
    try:
        seed = int(str(text).strip() or 0)
    except ValueError:
        raise message(f"seed {text!r}: write a whole number from 0 to {MOST_SEED}") from None
    if not 0 <= seed <= MOST_SEED:
        raise message(f"seed {seed}: write a whole number from 0 to {MOST_SEED}")
    return seed


def text_seed(seed: int) -> str:
    """Returns the text of a seed, which starts at 0 again after the last one."""
    return str(seed % (MOST_SEED + 1))


class Results:
    """What a run shows: a preview, pictures, files, and how to repeat it."""

    def __init__(self) -> None:
        self.preview = gr.Image(
            show_label=False,
            visible=False,
            interactive=False,
            buttons=[],
            format="png",
            height=PREVIEW + 100,
            elem_id="preview",
        )
        self.gallery = gr.Gallery(
            show_label=False,
            columns=2,
            height=PREVIEW + 100,
            object_fit="contain",
            buttons=["download", "fullscreen"],
            elem_id="gallery",
            interactive=False,
        )
        with gr.Row():
            self.status = gr.HTML("", elem_id="status")
            self.cancel = gr.Button(
                "Cancel", size="sm", visible=False, min_width=100, scale=0, elem_id="cancel"
            )
        self.files = gr.File(
            label="Files, with their settings inside",
            file_count="multiple",
            interactive=False,
            visible=False,
            height=170,
            elem_id="files",
        )
        with gr.Accordion("Python and command line", open=False):
            self.python = gr.Code(
                label="Python", language="python", interactive=False, elem_id="python"
            )
            self.command = gr.Code(
                label="Command line", language="shell", interactive=False, elem_id="command"
            )

    @property
    def components(self) -> list[Any]:
        """The outputs of a run."""
        return [
            self.preview,
            self.gallery,
            self.status,
            self.cancel,
            self.files,
            self.python,
            self.command,
        ]

    def cancelled(self) -> list[Any]:
        """Returns the outputs after a run was cancelled."""
        return [
            gr.update(visible=False),
            gr.update(visible=True),
            "Cancelled.",
            gr.update(visible=False),
            KEEP,
            KEEP,
            KEEP,
        ]


def runner(studio: Studio, part: Part, settings: Settings) -> Callable[..., Iterator[list[Any]]]:
    """Returns what a tab's button starts: a generator of the outputs."""

    def generate(*values: Any) -> Iterator[list[Any]]:
        began, count = time.perf_counter(), len(part.components)
        with Warnings() as warnings, mistakes():
            flags = part.flags(*values[:count]) | settings.flags(*values[count:])
            requests = studio.requests(flags)
            frames = studio.run(flags)
        for text in warnings.texts[:3]:
            gr.Warning(html.escape(text[:500]))
        # How to repeat it stands there at once; a cancelled run keeps it.
        code, command = python(studio.model, requests), command_line(studio.model, flags)
        status = "Starting; the first run of its kind compiles, unless it was cached."
        hidden = gr.update(visible=False)
        yield [KEEP, KEEP, status, gr.update(visible=True), KEEP, code, command]
        while True:
            with mistakes():
                frame = next(frames, None)
            if frame is None:
                return
            seconds = time.perf_counter() - began
            if frame.done < 1:
                text = f"{100 * frame.done:.0f} %, {seconds:.1f} s"
                shown = gr.update(value=preview(frame.images), visible=True)
                yield [shown, hidden, text, KEEP, KEEP, KEEP, KEEP]
            elif frame.paths and len(frame.images) == len(frame.paths):
                yield [hidden, *finished(frame, seconds), code, command]

    return generate


def named(function: Callable[..., Any], components: Sequence[Any]) -> Callable[..., Any]:
    """Names a function's parameters after its inputs, for callers of the HTTP interface."""
    names: list[str] = []
    for component in components:
        name = re.sub(r"\W+", "_", str(getattr(component, "label", None) or "state").lower())
        names.append(name if name not in names else f"{name}_{names.count(name) + 1}")
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    # A label may be a word of Python, such as "class".
    safe = [f"{name}_" if keyword.iskeyword(name) else name for name in names]
    parameters = [inspect.Parameter(name, kind) for name in safe]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function


def finished(frame: Frame, seconds: float) -> list[Any]:
    """Returns the gallery, the status, the cancel button and the files of a finished run."""
    many, folder = len(frame.paths), html.escape(str(frame.paths[0].parent))
    shown = [(served(path), caption(path)) for path in frame.paths]
    gallery = gr.update(
        value=shown, columns=min(math.ceil(math.sqrt(many)), 4), visible=True, selected_index=None
    )
    word = "picture" if many == 1 else "pictures"
    status = f"{many} {word} in {seconds:.1f} s, in {folder}"
    files = [*(path for path, _ in shown), *map(served, frame.extra)]
    return [gallery, status, gr.update(visible=False), gr.update(value=files, visible=True)]


def caption(path: Any) -> str:
    """Returns a picture's caption: its seed and position."""
    kept = png.read_settings(path)
    mix = f", {kept['mix']:.2f}" if "mix" in kept else ""
    return f"seed {kept['seed']}{mix}"


def preview(images: Sequence[np.ndarray]) -> np.ndarray:
    """Returns a grid of pictures, enlarged where they are small."""
    grid = png.grid(images)
    scale = max(PREVIEW // max(grid.shape[:2]), 1)
    size = (grid.shape[1] * scale, grid.shape[0] * scale)
    return np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC))


class mistakes:
    """Context in which an expected error becomes one line on the page."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, LdmJaxError):
            raise message(error) from None
        if isinstance(error, MemoryError):
            raise message("out of memory: make fewer or smaller pictures") from None


def restorer(
    studio: Studio, tasks: Sequence[Task], parts: Sequence[Part], settings: Settings
) -> Callable[[str | None], list[Any]]:
    """Returns what a dropped picture starts: the values of all inputs."""

    def restore(path: str | None) -> list[Any]:
        count = sum(len(part.components) for part in parts) + len(settings.components)
        if path is None:
            return [KEEP] * (count + 2)
        with mistakes():
            kept = read(path)
            fits(kept, studio.pipe.defaults.sampler)
            found = [
                (task, part) for task, part in zip(tasks, parts, strict=True) if task.made(kept)
            ]
            if not found:
                raise RequestError("the picture was made by a task that this model does not have")
            chosen, _ = found[0]
            values = [value for part in parts for value in part.restore(kept)]
        if kept.get("model") != studio.model["model"]:
            text = f"The picture was made by the model {str(kept.get('model'))[:200]!r}."
            gr.Warning(html.escape(text))
        missing = [
            name
            for name in ("image", "mask", "semantic_map", "layout", "embeddings")
            if kept.get(name) and studio.kept(kept[name]) is None
        ]
        if missing:
            gr.Warning(f"Upload the {' and '.join(missing)} again: this page does not keep them.")
        gr.Info("The settings are restored.", duration=3)
        return [None, gr.Tabs(selected=chosen.name), *values, *settings.restored(kept)]

    return restore


def read(path: str) -> dict[str, Any]:
    """Returns the settings in a PNG.

    Raises:
      RequestError: It has none, or too many.
    """
    try:
        kept = png.read_settings(path)
    except RequestError as error:
        raise RequestError(str(error).replace(path, "this picture")) from None
    if len(json.dumps(kept)) > MOST_SETTINGS:
        raise RequestError("this picture: its settings are damaged")
    return kept


def fits(kept: Mapping[str, Any], own: str) -> None:
    """Raises RequestError where a picture's settings have values that do not fit a request.

    Args:
      kept: The settings.
      own: The model's own sampler.
    """
    request = Request.from_row(kept)
    if request.seeds is None:
        raise RequestError("its settings lack 'seed', so it cannot be made again (a grid?)")
    if request.sampler is not None and request.sampler not in (own, *SAMPLERS):
        raise RequestError(f"its sampler {request.sampler!r} does not exist")
    texts = [kept.get(name) for name in ("prompt", "negative", "toward_prompt")]
    if any(text is not None and not isinstance(text, str) for text in texts):
        raise RequestError("its settings are damaged: a prompt is no text")
    if any(isinstance(text, str) and len(text) > MOST_TEXT for text in texts):
        raise RequestError("its settings are damaged: a prompt is too long")
