"""Reads reference data and compares with it; tests/golden/README.md describes the format."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ldm_jax.convert.compvis.networks import param_shapes
from ldm_jax.convert.tables import Table, source_shapes, to_ours

from .recipes import recipe_weights

REPO = Path(__file__).parents[2]


class NotYet(Exception):
    """A case or an option that this runner does not support; the message is the reason."""


def golden_folder() -> Path:
    """LDM_JAX_GOLDEN, else the full set next to the repository, else the set within it."""
    if given := os.environ.get("LDM_JAX_GOLDEN"):
        folder = Path(given).expanduser()
        if not (folder / "manifest.json").is_file():
            raise FileNotFoundError(f"LDM_JAX_GOLDEN={given}: it holds no manifest.json")
        return folder
    beside = REPO.parent / "shared" / "golden"
    return beside if (beside / "manifest.json").is_file() else REPO / "tests" / "golden"


@lru_cache(maxsize=8)
def _arrays(file: Path) -> dict[str, np.ndarray]:
    return load_file(file)


@cache
def shapes_of(module: Any) -> dict[str, Any]:
    """`param_shapes` of a network, traced once for all the cases that share it."""
    return param_shapes(module)


def nhwc(x: np.ndarray) -> np.ndarray:
    """[..., c, h, w] -> [..., h, w, c]."""
    return np.moveaxis(x, -3, -1)


def nchw(x: Any) -> np.ndarray:
    """[..., h, w, c] -> [..., c, h, w]."""
    return np.moveaxis(np.asarray(x), -1, -3)


@dataclasses.dataclass(frozen=True)
class Case:
    """One case: ``spec`` is its manifest entry; arrays are as stored, in PyTorch's layouts."""

    folder: Path
    name: str
    spec: Mapping[str, Any] = dataclasses.field(repr=False)
    manifest: Mapping[str, Mapping[str, Any]] = dataclasses.field(repr=False)

    @property
    def cls(self) -> str:
        """The dotted path of the original's class or function."""
        return self.spec["class"]

    @property
    def kwargs(self) -> dict[str, Any]:
        return self.spec["kwargs"]

    @cached_property
    def base(self) -> "Case | None":
        """The case that parameters come from first."""
        base = self.spec.get("params_from")
        return None if base is None else Case(self.folder, base, self.manifest[base], self.manifest)

    def part(self, kind: str) -> dict[str, np.ndarray]:
        """The arrays of one kind ("param", "in", "out", "grad") by name."""
        arrays = _arrays(self.folder / self.spec.get("file", f"{self.name}.safetensors"))
        return {
            name.removeprefix(f"{kind}/"): a
            for name, a in arrays.items()
            if name.startswith(f"{kind}/")
        }

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        """Inputs in the order in which the case lists them."""
        arrays = self.part("in")
        return {name: arrays[name] for name in self.spec["inputs"]}

    def image(self, name: str) -> np.ndarray:
        """An input [..., c, h, w] as [..., h, w, c]."""
        return nhwc(self.inputs[name])

    @cached_property
    def expected(self) -> dict[str, np.ndarray]:
        """Every recorded result: outputs by name, gradients as "grad:<name>"."""
        grads = {f"grad:{name}": a for name, a in self.part("grad").items()}
        return self.part("out") | grads

    def tolerance(self, name: str) -> tuple[float, float]:
        """(atol, rtol) of a result; zeros where it must be equal."""
        atol = self.spec["atol"]
        atol = atol[name] if isinstance(atol, Mapping) else atol
        return (0.0, 0.0) if atol == "exact" else (float(atol), float(self.spec["rtol"]))

    def state_dict(
        self,
        expected: Mapping[str, tuple[int, ...]],
        prefixes: Iterable[str] = ("model.diffusion_model.", "net."),
    ) -> dict[str, np.ndarray]:
        """The case's weights, float32: the base's first, then its own.

        ``expected`` holds the model's shapes by name. A bare key of the base that is not among them
        may be found under one of the ``prefixes``; arrays of the base that the model lacks, or has
        in another shape, are dropped.
        """
        weights: dict[str, np.ndarray] = {}
        if self.base is not None:
            for name, value in self.base.weights().items():
                renamed = next((p + name for p in ("", *prefixes) if p + name in expected), None)
                if renamed is not None and expected[renamed] == value.shape:
                    weights[renamed] = value
        return weights | self.weights(own=True)

    def weights(self, own: bool = False) -> dict[str, np.ndarray]:
        """All arrays of the case, stored ones converted from float16 to float32.

        The bases' weights come first, unless ``own`` is true; then those of a recipe.
        """
        weights = {} if own or self.base is None else self.base.weights()
        of = self.spec.get("params_from_recipe_of")
        weights = weights | recipe_weights(self.spec if of is None else self.manifest[of])
        return weights | {
            n: a.astype(np.float32) if a.dtype == np.float16 else a
            for n, a in self.part("param").items()
        }

    def params(
        self, table: Table, shapes: Mapping[str, Any], only: tuple[str, ...] = ("",)
    ) -> dict[str, Any]:
        """The case's weights whose names begin with one of ``only``, as our parameter tree.

        Raises:
            ConversionError: The weights do not fit the table in full.
        """
        weights = {
            n: w
            for n, w in self.state_dict(source_shapes(table, shapes, self.cls)).items()
            if n.startswith(only)
        }
        return to_ours(table, weights, shapes=shapes, where=f"{self.name} ({self.cls})")


