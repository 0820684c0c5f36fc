"""Executes notebooks, each in an empty folder, and stores their outputs with --write.

    python tools/run_notebooks.py [NAME ...] [--write] [--limit 300]

Prints the time of each, and ends with status 1 if one failed or took more than --limit seconds.
Needs the extra ``notebooks``.
"""

import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat  # pyright: ignore[reportMissingImports]
from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]
from nbclient.exceptions import (  # pyright: ignore[reportMissingImports]
    CellExecutionError,
    CellTimeoutError,
)
from PIL import Image

FOLDER = Path(__file__).parent.parent / "notebooks"
MOST_BYTES = 300_000  # of a stored notebook
COLOURS = 256  # of a stored picture
MOST_LINES = 60  # of the text that a cell prints


def execute(path: Path, limit: int) -> Any:
    """Returns a notebook with the outputs of running it in an empty folder."""
    notebook = nbformat.read(path, as_version=4)
    commands = str(Path(sys.executable).parent)  # the ldm-... of this environment
    if commands not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([commands, os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=limit,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            coalesce_streams=True,
        )
        client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [kept(output, folder) for output in cell.outputs]
            cell.outputs = [output for output in cell.outputs if output.get("text") != "\n"]
        cell.metadata.pop("execution", None)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def kept(output: Any, folder: str) -> Any:
    """Returns an output as it is stored: few colours, no escape codes, no temporary paths."""
    if output.output_type == "stream":
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.text).replace(folder + "/", "")
        text = re.sub(r"^\S+: \w*Warning: .*\n(  .*\n)?", "", text, flags=re.MULTILINE)
        lines = [
            line.rsplit("\r", 1)[-1] for line in text.rstrip().replace("\r\n", "\n").split("\n")
        ]
        if len(lines) > MOST_LINES:
            lines = [*lines[: MOST_LINES // 2], "...", *lines[-MOST_LINES // 2 :]]
        output.name, output.text = "stdout", "\n".join(lines) + "\n"
    picture = output.get("data", {}).get("image/png")
    if picture is not None:
        file = io.BytesIO()
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            few = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            few.save(file, "PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(file.getvalue()).decode()
        output.data.pop("text/plain", None)
        output.data.pop("image/jpeg", None)
    return output


def run(path: Path, limit: int, write: bool) -> tuple[float, str]:
    """Returns (seconds, what went wrong if anything did)."""
    began = time.perf_counter()
    try:
        notebook = execute(path, limit)
    except (CellExecutionError, CellTimeoutError) as error:
        return time.perf_counter() - began, str(error)
    seconds = time.perf_counter() - began
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > MOST_BYTES:
        return seconds, f"its outputs take {len(text.encode())} bytes, more than {MOST_BYTES}"
    if write:
        path.write_text(text, "utf-8")
    return seconds, "" if seconds <= limit else f"it took more than {limit} s"


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help="notebooks (default: all)")
    parser.add_argument("--write", action="store_true", help="store the outputs")
    parser.add_argument("--limit", type=int, default=300, help="seconds for a notebook (300)")
    args = parser.parse_args()
    names = args.names or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    failed = 0
    for name in names:
        seconds, wrong = run(FOLDER / f"{name}.ipynb", args.limit, args.write)
        print(f"{name:20} {seconds:6.1f} s  {wrong or 'ok'}", flush=True)
        failed += bool(wrong)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
