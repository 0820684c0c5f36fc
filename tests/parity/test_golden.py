"""The runner itself: what it reads, and that it fails when it should."""

from pathlib import Path

import numpy as np
import pytest

from .golden import Case, NotYet, compare, excess, golden_folder, load_cases, nchw, nhwc
from .test_parity import RUNNERS

pytestmark = [pytest.mark.fast, pytest.mark.parity]


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {case.name: case for case in load_cases(golden_folder())}


def test_wrong_results_fail_with_name_error_and_tolerance(cases: dict[str, Case]) -> None:
    case = next(
        case
        for case in cases.values()
        if case.cls in RUNNERS and "exact" in case.spec["atol"].values()
    )
    right = case.expected
    assert compare(case, right)[1] == []
    for name, theirs in right.items():
        off = theirs + (1 if np.issubdtype(theirs.dtype, np.integer) else 1.0)
        (line,) = compare(case, right | {name: off})[1]
        assert line.startswith(f"{name}: max error ")
        assert "tolerance" in line
    name = next(iter(right))
    (line,) = compare(case, right | {name: right[name][..., None]})[1]
    assert "shape" in line
    (line,) = compare(case, {n: a for n, a in right.items() if n != name})[1]
    assert "no such result" in line


def test_excess() -> None:
    inf, nan = np.inf, np.nan
    ratio = excess(
        np.array([1.0, 2.2, inf, nan, inf, 0.0]),
        np.array([1.0, 2.0, inf, nan, 1.0, nan]),
        0.1,
        0.05,
    )
    np.testing.assert_allclose(ratio, [0, 1, 0, 0, inf, inf])
    assert excess(np.array([2]), np.array([3]), 0.0, 0.0)[0] == inf


def test_layouts() -> None:
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert nhwc(x).shape == (2, 4, 5, 3)
    assert np.array_equal(nchw(nhwc(x)), x)


def test_weights_come_from_the_base_first(cases: dict[str, Case]) -> None:
    case = next(
        case
        for case in cases.values()
        if case.base is not None and case.part("param") and "unet_config" not in case.kwargs
    )
    own, base = case.part("param"), case.base.weights()
    shared = {n: a.shape for n, a in base.items()}
    lacking = next(n for n in shared if n not in own)
    weights = case.state_dict(
        {n: s for n, s in shared.items() if n != lacking} | {n: a.shape for n, a in own.items()}
    )
    assert lacking not in weights
    assert all(a.dtype != np.float16 for a in weights.values())
    for name, a in own.items():
        assert np.array_equal(weights[name], a)


def test_a_folder_without_manifest_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LDM_JAX_GOLDEN", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="LDM_JAX_GOLDEN"):
        golden_folder()


def test_every_runner_computes_or_raises_not_yet(cases: dict[str, Case]) -> None:
    """A class is either known or skipped with a reason: never an error of its own."""
    case = next(case for case in cases.values() if case.cls.endswith("UNetModel"))
    spec = {**case.spec, "kwargs": {**case.kwargs, "no_such_option": 1}}
    with pytest.raises(NotYet, match="no_such_option"):
        RUNNERS[case.cls](Case(case.folder, case.name, spec, case.manifest))
