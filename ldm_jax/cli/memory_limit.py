"""Commands under a limit of address space (``ulimit -v``): a lack of memory becomes one line.

A C++ library that gets no memory ends the process: XLA's compiler by SIGABRT, others by SIGSEGV.
Nothing inside the process can prevent that, so under such a limit a command runs in a child process
whose parent explains how it ended.
"""

import contextlib
import ctypes
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ldm_jax.io.resources import OUT_OF_MEMORY, address_limit

# The first of what a failing process writes; from there on its text is kept until it has ended, or
# for some seconds where it runs on.
_LAST_WORDS = re.compile(
    rb"^(Traceback \(most|terminate called|Fatal Python error|LLVM ERROR|OpenBLAS |\*\*\* |"
    rb"[EF]\d{4} |cannot allocate memory)",
    re.MULTILINE,
)
_SIGNS = re.compile(
    "|".join((*OUT_OF_MEMORY, "MemoryError", "Resource temporarily unavailable", "pthread_create")),
    re.IGNORECASE,
)
_NEAR = 0.75  # of the limit: a process that was killed beyond it lacked memory
_CRASHES = ("SIGABRT", "SIGSEGV", "SIGBUS", "SIGILL", "SIGTRAP")
_FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
_PERIOD = 0.2  # seconds between two readings of the child's memory
_KEPT = 10.0  # seconds
_PDEATHSIG = 1  # of Linux's prctl.h


def run_limited(name: str, load: Callable[[], Callable[[], Any]]) -> Any:
    """Returns ``load()()``; under a limit of address space both calls are in a child process.

    Call it before anything large is imported. The parent passes on the signals that it gets and
    the child's stderr, and ends as the child does. Where the child lacked memory, the parent
    prints one line and exits with status 2, or with LDM_JAX_TRACEBACK=1 the libraries' own words.

    Args:
      name: The command, for the line.
      load: Imports the command and returns it.
    """
    limit = address_limit()
    if limit is None or not hasattr(os, "fork"):
        return load()()
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    forwarded = [getattr(signal, each) for each in _FORWARDED if hasattr(signal, each)]
    # None may end the parent before it forwards them.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)
    parent, child = os.getpid(), os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(reader)
        os.dup2(writer, 2)
        os.close(writer)
        _end_with(parent)
        return _loaded(load, name, limit)()
    os.close(writer)
    _forward(forwarded, child)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    text, peak, code = _follow(child, reader)
    crashed = -code in [getattr(signal, each, None) for each in _CRASHES]
    lacking = _SIGNS.search(text) or (crashed and peak >= _NEAR * limit)
    if lacking and (crashed or (code and text)) and not os.environ.get("LDM_JAX_TRACEBACK"):
        during = "while it compiled" if "backend_compile" in text else "when it ended"
        _end(name, limit, f"of which {_gib(peak)} were in use {during}")
    _write(text.encode())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(parent, -code)
    sys.exit(code)


def _loaded(load: Callable[[], Callable[[], Any]], name: str, limit: int) -> Callable[[], Any]:
    """Returns ``load()``; ends the process where the limit leaves no room for the libraries."""
    try:
        return load()
    except ModuleNotFoundError:
        raise
    except (ImportError, MemoryError, OSError, SystemError) as error:
        if os.environ.get("LDM_JAX_TRACEBACK"):
            raise
        why = " ".join(str(error).split()) or type(error).__name__
        _end(name, limit, f"which is too little to load the libraries ({why[:160]})")


def _end(name: str, limit: int, why: str) -> NoReturn:
    """Prints one line about a lack of memory and exits with status 2."""
    line = (
        f"{name}: out of memory: ulimit -v allows {_gib(limit)} of address space, {why}: raise "
        "the limit, or lower the batch or the size\n"
    )
    _write(line.encode())
    sys.exit(2)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _write(text: bytes) -> None:
    """Writes to stderr, which may be a full disk."""
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(2, text) :]


def _end_with(parent: int) -> None:
    """Has this process killed when its parent ends, as far as the system can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _forward(signals: list[int], child: int) -> None:
    def forward(number: int, _: Any) -> None:
        # A terminal sends Ctrl-C to both processes.
        if number != signal.SIGINT or not os.isatty(0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    for number in signals:
        signal.signal(number, forward)


def _follow(child: int, reader: int) -> tuple[str, int, int]:
    """Passes on a child's stderr until it ends.

    Returns:
      Its last words, which were not passed on; its largest address space in bytes; and its exit
      status, minus the signal's number where a signal ended it.
    """
    last_words, since, peak, status = b"", 0.0, 0, None
    while True:
        peak = max(peak, _address_space(child))
        readable, _, _ = select.select([reader], [], [], _PERIOD if status is None else 0)
        data = os.read(reader, 1 << 16) if readable else b""
        if not last_words and (found := _LAST_WORDS.search(data)):
            _write(data[: found.start()])
            last_words, since = data[found.start() :], time.monotonic()
        elif last_words:
            last_words += data
        else:
            _write(data)
        if status is None and last_words and time.monotonic() - since > _KEPT:
            _write(last_words)
            last_words = b""
        if status is not None and not data:
            return last_words.decode("utf-8", "replace"), peak, status
        if status is None and not data:
            # The end of the pipe is that of the child, but where its own children keep it open.
            ended, code = os.waitpid(child, 0 if readable else os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if ended else None


def _address_space(process: int) -> int:
    """Returns the most bytes of address space that a process has had; 0 where unknown."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmPeak:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
        if found:
            return int(found[1]) * 1024
    return 0
