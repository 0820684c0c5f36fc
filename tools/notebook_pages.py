"""MkDocs hook: each notebook is a page of the site, with its stored outputs.

A notebook becomes Markdown, so that its links and anchors are checked as those of every page, and
its code looks the same. Links between notebooks and pages are those between their files.
"""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files  # pyright: ignore[reportMissingImports]

FOLDER = Path(__file__).parent.parent / "notebooks"


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages, their pictures and the notebooks themselves."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        page, pictures = markdown(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Makes links of the pages to notebooks those of their pages."""
    return re.sub(r"\(\.\./notebooks/(\w+)\.ipynb", r"(notebooks/\1.md", markdown)


def markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """Returns a notebook as Markdown, and its pictures by name."""
    notebook = json.loads(path.read_text("utf-8"))
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = re.sub(r"\(\.\./docs/", "(../", source)
            parts.append(re.sub(r"\((\w+)\.ipynb", r"(\1.md", source))
            continue
        parts.append(fenced(source, ".python"))
        for kind, data in outputs(cell):
            if kind == "text":
                parts.append(fenced(data, ".text .no-copy"))
            else:
                name = f"{path.stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode(data)
                parts.append(f"![Output of the cell above]({name})")
    title, *rest = parts
    note = f"*This page is a notebook: [download it]({path.name}) to run it, for example on Colab.*"
    return "\n\n".join([title, note, *rest]) + "\n", pictures


def outputs(cell: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields ("png", base64) or ("text", text) for each output of a cell."""
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            yield "png", "".join(data["image/png"])
        elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
            yield "text", text


def fenced(text: str, classes: str) -> str:
    """Returns a block of code; its fence is longer than any inside."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall(r"`{3,}", text) or [""]))
    return f"{fence} {{ {classes} }}\n{text.rstrip()}\n{fence}"
