"""Every case of the reference data against what ldm_jax computes, chosen by the original's class, never by the case's name."""

import jax
import pytest

from . import networks
from .golden import Case, NotYet, compare, golden_folder, load_cases

RUNNERS = {**networks.CASES}


@pytest.mark.parametrize("case", load_cases(golden_folder()), ids=lambda case: case.name)
def test_case(case: Case, record_property: pytest.FixtureRequest) -> None:
    if case.cls not in RUNNERS:
        pytest.skip(f"no runner yet for {case.cls}")
    try:
        with jax.default_matmul_precision("highest"):  # the references are float32 throughout; accelerators would round inputs
            results = RUNNERS[case.cls](case)
    except NotYet as reason:
        pytest.skip(f"not yet, {case.cls}: {reason}")
    worst, failures = compare(case, results)
    record_property("worst", worst)
    assert not failures, f"{case.name} ({case.cls}):\n  " + "\n  ".join(failures)
