"""`fdm evaluate` on the tiny run: statistics, generated and existing images, a stop in the middle, refusals."""

import argparse
import dataclasses
import errno
import json
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from cli.conftest import start_all
from encoded import png

from fdm_jax.cli.evaluate import folder_name, open_reference
from fdm_jax.cli.features import _claim, _claimed
from fdm_jax.cli.main import main
from fdm_jax.cli.sampling import load_model, load_with_guide
from fdm_jax.data.digits import load_digits_arrays
from fdm_jax.errors import UserError
from fdm_jax.evaluation import classifier
from fdm_jax.evaluation.frechet import frechet_distance
from fdm_jax.evaluation.moments import moments
from fdm_jax.evaluation.references import Reference, save_reference
from fdm_jax.training.locking import locked

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def place(tmp_path_factory, data_dir):
    """Statistics of the digits' pixels, with features, and the data's folder."""
    folder = tmp_path_factory.mktemp("evaluate")
    where = data_dir.partition("=")[2]
    arguments = [f"--data_dir={where}", "--data=digits", "--extractor=pixels", f"--out={folder}/ref.npz"]
    assert main(["evaluate", "ref", *arguments, "--split=test", "--keep-features"]) == 0
    return folder


def evaluate(folder, *more):
    steps = [] if any(argument.startswith("--images=") for argument in more) else ["--steps=3"]
    return main(["evaluate", f"--ref={folder}/ref.npz", "--batch=16", *steps, *more])


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_statistics_are_those_of_the_pixels(place, data_dir):
    pixels = load_digits_arrays("test", data_dir.partition("=")[2])[0].reshape(297, 64) / 255
    with np.load(place / "ref.npz") as data:
        np.testing.assert_allclose(data["features"], pixels, atol=1e-6)  # they are float32
        np.testing.assert_allclose(data["mu"], pixels.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(data["sigma"], np.cov(pixels, rowvar=False), atol=1e-6)
        description = json.loads(str(data["description"]))
    assert description["images"] == 297 and description["extractor"] == "pixels" and "jax" in description["versions"]


def test_what_the_actions_share_may_stand_before_them(tmp_path, data_dir):
    shared = ["--extractor=pixels", "--num=100", "--keep-features", f"--batch={2**63}"]  # no more than there are
    more = [f"--data_dir={data_dir.partition('=')[2]}", "--data=digits", f"--out={tmp_path}/ref.npz"]
    assert main(["evaluate", *shared, "ref", *more]) == 0
    with np.load(tmp_path / "ref.npz") as data:
        assert len(data["features"]) == 100


@pytest.fixture(scope="module")
def measured(place, straight_run):
    out = place / "measured"
    arguments = [f"--workdir={straight_run}", "--num=1100", "--keep-features", "--bootstrap=3", f"--out={out}"]
    assert evaluate(place, *arguments) == 0
    return out, arguments


def test_generated_images(measured, place, straight_run, tmp_path):
    """The figure is that of the same seeds from fdm generate, measured as files."""
    out, _ = measured
    figures = result(out)
    assert figures["images"] == 1100 and set(figures["metrics"]) == {
        "frechet_distance", "kernel_distance", "precision", "recall",
    }  # fmt: skip
    settings = figures["settings"]
    assert settings["nfe"] == 5 and settings["checkpoint"] == 20 and len(settings["ref_sha256"]) == 64
    arguments = [f"--out={tmp_path}/images.npz", "--seeds=0-1099", "--steps=3", "--batch=16"]
    assert main(["generate", f"--workdir={straight_run}", *arguments]) == 0
    assert evaluate(place, f"--images={tmp_path}/images.npz", f"--out={tmp_path}/files") == 0
    ours, theirs = (result(folder)["metrics"]["frechet_distance"]["value"] for folder in (out, tmp_path / "files"))
    assert ours == pytest.approx(theirs, rel=1e-6)
    with np.load(tmp_path / "images.npz") as made, np.load(place / "ref.npz") as ref:
        direct = frechet_distance(*moments(made["image"].reshape(1100, -1) / 255), ref["mu"], ref["sigma"])
    assert ours == pytest.approx(direct, rel=1e-5)


def test_it_goes_on_where_it_was(measured, place, straight_run, tmp_path, monkeypatch, capsys):
    from fdm_jax.cli import evaluate as module

    out, arguments = measured
    before = result(out)
    parts = sorted((out / "features").glob("*.npz"))
    assert len(parts) == 3
    parts[1].write_bytes(parts[1].read_bytes()[:1000])
    assert evaluate(place, *arguments) == 2
    assert f"{parts[1]} is damaged: delete it, and the same command makes it again." in capsys.readouterr().err
    parts[1].unlink()
    (out / "features" / ".000000512.npz.part.npz").write_bytes(b"half")  # what a kill leaves
    real, made = module.generated_images, []

    def counting(args):
        images = real(args)
        make = images.make
        images.make = lambda *rows: made.append(rows) or make(*rows)
        return images

    monkeypatch.setattr(module, "generated_images", counting)
    moved = shutil.copytree(straight_run, tmp_path / "moved")  # as the run may be meanwhile
    assert evaluate(place, f"--workdir={moved}", *arguments[1:]) == 0
    assert made == [(512, 1024)]
    assert "then 512 images, 512 at a time." in capsys.readouterr().err
    assert result(out)["metrics"] == before["metrics"]


def test_other_weights_or_another_family_are_another_model(straight_run):
    model, older = load_model(straight_run), load_model(straight_run, 16)
    assert model._replace(variables=older.variables).describe()["model_sha256"] != model.describe()["model_sha256"]
    plain = dataclasses.replace(model.experiment, family=dataclasses.replace(model.experiment.family, momentum=None))
    assert model.experiment.family.momentum is not None
    assert model._replace(experiment=plain).describe()["model_sha256"] != model.describe()["model_sha256"]


def test_a_run_that_was_moved_finds_its_evaluation():
    settings = {"workdir": "a", "model_sha256": "1", "ref": "b", "num": 2}
    name = folder_name("step-1", settings)
    assert folder_name("step-1", settings | {"workdir": "c", "ref": "d"}) == name
    assert folder_name("step-1", settings | {"model_sha256": "2"}) != name


@pytest.mark.slow
def test_two_processes_share_the_work(measured, place, tmp_path):
    """Each makes its pieces; the figures are those of one process."""
    out, arguments = measured
    more = [*arguments[:-1], f"--out={tmp_path}/shared", f"--ref={place}/ref.npz", "--steps=3", "--batch=16"]
    processes = start_all(["evaluate", *more], 2, devices=2)
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "frechet_distance" in said[0] and "frechet_distance" not in said[1]
    ours, theirs = (result(folder)["metrics"]["frechet_distance"]["value"] for folder in (tmp_path / "shared", out))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_zip_and_a_folder(place, tmp_path):
    images = RNG.integers(0, 256, (40, 8, 8), np.uint8)
    (tmp_path / "images").mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for i, image in enumerate(images):
            file.writestr(f"{i:03d}.png", png(image))
            (tmp_path / "images" / f"{i:03d}.png").write_bytes(png(image))
    values = []
    for name in ("images", "images.zip"):
        assert evaluate(place, f"--images={tmp_path}/{name}", f"--out={tmp_path}/of-{name}") == 0
        assert not (tmp_path / f"of-{name}" / "features").exists()
        values.append(result(tmp_path / f"of-{name}")["metrics"])
    assert values[0] == values[1]


def test_figures_that_were_asked_for_one_by_one(place, tmp_path):
    np.savez(tmp_path / "images.npz", image=RNG.integers(0, 256, (40, 8, 8, 1), np.uint8))
    arguments = [f"--images={tmp_path}/images.npz", f"--out={tmp_path}/out"]
    for metric in ("frechet", "kernel"):
        assert evaluate(place, *arguments, f"--metrics={metric}") == 0
    assert set(result(tmp_path / "out")["metrics"]) == {"frechet_distance", "kernel_distance"}


@pytest.mark.parametrize("name", ["result.json", "settings.json"])
def test_a_file_server_that_fails_while_there_are_figures(place, tmp_path, monkeypatch, capsys, name):
    """They stay, and nobody is told to delete them."""
    np.savez(tmp_path / "images.npz", image=RNG.integers(0, 256, (40, 8, 8, 1), np.uint8))
    arguments = [f"--images={tmp_path}/images.npz", f"--out={tmp_path}/out"]
    assert evaluate(place, *arguments, "--metrics=frechet") == 0
    before, read = result(tmp_path / "out"), Path.read_text

    def fail(path, *args, **kwargs):
        if path.name == name:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        assert evaluate(place, *arguments, "--metrics=kernel") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{name} cannot be" in said and "(Stale file handle)" in said and "delete" not in said
    assert result(tmp_path / "out") == before


def test_statistics_of_another_resolution_are_mentioned(tmp_path, capsys):
    """Inception and DINOv2 take images of any size."""
    save_reference(Reference(np.zeros(64), np.eye(64), None, {"resolution": 16}), tmp_path / "ref.npz")
    open_reference(tmp_path / "ref.npz", "pixels", None, (8, 8, 1))
    assert "are of images of 16x16, and these are 8x8" in capsys.readouterr().err
    save_reference(Reference(np.zeros(64), np.eye(64), None, {"resolution": 8}), tmp_path / "ref.npz")
    open_reference(tmp_path / "ref.npz", "pixels", None, (8, 8, 1))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "images.npz"])
