"""Evaluation while training: its figures, the best checkpoint, and that training goes on as without it."""

import contextlib
import io
import json
import re
import signal
import time

import jax
import numpy as np
import pytest
import tiny
from cli.conftest import assert_same_end, rows
from PIL import Image

from fdm_jax.cli.main import main
from fdm_jax.cli.sampling import load_model
from fdm_jax.data.digits import load_digits_arrays
from fdm_jax.denoiser import make_denoise_fn
from fdm_jax.evaluation.denoising import held_out_error
from fdm_jax.evaluation.moments import moments
from fdm_jax.evaluation.references import Reference, save_reference
from fdm_jax.model import load_run
from fdm_jax.pictures import image_grid
from fdm_jax.sampling.generate import NotFinite
from fdm_jax.training import loop, watchdog
from fdm_jax.training.checkpoints import Checkpoints
from fdm_jax.training.evaluating import Evaluator
from fdm_jax.training.step import TrainState

EVERY = ["--config.eval.every_images=64", "--config.eval.held_out_images=50", "--config.eval.num_images=40"]


@pytest.fixture(scope="module")
def statistics(tmp_path_factory, data_dir):
    images, _ = load_digits_arrays("all", data_dir.partition("=")[2])
    path = tmp_path_factory.mktemp("statistics") / "pixels.npz"
    reference = Reference(*moments(images.reshape(len(images), -1) / 255), description={"extractor": "pixels"})
    save_reference(reference, path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir, statistics):
    """Like the straight run, with five evaluations, and nothing kept but the last and the best."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    more = [
        *EVERY, f"--config.eval.ref={statistics}", "--config.checkpoint.keep_latest=1",
        "--config.checkpoint.keep_every_images=100000",
    ]  # fmt: skip
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.MonkeyPatch.context() as patches:
        patches.setattr("fdm_jax.training.evaluating.LINE_SECONDS", 0.0)
        assert main(tiny.arguments(workdir, data_dir, *more)) == 0
    for line in (
        "40 of 40 images (100%)  evaluating  ",
        f"{50 * (4 + 9)} of {50 * (4 + 9)} images (100%)  evaluating  ",
    ):
        assert said.getvalue().count(line) == 5
    assert said.getvalue().count("Compiling the evaluation") == 1
    return workdir


def evaluations(workdir):
    return [row for row in rows(workdir) if "val/error" in row]


def test_figures_are_logged(run):
    found = evaluations(run)
    assert [row["nimg"] for row in found] == [64, 128, 192, 256, 320]
    for row in found:
        assert row["eval/frechet_distance"] > 0 and row["val/error"] > 0
        assert len([key for key in row if key.startswith("val/error@")]) == 9
    assert (run / "held_out.png").exists()
    seconds = [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_the_best_checkpoint_is_kept_beside_the_last(run):
    frechet = {row["step"]: row["eval/frechet_distance"] for row in evaluations(run)}
    best = min(frechet, key=frechet.get)
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    assert checkpoints.best() == load_model(run, "best").checkpoint == best
    best_before = min(frechet.keys() - {20}, key=frechet.get)
    assert checkpoints.steps() == [best_before, 20]  # the last was saved before it was evaluated


def test_the_error_is_that_of_the_saved_weights(run, data_dir):
    model = load_model(run)
    images, labels = load_digits_arrays("test", data_dir.partition("=")[2])

    def denoise(x, sigma, labels):
        network = lambda x, c: model.experiment.network.apply(model.variables, x, c, jax.nn.one_hot(labels, 10))  # noqa: E731
        return make_denoise_fn(model.experiment.family, network)(x, sigma)

    expected = held_out_error(denoise, images[:50] / np.float32(127.5) - 1, labels[:50])
    assert evaluations(run)[-1]["val/error"] == pytest.approx(expected, rel=1e-5)


def test_training_is_as_without_it(run, straight_run):
    assert_same_end(run, straight_run, 20)
    training = [row for row in rows(run) if "loss" in row]
    assert training == rows(straight_run)


def test_samples_that_are_no_numbers_do_not_end_a_run(tmp_path, data_dir, statistics, monkeypatch, capsys):
    def not_finite(seeds, finite):
        raise NotFinite(f"{len(seeds)} seeds gave nothing")

    monkeypatch.setattr("fdm_jax.sampling.generate.check_finite", not_finite)
    more = ["--config.samples.every_images=64", "--config.samples.rows=1", "--config.train.images=64",
            f"--config.eval.ref={statistics}"]  # fmt: skip
    assert main(tiny.arguments(tmp_path / "run", data_dir, *EVERY, *more)) == 0
    assert "64 images: no samples. 10 seeds gave nothing" in capsys.readouterr().err
    (evaluated,) = evaluations(tmp_path / "run")
    assert evaluated["eval/frechet_distance"] is None and evaluated["val/error"] > 0
    assert not (tmp_path / "run" / "samples").exists()


def test_what_the_end_of_a_start_prevents_the_next_one_does(tmp_path, data_dir, monkeypatch, capsys):
    """SIGTERM in an evaluation, memory that it does not get, and an end like a kill between a checkpoint and its samples."""
    more = [*EVERY, "--config.samples.every_images=64", "--config.samples.rows=2", "--config.samples.steps=2",
            "--config.train.images=128"]  # fmt: skip
    straight, stopped = (tmp_path / name for name in ("straight", "stopped"))
    assert main(tiny.arguments(straight, data_dir, *more)) == 0
    said = capsys.readouterr().err
    for line in (
        r"64 of 128 images \( 50%\)  loss [\d.]+ .* img/s  \d+:\d\d left",
        r"128 of 128 images \(100%\)  loss ",
    ):
        assert re.search(line, said), said

    def broken_off(self, variables, stop):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self, variables, stop)

    def no_memory(self, *args):
        raise MemoryError("it takes 9 GiB")

    def killed(self):
        if self.nimg == 128:
            raise KeyboardInterrupt
        sample(self)

    sample, evaluate = loop._Run._sample, Evaluator.__call__

    def without_memory(owner, sentence):
        with monkeypatch.context() as patches:
            patches.setattr(owner, "__call__", no_memory)
            assert main(tiny.arguments(stopped, data_dir, *more)) == 2
        assert f"Memory is full (it takes 9 GiB) in the {sentence}" in capsys.readouterr().err

    without_memory(Evaluator, "evaluation of step 4: go on with a smaller --config.eval.batch_size than 64")
    with monkeypatch.context() as patches:
        patches.setattr(Evaluator, "__call__", broken_off)
        assert main(tiny.arguments(stopped, data_dir, *more)) == 0
        said = capsys.readouterr().err
        assert "Stopped by SIGTERM at step 4, saved" in said and "evaluating" not in said  # a second is no long work
        assert not evaluations(stopped) and not (stopped / "samples").exists()
    without_memory(loop.BatchedGenerator, "picture of step 4: go on with a smaller --config.samples.rows than 2")
    with monkeypatch.context() as patches:
        patches.setattr(loop._Run, "_sample", killed)
        assert main(tiny.arguments(stopped, data_dir, *more)) == 130
    for _ in range(2):
        assert main(tiny.arguments(stopped, data_dir, *more)) == 0
        assert rows(stopped) == rows(straight)
    pictures = [{path.name: path.read_bytes() for path in (run / "samples").iterdir()} for run in (straight, stopped)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 2
    images = load_run(straight).sampler(steps=2, batch_size=20)(range(20), [*range(10)] * 2)  # a class per column
    shown = np.asarray(Image.open(straight / "samples" / "000000000128.png"))
    np.testing.assert_array_equal(shown, image_grid(images, 10, scale=4))


@pytest.mark.parametrize("stopped_in", ["step", "evaluation"])
def test_a_stop_at_the_last_step_is_not_the_end(tmp_path, data_dir, monkeypatch, capsys, stopped_in):
    """The run is complete when it is evaluated, too."""
    arguments = tiny.arguments(tmp_path / "run", data_dir, *EVERY, "--config.train.images=16")

    def signalled(self, *args):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.5)
        return (next_batches if stopped_in == "step" else evaluate)(self, *args)

    next_batches, evaluate = loop._Run._next_batches, Evaluator.__call__
    with monkeypatch.context() as patches:
        patches.setattr(watchdog, "PATIENCE", 0.25)
        if stopped_in == "step":
            patches.setattr(loop._Run, "_next_batches", signalled)
        else:
            patches.setattr(Evaluator, "__call__", signalled)
        assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "Stopped by SIGTERM at step 1, saved" in said and not evaluations(tmp_path / "run")
    assert f"minutes: waiting for {'data' if stopped_in == 'step' else 'an evaluation'}." in said
    # The one step was slow for its compilation, which says nothing of the speed.
    assert "img_per_s" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "Stopped" not in said and "waiting" not in said and len(evaluations(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.eval.ref=nowhere.npz"], "nowhere.npz cannot be read"),
        (["--config.eval.held_out_split=nothing"], "--config.eval.held_out_split=''"),
        (["--config.eval.held_out_split="], "there is nothing to evaluate"),
        (["--config.eval.ref=STATISTICS", "--config.eval.extractor=classifier"], "needs its weights"),
        (["--config.eval.num_images=1"], "eval.num_images must be 2 or more"),
        (["--config.eval.num_images=5000000000"], "eval.num_images must be below 2^32"),
    ],
)
def test_bad_input(tmp_path, data_dir, statistics, capsys, arguments, words):
    arguments = [argument.replace("STATISTICS", str(statistics)) for argument in arguments]
    assert main(tiny.arguments(tmp_path / "run", data_dir, *EVERY, *arguments)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "rows_by_step, best",
    [
        ({1: {"val/error": 0.5}, 2: {"val/error": None}, 4: {"val/error": 0.7}}, 1),  # 2: a run that diverged
        ({1: {"val/error": 0.5}, 2: {"val/error": 0.4}}, 2),  # and then went on without evaluation
        ({1: {"val/error": 0.5}, 2: {"val/error": 0.6, "eval/fid": 9.0}, 3: {"val/error": 0.4, "eval/fid": 9.5}}, 2),
    ],
)
def test_the_best_is_kept_whatever_comes_after(tmp_path, rows_by_step, best):
    """Figures that are not finite, none, or of another kind: the best checkpoint is among those of the newest kind."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_latest=1)
    leaf = jax.numpy.zeros(2)
    for step in range(1, 6):
        if row := rows_by_step.get(step):
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")
        checkpoints.save(step, TrainState(leaf, leaf, {}, {"a": leaf}, leaf, leaf), {})
    checkpoints.wait()
    assert checkpoints.best() == best and checkpoints.steps() == [best, 5]
    checkpoints.close()
