"""The stored notebooks are executed, small, without errors, and link to what exists."""

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells_of(path, kind):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_executed_from_the_first_cell_to_the_last(path):
    cells = cells_of(path, "code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small_and_holds_no_path_of_the_machine_that_ran_it(path):
    text = path.read_text("utf-8")
    assert len(text.encode()) <= 300_000
    assert not re.search(r"/tmp/|/root|/home/|/work", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_first_code_installs_the_package_where_it_is_missing(path):
    first = "".join(cells_of(path, "code")[0]["source"])
    assert 'find_spec("ldm_jax") is None' in first
    assert "%pip install" in first


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_links_exist(path):
    prose = "\n".join("".join(cell["source"]) for cell in cells_of(path, "markdown"))
    assert prose.startswith("# ")
    targets = re.findall(r"\]\(((?!http)[^)#]+)", prose)
    assert targets
    for target in targets:
        assert (path.parent / target).exists(), target
