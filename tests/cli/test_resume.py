"""A run that is stopped, killed or damaged and started again equals one that was not, bit for bit."""

import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from cli.conftest import assert_same_end, checkpoint, nothing_left_on_devices, rows, start

from fdm_jax.cli.main import main
from fdm_jax.evaluation.denoising import DenoisingError
from fdm_jax.training import loop, parallel
from fdm_jax.training.checkpoints import Checkpoints


def test_resumed_run_equals_uninterrupted_run(straight_run, data_dir, tmp_path):
    """Stopped at steps 3 and 8 of 20, in the middle of an epoch and of the warm-up; read in other ways in between.

    The straight run's save of step 8 was still being written while later steps overwrote donated buffers: it must hold
    its own step's bits.
    """
    other_ways = ["--config.data.workers=2", "--config.data.device_prefetch=0"]
    for images, ways in ((48, []), (128, other_ways), (320, [])):
        assert main(tiny.arguments(tmp_path / "run", data_dir, f"--config.train.images={images}", *ways)) == 0
        if images == 128:
            assert_same_end(tmp_path / "run", straight_run, 8)
    assert_same_end(tmp_path / "run", straight_run, 20)
    # Rows are means since the last one, so those at steps that both wrote after a full interval agree.
    straight = {row["step"]: row for row in rows(straight_run)}
    resumed = {row["step"]: row for row in rows(tmp_path / "run")}
    for step in (12, 16, 20):
        assert resumed[step] == straight[step]


