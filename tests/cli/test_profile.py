"""`fdm profile`: a trace that other programs open, and tables whose rows are the network's own modules."""

import gzip
import json
import re

import pytest
import tiny

from fdm_jax.cli.main import main


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """The train step on the eight devices of this process, as other tests compile it."""
    out = tmp_path_factory.mktemp("profile") / "new"
    assert main(["profile", f"--config={tiny.CONFIG}", *tiny.OVERRIDES, f"--out={out}", "--steps=2", "--top=3"]) == 0
    return out


def test_trace_opens(profiled):
    (trace,) = profiled.glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("args", {}).get("hlo_op") is not None for event in events) > 100
    assert len(list(profiled.glob("plugins/profile/*/*.xplane.pb"))) == 1


def test_tables(profiled):
    summary = json.loads((profiled / "profile.json").read_text())
    assert (summary["what"], summary["batch_size"], summary["devices"], summary["steps"]) == ("train", 16, 8, 2)
    for table in ("categories", "modules", "passes"):
        rows = summary[table]
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert sum(row["milliseconds"] for row in rows) == pytest.approx(summary["milliseconds"])
        assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
    modules = {row["name"]: row["share"] for row in summary["modules"]}
    assert {"enc_8x8_block0/conv0", "dec_8x8_in0/attention/qkv", "map_layer0"} <= modules.keys()
    assert {"between modules", "outside the network"} <= modules.keys()
    assert {row["name"] for row in summary["passes"]} == {"forward", "backward", "outside the network", "unnamed"}
    kinds = {row["name"] for row in summary["categories"]}
    assert {"convolution", "matrix product", "elementwise"} <= kinds and "not in the program" not in kinds
    assert all(0 <= device["between"] <= device["idle"] < 1 for device in summary["idle"].values())


def test_words(profiled):
    words = (profiled / "profile.txt").read_text()
    assert "ms of operations per step of 16 images on 8 x cpu, float32" in words
    assert re.search(r"/host:CPU: idle \d.* at a time; \d[\d.]*% between one program and the next[;.]", words)
    assert "Trace: " in words
    *tables, _ = words.split("\n\n")[1:]
    assert [table.count("%") for table in tables] == [3, 3, 3, 3]  # --top


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("--what=training", "--what cannot be 'training': did you mean 'train'?"),
        ("--config=", "There is no configuration file ''"),
        ("--steps=0", "--steps must be 1 or more, and is 0."),
        ("--steps=1001", "--steps must be at most 1000, or the trace fills the memory, and is 1001."),
        ("--out=/dev/null/profile", "--out=/dev/null/profile cannot be made: Not a directory."),
        ("--what=loop --config.parallel=pmap", "parallel=pmap compiles for the devices of this process only"),
    ],
)
def test_mistakes(capsys, tmp_path, wrong, sentence):
    assert main(["profile", f"--config={tiny.CONFIG}", *tiny.OVERRIDES, f"--out={tmp_path}", *wrong.split()]) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Compiling" not in said  # before anything is trained


@pytest.mark.slow
def test_sampling(tmp_path):
    arguments = ["--what=sample", "--steps=1", "--remat=8", "--batch-size=8"]
    assert main(["profile", f"--config={tiny.CONFIG}", *tiny.OVERRIDES, f"--out={tmp_path}", *arguments]) == 0
    summary = json.loads((tmp_path / "profile.json").read_text())
    assert {row["name"] for row in summary["passes"]} <= {"forward", "outside the network", "unnamed"}


@pytest.mark.slow
@pytest.mark.parametrize(("at_once", "steps"), [(1, 6), (2, 6), (16, 16)])
def test_loop(tmp_path, capsys, monkeypatch, at_once, steps):
    """What `fdm train` does, in whole programs, stopped when there is enough; nothing of its workdir is left."""
    monkeypatch.setattr("fdm_jax.training.loop.ONE_BY_ONE", ())  # as on accelerators
    arguments = ["--what=loop", "--steps=6", "--batch-size=8", "--remat=8", f"--config.train.steps_at_once={at_once}"]
    assert main(["profile", f"--config={tiny.CONFIG}", *tiny.OVERRIDES, f"--out={tmp_path}", *arguments]) == 0
    summary = json.loads((tmp_path / "profile.json").read_text())
    assert (summary["what"], summary["steps"], summary["batch_size"]) == ("loop", steps, 8)
    named = sum(row["share"] for row in summary["categories"] if row["name"] != "not in the program")
    assert named > 0.99
    assert {"forward", "backward", "recomputed"} <= {row["name"] for row in summary["passes"]}
    # Whole steps, however long it took to begin to trace them: each of the eight devices ran each operation once in each.
    assert {row["runs"] for row in summary["operations"] if row["category"] == "convolution"} == {8}
    printed = capsys.readouterr()
    assert "First step done" in printed.err and "of operations per step of 8 images" in printed.out
    assert {path.name for path in tmp_path.iterdir()} == {"plugins", "profile.json", "profile.txt"}


@pytest.mark.parametrize("name", ["profile.json", "profile.txt"])
def test_files_of_others_are_not_written_over(tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert main(["profile", f"--config={tiny.CONFIG}", *tiny.OVERRIDES, f"--out={tmp_path}"]) == 2
    assert f"{tmp_path} holds {name} of something else: give another --out." in capsys.readouterr().err
