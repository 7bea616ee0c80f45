"""How much memory there is; and what is freed is kept: the second block of a size costs no page faults."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from fdm_jax import host_memory
from fdm_jax.host_memory import check_program, machine_memory

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


@pytest.mark.parametrize(
    ("groups", "limits", "memory"),
    [
        # A job of Slurm's, with version 2: the smallest of those around the process.
        ("0::/slurm/job_7/step_0", {"slurm/memory.max": "max", "slurm/job_7/memory.max": "4096\n"}, 4096),
        # Version 1, which says a number for no limit.
        ("2:cpu:/\n4:memory:/a/b\n0::/\n", {"memory/a/memory.limit_in_bytes": "8192", "memory.max": "max"}, 8192),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": "9223372036854771712"}, None),
        # A container that sees its own group as the root.
        ("0::/docker/7d1c", {"memory.max": "2048"}, 2048),
        ("0::/", {}, None),
        (None, {}, None),
    ],
)
def test_memory_of_a_container_or_job(tmp_path, groups, limits, memory):
    mounted = tmp_path / "cgroup"
    for name, limit in limits.items():
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text(limit)
    if groups is not None:
        (tmp_path / "groups").write_text(groups)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine_memory(tmp_path / "groups", mounted) == (memory or whole)


def test_a_program_that_memory_does_not_hold(monkeypatch):
    kib = 2**10
    program = jax.jit(lambda x: x + 1).lower(jnp.zeros(32 * kib, jnp.uint8)).compile()  # 32 KiB in, 32 KiB out
    monkeypatch.setattr(host_memory, "machine_memory", lambda: 2 * 64 * kib)
    check_program(program, devices=2)
    with pytest.raises(MemoryError, match="the program takes .* GiB, and there are .* GiB"):
        check_program(program, devices=3)


@pytest.mark.parametrize(("donated", "product", "takes"), [(None, False, 32), (0, False, 16), (None, True, 48)])
def test_donated_memory_counts_once_and_temporary_memory_too(monkeypatch, donated, product, takes):
    """16 KiB in, 16 KiB out, which may be the same, and 16 KiB for the product in between."""
    program = jax.jit(lambda x: x @ x @ x if product else x + 1, donate_argnums=donated).lower(jnp.zeros((64, 64)))
    monkeypatch.setattr(host_memory, "machine_memory", lambda: takes * 2**10)
    check_program(program.compile(), devices=1)
    monkeypatch.setattr(host_memory, "machine_memory", lambda: takes * 2**10 - 1)
    with pytest.raises(MemoryError):
        check_program(program.compile(), devices=1)