def test_configuration_and_checkpoints_are_kept(straight_run):
    import json

    config = json.loads((straight_run / "config.json").read_text())
    assert config["train"]["batch_size"] == 16 and config["data"]["num_classes"] == 10
    steps = sorted(int(p.name) for p in (straight_run / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == [8, 12, 16, 20]  # the latest three, and every 128 images (8 steps)
    arrays, meta = checkpoint(straight_run, 20)
    assert meta["config"] == config and meta["data"]["batches"] == 20
    assert int(arrays["['train']['step']"]) == 20
    # The average lags behind the parameters, and neither was written over by a later step.
    kernel = "['map_layer0']['kernel']"
    assert np.abs(arrays["['model']['ema']" + kernel] - arrays["['train']['params']" + kernel]).max() > 1e-5
    earlier, meta = checkpoint(straight_run, 16)
    assert meta["data"]["batches"] == 16  # although more were on the devices
    assert np.abs(earlier["['train']['params']" + kernel] - arrays["['train']['params']" + kernel]).max() > 1e-5


@pytest.mark.slow
def test_another_number_of_devices_continues_the_run(straight_run, data_dir, tmp_path):
    """12 steps on eight devices, the rest on one: the same curve up to rounding."""
    assert main(tiny.arguments(tmp_path / "run", data_dir, "--config.train.images=192")) == 0
    process = start(tiny.arguments(tmp_path / "run", data_dir), devices=1)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    straight, resumed = rows(straight_run), rows(tmp_path / "run")
    assert [r["step"] for r in resumed] == [r["step"] for r in straight]
    np.testing.assert_allclose([r["loss"] for r in resumed], [r["loss"] for r in straight], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("one_by_one", [(), ("cpu",)])
def test_several_steps_as_one_program(straight_run, data_dir, tmp_path, monkeypatch, one_by_one):
    """The same curve; and stopped where a program of three would reach beyond, the same bits as without the stop.

    On CPUs steps are sent one by one, which only the programs show.
    """
    monkeypatch.setattr(loop, "ONE_BY_ONE", one_by_one)
    workdir, at_once = tmp_path / "run", ["--config.train.steps_at_once=3", "--config.log.every_images=48"]
    assert main(tiny.arguments(workdir, data_dir, *at_once)) == 0
    straight = {row["step"]: row["loss"] for row in rows(straight_run)}
    losses = {row["step"]: row["loss"] for row in rows(workdir)}
    assert list(losses) == [3, 6, 9, 12, 15, 18, 20]
    first = [np.mean([run[step] for step in steps]) for run, steps in ((losses, (3, 6, 9, 12)), (straight, (4, 8, 12)))]
    assert first[0] == pytest.approx(first[1], rel=1e-4)
    for images in (16 * 9, 320):
        assert main(tiny.arguments(tmp_path / "stopped", data_dir, *at_once, f"--config.train.images={images}")) == 0
    assert_same_end(tmp_path / "stopped", workdir, 20)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
def test_other_modes_continue_what_jit_began(straight_run, data_dir, tmp_path, monkeypatch, mode):
    """Checkpoints know nothing of how devices were used, and all ways give one curve.  What evaluates has it all."""
    monkeypatch.setattr(parallel, "LEAST_DEALT", 16)
    held, mean = [], DenoisingError.mean

    def watched(self, variables, **how):
        held.extend(leaf.sharding.shard_shape(leaf.shape) == leaf.shape for leaf in jax.tree.leaves(variables))
        return mean(self, variables, **how)

    monkeypatch.setattr(DenoisingError, "mean", watched)
    workdir = tmp_path / "run"
    assert main(tiny.arguments(workdir, data_dir, "--config.train.images=192")) == 0
    evaluated = ["--config.eval.every_images=320", "--config.eval.held_out_images=16"]
    assert main(tiny.arguments(workdir, data_dir, *evaluated, f"--config.parallel={mode}")) == 0
    assert held and all(held)
    losses = [[row["loss"] for row in rows(run) if "loss" in row] for run in (straight_run, workdir)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.slow
def test_ways_to_compute_the_network_may_change_on_the_way(straight_run, data_dir, tmp_path):
    """Rematerialised blocks and an attention chosen by name continue a checkpoint without, to the same curve."""
    workdir = tmp_path / "run"
    assert main(tiny.arguments(workdir, data_dir, "--config.train.images=192")) == 0
    ways = ["--config.remat=(8,)", "--config.network.attention=xla"]
    assert main(tiny.arguments(workdir, data_dir, *ways)) == 0
    losses = [[row["loss"] for row in rows(run)] for run in (straight_run, workdir)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert checkpoint(workdir, 20)[0].keys() == checkpoint(straight_run, 20)[0].keys()


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_kill_in_the_middle_of_saves_loses_nothing(straight_run, data_dir, tmp_path, capsys, monkeypatch):
    """kill -9 while a checkpoint is half written; then the run goes on to the same bits, in another environment too."""
    monkeypatch.setenv("JAX_THREEFRY_PARTITIONABLE", "0")  # other draws, up to jax 0.4 the default
    monkeypatch.setenv("JAX_RANDOM_SEED_OFFSET", "5")
    monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "raise")
    monkeypatch.setenv("JAX_NUMPY_DTYPE_PROMOTION", "strict")
    workdir = tmp_path / "run"
    saves, caught = workdir / "checkpoints", False

    def half_written():
        return any("tmp" in p.name for p in saves.glob("*"))

    while not caught:  # rarely, the save has ended before the kill arrives
        process = start(tiny.arguments(workdir, data_dir, "--config.checkpoint.every_images=16"), devices=8)
        wait_for(lambda: half_written() and any(p.name.isdigit() for p in saves.glob("*")), process)
        process.kill()
        process.wait()
        process.stdout.close()
        caught = half_written()
    assert main(tiny.arguments(workdir, data_dir)) == 0
    assert "Going on from step" in capsys.readouterr().err
    assert_same_end(workdir, straight_run, 20)
    assert not any("tmp" in p.name for p in (workdir / "checkpoints").iterdir())
    steps = [row["step"] for row in rows(workdir)]
    assert steps == sorted(set(steps))  # rows written before a kill are not there twice


def test_sigterm_saves_and_exits_with_0(straight_run, data_dir, tmp_path):
    workdir = tmp_path / "run"
    process = start(tiny.arguments(workdir, data_dir, "--config.train.images=160000"), devices=8)
    wait_for(
        lambda: (workdir / "metrics.jsonl").exists() and len((workdir / "metrics.jsonl").read_text()) > 10, process
    )
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "Stopped by SIGTERM at step" in out
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert f"step {saved:,}, saved" in out
    assert main(tiny.arguments(workdir, data_dir, f"--config.train.images={16 * (saved + 3)}")) == 0
    assert rows(workdir)[-1]["step"] == saved + 3


def damage(checkpoint):
    """Cut the files of its "train" part to half of their length."""
    for path in (checkpoint / "train").rglob("*"):
        if path.is_file() and path.stat().st_size > 4:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_checkpoint_falls_back_to_the_one_before(straight_run, data_dir, tmp_path, caplog):
    workdir = shutil.copytree(straight_run, tmp_path / "run")
    damage(workdir / "checkpoints" / "20")
    assert main(tiny.arguments(workdir, data_dir)) == 0
    assert "checkpoint of step 20 is damaged" in caplog.text
    assert (workdir / "checkpoints" / "damaged" / "20").is_dir()
    assert_same_end(workdir, straight_run, 20)
    assert rows(workdir) == rows(straight_run)


def test_what_is_damaged_is_said_in_a_line(straight_run, tmp_path, caplog):
    """Where Orbax has pages."""
    workdir = shutil.copytree(straight_run, tmp_path / "run")
    for path in (workdir / "checkpoints" / "20" / "model").glob("ocdbt.process_*/d/*"):
        path.write_bytes(b"")
    step, *_ = Checkpoints(workdir / "checkpoints", read_only=True).restore_model()
    (said,) = caplog.messages
    assert step == 16 and "The checkpoint of step 20 cannot be read: " in said
    assert "\n" not in said and "Encountered" not in said and len(said) < 300


def test_checkpoint_that_storage_does_not_give_is_not_damaged(straight_run, data_dir, tmp_path, monkeypatch, capsys):
    """A run that went on from the one before would lose what lies between."""
    workdir = shutil.copytree(straight_run, tmp_path / "run")

    def restore(self, folder, args):
        raise ValueError(f'UNKNOWN: Error reading local file "{folder}/manifest": Stale file handle')

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", restore)
    assert main(tiny.arguments(workdir, data_dir)) == 1
    said = capsys.readouterr().err
    assert "checkpoints/20/" in said.splitlines()[-1] and "(Stale file handle): wait" in said.splitlines()[-1]
    assert (workdir / "checkpoints" / "20").is_dir() and not (workdir / "checkpoints" / "damaged").exists()


def test_where_none_can_be_read_none_is_moved(straight_run, data_dir, tmp_path, capsys):
    """It may well not be they that are at fault: the device's memory, say, is in use."""
    workdir = tmp_path / "run"
    shutil.copytree(straight_run, workdir)
    for step in (8, 12, 16, 20):
        damage(workdir / "checkpoints" / str(step))
    before = {path: path.stat().st_size for path in (workdir / "checkpoints").rglob("*")}
    assert main(tiny.arguments(workdir, data_dir, "--config.train.images=384")) == 2
    said = capsys.readouterr().err
    assert f"None of the 4 checkpoints in {workdir / 'checkpoints'} can be read (" in said
    assert "all are left as they are; mend the cause, or start again with another --workdir." in said
    assert {path: path.stat().st_size for path in (workdir / "checkpoints").rglob("*")} == before


def test_a_run_that_has_ended_leaves_nothing_on_the_devices(data_dir, tmp_path):
    """In a notebook the next run may need the memory."""
    lone = jnp.zeros(1)
    if lone.addressable_shards and "addressable_shards" in vars(lone):
        pytest.skip("This JAX (0.7) lets an array on one device refer to itself once it was saved.")
    with nothing_left_on_devices():
        assert main(tiny.arguments(tmp_path / "run", data_dir, "--config.train.images=48")) == 0
