"""Rules of the source: which package imports which, and where isinstance on a kind may stand."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

PACKAGE = Path(__file__).parent.parent / "ldm_jax"
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "configs" not in p.relative_to(PACKAGE).parts)
# These modules of models/ stand above conditioning/: they put whole models together.
ASSEMBLY = ("ldm_jax.models.ldm", "ldm_jax.models.build", "ldm_jax.models.code_transformer")
PURE = ("nn", "models", "diffusion", "conditioning", "sampling")

# package -> the packages of ldm_jax that it may import besides itself
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "diffusion": {"errors"},
    "kernels": {"errors"},
    "nn": {"errors", "kernels"},
    "distributed": {"errors", "kernels"},
    "io": {"errors", "distributed"},  # several processes write one checkpoint
    "data": {"errors", "io"},
    "models": {"errors", "nn", "kernels", "diffusion"},
    "conditioning": {"errors", "nn", "kernels", "models", "data", "io", "diffusion"},
    "assembly": {"errors", "nn", "kernels", "models", "conditioning", "diffusion"},
}
BELOW = {*ALLOWED["assembly"], "assembly", "data", "io"}
ALLOWED |= {
    "convert": BELOW,
    "sampling": BELOW | {"convert"},
    "train": BELOW | {"distributed", "sampling", "eval", "configs"},  # a config's defaults
    "eval": BELOW | {"distributed", "sampling", "convert"},
    "plan": BELOW | {"distributed", "sampling", "train"},
    "app": BELOW | {"sampling", "cli"},
}
EVERYTHING = {*ALLOWED, "cli", "configs", ""}


def package_of(module: str) -> str:
    """Package of a module: ldm_jax.data.loader -> data; ldm_jax -> ""; ldm_jax.export -> cli."""
    if module.startswith(ASSEMBLY):
        return "assembly"
    first, *rest = module.split(".")
    name = first if first != "ldm_jax" else rest[0] if rest else ""
    return "cli" if name == "export" and first == "ldm_jax" else name


def modules(path: Path) -> Iterator[str]:
    """The full name of every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            above = ".".join(package[: -node.level]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            if base == "ldm_jax":
                yield from (f"{base}.{alias.name}" for alias in node.names)
            else:
                yield base


def ours(path: Path) -> set[str]:
    """The packages of this project that a file imports."""
    roots = ("ldm_jax", "configs", "benchmarks", "tests", "tools")
    return {package_of(name) for name in modules(path) if name.split(".")[0] in roots}


def name_of(path: Path) -> str:
    """The package that a file belongs to."""
    dotted = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return package_of(dotted.removesuffix(".__init__"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    package = name_of(path)
    if package in ("", "cli") or path.name == "__main__.py":
        assert ours(path) <= EVERYTHING
        return
    assert package in ALLOWED, f"{package} has no place in the order of imports"
    assert ours(path) <= {package, *ALLOWED[package]}


def test_at_most_four_modules_lie_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 4


def test_linen_is_imported_by_networks_alone():
    linen = {
        name_of(path)
        for path in SOURCES
        if re.search(r"flax\.linen|from flax import .*\blinen\b", path.read_text(encoding="utf-8"))
    }
    assert linen == {"nn", "models"}


@pytest.mark.parametrize("package", PURE)
def test_networks_and_sampling_know_neither_state_nor_platform(package):
    banned = re.compile(r"ContextVar|contextvars|default_backend\(|\.platform\b|jax\.devices\(")
    for path in (PACKAGE / package).rglob("*.py"):
        found = banned.findall(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(PACKAGE)}: {found}"
        assert "distributed" not in ours(path), path.relative_to(PACKAGE)


def classes_in(folder: Path) -> set[str]:
    """Names of the classes defined in a folder."""
    return {
        node.name
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }


def kinds_tested(path: Path) -> set[str]:
    """Names of the classes that a file tests with isinstance, issubclass or `case Class()`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "isinstance",
            "issubclass",
        ):
            found |= {
                getattr(leaf, "id", getattr(leaf, "attr", ""))
                for leaf in ast.walk(node.args[1])
                if isinstance(leaf, ast.Name | ast.Attribute)
            }
        elif isinstance(node, ast.MatchClass):
            found.add(getattr(node.cls, "id", getattr(node.cls, "attr", "")))
    return found


@pytest.mark.parametrize("folder", ["conditioning", "train/tasks"])
def test_no_other_package_tests_for_a_kind(folder):
    kinds = classes_in(PACKAGE / folder)
    assert kinds
    for path in SOURCES:
        if not path.is_relative_to(PACKAGE / folder) and folder.split("/")[0] in ours(path):
            tested = kinds_tested(path) & kinds
            assert not tested, f"{path.relative_to(PACKAGE)} tests for {tested}"


def test_every_way_of_importing_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "ldm_jax")
    file = tmp_path / "ldm_jax" / "train" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from typing import TYPE_CHECKING\nfrom ldm_jax import plan\nfrom ..data import Loader\n"
        "from . import state\nif TYPE_CHECKING:\n    import configs.common\n"
        "def f():\n    import ldm_jax.models.unet\n    from ldm_jax.nn import layers\n"
        "def g(x):\n    match x:\n        case Mask():\n"
        "            return isinstance(x, (A, b.C))\n"
    )
    assert ours(file) == {"plan", "data", "train", "configs", "models", "nn"}
    assert kinds_tested(file) == {"Mask", "A", "C", "b"}
