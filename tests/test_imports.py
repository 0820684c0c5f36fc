"""Who may import whom: read off the source, so that imports inside functions count as well."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ldm_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

LEAVES = {
    "heap",
    "tokenizers",
    "parallel",
    "checkpoint",
    "data",
    "metrics",
    "pictures",
    "diffusion",
}
# part -> the parts of ldm_jax that it may import, besides itself
ALLOWED = {
    **{leaf: set() for leaf in LEAVES},
    "cores": {"parallel"},
    "checkpoint": {"parallel"},  # several processes write one checkpoint
    "nn": {"parallel"},  # which form of attention a program gets depends on what it is compiled for
    "models": {"nn"},
    "conditioning": {"nn", "models", "tokenizers"},
    "latent": {"nn", "models", "conditioning", "diffusion", "cores", "parallel"},
    "generation": {"nn", "conditioning", "latent", "diffusion"},
    "fitting": {"conditioning", "data"},
    "requests": {"conditioning", "latent", "generation", "fitting", "data"},
    "train": {"nn", "models", "conditioning", "latent", "generation", *LEAVES},
    "convert": {"", "models", "conditioning", "latent", "configs", *LEAVES},
    "pipeline": {
        "nn",
        "models",
        "conditioning",
        "latent",
        "generation",
        "requests",
        "convert",
        "cores",
        *LEAVES,
    },
    "export": {"", "conditioning", "latent", "generation", "requests", "pipeline", *LEAVES},
    "many": {"requests", "pipeline", *LEAVES},
    "sampling": {"cli", "requests", "pipeline", "many", "cores", *LEAVES},
    "cli": {"nn", "models", "conditioning", "latent", "train", "pipeline", *LEAVES},
    "plan": {"nn", "models", "conditioning", "latent", "generation", "train", "cli", *LEAVES},
    "": {"pipeline", "cores"},  # ldm_jax/__init__.py
    "__main__": {"train", "cli", *LEAVES},  # a leaf's command line is a script
}


def part_of(module: str) -> str:
    """ldm_jax.data.loader -> data; ldm_jax -> ""; configs.common -> configs."""
    first, *rest = module.split(".")
    return first if first != "ldm_jax" else rest[0] if rest else ""


def modules(path: Path) -> Iterator[str]:
    """The full name of every module that a file imports; of `from package import module`, the module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            above = ".".join(package[: -node.level]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            yield from (
                (f"{base}.{alias.name}" for alias in node.names) if base == "ldm_jax" else (base,)
            )


def ours(path: Path) -> set[str]:
    return {
        part_of(name)
        for name in modules(path)
        if name.split(".")[0] in ("ldm_jax", "configs", "benchmarks", "tests")
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    part = part_of(
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    )
    if path.stem == "__main__" and part in LEAVES:
        part = "__main__"
    assert part in ALLOWED, f"{part} has no place in the order of imports"
    assert ours(path) <= {part, *ALLOWED[part]}


def test_linen_is_imported_by_networks_alone():
    with_linen = {
        path.relative_to(PACKAGE).parts[0]
        for path in SOURCES
        if any(m.startswith("flax.linen") for m in modules(path))
    }
    with_linen |= {
        path.relative_to(PACKAGE).parts[0]
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and node.module == "flax"
        and "linen" in [alias.name for alias in node.names]
    }
    assert with_linen == {"nn", "models"}


def test_every_way_of_importing_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "ldm_jax")
    file = tmp_path / "ldm_jax" / "train" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from typing import TYPE_CHECKING\nfrom ldm_jax import pictures\nfrom ..data import Loader\nfrom . import state\n"
        "if TYPE_CHECKING:\n    import configs.common\ndef f():\n    import ldm_jax.models.unet\n    from ldm_jax.nn import layers\n"
    )
    assert ours(file) == {"pictures", "data", "train", "configs", "models", "nn"}
