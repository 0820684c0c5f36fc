"""Disk, memory and buckets that fail, as one line each instead of the errors of libraries."""

import contextlib
import ctypes
import errno
import logging
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ldm_jax.errors import LdmJaxError, ResourceError, StorageError
from ldm_jax.io.paths import describe_problem, is_bucket, storage_problem

DISK_FULL = ("No space left", "Disk quota exceeded", "File too large")
OUT_OF_MEMORY = (
    *("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "Cannot allocate memory"),
    *("bad_alloc", "can't start new thread", "Unable to allocate", "failed to map segment"),
)


@contextlib.contextmanager
def resource_errors(
    memory: str, folder: Path | None = None, after: str = "start the same command again"
) -> Iterator[None]:
    """Raises a full disk and exhausted memory as ResourceError, a bucket's refusal as StorageError.

    Orbax, TensorBoard's writer and the compiler report them in many ways, some of them in threads
    that print tracebacks of their own.

    Args:
      memory: The advice against a lack of memory.
      folder: What is being written; by default the file that the error names.
      after: What to do once there is room.
    """
    reasons: list[str] = []

    def thread_error(args: Any) -> None:
        if (why := reason(args.exc_value)) is None:
            shown(args)
        else:
            reasons.append(why)

    def without_traceback(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or reason(error) is None

    shown, log = threading.excepthook, logging.getLogger("absl")
    threading.excepthook = thread_error
    log.addFilter(without_traceback)  # Orbax logs what it also raises
    try:
        yield
        if "disk" in reasons:
            raise OSError(errno.ENOSPC, "No space left")
        if reasons:
            raise MemoryError
    except LdmJaxError:
        raise
    except Exception as error:
        why = reason(error)
        if why == "disk":
            where = folder or _file_of(error) or "the output"
            raise ResourceError(
                f"{where} cannot be written, the disk is full: make room and {after}"
            ) from None
        if why == "memory":
            text = (str(error).strip().splitlines() or [""])[0][:160]
            if limit := address_limit():
                memory += f"; ulimit -v allows {limit / 2**30:.2f} GiB of address space"
            raise ResourceError(
                f"out of memory: {memory}" + (f" ({text})" if text else "")
            ) from None
        if problem := _problem_of_bucket(error, folder):
            raise StorageError(describe_problem(problem, folder)) from None
        raise
    finally:
        threading.excepthook = shown
        log.removeFilter(without_traceback)


def address_limit() -> int | None:
    """Returns this process's limit of address space in bytes, None without one."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _problem_of_bucket(error: BaseException, folder: Path | None) -> str | None:
    """Returns the `storage_problem` of an error that cannot be one of this machine's files."""
    problem = storage_problem(error)
    if problem in ("missing", "rights") and not (folder is not None and is_bucket(folder)):
        return None
    return problem


def release_memory() -> None:
    """Returns freed memory that the C library (glibc) keeps for reuse to the system."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def reason(error: BaseException | None) -> Literal["disk", "memory"] | None:
    """Returns "disk" or "memory" where an error, or what it came from, is of that kind."""
    for each in _chain(error):
        text, number = str(each), getattr(each, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return "disk"
        if any(sign in text for sign in DISK_FULL):
            return "disk"
        if number == errno.ENOMEM or isinstance(each, MemoryError):
            return "memory"
        if any(sign in text for sign in OUT_OF_MEMORY):
            return "memory"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _file_of(error: BaseException) -> str | None:
    """Returns the file that an error, or what it came from, names."""
    for each in _chain(error):
        if isinstance(each, OSError) and isinstance(each.filename, str):
            return each.filename
        # TensorStore: Error writing "file" ...
        if found := re.search(r'"(?:local file )?(/[^"]+)"', str(each)):
            return found[1]
    return None
