"""Releases of jaxlib with slow convolutions on CPUs get their flag, GPUs theirs, and nothing else does."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from fdm_jax.xla_flags import (
    COMMAND_BUFFERS,
    FLAG,
    avoid_slow_convolutions,
    launch_operations_singly,
    without_graphs,
)

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

    def pretend(version="0.10.2", flags=None, plugins=()):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in plugins else None)
        if flags is None:
            monkeypatch.delenv("XLA_FLAGS", raising=False)
        else:
            monkeypatch.setenv("XLA_FLAGS", flags)

    return pretend


@pytest.mark.parametrize("version", ["0.10.2", "0.11.2", "0.12.0.1"])
@pytest.mark.parametrize("flags, after", [(None, ""), ("", ""), ("--xla_dump_to=d", "--xla_dump_to=d ")])
def test_the_flag_comes_after_those_that_are_set(machine, version, flags, after):
    machine(version, flags=flags)
    assert avoid_slow_convolutions()
    assert os.environ["XLA_FLAGS"] == f"{after}{FLAG}=-individual_convolution"
    assert not avoid_slow_convolutions()


@pytest.mark.parametrize(
    "other", [{"version": "0.13.0"}, {"version": "0.10.1"}, {"plugins": ["libtpu"]}, {"plugins": ["jax_plugins"]}]
)
def test_others_are_left_alone(machine, other):
    machine(flags="", **other)
    assert not avoid_slow_convolutions()
    assert os.environ["XLA_FLAGS"] == ""


def test_a_choice_of_the_user_stays(machine):
    machine(flags=f"{FLAG}=")
    assert not avoid_slow_convolutions()
    assert os.environ["XLA_FLAGS"] == f"{FLAG}="


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


@pytest.fixture
def plugins(monkeypatch):
    """plugins(name, ...): pretends that plugins of these names are installed, and none else."""

    def pretend(*names):
        points = [importlib.metadata.EntryPoint(name, f"jax_plugins.{name}", "jax_plugins") for name in names]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "jax_plugins" else [])

    return pretend


@pytest.mark.parametrize("name", ["xla_cuda12", "xla_cuda13"])
def test_traces_of_gpus_name_operations(monkeypatch, plugins, name):
    plugins("other", name)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=d")
    assert launch_operations_singly()
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=d {COMMAND_BUFFERS}="
    assert not launch_operations_singly()


def test_traces_of_others_and_of_those_who_chose(monkeypatch, plugins):
    plugins("other")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert not launch_operations_singly()
    assert "XLA_FLAGS" not in os.environ
    plugins("xla_cuda13")
    monkeypatch.setenv("XLA_FLAGS", f"{COMMAND_BUFFERS}=FUSION")
    assert not launch_operations_singly()
    assert os.environ["XLA_FLAGS"] == f"{COMMAND_BUFFERS}=FUSION"


def test_programs_for_gpus_have_no_graphs(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = without_graphs("gpu")
    assert options == {"xla_gpu_enable_command_buffer": ""}
    # XLA reads the options of GPUs for CPUs too, and refuses those that it does not know.
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    assert without_graphs("cpu") is None and without_graphs("tpu") is None
    monkeypatch.setenv("XLA_FLAGS", f"{COMMAND_BUFFERS}=FUSION")
    assert without_graphs("gpu") is None


def test_xla_knows_the_flag_of_traces():
    """An unknown flag would end the process; an empty list of what to record is one that XLA takes."""
    program = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    environment = {**os.environ, "XLA_FLAGS": f"{COMMAND_BUFFERS}=", "JAX_PLATFORMS": "cpu"}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == "2", found.stderr
