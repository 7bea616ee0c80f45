"""The release of jaxlib with slow convolutions on CPUs gets its flag, and nothing else does."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import pytest

from fdm_jax.xla_flags import FLAG, SLOW_CONVOLUTIONS, avoid_slow_convolutions

PROGRAM = """
import sys
from fdm_jax.xla_flags import avoid_slow_convolutions
avoided = sys.argv[1] == "avoid" and avoid_slow_convolutions()
import jax
import jax.numpy as jnp
convolve = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
program = jax.jit(convolve).lower(jnp.ones((128, 8, 8, 64)), jnp.ones((3, 3, 64, 64))).compile().as_text()
print(int(avoided), int("__ynn_fusion" in program))
"""


@pytest.fixture
def machine(monkeypatch):
    """machine(version, flags, plugins): pretends that these are there."""

    def pretend(version=SLOW_CONVOLUTIONS, flags=None, plugins=()):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in plugins else None)
        if flags is None:
            monkeypatch.delenv("XLA_FLAGS", raising=False)
        else:
            monkeypatch.setenv("XLA_FLAGS", flags)

    return pretend


@pytest.mark.parametrize("flags, after", [(None, ""), ("", ""), ("--xla_dump_to=d", "--xla_dump_to=d ")])
def test_the_flag_comes_after_those_that_are_set(machine, flags, after):
    machine(flags=flags)
    assert avoid_slow_convolutions()
    assert os.environ["XLA_FLAGS"] == f"{after}{FLAG}=-individual_convolution"
    assert not avoid_slow_convolutions()


@pytest.mark.parametrize(
    "other", [{"version": "0.12.0"}, {"version": "0.10.1"}, {"plugins": ["libtpu"]}, {"plugins": ["jax_plugins"]}]
)
def test_others_are_left_alone(machine, other):
    machine(flags="", **other)
    assert not avoid_slow_convolutions()
    assert os.environ["XLA_FLAGS"] == ""


def test_a_choice_of_the_user_stays(machine):
    machine(flags=f"{FLAG}=")
    assert not avoid_slow_convolutions()
    assert os.environ["XLA_FLAGS"] == f"{FLAG}="


@pytest.mark.skipif(importlib.metadata.version("jaxlib") != SLOW_CONVOLUTIONS, reason="of one release of jaxlib")
def test_xla_takes_the_flag(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")

    def run(mode):
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
        ).stdout.split()

    if run("leave") == ["0", "0"]:
        pytest.skip("XLA uses no YNNPACK on this machine")
    avoided, used = run("avoid")
    assert used == "0" or avoided == "0"  # "0": an accelerator's plugin is installed
