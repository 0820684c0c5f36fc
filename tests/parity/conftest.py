"""Says which reference data a run reads."""

import pytest

from .golden import golden_folder


def pytest_report_header() -> str:
    return f"reference data: {golden_folder()}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The header again, which -q leaves out."""
    terminalreporter.write_line(pytest_report_header())