def load_cases(folder: Path) -> list[Case]:
    """Every case of a folder, in the manifest's order."""
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    return [Case(folder, name, spec, cases) for name, spec in cases.items()]


def all_cases() -> list[Case]:
    """The cases to run: those of LDM_JAX_GOLDEN, else every set that the repository carries."""
    folders = [golden_folder()]
    if "LDM_JAX_GOLDEN" not in os.environ:
        folders += [REPO / "tests" / "golden" / name for name in ("second", "third")]
    return [case for folder in folders for case in load_cases(folder)]


def excess(ours: np.ndarray, theirs: np.ndarray, atol: float, rtol: float) -> np.ndarray:
    """|a - b| / (atol + rtol |b|) elementwise.

    0 where both are equal (infinities and nan too), inf where only one is finite.
    """
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        ratio = np.abs(a - b) / (atol + rtol * np.abs(b))
    return np.where(equal, 0.0, np.where(np.isfinite(ratio), ratio, np.inf))


def summed_gradient(case: Case, name: str, *passes: Any) -> np.ndarray:
    """The gradient of an input, as a case recorded it.

    PyTorch adds up the gradients of a tensor, and those of inputs (unlike those of parameters) are
    not reset in some of the recorded calls: what is stored is the gradient of one of the
    ``passes``, of all of them, or of all of them run twice. The nearest of these in norm is
    returned.
    """
    grads = [np.asarray(grad, np.float64) for grad in passes]
    total = np.sum(grads, axis=0)
    recorded = np.linalg.norm(case.expected.get(name, grads[0]).astype(np.float64))
    candidates = [grads[0], total, 2 * total]
    return min(candidates, key=lambda grad: abs(float(np.linalg.norm(grad)) - float(recorded)))


def compare(case: Case, ours: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """({result: largest error in units of its tolerance}, a line for each result that fails)."""
    worst, failures = {}, []
    for name, theirs in case.expected.items():
        if name not in ours and name in case.spec.get("soft_outputs", ()):
            continue
        if name not in ours:
            failures.append(f"{name}: the runner computes no such result for {case.cls}")
            continue
        a = np.asarray(ours[name])
        if a.shape != theirs.shape:
            failures.append(f"{name}: shape {a.shape}, expected {theirs.shape}")
            continue
        atol, rtol = case.tolerance(name)
        if np.issubdtype(theirs.dtype, np.integer):
            atol = rtol = 0.0
        ratio = excess(a, theirs, atol, rtol)
        worst[name] = float(ratio.max(initial=0.0))
        if worst[name] > 1.0:
            with np.errstate(invalid="ignore"):
                error = np.abs(a.astype(np.float64) - theirs.astype(np.float64)).max()
            tolerance = f"tolerance {atol:g} + {rtol:g} |b|"
            places = f"{int((ratio > 1).sum())} of {ratio.size} places"
            failures.append(
                f"{name}: max error {error:.3g}, {tolerance} ({worst[name]:.3g} times it; {places})"
            )
    return worst, failures
