"""`fdm import` and `fdm export`: workdirs of the original's models, files for its users, and back."""

import errno
import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tiny
from cli.conftest import checkpoint
from conftest import GOLDEN
from interop.storages import plain_storage
from interop.written import write_snapshot

from fdm_jax.cli.main import main
from fdm_jax.defaults import from_dict
from fdm_jax.errors import UserError
from fdm_jax.experiment import Experiment
from fdm_jax.interop import files, load_snapshot
from fdm_jax.interop.snapshots import read_snapshot, tensors
from fdm_jax.interop.state_dict import to_torch
from fdm_jax.networks import SongUNet
from fdm_jax.training.checkpoints import Checkpoints
from fdm_jax.training.locking import locked

SNAPSHOT = GOLDEN / "snapshot-fdm_edm.pkl"


@pytest.fixture(autouse=True)
def without_torch(monkeypatch):
    """The numbers in snapshots are read by the tests' own few lines, so that all of this runs where torch is not."""
    monkeypatch.setattr(files, "load_snapshot", lambda path: load_snapshot(path, plain_storage))


@pytest.fixture
def imported(tmp_path):
    assert main(["import", str(SNAPSHOT), f"--workdir={tmp_path / 'imported'}"]) == 0
    return tmp_path / "imported"


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    *before, sentence = capsys.readouterr().err.strip().splitlines()
    assert not before
    return sentence


def average(workdir):
    return Checkpoints(workdir / "checkpoints", read_only=True).restore_model()[1]


def test_import_says_what_it_found_and_generates(tmp_path, capsys):
    imported = tmp_path / "imported"
    assert main(["import", str(SNAPSHOT), f"--workdir={imported}"]) == 0
    said = capsys.readouterr().out
    assert "EDM-FDM with multiplier 2 on ddpmpp, 180,513 parameters, 8x8x1 images, 10 classes" in said
    out = tmp_path / "grid.png"
    assert main(["generate", f"--workdir={imported}", "--seeds=0-3", "--class=3", "--steps=3", f"--out={out}"]) == 0
    assert np.asarray(PIL.Image.open(out)).std() > 0
    assert json.loads((imported / "config.json").read_text())["network"]["model_channels"] == 16


def test_what_was_imported_is_evaluated_and_compared(imported, tmp_path):
    """By fdm evaluate and fdm sweep, as if trained here."""
    shape = Experiment.from_config(from_dict(json.loads((imported / "config.json").read_text()))).image_shape
    images = np.random.default_rng(0).integers(0, 256, (6, *shape), np.uint8)
    (tmp_path / "real").mkdir()
    for i, image in enumerate(images):
        PIL.Image.fromarray(image.squeeze()).save(tmp_path / "real" / f"{i}.png")
    statistics = f"{tmp_path}/ref.npz"
    assert main(["evaluate", "ref", f"--data={tmp_path}/real", "--extractor=pixels", f"--out={statistics}"]) == 0
    sampled = [f"--workdir={imported}", f"--ref={statistics}", "--num=8", "--batch=8"]
    assert main(["evaluate", *sampled, "--steps=2", f"--out={tmp_path}/evaluation"]) == 0
    figures = json.loads((tmp_path / "evaluation" / "result.json").read_text())
    assert figures["images"] == 8 and np.isfinite(figures["metrics"]["frechet_distance"]["value"])
    assert (
        main(["sweep", *sampled, "--solvers=heun", "--nfe=3", "--seeds=0-7", "--tolerance=0.05", f"--out={tmp_path}/s"])
        == 0
    )


def test_weights_are_those_of_the_file(imported):
    wanted = load_snapshot(SNAPSHOT, plain_storage).variables
    jax.tree.map(np.testing.assert_array_equal, average(imported), dict(wanted))


