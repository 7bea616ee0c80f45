"""`fdm likelihood` on the tiny run: per image, whatever the batch, continued, refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from encoded import png

from fdm_jax.cli.main import main
from fdm_jax.cli.record import Record
from fdm_jax.defaults import recipe
from fdm_jax.errors import UserError
from fdm_jax.experiment import open_data
from fdm_jax.sampling import flow


def likelihood(workdir, out, *more):
    return main(["likelihood", f"--workdir={workdir}", f"--out={out}", "--tolerance=1e-3", *more])


def bits(path):
    first, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert first["settings"]["dequantisation"] == "uniform"
    return {row["index"]: row["bits_per_dim"] for row in rows}


@pytest.fixture(scope="module")
def twelve(straight_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("likelihood") / "bits.jsonl"
    assert likelihood(straight_run, out, "--num=12", "--batch=8") == 0
    return out


def test_bits_of_each_image(twelve):
    values = bits(twelve)
    assert sorted(values) == list(range(12))
    assert all(1 < value < 12 for value in values.values())  # a uniform density has 8


def test_a_network_of_bfloat16_is_followed_in_float32(twelve, straight_run, tmp_path, in_bfloat16):
    """The solver would take its rounding for error, and shorten its steps until it got nowhere."""
    assert likelihood(straight_run, tmp_path / "bits.jsonl", "--num=12", "--batch=8") == 0
    assert (tmp_path / "bits.jsonl").read_text() == twelve.read_text()


def test_a_stop_in_the_middle_makes_no_difference(twelve, straight_run, tmp_path, capsys):
    out = tmp_path / "bits.jsonl"
    lines = twelve.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:9] + lines[1:3]) + lines[9][:10])  # eight rows, two of them doubled, and a torn one
    assert likelihood(straight_run, out, "--num=12", "--batch=8") == 0
    before, after = bits(twelve), bits(out)
    assert before.keys() == after.keys()
    for index, value in before.items():
        assert after[index] == pytest.approx(value, abs=0.02)  # another batch, other steps of the ODE solver
    said = capsys.readouterr().out
    assert f"{np.mean(list(after.values())):.4f} +- " in said and "12 images of digits (test)" in said


def test_a_run_that_was_moved_keeps_its_results(twelve, straight_run, tmp_path, monkeypatch):
    moved = shutil.copytree(straight_run, tmp_path / "moved")
    out = shutil.copy(twelve, tmp_path / "bits.jsonl")
    monkeypatch.setattr("fdm_jax.cli.likelihood.compile_bits", None)  # nothing is computed
    assert likelihood(moved, out, "--num=12", "--batch=8") == 0
    assert out.read_text() == twelve.read_text()


def test_other_settings_are_refused(twelve, straight_run, capsys):
    assert likelihood(straight_run, twelve, "--num=12", "--seed=1") == 2
    assert "holds results made with another seed" in capsys.readouterr().err


@pytest.mark.slow
def test_the_estimate_and_the_exact_figure_have_files_of_their_own(straight_run, tmp_path):
    workdir = shutil.copytree(straight_run, tmp_path / "run")
    for more in ([], ["--exact"]):
        assert main(["likelihood", f"--workdir={workdir}", "--tolerance=1e-2", "--num=2", "--batch=8", *more]) == 0
    estimate, exact = (bits(workdir / f"likelihood-{name}.jsonl") for name in ("test", "test-exact"))
    assert estimate.keys() == exact.keys() == {0, 1} and estimate[0] == pytest.approx(exact[0], abs=0.5)


def test_settings_without_results_stand_in_nobodys_way(tmp_path):
    """A command that failed, and the next one, which does what its sentence advised."""
    Record(tmp_path / "bits.jsonl", {"tolerance": 1e-12})
    Record(tmp_path / "bits.jsonl", {"tolerance": 1e-5}).add({"index": 0})
    assert Record(tmp_path / "bits.jsonl", {"tolerance": 1e-5}).rows == [{"index": 0}]
    with pytest.raises(UserError, match="results made with another tolerance"):
        Record(tmp_path / "bits.jsonl", {"tolerance": 1e-12})
    with pytest.raises(UserError, match="in/it cannot be written: Not a directory; give another --out."):
        Record(tmp_path / "bits.jsonl" / "in" / "it", {"tolerance": 1e-12})


def test_a_terminal_is_written_and_not_read():
    """As /dev/stdout is."""
    master, slave = os.openpty()
    try:
        Record(Path(os.ttyname(slave)), {"tolerance": 1e-5}).add({"index": 0})
        shown = b""
        while shown.count(b"\n") < 2:
            shown += os.read(master, 1000)
        assert shown.splitlines() == [b'{"settings": {"tolerance": 1e-05}}', b'{"index": 0}']
    finally:
        os.close(slave)
        os.close(master)


def test_other_data_of_the_same_name_is_refused(straight_run, tmp_path, capsys):
    """Folders are called by the last part of their path."""
    for place in ("a", "b"):
        (tmp_path / place / "cats").mkdir(parents=True)
        (tmp_path / place / "cats" / "0.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
        (tmp_path / place / "cats" / "dataset.json").write_text('{"labels": [["0.png", 0]]}')
    settings = ["--split=train", "--batch=8"]
    assert likelihood(straight_run, tmp_path / "bits.jsonl", *settings, f"--data={tmp_path}/a/cats") == 0
    assert likelihood(straight_run, tmp_path / "bits.jsonl", *settings, f"--data={tmp_path}/b/cats") == 2
    assert "holds results made with another source" in capsys.readouterr().err


def test_an_ode_that_cannot_be_solved(straight_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flow, "MAX_STEPS", 2)
    assert likelihood(straight_run, tmp_path / "bits.jsonl", "--num=2", "--batch=8") == 2
    assert "give a larger --tolerance, or an earlier --checkpoint if" in capsys.readouterr().err


def test_classes_that_the_model_does_not_know(straight_run, tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    (tmp_path / "dataset.json").write_text('{"labels": [["0.png", 11]]}')
    assert likelihood(straight_run, tmp_path / "bits.jsonl", "--split=train", f"--data={tmp_path}") == 2
    assert "The model knows 10 classes, and " in capsys.readouterr().err


def test_held_out_images_are_neither_mirrored_nor_a_subset(data_dir):
    config = recipe("digits")
    config.data.update(data_dir=data_dir.partition("=")[2], xflip=True)
    assert len(open_data(config)) == 2 * 1500 and len(open_data(config, "test")) == 297
    config.data.max_images = 100
    assert len(open_data(config)) == 2 * 100 and len(open_data(config, "test")) == 297


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--num=0", "--num must be 1 or more"),
        ("--tolerance=1", "--tolerance must be between"),
        ("--sigma-min=90", "0 < sigma_min < sigma_max"),
        ("--split=nothing", "(data.source=digits) cannot be had: digits has no split 'nothing'"),
        ("--data=nowhere.zip", "nowhere.zip"),
        ("--seed=-1", "--seed must be from 0"),
    ],
)
def test_bad_input(straight_run, tmp_path, capsys, argument, words):
    assert likelihood(straight_run, tmp_path / "bits.jsonl", argument) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "bits.jsonl").exists()


def test_a_file_that_is_something_else(straight_run, tmp_path, capsys):
    for content in ("not ours\n", '{"settings": 5}\n{}\n'):
        (tmp_path / "notes.txt").write_text(content)
        assert likelihood(straight_run, tmp_path / "notes.txt") == 2
        assert "is not a file of results" in capsys.readouterr().err
        assert (tmp_path / "notes.txt").read_text() == content
