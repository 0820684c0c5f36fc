"""The C library's memory as a training program sets it up, each time in a process of its own."""

import subprocess
import sys

import pytest

# Pages that are met for the first time, by the system's count, in taking and giving back 64 MiB ten times.
COUNT = """
import ctypes, resource
from ldm_jax.heap import keep_large_blocks
kept = {kept}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,)
def turn():
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    turn()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: str) -> tuple[str, int]:
    """What ``kept`` gives, and how many pages were met anew after it."""
    done = subprocess.run([sys.executable, "-c", COUNT.format(kept=kept)], capture_output=True, text=True, check=True)
    told, count = done.stdout.split()
    return told, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_large_blocks_are_taken_from_the_system_once():
    told, count = faults("keep_large_blocks()")
    if told == "False":
        pytest.skip("this C library is not glibc")
    assert count < 100
    assert faults("None")[1] > 10 * count  # 2 MiB pages may be everybody's here, so not a number of pages
