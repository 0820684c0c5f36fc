"""Messages, flags and files that the pages name exist."""

import ast
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

from ldm_jax.conditioning import CONDITIONERS
from ldm_jax.configs.common import base
from ldm_jax.data import SOURCES
from ldm_jax.diffusion import grids
from ldm_jax.diffusion.objective import OBJECTIVES
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.diffusion.schedule import BETA_SCHEDULES
from ldm_jax.eval.evaluation import METRICS
from ldm_jax.eval.protocols import PRESETS
from ldm_jax.train.tasks import TASKS
from ldm_jax.train.tasks.base import flatten, plain

ROOT = Path(__file__).parent.parent
PAGES = {page.stem: page.read_text("utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
PROGRAM = "\n".join(file.read_text("utf-8") for file in sorted((ROOT / "ldm_jax").rglob("*.py")))

pytestmark = pytest.mark.fast


def literals() -> str:
    """Returns every string of the package, one a line, without what f-strings fill in."""
    lines = []
    for node in ast.walk(ast.parse(PROGRAM.replace("from __future__", "# from __future__"))):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
            lines.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            lines.append(node.value)
    return "\n".join(lines)


def test_every_message_of_troubleshooting_is_one_of_the_program():
    texts = literals()
    rows = re.findall(r"^\| (.*?) \|", PAGES["troubleshooting"], re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 30
    # Capitals, numbers and quoted names stand for what the program fills in.
    filled = r"\b[A-Z]+\b(?! files)|HxW|--[XY]\b|\.\.\.|=?\d+|'[^']*'|[;:?]| which | \(a grid\?\)"
    unknown = [
        message
        for message in messages
        for part in re.split(filled, message.replace("(VAE)", "").replace("NaN", "..."))
        if len(words := part.strip(" ,()=").removeprefix("is ")) > 3 and words not in texts
    ]
    assert not unknown, "\n".join(map(str, unknown))


def test_every_flag_is_one_of_a_program():
    known = set(re.findall(r'(?:DEFINE_\w+\(|add\(|define\()\s*"(?:--)?(\w+)"', PROGRAM))
    known |= set(re.findall(r'flag="(\w+)"', PROGRAM))
    known |= set(re.findall(r"^    (\w+): .* = option\(", PROGRAM, re.MULTILINE))
    known |= {"progress_every", "help", "nogrid", "no-ema", "nocompile"}
    known |= {"steps", "sampler", "guidance", "eta", "grid"}
    unknown = []
    for name, page in PAGES.items():
        commands = re.findall(r"^\s*(?:ldm-\w+|\$?begun|model).*", page, re.MULTILINE)
        inline = re.findall(r"`(?:ldm-\w+ [^`]*|--[^`]*)`", page)
        for line in [*commands, *inline] if name != "migration" else []:
            for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", line):
                if flag not in known:
                    unknown.append((name, flag))
    assert not unknown, "\n".join(map(str, unknown))


def test_links_between_pages_exist():
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(((?!http)[^)#]+)", page):
            assert (ROOT / "docs" / target).exists(), (name, target)


def test_the_readme_is_short_and_its_links_exist():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 120
    for target in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (ROOT / target).exists(), target


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {f"{name}.md" for name in PAGES} | notebooks == set(re.findall(r"[\w/-]+\.md", text))


def test_every_dotted_name_exists():
    for name, page in PAGES.items():
        if name != "migration":
            for dotted in set(re.findall(r"\bldm_jax(?:\.\w+)+\b(?!\()(?![./])", page)):
                assert pkgutil.resolve_name(dotted) is not None, name


def test_every_config_field_exists():
    known = {"data.where", "data.split_column", "data.holdout", "data.pair_holdout"}
    known |= {f"data.condition.{name}" for name in ("column", "most", "database", "clip")}
    known |= {"data.source", "data.condition", "data.buckets"}
    known |= {f"data.{a}" for s in SOURCES.values() for a in inspect.signature(s).parameters}
    for task in TASKS:
        known |= flatten(plain(base(task))).keys()
    sections = "data|optim|loss|mesh|best|guard|adversary|wandb"
    for name, page in PAGES.items():
        for code in re.findall(r"`([^`]+)`", page):
            for field in re.findall(
                rf"(?<![\w./-])(?:--)?(?:config\.)?((?:{sections})\.[\w.]+)", code
            ):
                if not field.endswith((".md", ".json", ".jsonl", ".py", ".update")):
                    assert field.rstrip(".") in known, (name, field)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("sampling", {*SAMPLERS} - {"ddim_inversion"}),
        ("sampling", {o for s in SAMPLERS.values() for o in s.options} - {"eta", "temperature"}),
        ("sampling", grids.ALL),
        ("data", SOURCES),
        ("data", CONDITIONERS),
        ("training", OBJECTIVES),
        ("training", BETA_SCHEDULES),
        ("evaluation", METRICS),
        ("evaluation", PRESETS),
    ],
)
def test_every_entry_of_a_registry_is_on_its_page(page, names):
    missing = [name for name in names if not re.search(rf'[`"]{name}[`"]', PAGES[page])]
    assert not missing, missing
