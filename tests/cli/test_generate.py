"""Images from a run: by seed, in one grid or one npz, resumed, refused."""

import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest
from cli.conftest import nothing_left_on_devices, start
from PIL import Image

from fdm_jax.cli import generate as generate_module
from fdm_jax.cli.generate import parse_seeds
from fdm_jax.cli.main import main
from fdm_jax.errors import UserError
from fdm_jax.interop import load_model
from fdm_jax.sampling.guidance import Guidance
from fdm_jax.sampling.solvers import SOLVERS
from fdm_jax.training.locking import locked


def generate(workdir, out, *more):
    return main(["generate", f"--workdir={workdir}", f"--out={out}", "--steps=3", *more])


@pytest.fixture(scope="module")
def folder(straight_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("generate") / "images"
    with jax.transfer_guard("disallow"):
        assert generate(straight_run, out, "--seeds=0-10", "--batch=8") == 0
    return out


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_png_per_seed(folder):
    assert sorted(p.name for p in folder.glob("*.png")) == [f"{seed:06d}.png" for seed in range(11)]
    assert pixels(folder / "000003.png").shape == (8, 8)


def test_a_seed_gives_its_image_in_any_company(folder, straight_run, tmp_path):
    assert generate(straight_run, tmp_path / "few", "--seeds=9,2", "--batch=8") == 0
    for seed in (2, 9):  # another batch of the same shape: the same bits
        np.testing.assert_array_equal(pixels(tmp_path / "few" / f"{seed:06d}.png"), pixels(folder / f"{seed:06d}.png"))
    assert generate(straight_run, tmp_path / "all", "--seeds=0-10", "--batch=16") == 0
    for seed in range(11):  # another shape: the same up to rounding to 8 bits
        difference = pixels(tmp_path / "all" / f"{seed:06d}.png").astype(int) - pixels(folder / f"{seed:06d}.png")
        assert np.abs(difference).max() <= 1


def test_a_program_of_ones_own_gets_the_same_images(folder, straight_run, tmp_path):
    model = load_model(straight_run)
    sample = model.sampler(steps=3, batch_size=8)
    images = sample(range(11))
    assert images.dtype == np.uint8
    for seed in range(11):
        np.testing.assert_array_equal(images[seed, ..., 0], pixels(folder / f"{seed:06d}.png"))
    assert generate(straight_run, tmp_path / "threes", "--seeds=4,7", "--class=3", "--batch=8") == 0
    threes = sample([7, 4], labels=3)
    np.testing.assert_array_equal(threes, sample([7, 4], labels=[3, 3]))
    np.testing.assert_array_equal(threes[1, ..., 0], pixels(tmp_path / "threes" / "000004.png"))
    for seeds, labels, words in (
        ([0], 10, "The class must be from 0 to 9, and is 10"), ([0, 1], [3], "2 seeds and 1 labels"), ([-1], 3, "Seeds go"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            sample(seeds, labels)


def test_models_are_loaded_from_runs_and_files(straight_run, tmp_path):
    model = load_model(str(straight_run))
    assert model.checkpoint == 20 and load_model(straight_run, 12).checkpoint == 12
    out = tmp_path / "model.safetensors"
    assert main(["export", f"--workdir={straight_run}", f"--out={out}"]) == 0
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 1), np.float32)
    np.testing.assert_array_equal(load_model(out).denoise(x, 2.0), model.denoise(x, 2.0))
    with nothing_left_on_devices():
        load_model(straight_run).denoise(x, 2.0)
    guided = model.sampler(steps=2, batch_size=8, guidance=Guidance(scale=2.0), guide=load_model(straight_run, 12))
    assert (guided([0], 3) != model.sampler(steps=2, batch_size=8)([0], 3)).any()
    with pytest.raises(UserError, match="A guide needs guidance"):
        model.sampler(guide=model)
    for path, checkpoint, words in (
        (tmp_path, None, "not the workdir of a run"), (tmp_path / "nothing", None, "not the workdir of a run"),
        (straight_run, 7, "no checkpoint"), (out, 20, "only a run's workdir has checkpoints"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            load_model(path, checkpoint)


def test_npz_holds_the_same_images_with_labels(folder, straight_run, tmp_path):
    assert generate(straight_run, tmp_path / "images.npz", "--seeds=0-10", "--batch=8") == 0
    data = np.load(tmp_path / "images.npz")
    assert data["image"].shape == (11, 8, 8, 1) and data["image"].dtype == np.uint8
    np.testing.assert_array_equal(data["seed"], np.arange(11))
    assert data["label"].min() >= 0 and data["label"].max() < 10 and len(set(data["label"])) > 3
    for seed in range(11):
        np.testing.assert_array_equal(data["image"][seed, ..., 0], pixels(folder / f"{seed:06d}.png"))
    assert list(tmp_path.iterdir()) == [tmp_path / "images.npz"]


def test_grid_and_class(straight_run, tmp_path):
    assert generate(straight_run, tmp_path / "grid.png", "--seeds=0-5", "--class=3", "--columns=3", "--batch=8") == 0
    height, width = pixels(tmp_path / "grid.png").shape[:2]
    assert width > height > 60


def test_it_goes_on_where_it_was(folder, straight_run):
    kept = (folder / "000000.png").stat().st_mtime_ns
    (folder / "000010.png").unlink()
    (folder / "000009.png").write_bytes(b"")  # as after a loss of power
    assert generate(straight_run, folder, "--seeds=0-11", "--batch=8") == 0
    assert (folder / "000000.png").stat().st_mtime_ns == kept
    assert pixels(folder / "000009.png").shape == (8, 8)
    assert (folder / "000010.png").exists() and (folder / "000011.png").exists()
    assert "steps" in json.loads((folder / "settings.json").read_text())


def test_it_goes_on_after_a_kill_that_came_while_the_pieces_were_removed(straight_run, tmp_path, monkeypatch):
    out = tmp_path / "grid.png"
    with monkeypatch.context() as patch:
        patch.setattr(generate_module.shutil, "rmtree", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(straight_run, out, "--seeds=0-3", "--batch=8")
    parts = tmp_path / "grid.png.parts"
    assert out.exists() and [path.name for path in parts.iterdir()] == [".lock"]
    assert generate(straight_run, out, "--seeds=0-3", "--batch=8") == 0
    assert list(tmp_path.iterdir()) == [out]


def test_a_grid_takes_no_image_of_a_request_that_was_killed(straight_run, tmp_path, monkeypatch):
    """With other settings, for the same file."""
    out, alone = tmp_path / "grid.npz", tmp_path / "alone.npz"
    with monkeypatch.context() as patch:
        patch.setattr(generate_module._Output, "finish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(straight_run, out, "--seeds=0-3", "--batch=8", "--class=1")
    assert (tmp_path / "grid.npz.parts/000003.png").exists()
    for made in (out, alone):
        assert generate(straight_run, made, "--seeds=0-3", "--batch=8", "--class=2") == 0
    np.testing.assert_array_equal(np.load(out)["image"], np.load(alone)["image"])
    assert sorted(tmp_path.iterdir()) == [alone, out]


def test_a_disk_that_is_full_is_said(straight_run, tmp_path, monkeypatch, capsys):
    def write_text(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(generate_module, "write_text", write_text)
    assert generate(straight_run, tmp_path, "--seeds=0-3", "--batch=8") == 2
    assert "The disk, or your quota of it, is full: make room" in capsys.readouterr().err


def test_a_run_that_was_moved_goes_on_in_its_folder(straight_run, tmp_path):
    out, moved = tmp_path / "images", shutil.copytree(straight_run, tmp_path / "moved")
    assert generate(straight_run, out, "--seeds=0-3", "--batch=4") == 0
    kept = (out / "000000.png").stat().st_mtime_ns
    assert generate(moved, out, "--seeds=0-7", "--batch=4") == 0
    assert (out / "000000.png").stat().st_mtime_ns == kept and (out / "000007.png").exists()
    assert json.loads((out / "settings.json").read_text())["workdir"] == str(moved)


def test_other_settings_are_not_mixed_into_a_folder(folder, straight_run, capsys):
    assert generate(straight_run, folder, "--class=1") == 2
    assert "made with another class" in capsys.readouterr().err


def test_settings_of_another_version_are_named(straight_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert generate(straight_run, out, "--seeds=0-3", "--batch=8") == 0
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps(settings | {"later": 1}))
    assert generate(straight_run, out, "--seeds=0-3", "--batch=8") == 2
    assert "made with another later: delete it" in capsys.readouterr().err
    for picture in out.glob("*.png"):
        picture.unlink()
    assert generate(straight_run, out, "--seeds=0-3", "--batch=8") == 0  # settings of nothing keep nobody out


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_two_at_once_are_not_mixed(straight_run, tmp_path, capsys, name):
    """Of an .npz the second would take pictures of the first for its own, whatever they are of."""
    out = tmp_path / name
    with locked(tmp_path / ("out.npz.parts" if out.suffix else name)):
        assert generate(straight_run, out, "--seeds=0-3") == 2
    assert "Another process is at work in" in capsys.readouterr().err and not list(tmp_path.glob("*/*.json"))


def test_pictures_of_others_are_not_taken_for_ours(straight_run, tmp_path, capsys):
    """A data set, say, whose files have the names that seeds would have."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "000000.png").write_bytes(b"mine")
    assert generate(straight_run, out) == 2
    assert f"{out} holds 000000.png, which fdm generate did not make" in capsys.readouterr().err
    assert (out / "000000.png").read_bytes() == b"mine" and len(list(out.glob("[!.]*"))) == 1


@pytest.mark.parametrize("name", ["notes.txt", "notes/a.txt"])
def test_a_folder_of_somebody_is_not_the_temporary_one(straight_run, tmp_path, capsys, name):
    """Which would be deleted, with all that is in it."""
    kept = tmp_path / "grid.png.parts" / name
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    assert generate(straight_run, tmp_path / "grid.png", "--seeds=0-3") == 2
    assert f"grid.png.parts holds {name[:5]}" in capsys.readouterr().err
    assert kept.read_text() == "mine" and not (tmp_path / "grid.png.parts/settings.json").exists()


@pytest.mark.parametrize("name", ["result.json", "features/000000000.npz"])
def test_settings_of_an_evaluation_are_kept(straight_run, tmp_path, capsys, name):
    """Without them its features would be lost."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    (tmp_path / "settings.json").write_text('{"solver": "heun", "piece": 512}')
    assert generate(straight_run, tmp_path) == 2
    assert (
        f"{tmp_path} holds {name.partition('/')[0]} of something else: give another --out." in capsys.readouterr().err
    )
    assert "piece" in (tmp_path / "settings.json").read_text()


@pytest.mark.parametrize("text", ["", "[]", "{", "\udcff", '{"editor.fontSize": 12}'])
def test_a_file_of_another_program_in_the_place_of_the_settings(straight_run, tmp_path, capsys, text):
    (tmp_path / "settings.json").write_bytes(text.encode(errors="surrogateescape"))
    assert generate(straight_run, tmp_path) == 2
    assert "settings.json is there already and holds no settings of results: give another" in capsys.readouterr().err
    assert (tmp_path / "settings.json").read_bytes() == text.encode(errors="surrogateescape")


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (["--seeds=5-1"], "The range of seeds '5-1' falls"),
        (["--seeds=1,x"], "cannot be read at 'x'"),
        (["--seeds="], "cannot be read at ''"),
        (["--seeds=-4"], "cannot be read at '-4'"),
        (["--seeds=4294967296"], "go up to 4294967295"),
        (["--seeds=1,0-3"], "name one seed twice"),
        (["--class=10"], "The class must be from 0 to 9, and is 10"),
        (["--class=three"], "The model knows no class 'three': choose one of 0, 1, 2, 3"),
        (["--checkpoint=7"], "no checkpoint of step 7: choose one of 8, 12, 16, 20"),
        (["--batch=0"], "--batch must be 1 or more"),
    ],
)
def test_bad_arguments(straight_run, tmp_path, capsys, arguments, sentence):
    assert generate(straight_run, tmp_path / "out", *arguments) == 2
    assert sentence in capsys.readouterr().err


def test_bad_places(straight_run, tmp_path, capsys):
    assert generate(tmp_path, tmp_path / "out") == 2
    assert "is not the workdir of a run: it has no config.json" in capsys.readouterr().err
    (tmp_path / "model.safetensors").touch()
    assert generate(tmp_path / "model.safetensors", tmp_path / "out") == 2
    assert "is not the workdir of a run but a file: fdm import makes" in capsys.readouterr().err
    assert generate(straight_run, tmp_path / "out.gif") == 2
    assert "must be a folder or end in .png or .npz" in capsys.readouterr().err
    for name in ("out.png", "out.npz"):
        (tmp_path / name).mkdir()
        assert generate(straight_run, tmp_path / name) == 2
        assert f"{name} is a folder, where a file was to be written" in capsys.readouterr().err
    for place in ("/proc/out", tmp_path / ("a" * 300), straight_run / "config.json" / "out"):
        assert generate(straight_run, place) == 2
        assert f"{place} cannot be written: " in capsys.readouterr().err


def test_parse_seeds():
    np.testing.assert_array_equal(parse_seeds("0-3, 7"), [0, 1, 2, 3, 7])
    with pytest.raises(UserError):
        parse_seeds("0-99999999999")


def test_one_device_reads_what_eight_wrote(straight_run, tmp_path):
    out = tmp_path / "grid.png"
    process = start(["generate", f"--workdir={straight_run}", "--seeds=0-3", "--steps=2", f"--out={out}"], devices=1)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0 and out.exists() and "WARNING" not in said, said


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--solver=unipc-2", "--grid=log-snr", "--nfe=4"], "unipc-2, 4 NFE"),
        (["--solver=dpmpp", "--steps=5", "--match-original"], "dpmpp, 5 NFE"),
        (["--solver=euler", "--grid=80,5,0.5,0"], "euler, 3 NFE"),
        (["--nfe=6"], "heun, 5 NFE"),
        (["--solver=ancestral", "--nfe=3", "--sigma-max=40"], "ancestral, 3 NFE"),
    ],
)
def test_solvers(straight_run, tmp_path, capsys, arguments, said):
    base = ["generate", f"--workdir={straight_run}", "--seeds=0-7", "--batch=8"]
    assert main([*base, f"--out={tmp_path / 'a.npz'}", *arguments]) == 0
    assert said in capsys.readouterr().out
    assert main([*base, f"--out={tmp_path / 'b.npz'}", *arguments]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["image"], np.load(tmp_path / "b.npz")["image"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--solver=unipc"], "no solver 'unipc': did you mean 'unipc-"),
        (["--grid=edn"], "no grid 'edn': did you mean 'edm'"),
        (["--grid=80,x,0"], "holds something else than numbers"),
        (["--grid=80,40"], "must end at 0"),
        (["--grid=80,40,0", "--steps=5"], "5 steps of heun go through 5 noise levels and 0, and 2 are given"),
        (["--solver=dpmpp-2m", "--S_churn=3"], "Churn belongs to the solvers heun and euler"),
        (["--solver=dpmpp", "--steps=1"], "dpmpp takes 2 steps or more, not 1"),
        (["--sigma-min=90"], "0 < sigma_min < sigma_max"),
        (
            ["--grid=80,5,0", "--sigma-max=10"],
            "--sigma-max would change nothing, because --grid=80,5,0 gives the noise",
        ),
        (["--grid=80,5,0", "--match-original"], "--match-original would change nothing"),
        (["--grid=log-snr", "--rho=3"], "--rho would change nothing, because it belongs to the grid edm"),
        (["--S_noise=1.003"], "--S_noise would change nothing, because there is no churn"),
    ],
)
def test_bad_solvers_and_grids(straight_run, tmp_path, capsys, arguments, words):
    assert main(["generate", f"--workdir={straight_run}", f"--out={tmp_path / 'x.png'}", *arguments]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("fdm generate: ") and words in sentence


def test_guidance(straight_run, tmp_path, capsys):
    def images(*more):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        arguments = ["generate", f"--workdir={straight_run}", "--seeds=0-7", "--batch=8", "--class=3", "--solver=euler"]
        assert main([*arguments, "--steps=3", f"--out={out}", *more]) == 0
        return np.load(out)["image"].astype(int), capsys.readouterr().err

    plain, said = images()
    assert "label dropout" not in said and said.count("\n") == 2  # what is to be made, and how fast it was
    one, said = images("--guidance=1")
    assert "trained without label dropout" in said
    assert abs(one - plain).max() <= 1  # rounding
    assert abs(images("--guidance=40")[0] - plain).max() > 1
    outside, _ = images("--guidance=40", "--guidance-interval=200,300")
    np.testing.assert_array_equal(outside, plain)
    itself, said = images("--guidance=3", f"--guide={straight_run}")
    assert abs(itself - plain).max() <= 1 and "label dropout" not in said
    for more, words in (
        (["--guide=x"], "--guide needs a scale"),
        (["--guidance-interval=0.2,3"], "--guidance-interval needs a scale"),
        (["--guidance=2", "--guidance-interval=1"], "two noise levels LOW,HIGH"),
        (["--guidance=2", "--guidance-interval=2,1"], "from a lower to a higher"),
        (["--guidance=2", f"--guide={tmp_path / 'nowhere'}"], "is not the workdir of a run"),
    ):
        assert main(["generate", f"--workdir={straight_run}", f"--out={tmp_path / 'x.png'}", "--steps=2", *more]) == 2
        assert words in capsys.readouterr().err


def test_list_of_solvers(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--list-solvers"])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0 and len(lines) == 1 + len(SOLVERS)
    assert lines[0].split()[:3] == ["name", "order", "NFE"]
    assert any(line.startswith("unipc-3 ") and "2302.04867" in line for line in lines)
    noisy = {line.split()[0]: line[lines[0].index("noise") :].split()[0] for line in lines[1:]}
    assert noisy.keys() == SOLVERS.keys() and noisy["heun"] == "no" and noisy["ancestral"] == "yes"


@pytest.mark.parametrize("solver", ["ancestral", pytest.param("unipc-2", marks=pytest.mark.slow)])
def test_a_seed_gives_its_image_on_any_devices_in_any_batch(straight_run, solver):
    """Alone, among 7 and among 64, on 1, 2 and 8 devices: up to rounding; for one shape of the batch, bit for bit.

    All but the last image of a batch: Eigen, which convolves on CPUs, adds in another order for its last pixels where
    their number does not fit the registers, as with AVX2.
    """
    import jax

    from fdm_jax.devices import make_mesh
    from fdm_jax.sampling.generate import BatchedGenerator
    from fdm_jax.sampling.seeds import choose_labels

    model = load_model(straight_run)
    experiment = model.experiment
    generate = experiment.generate_fn(steps=4, solver=solver)

    def sample(seeds, devices, batch):
        generator = BatchedGenerator(generate, make_mesh(jax.devices()[:devices]), batch, quantise=False)
        labels = choose_labels(None, seeds, 10)
        images = np.concatenate(list(generator(model.variables, seeds, labels)))
        assert generator._generate._cache_size() == 1  # compiled once, however many batches
        return images

    seeds = np.arange(100, 164, dtype=np.uint32)
    all_of_them = sample(seeds, 1, 64)
    for devices, batch, chosen in [
        (1, 1, [5]),
        (1, 7, [5, 63, 2]),
        (2, 64, range(64)),
        (8, 64, range(64)),
        (8, 7, [5, 9]),
    ]:
        chosen = np.array(chosen)
        np.testing.assert_allclose(sample(seeds[chosen], devices, batch), all_of_them[chosen], atol=2e-4)
    reversed_ = sample(seeds[::-1].copy(), 1, 64)[::-1]
    np.testing.assert_array_equal(reversed_[1:-1], all_of_them[1:-1])
    np.testing.assert_allclose(reversed_, all_of_them, atol=2e-6)
    others = np.concatenate([seeds[:1], np.arange(5000, 5063, dtype=np.uint32)])
    np.testing.assert_array_equal(sample(others, 1, 64)[0], all_of_them[0])  # in the same place
