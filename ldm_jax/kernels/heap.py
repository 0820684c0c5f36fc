"""The C library's memory, set up for programs on a CPU."""

import ctypes
import os
import sys
from importlib.util import find_spec

import jax

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX, _MADV_HUGEPAGE = (
    -1,
    -4,
    -8,
    14,
)  # of glibc's malloc.h and Linux's mman.h
_HUGE_PAGE = 2 << 20


def keep_large_blocks() -> bool:
    """Lets this process keep the large blocks that it has used, on huge pages; whether it does: only on CPU, under Linux with glibc.

    XLA's programs for CPU ask for all their temporary memory anew at every call. glibc takes such blocks from the system and gives them back, so that
    every page of a training step was met for the first time: about a twentieth of its time. A program calls this, once and
    before anything is computed; a library should not, for it holds for everything in the process, whose memory from then on does not shrink.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    if _surely_cpu():
        # The threads of XLA are to share one heap: a block that is too large for a thread's own is taken from the system, whatever is said below.
        # They have theirs as soon as the backend has started.
        libc.mallopt(_ARENA_MAX, 1)
    if jax.default_backend() != "cpu":
        return False
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    kept = libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, -1)
    # The heap is made long once, which takes addresses and no memory, because only pages that exist can be told to be huge.
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    if start := libc.malloc(size):
        libc.free(start)
        first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(first, (start + size - first) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
    return bool(kept)


def _surely_cpu() -> bool:
    """Whether no other backend can start, as far as can be told before one has."""
    if platforms := jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]  (made at run time)
        return platforms == "cpu"
    return not any(find_spec(name) for name in ("jax_plugins", "libtpu"))