def test_other_images_under_the_same_name(kind, place, tmp_path, capsys):
    """Features of the former ones are not taken for theirs."""

    def write(value):
        images = np.full((5, 8, 8, 1), value, np.uint8)
        (tmp_path / "folder").mkdir(exist_ok=True)
        for i, image in enumerate(images):
            (tmp_path / "folder" / f"{i}.png").write_bytes(png(image[..., 0]))
        np.savez(tmp_path / "images.npz", image=images)

    arguments = [f"--images={tmp_path}/{kind}", f"--out={tmp_path}/out", "--metrics=frechet", "--keep-features"]
    write(0)
    assert evaluate(place, *arguments) == evaluate(place, *arguments) == 0
    write(255)
    assert evaluate(place, *arguments) == 2
    assert "holds an evaluation made with another images_sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "takes --workdir=DIR or --images=PATH"),
        (["--images=PLACE/many.npz", "--num=60"], "holds 50 images, and --num asks for 60"),
        (["--images=PLACE/large.npz"], "are of 64 numbers an image, and the extractor pixels gives 81"),
        (["--images=PLACE/floats.npz"], "must be uint8"),
        (["--images=PLACE/thin.npz"], "must be uint8 [N, H, W, 1 or 3], and are uint8 [5, 8, 0, 1]"),
        (["--images=PLACE/empty.npz"], "holds no array called image"),
        (["--images=PLACE/text.npz"], "is no .npz of images"),
        (["--images=PLACE/one.npz"], "is no .npz of images"),
        (["--images=PLACE/damaged.npz"], "is no .npz of images, or damaged (Error -3 while decompressing"),
        (["--images=PLACE/nowhere.npz"], "cannot be read"),
        (["--images=PLACE/mixed"], "9x9"),
        (["--images=PLACE/many.npz", "--metrics=inception-score"], "needs the extractor inception"),
        (["--images=PLACE/many.npz", "--extractor=classifier"], "needs its weights"),
        (["--images=PLACE/many.npz", "--distributed=localhost:1,2,2"], "I from 0 to N - 1, and is 'localhost:1,2,2'"),
        (["--images=PLACE/many.npz", "--distributed=somehow"], "must be off, auto"),
        (["--images=PLACE/many.npz", "--bootstrap=-1"], "--bootstrap must be 0 or more"),
        (["--images=PLACE/many.npz", "--class=3"], "--class says how a --workdir's model generates"),
        (["--images=PLACE/many.npz", "--S_churn=2"], "--S_churn says how"),
        (["--images=PLACE/many.npz", "--sigma-min=1"], "--sigma-min says how"),
        (["--workdir=PLACE"], "PLACE"),
    ],
)
def test_bad_input(place, tmp_path, capsys, arguments, words):
    np.savez(tmp_path / "many.npz", image=RNG.integers(0, 256, (50, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "thin.npz", image=np.zeros((5, 8, 0, 1), np.uint8))
    np.savez(tmp_path / "large.npz", image=RNG.integers(0, 256, (50, 9, 9, 1), np.uint8))
    np.savez(tmp_path / "floats.npz", image=np.zeros((50, 8, 8, 1)))
    np.savez(tmp_path / "empty.npz", label=np.zeros(5))
    (tmp_path / "text.npz").write_text("images")
    np.save(tmp_path / "one.npy", np.zeros((50, 8, 8, 1), np.uint8))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    np.savez_compressed(tmp_path / "damaged.npz", image=np.arange(3200).reshape(50, 8, 8, 1).astype(np.uint8))
    with (tmp_path / "damaged.npz").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 40)
    (tmp_path / "mixed").mkdir()
    for side in (8, 9):
        (tmp_path / "mixed" / f"{side}.png").write_bytes(png(np.zeros((side, side), np.uint8)))
    arguments = [argument.replace("PLACE", str(tmp_path)) for argument in arguments]
    assert evaluate(place, *arguments, f"--out={tmp_path}/out") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert words.replace("PLACE", str(tmp_path)) in said


def test_a_seed_that_is_none(tmp_path, capsys):
    assert main(["evaluate", "fit-classifier", "--data=digits", f"--out={tmp_path}/c.safetensors", "--seed=-1"]) == 2
    assert "--seed must be from 0 to 2^31 - 1, and is -1" in capsys.readouterr().err


@pytest.mark.parametrize("action, ending", [("ref", "npz"), ("fit-classifier", "safetensors")])
def test_an_output_that_is_another_file_or_a_folder(tmp_path, capsys, action, ending):
    """Found before anything is computed; a run's configuration is not overwritten by a slip."""
    for name, sentence in (("config.json", f"--out must end in .{ending}, and is"), (f"x.{ending}", "it is a folder")):
        out = tmp_path / name
        (out.mkdir if name.startswith("x") else out.touch)()
        assert main(["evaluate", action, "--data=digits", f"--out={out}"]) == 2
        assert sentence in capsys.readouterr().err
    assert (tmp_path / "config.json").read_bytes() == b""


def test_another_evaluation_in_the_folder(measured, place, capsys):
    out, arguments = measured
    assert evaluate(place, *arguments, "--first-seed=7") == 2
    assert "holds an evaluation made with another first_seed" in capsys.readouterr().err


def test_settings_without_features_stand_in_nobodys_way(tmp_path):
    """Of a command that failed before its first piece; but not those of pictures that fdm generate made."""
    _claim(tmp_path, {"first_seed": 1}, 512)
    _claim(tmp_path, {"first_seed": 2}, 512)
    (tmp_path / "000000.png").touch()
    with pytest.raises(UserError, match="with another first_seed"):
        _claim(tmp_path, {"first_seed": 3}, 512)


@pytest.mark.parametrize("name", ["features/mine.txt", "features/.mine", "result.json"])
def test_files_of_others_are_kept(tmp_path, name):
    """In the current folder, say; the folder of features is deleted at the end."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(
        UserError, match=f"{tmp_path} holds {name.partition('/')[0]} of something else: give another --out."
    ):
        _claim(tmp_path, {"first_seed": 1}, 512)
    assert file.read_text() == "mine" and not (tmp_path / "settings.json").exists()


def test_another_batch_goes_on_with_the_pieces_that_are_there(tmp_path):
    settings = {"first_seed": 1, "workdir": "/here"}
    _claim(tmp_path, settings, 512)
    (tmp_path / "features" / "000000000.npz").touch()
    _claim(tmp_path, settings, 480)
    assert _claimed(tmp_path, settings | {"workdir": "/there"}) == 512
    (tmp_path / "features" / "000000000.npz").unlink()
    (tmp_path / "result.json").touch()
    _claim(tmp_path, settings, 480)
    assert _claimed(tmp_path, settings) == 480


def test_processes_that_do_not_see_one_folder_or_model(tmp_path):
    for folder in (tmp_path, tmp_path / "own"):
        _claim(tmp_path, {"checkpoint": 10}, 512)
        with pytest.raises(UserError, match="is not the same for all processes: give --checkpoint"):
            _claimed(folder, {"checkpoint": 20})


def test_another_guide_or_model_under_the_same_name(straight_run, tmp_path):
    """A guide that was trained on, and a run that was made anew: the settings tell them from what was there before."""
    guide = tmp_path / "guide"
    shutil.copytree(straight_run, guide)
    args = argparse.Namespace(
        workdir=straight_run, checkpoint=None, guidance=2.0, guidance_interval="0,inf", guide=guide
    )
    newest = load_with_guide(args).describe()
    assert newest["checkpoint"] == newest["guide_checkpoint"] == 20
    assert newest["model_sha256"] == newest["guide_model_sha256"] == load_model(straight_run).describe()["model_sha256"]
    shutil.rmtree(guide / "checkpoints" / "20")
    older = load_with_guide(args).describe()
    assert {name for name in newest if newest[name] != older[name]} == {"guide_checkpoint", "guide_model_sha256"}


def test_features_that_are_not_finite(tmp_path, capsys):
    """A damaged extractor is found at the first piece, and nothing is called a result."""
    shape = (8, 8, 1)
    params = classifier.Network(3).init(jax.random.key(0), np.zeros((1, *shape), np.uint8))["params"]
    params = jax.tree.map(lambda value: np.full_like(value, np.nan), params)
    classifier.save(classifier.Classifier(3, shape, "none", 0.5, params), tmp_path / "c.safetensors")
    np.savez(tmp_path / "ref.npz", mu=np.zeros(classifier.WIDTH), sigma=np.eye(classifier.WIDTH))
    np.savez(tmp_path / "images.npz", image=RNG.integers(0, 256, (20, *shape), np.uint8))
    extractor = ["--extractor=classifier", f"--weights={tmp_path}/c.safetensors"]
    assert evaluate(tmp_path, f"--images={tmp_path}/images.npz", *extractor, f"--out={tmp_path}/out") == 2
    assert "The features of 20 of 20 images are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.slow
def test_fid_with_inception_itself(straight_run, data_dir, tmp_path):
    """Random weights in pytorch-fid's names: from the file of weights to a figure that is called FID."""
    from golden.make_extractors import numbers
    from safetensors.numpy import save_file

    from fdm_jax.evaluation import inception

    weights = tmp_path / "inception.safetensors"
    save_file({name: numbers(name, shape) for name, shape in inception._shapes().items()}, weights)
    data = [f"--data_dir={data_dir.partition('=')[2]}", "--data=digits", "--num=40", "--keep-features"]
    assert main(["evaluate", "ref", *data, f"--weights={weights}", f"--out={tmp_path}/ref.npz", "--batch=8"]) == 0
    arguments = [f"--workdir={straight_run}", f"--weights={weights}", "--num=24", "--batch=8", "--bootstrap=2"]
    assert evaluate(tmp_path, *arguments, f"--out={tmp_path}/out") == 0
    figures = result(tmp_path / "out")["metrics"]
    assert set(figures) == {"fid", "kid", "precision", "recall", "inception_score"}
    assert figures["fid"]["value"] > 0 and figures["fid"]["deviation"] > 0


def test_two_at_once_are_not_mixed(place, straight_run, tmp_path, capsys):
    """The first to end would take away the features that the second still counts on."""
    with locked(tmp_path):
        assert evaluate(place, f"--workdir={straight_run}", "--num=20", f"--out={tmp_path}") == 2
    assert "Another process is at work in" in capsys.readouterr().err and not list(tmp_path.glob("[!.]*"))
