"""Commands under a limit of address space end in one line, and otherwise as without one."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's"),
]
LIMIT = 2**30
ABORT = "say(b\"terminate called after throwing 'std::bad_alloc'\\n\"); os.abort()"


def start(body: str, limit: int = LIMIT, **environment: str) -> subprocess.Popen:
    """A process whose command ``def main():`` has this body."""
    source = f"""
import os, signal, sys, time
from ldm_jax.cli.memory_limit import run_limited
def say(text):
    os.write(2, text)
def main():
    {body}
def load():
    say(b"loading\\n")
    return main
sys.exit(run_limited("ldm-x", load))
"""
    known = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", source],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**known, **environment},
    )


def ended(body: str, limit: int = LIMIT, **environment: str) -> tuple[int, str, str]:
    process = start(body, limit, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(
    "body",
    [
        ABORT,
        "say(b'Fatal Python error: Aborted\\n... MemoryError\\n'); os.kill(os.getpid(), 11)",
        "say(b'cannot allocate memory for thread-local data: ABORT\\n'); os._exit(127)",
        "say(b'*** x\\ncannot allocate memory for thread-local data: ABORT\\n'); os._exit(127)",
        "bytearray(1 << 34)",
        "raise ImportError('x.so: failed to map segment from shared object')",
    ],
)
def test_a_library_that_gets_no_memory_is_one_line(body):
    status, out, err = ended(body)
    assert (status, out) == (2, "")
    assert err.startswith("loading\n")
    line = err.removeprefix("loading\n")
    assert line.startswith("ldm-x: out of memory: ulimit -v allows 1.00 GiB of address space, of ")
    assert line.endswith(": raise the limit, or lower the batch or the size\n")
    assert line.count("\n") == 1


def test_libraries_that_cannot_be_loaded_are_one_line():
    status, _, err = ended("pass", 2**28)
    assert (status, err) == (0, "loading\n")
    status, _, err = ended("import numpy, jax, scipy.linalg", 2**28)
    assert status == 2
    assert err.count("\n") == 2
    assert "ldm-x: out of memory: ulimit -v allows 0.25 GiB" in err


def test_other_ends_are_those_of_the_command():
    assert ended("print(5)") == (0, "5\n", "loading\n")
    assert ended("sys.exit(75)")[0] == 75
    status, _, err = ended("1 / 0")
    assert status == 1
    assert "Traceback" in err
    assert "ZeroDivisionError" in err
    status, _, err = ended("os.abort()")  # far below the limit, without a word about memory
    assert status == -signal.SIGABRT
    status, _, err = ended(ABORT, LDM_JAX_TRACEBACK="1")
    assert status == -signal.SIGABRT
    assert "bad_alloc" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_command(number):
    process = start(
        f"signal.signal({int(number)}, lambda *_: (print('stopped', flush=True), os._exit(3)));"
        "print('ready', flush=True); time.sleep(60)"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "stopped\n"
    assert process.returncode == 3


def test_a_killed_parent_leaves_no_command_behind():
    process = start("print(os.getpid(), flush=True); time.sleep(60)")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=60)
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            return
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the command runs on")


def test_without_a_limit_there_is_one_process():
    status, out, _ = ended("print(os.getppid())", resource.RLIM_INFINITY)
    assert (status, out) == (0, f"{os.getpid()}\n")


def test_every_command_starts_under_its_limit():
    with (ROOT / "pyproject.toml").open("rb") as file:
        import tomllib

        scripts = tomllib.load(file)["project"]["scripts"]
    import ldm_jax.cli

    for name, where in scripts.items():
        module, function = where.split(":")
        assert module == "ldm_jax.cli"
        assert function == f"start_{name.removeprefix('ldm-')}"
        assert name in getattr(ldm_jax.cli, function).__doc__
