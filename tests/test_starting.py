"""What a run starts from."""

import argparse
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
import tiny

from fdm_jax.cli.config import load
from fdm_jax.defaults import recipe, to_json
from fdm_jax.devices import make_mesh, replicated, sharded
from fdm_jax.errors import UserError
from fdm_jax.experiment import Experiment
from fdm_jax.training import starting


class State(NamedTuple):
    params: dict
    ema: dict


def state(placed):
    """A million parameters and their average, 4 bytes each: 8 MB."""
    numbers = jax.ShapeDtypeStruct((1000, 1000), jnp.float32, sharding=placed(make_mesh()))
    return State(params={"kernel": numbers}, ema={"kernel": numbers})


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", '{"mine": 1}'),
        ("config.json", "mine"),
        ("metrics.jsonl", "{}"),
        ("parameters.txt", "mine"),
        ("curves.png", ""),
        ("held_out.png", ""),
    ],
)
def test_files_of_others_are_not_written_over(tmp_path, name, content):
    """In the current folder, say, which is given as the workdir."""
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path} holds {name} of something else: give another --workdir."):
        starting.check_workdir(tmp_path)


def test_a_run_without_checkpoints_begins_again(tmp_path):
    """It ended before the first one."""
    starting.check_workdir(tmp_path)
    (tmp_path / "config.json").write_text(to_json(recipe("digits")))
    for name in ("parameters.txt", "metrics.jsonl", "curves.png"):
        (tmp_path / name).touch()
    starting.check_workdir(tmp_path)


@pytest.mark.parametrize("placed, need", [(replicated, 64e6), (sharded, 8e6)])
def test_cpu_devices_share_the_memory_of_one_machine(monkeypatch, placed, need):
    """Eight of them: eight copies, or one that is dealt out."""
    monkeypatch.setattr(starting, "machine_memory", lambda: need)
    starting.check_memory(state(placed))
    monkeypatch.setattr(starting, "machine_memory", lambda: need - 1)
    with pytest.raises(
        UserError, match=r"has 1,000,000 parameters: .* this machine has .* or take a machine with more"
    ):
        starting.check_memory(state(placed))


def test_a_state_that_no_memory_holds_is_not_begun(monkeypatch):
    experiment = Experiment.from_config(load(argparse.Namespace(config=tiny.CONFIG, overrides=tiny.OVERRIDES)))
    sharding = experiment.parallelised(make_mesh()).state_sharding
    monkeypatch.setattr(starting, "machine_memory", lambda: 2**12)
    with pytest.raises(UserError, match="take a smaller network"):
        starting.fresh_state(experiment.network, experiment.spec, experiment.image_shape, sharding)


@pytest.mark.parametrize("placed, need", [(replicated, 8e6), (sharded, 1e6)])
def test_other_devices_have_memory_of_their_own(monkeypatch, placed, need):
    """The least of what they say decides, and one that says nothing may have enough."""
    said = [{"bytes_limit": need + 1}, {"bytes_limit": need}, None]
    devices = [SimpleNamespace(platform="gpu", device_kind="H200", memory_stats=lambda s=s: s) for s in said]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    starting.check_memory(state(placed))
    said[1]["bytes_limit"] -= 1
    with pytest.raises(
        UserError, match=r"a device \(H200\) has .* GiB: .* deal the state to more devices with --config"
    ):
        starting.check_memory(state(placed))