@pytest.mark.parametrize("name", ["fdm_edm", "ve", "edm"])
def test_export_and_import_give_the_same_bits(tmp_path, name):
    assert main(["import", str(GOLDEN / f"snapshot-{name}.pkl"), f"--workdir={tmp_path / 'a'}"]) == 0
    out = tmp_path / "model.safetensors"
    assert main(["export", f"--workdir={tmp_path / 'a'}", f"--out={out}"]) == 0
    assert main(["import", str(out), f"--workdir={tmp_path / 'b'}"]) == 0
    jax.tree.map(np.testing.assert_array_equal, average(tmp_path / "a"), average(tmp_path / "b"))
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()

    from safetensors.numpy import load_file

    original = tensors(read_snapshot(GOLDEN / f"snapshot-{name}.pkl", plain_storage).ema)
    written = load_file(out)
    assert {f"model.{key}" for key in written} == original.keys()
    for key, value in written.items():
        np.testing.assert_array_equal(value, original[f"model.{key}"])
    description = json.loads((tmp_path / "model.safetensors.json").read_text())
    arguments = read_snapshot(GOLDEN / f"snapshot-{name}.pkl", plain_storage).ema.state["_modules"]["model"].arguments
    assert arguments.items() <= description["SongUNet"].items()
    ema = read_snapshot(GOLDEN / f"snapshot-{name}.pkl", plain_storage).ema
    preconditioning = description["preconditioning"]
    assert preconditioning.pop("class") == ema.class_name
    assert preconditioning.items() <= ema.state.items()  # the original keeps its arguments as attributes
    assert (
        set(preconditioning)
        == {
            "fdm_edm": {"sigma_data", "sigma_min", "sigma_max", "fdm_multiplier"},
            "ve": {"sigma_min", "sigma_max"},
            "edm": {"sigma_data"},
        }[name]
    )


def test_export_onto_a_full_disk_goes_on_as_it_says(imported, tmp_path, capsys, monkeypatch):
    out, write_whole = tmp_path / "m.safetensors", files.write_whole
    full = [out, tmp_path / "m.safetensors.json"]  # when which of them is written

    def write_unless_full(path, write):
        if full and path == full[-1]:
            full.pop()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_whole(path, write)

    monkeypatch.setattr(files, "write_whole", write_unless_full)
    capsys.readouterr()
    for _ in range(2):
        assert "the same command goes on" in refused(capsys, "export", f"--workdir={imported}", f"--out={out}")
    assert main(["export", f"--workdir={imported}", f"--out={out}"]) == 0
    out.unlink()
    (tmp_path / "m.safetensors.json").write_text("of another model")
    capsys.readouterr()
    assert "m.safetensors.json is there already" in refused(capsys, "export", f"--workdir={imported}", f"--out={out}")
    assert not out.exists()


def test_export_for_torch(imported, tmp_path):
    torch = pytest.importorskip("torch")
    out = tmp_path / "model.pt"
    assert main(["export", f"--workdir={imported}", "--format=torch", f"--out={out}"]) == 0
    state = torch.load(out, weights_only=True)
    original = tensors(read_snapshot(SNAPSHOT).ema)
    assert {f"model.{key}" for key in state} == original.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(value.numpy(), original[f"model.{key}"])
    assert main(["import", str(out), f"--workdir={tmp_path / 'b'}"]) == 0
    jax.tree.map(np.testing.assert_array_equal, average(imported), average(tmp_path / "b"))


