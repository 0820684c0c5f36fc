"""Reports the folder of reference data."""

import pytest

from .golden import golden_folder


def pytest_report_header() -> str:
    return f"reference data: {golden_folder()}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Repeats the header, which -q leaves out."""
    terminalreporter.write_line(pytest_report_header())
