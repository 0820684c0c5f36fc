"""Says which reference data a run reads, and keeps compiling cheap."""

from collections.abc import Iterator

import jax
import pytest

from .golden import golden_folder


def pytest_report_header() -> str:
    return f"reference data: {golden_folder()}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The header again, which -q leaves out."""
    terminalreporter.write_line(pytest_report_header())


@pytest.fixture(autouse=True, scope="module")
def quick_compiling() -> Iterator[None]:
    """On a CPU nearly all the time goes into compiling programs that run once, and unoptimised ones are no less
    exact."""
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", False)
