"""Every case of the reference data; its class in the original chooses the runner."""

import jax
import pytest

from . import (
    adapters,
    diffusion,
    evaluation,
    networks,
    options,
    retrieval,
    schedulers,
    sgm,
    stages,
    transformer,
)
from .golden import Case, NotYet, all_cases, compare

pytestmark = pytest.mark.parity

PARTS = (
    adapters,
    networks,
    stages,
    diffusion,
    schedulers,
    evaluation,
    options,
    retrieval,
    sgm,
    transformer,
)
RUNNERS = {name: runner for part in PARTS for name, runner in part.CASES.items()}


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_case(case: Case) -> None:
    if case.cls not in RUNNERS:
        pytest.skip(f"no runner yet for {case.cls}")
    try:
        # The references are float32 throughout; accelerators would round the inputs of products.
        with jax.default_matmul_precision("highest"):
            results = RUNNERS[case.cls](case)
    except NotYet as reason:
        pytest.skip(f"not yet, {case.cls}: {reason}")
    _, failures = compare(case, results)
    # A rounding may flip a decision to accept a step.
    if failures and ("dpm_adaptive" in case.cls or case.spec.get("soft")):
        pytest.xfail("soft: " + "; ".join(failures))
    assert not failures, f"{case.name} ({case.cls}):\n  " + "\n  ".join(failures)
