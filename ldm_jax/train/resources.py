"""Disk and memory that do not suffice, as one line each instead of the errors of libraries."""

import contextlib
import errno
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm_jax.errors import ResourceError

DISK_FULL = ("No space left", "Disk quota exceeded", "File too large")
OUT_OF_MEMORY = (
    *("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "Cannot allocate memory"),
    *("bad_alloc", "can't start new thread", "Unable to allocate"),
)


@contextlib.contextmanager
def resource_errors(folder: Path, memory: str) -> Iterator[None]:
    """Raises a full disk and exhausted memory as ResourceError.

    Orbax, TensorBoard's writer and the compiler report them in many ways, some of them in threads
    that print tracebacks of their own.

    Args:
      folder: What is being written.
      memory: The advice against a lack of memory.
    """
    reasons: list[str] = []

    def thread_error(args: Any) -> None:
        if (why := _reason(args.exc_value)) is None:
            shown(args)
        else:
            reasons.append(why)

    def without_traceback(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or _reason(error) is None

    shown, log = threading.excepthook, logging.getLogger("absl")
    threading.excepthook = thread_error
    log.addFilter(without_traceback)  # Orbax logs what it also raises
    try:
        yield
        if reasons:
            raise OSError(errno.ENOSPC, "No space left")
    except Exception as error:
        if _reason(error) == "disk":
            raise ResourceError(
                f"{folder} cannot be written, the disk is full: make room and start the same "
                "command again, it resumes from what is complete"
            ) from None
        if _reason(error) == "memory":
            text = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise ResourceError(f"out of memory: {memory} ({text})") from None
        raise
    finally:
        threading.excepthook = shown
        log.removeFilter(without_traceback)


def _reason(error: BaseException | None) -> str | None:
    """Returns "disk" or "memory" where an error, or what it came from, is of that kind."""
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return "disk"
        if any(sign in text for sign in DISK_FULL):
            return "disk"
        if isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
            return "memory"
        error = error.__cause__ or error.__context__
    return None