def test_torch_is_asked_for(imported, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    capsys.readouterr()
    sentence = refused(capsys, "export", f"--workdir={imported}", "--format=torch", f"--out={tmp_path / 'model.pt'}")
    assert "torch must be installed" in sentence and not list(tmp_path.glob("*model.pt*"))


@pytest.fixture
def tiny_import(tmp_path):
    """An import with the network of the tests' tiny run."""
    network = SongUNet(8, 1, 10, 0, "ddpmpp", 4, (1,), 1, 1, (), 0.1)
    variables = jax.jit(network.init)(jax.random.key(7), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
    write_snapshot(
        tmp_path / "tiny.pkl", to_torch(variables, (1, 1)), ("EDMPrecond", {}), files.original_arguments(network)
    )
    files.import_model(tmp_path / "tiny.pkl", tmp_path / "imported")
    return tmp_path / "imported"


@pytest.fixture
def start(tmp_path):
    """Arguments of a short run that starts from an import."""
    short = [
        f"--config.data.data_dir={tmp_path / 'data'}",
        "--config.train.images=32",
        "--config.checkpoint.every_images=16",
    ]
    return lambda workdir, init_from, *more: tiny.arguments(workdir, f"--init_from={init_from}", *short, *more)


def test_training_starts_from_an_import(tiny_import, start, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(start(run, tiny_import)) == 0
    assert f"Weights: the average of {tiny_import}, step 0." in capsys.readouterr().out
    arrays, _ = checkpoint(run, 1)  # the first step has a rate of 0: parameters and average stay what they were
    for place in ("['train']['params']", "['model']['ema']"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(average(tiny_import)["params"]):
            np.testing.assert_array_equal(arrays[place + jax.tree_util.keystr(path)], leaf)
    later, _ = checkpoint(run, 2)
    kernel = "['train']['params']['map_layer0']['kernel']"
    assert np.abs(later[kernel] - arrays[kernel]).max() > 1e-6
    # Given again, and with the import gone, the run goes on from its own checkpoint.
    tiny_import.rename(tmp_path / "gone")
    assert main(start(run, tiny_import, "--config.train.images=48")) == 0
    assert "Going on from step 2" in capsys.readouterr().err


def test_training_refuses_what_does_not_fit(tiny_import, start, tmp_path, capsys):
    capsys.readouterr()
    changes = ("--config.network.model_channels=8", "--config.network.dtype=bfloat16")
    sentence = refused(capsys, *start(tmp_path / "a", tiny_import, *changes))
    assert "cannot be used: the tensors are not those of this configuration's network" in sentence
    assert "The configurations differ in " in sentence and "network.model_channels (4 there, 8 here)." in sentence
    assert "network.dtype" not in sentence  # of which the weights' shapes know nothing
    assert "There is no checkpoint in" in refused(capsys, *start(tmp_path / "b", tmp_path / "nowhere"))
    sentence = refused(capsys, *start(tiny_import, tiny_import))
    assert "holds an imported model" in sentence and "--init_from=" in sentence
    assert average(tiny_import)["params"]  # nothing was moved away


def test_bad_input(imported, tmp_path, capsys):
    capsys.readouterr()
    new = f"--workdir={tmp_path / 'new'}"
    assert "holds a run already" in refused(capsys, "import", SNAPSHOT, f"--workdir={imported}")
    assert "cannot be read (No such file" in refused(capsys, "import", tmp_path / "nothing.pkl", new)
    with locked(tmp_path / "other"):
        assert "Another process is at work in" in refused(capsys, "import", SNAPSHOT, f"--workdir={tmp_path / 'other'}")
    cut = tmp_path / "cut.pkl"
    cut.write_bytes(SNAPSHOT.read_bytes()[:-100])
    assert "damaged or incomplete" in refused(capsys, "import", cut, new)
    out = tmp_path / "m.safetensors"
    assert "must end in .safetensors" in refused(
        capsys, "export", f"--workdir={imported}", f"--out={tmp_path / 'm.bin'}"
    )
    assert "is not the workdir of a run" in refused(capsys, "export", f"--workdir={tmp_path}", f"--out={out}")
    assert "There is no checkpoint of step 5" in refused(
        capsys, "export", f"--workdir={imported}", f"--out={out}", "--checkpoint=5"
    )
    assert main(["export", f"--workdir={imported}", f"--out={out}"]) == 0
    capsys.readouterr()
    assert "is there already" in refused(capsys, "export", f"--workdir={imported}", f"--out={out}")
    beside = tmp_path / "m.safetensors.json"
    description = beside.read_text()
    for content, words in (
        (description.replace('"model_channels": 16', '"model_channels": 32'), "tensors are not those of"),
        ("{}", "is not the description of a file"),
        ("{", "cannot be read"),
    ):
        beside.write_text(content)
        assert words in refused(capsys, "import", out, new)
    beside.write_text(description)
    whole = out.read_bytes()
    for content in (whole[:-10], whole[:100], b"", b"x" * 100):
        out.write_bytes(content)
        assert "is damaged or incomplete" in refused(capsys, "import", out, new)
    beside.unlink()
    assert "is missing: keep the two together" in refused(capsys, "import", out, new)
    assert "There is no file" in refused(capsys, "import", tmp_path / "no.safetensors", new)
    assert not (tmp_path / "new").exists()


def test_import_that_was_stopped_begins_anew(tmp_path, monkeypatch):
    workdir = tmp_path / "w"
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_whole", lambda *_: 1 / 0)  # between the checkpoint and config.json
        with pytest.raises(ZeroDivisionError):
            files.import_model(SNAPSHOT, workdir)
    assert (workdir / "checkpoints" / "0").exists() and not (workdir / "config.json").exists()
    files.import_model(SNAPSHOT, workdir)
    assert average(workdir)["params"]


def test_import_deletes_no_checkpoints_of_a_run(tmp_path):
    """Of which only the config.json was lost."""
    workdir = tmp_path / "w"
    files.import_model(SNAPSHOT, workdir)
    (workdir / "config.json").unlink()
    (workdir / "checkpoints" / "0").rename(workdir / "checkpoints" / "8")
    with pytest.raises(UserError, match="holds checkpoints of a run, though no config.json"):
        files.import_model(SNAPSHOT, workdir)
    assert (workdir / "checkpoints" / "8").exists()


def test_tensors_that_do_not_fit_the_description(tmp_path):
    model = load_snapshot(SNAPSHOT, plain_storage)
    state = to_torch(model.variables, (1, 1))
    network = dict(files.original_arguments(model.network))
    path = tmp_path / "s.pkl"
    write_snapshot(path, state, ("EDMPrecond", {}), network)
    assert load_snapshot(path, plain_storage).config["momentum"]["enabled"] is False
    for change, words in (
        ({"dec.8x8_aux_conv.bias": np.zeros(2, np.float32)}, r"dec_8x8_aux_conv/bias is \(2,\), and should be \(1,\)"),
        ({"enc.8x8_new.weight": np.zeros((1, 1), np.float32)}, "enc_8x8_new/kernel is .* and should be absent"),
        ({"enc.8x8_conv.weight": np.zeros((1, 1, 1), np.float32)}, "has shape"),
    ):
        write_snapshot(path, state | change, ("EDMPrecond", {}), network)
        with pytest.raises(UserError, match=f"s.pkl cannot be used: .*{words}"):
            load_snapshot(path, plain_storage)
    del state["map_layer0.bias"]
    write_snapshot(path, state, ("EDMPrecond", {}), network)
    with pytest.raises(UserError, match="map_layer0/bias is absent"):
        load_snapshot(path, plain_storage)


IMPORT = """
import sys
import tiny
from fdm_jax.cli.main import main
code = main(["import", sys.argv[1], f"--workdir={sys.argv[2]}"])
print(tiny.peak_memory())
sys.exit(code)
"""


@pytest.mark.slow
def test_a_snapshot_of_250_megabytes(tmp_path):
    """CIFAR-10's VP network, 61.8 million parameters: under a minute and 2 GiB."""
    pytest.importorskip("torch")
    network = SongUNet(32, 3, 10, 9, "ddpmpp", 128, (1, 2, 2, 2), 4, 4, (16,), 0.13)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    path = tmp_path / "large.pkl"
    write_snapshot(
        path, to_torch(variables, (1, 1)), ("FDM_VPPrecond", {"fdm_multiplier": 2.0}), files.original_arguments(network)
    )
    assert path.stat().st_size > 240e6
    began = time.monotonic()
    done = tiny.run_script(IMPORT, path, tmp_path / "w")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60
    *said, memory = done.stdout.splitlines()
    assert "VP-FDM with multiplier 2 on ddpmpp, 61,806,979 parameters" in said[-1]
    assert int(memory) < 2 * 2**30
    assert (tmp_path / "w" / "config.json").exists()
    print(f"{time.monotonic() - began:.1f} s, {int(memory) / 2**20:.0f} MiB")
