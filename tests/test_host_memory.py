"""Freed memory is kept: the second block of a size costs no page faults."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from fdm_jax.host_memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
faults = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"x") * (128 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(kept), *faults)
"""


def faults(mode):
    run = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return map(int, run.stdout.split())


@pytest.mark.skipif(sys.platform != "linux", reason="the switches are glibc's")
def test_second_block_is_the_first():
    kept, first, second = faults("keep")
    assert kept and first > 1000 and second < first / 20
    kept, first, second = faults("leave")
    assert not kept and second > first / 2
