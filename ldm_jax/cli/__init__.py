"""The console commands, each a function that imports what it needs when it is called."""

import importlib
from typing import Any

from ldm_jax.cli.memory_limit import run_limited


def _command(name: str) -> Any:
    return run_limited(f"ldm-{name}", lambda: importlib.import_module(f"ldm_jax.cli.{name}").main)


def start_sample() -> Any:
    """Runs ``ldm-sample``."""
    return _command("sample")


def start_train() -> Any:
    """Runs ``ldm-train``."""
    return _command("train")


def start_convert() -> Any:
    """Runs ``ldm-convert``."""
    return _command("convert")


def start_data() -> Any:
    """Runs ``ldm-data``."""
    return _command("data")


def start_plan() -> Any:
    """Runs ``ldm-plan``."""
    return _command("plan")


def start_export() -> Any:
    """Runs ``ldm-export``."""
    return _command("export")


def start_eval() -> Any:
    """Runs ``ldm-eval``."""
    return _command("eval")


def start_app() -> Any:
    """Runs ``ldm-app``."""
    return _command("app")
