"""The C library's heap, configured for programs on a CPU."""

import ctypes
import os
import sys
from importlib.util import find_spec

import jax

# Of glibc's malloc.h and Linux's mman.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX, _MADV_HUGEPAGE = -1, -4, -8, 14
_HUGE_PAGE = 2 << 20


def keep_large_blocks() -> bool:
    """Keeps the large memory blocks of this process for reuse, on huge pages.

    XLA's programs for CPU allocate all their temporary memory at every call. glibc takes such
    blocks from the system and returns them, so that every page of a training step is touched for
    the first time again. Call this once in a program, before anything is computed; not in a
    library: it holds for everything in the process, whose memory no longer shrinks.

    Returns:
      Whether it is done: only on CPU, under Linux with glibc.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    if _surely_cpu():
        # XLA's threads must share one heap, before the backend starts them: a block too large for
        # a thread's own heap comes from the system, whatever is configured below.
        libc.mallopt(_ARENA_MAX, 1)
    if jax.default_backend() != "cpu":
        return False
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    kept = libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, -1)
    # Reserving a long heap once takes addresses but no memory: only existing pages can be huge.
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    if start := libc.malloc(size):
        libc.free(start)
        first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(first, (start + size - first) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
    return bool(kept)


def free_bytes() -> int:
    """Returns the bytes that the heap has taken from the system and not given out; 0 if unknown."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallinfo2"):
        return 0
    libc.mallinfo2.restype = _MallInfo
    return libc.mallinfo2().fordblks


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _surely_cpu() -> bool:
    """Whether no other backend can start, decided before any has."""
    if platforms := jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        return platforms == "cpu"
    return not any(find_spec(name) for name in ("jax_plugins", "libtpu"))
