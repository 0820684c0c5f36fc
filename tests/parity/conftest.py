"""Says which reference data a run reads."""

from .golden import golden_folder


def pytest_report_header() -> str:
    return f"reference data: {golden_folder()}"
