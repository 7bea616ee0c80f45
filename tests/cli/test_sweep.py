"""`fdm sweep` on the tiny run: its table and pictures, continued, refused."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from fdm_jax.cli.main import main
from fdm_jax.evaluation.references import Reference, save_reference
from fdm_jax.sampling import flow
from fdm_jax.sampling.linear import Combination, step_call
from fdm_jax.sampling.solvers import SOLVERS
from fdm_jax.training.locking import locked


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    path = tmp_path_factory.mktemp("stats") / "pixels.npz"
    save_reference(Reference(np.full(64, 0.3), np.eye(64) / 20, description={"extractor": "pixels", "width": 64}), path)
    return path


def sweep(workdir, out, *more):
    return main(
        ["sweep", f"--workdir={workdir}", f"--out={out}", "--seeds=0-9", "--batch=16", "--tolerance=1e-4", *more]
    )


@pytest.fixture(scope="module")
def folder(straight_run, statistics, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "sweep"
    arguments = ["--solvers=heun,unipc-2,ancestral", "--nfe=1,5,41", f"--ref={statistics}", "--num=20"]
    assert sweep(straight_run, out, *arguments) == 0
    return out, arguments


def test_the_table(folder):
    out, _ = folder
    rows = json.loads((out / "table.json").read_text())
    assert {(row["solver"], row["nfe"]) for row in rows} == {
        ("heun", 1), ("heun", 5), ("heun", 41), ("unipc-2", 5), ("unipc-2", 41),
        ("ancestral", 1), ("ancestral", 5), ("ancestral", 41),
    }  # fmt: skip
    distance = {(row["solver"], row["nfe"]): row["distance"] for row in rows}
    assert distance["unipc-2", 41] < distance["unipc-2", 5] and distance["heun", 41] < distance["heun", 1]
    assert distance["unipc-2", 41] < 0.02
    assert distance["ancestral", 41] is None  # draws noise
    assert all(row["frechet"] > 0 for row in rows)
    with (out / "table.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8


def test_a_network_of_bfloat16_is_measured_by_the_same_solution(folder, straight_run, tmp_path, in_bfloat16):
    """It is that of the model; what bfloat16 adds is among what is measured."""
    out = tmp_path / "sweep"
    assert sweep(straight_run, out, "--solvers=unipc-2", "--nfe=41") == 0
    np.testing.assert_array_equal(np.load(out / "reference.npy"), np.load(folder[0] / "reference.npy"))
    [row] = json.loads((out / "table.json").read_text())
    [plain] = [row for row in json.loads((folder[0] / "table.json").read_text()) if row["solver"] == "unipc-2"][-1:]
    assert plain["distance"] < row["distance"] < 0.1


def test_files_of_others_are_kept(straight_run, tmp_path, capsys):
    """In the current folder, say; those of a sweep whose record was deleted are its own."""
    for name in ("table.csv", "samples.png"):
        (tmp_path / name).write_text("mine")
    assert sweep(straight_run, tmp_path) == 2
    assert f"{tmp_path} holds table.csv, samples.png of something else: give another --out." in capsys.readouterr().err
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["mine", "mine"]


def test_the_pictures(folder):
    out, _ = folder
    for name in ("distance.png", "frechet.png", "samples.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 200
    assert np.load(out / "reference.npy").shape == (10, 8, 8, 1)


def test_a_solver_that_gives_no_numbers_has_no_figures(straight_run, tmp_path, monkeypatch, capsys):
    nowhere = lambda sigmas, steps: [step_call(sigma, Combination(np.nan, (0.0,))) for sigma in sigmas[:-1]]  # noqa: E731
    monkeypatch.setitem(SOLVERS, "broken", dataclasses.replace(SOLVERS["euler"], calls=nowhere))
    assert sweep(straight_run, tmp_path / "out", "--solvers=euler,broken", "--nfe=2", "--tolerance=1e-2") == 0
    assert "warning: broken (edm), 2 NFE: The images of 10 of 10 seeds" in capsys.readouterr().err
    distance = {row["solver"]: row["distance"] for row in json.loads((tmp_path / "out" / "table.json").read_text())}
    assert distance["euler"] > 0 and distance["broken"] is None


def test_it_goes_on_where_it_was(folder, straight_run, monkeypatch):
    """Only the row that is missing is sampled."""
    from fdm_jax.cli import sweep as module

    out, arguments = folder
    before = json.loads((out / "table.json").read_text())
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[:-1]))
    judged, real = [], module.judge_case
    monkeypatch.setattr(module, "judge_case", lambda *a: judged.append(a[-1]) or real(*a))
    assert sweep(straight_run, out, *arguments) == 0
    assert judged == ["ancestral"]
    assert json.loads((out / "table.json").read_text()) == before


def test_damaged_pieces(folder, straight_run, capsys):
    """Such as a loss of power leaves."""
    out, arguments = folder
    kept = {path: path.read_bytes() for path in (out / "reference.npy", out / "parts" / "heun-edm-5.npy")}
    for path, content in kept.items():
        path.write_bytes(content[:200])
        solution = path.name == "reference.npy"
        assert sweep(straight_run, out, *arguments) == (2 if solution else 0)
        words = "is damaged: delete it, and the same command" if solution else "is damaged or gone, and samples.png is"
        assert f"{path} {words}" in capsys.readouterr().err
        path.write_bytes(content)


def test_an_ode_that_cannot_be_solved(straight_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flow, "MAX_STEPS", 2)
    assert sweep(straight_run, tmp_path / "sweep", "--solvers=euler", "--nfe=5") == 2
    assert "give a larger --tolerance, or an earlier --checkpoint if" in capsys.readouterr().err


def test_a_solution_of_other_settings_is_not_used(straight_run, tmp_path):
    """The record is deleted, as the refusal advises; what lies beside it is of other seeds."""
    arguments = ["--solvers=heun", "--nfe=5"]
    assert sweep(straight_run, tmp_path, *arguments) == 0
    before = np.load(tmp_path / "reference.npy")
    assert sweep(straight_run, tmp_path, *arguments, "--seeds=10-19") == 2
    (tmp_path / "results.jsonl").unlink()
    assert sweep(straight_run, tmp_path, *arguments, "--seeds=10-19") == 0
    assert (np.load(tmp_path / "reference.npy") != before).any()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--solvers=heun,nothing"], "There is no solver 'nothing'"),
        (["--solvers=ancestral"], "draws noise, so that its distance"),
        (["--grids=edm,nothing"], "There is no grid 'nothing'"),
        (["--nfe=5,a"], "--nfe must be numbers"),
        (["--nfe=1", "--solvers=unipc-2"], "None of the solvers takes so few"),
        (["--num=1"], "--num is 1"),
        (["--seeds=3-1"], "falls"),
        (["--ref=nowhere.npz"], "nowhere.npz cannot be read"),
        (["--sigma-min=90"], "0 < sigma_min < sigma_max"),
        (["--sigma-min=90", "--sigma-max=100"], "0 < sigma_min < sigma_max"),
        (["--weights=nowhere.safetensors"], "--weights is for the Frechet distance, which needs --ref"),
        (["--tolerance=-1"], "--tolerance must be between"),
    ],
)
def test_bad_input(straight_run, tmp_path, capsys, arguments, words):
    assert sweep(straight_run, tmp_path / "out", *arguments) == 2
    said = capsys.readouterr().err
    assert words in said and "the ODE's solution:" not in said


def test_two_at_once_are_not_mixed(straight_run, tmp_path, capsys):
    with locked(tmp_path):
        assert sweep(straight_run, tmp_path) == 2
    assert "Another process is at work in" in capsys.readouterr().err and not list(tmp_path.glob("[!.]*"))
