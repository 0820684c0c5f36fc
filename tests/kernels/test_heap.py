"""Allocator settings of a training program, each in a new process."""

import subprocess
import sys

import pytest

# Pages that are met for the first time, by the system's count, in running a program with 64 MiB or
# more of temporary memory three times.
COUNT = """
import resource
import jax, jax.numpy as jnp
from ldm_jax.kernels.heap import keep_large_blocks
kept = {kept}

def total(x):
    # Each x is kept for the gradient.
    return jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, length=8)[0].sum()

x = jnp.ones((1024, 4096))
program = jax.jit(jax.grad(total)).lower(x).compile()
for _ in range(4):
    program(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    program(x).block_until_ready()
after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
assert program.memory_analysis().temp_size_in_bytes >= 64 << 20
print(kept, after - before)
"""


def faults(kept: str) -> tuple[str, int]:
    """The result of ``kept``, and the number of page faults after it."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(kept=kept)], capture_output=True, text=True, check=True
    )
    result, count = done.stdout.split()
    return result, int(count)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_large_blocks_are_taken_from_the_system_once():
    result, count = faults("keep_large_blocks()")
    if result == "False":
        pytest.skip("this C library is not glibc")
    assert count < 400  # of 120,000
    # No fixed count: pages may be 2 MiB.
    assert faults("None")[1] > count
