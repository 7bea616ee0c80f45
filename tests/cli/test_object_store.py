"""A workdir in a bucket is like a local one: bit for bit, through a kill in the middle of a save and damage."""

import gzip
import io
import json
import time
from pathlib import Path

import numpy as np
import object_store
import pytest
import tiny
from cli.conftest import assert_same_end, assert_same_losses, finish, rows, start, start_all
from PIL import Image

from fdm_jax.cli.main import main
from fdm_jax.training import locking


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(locking, "BEAT", 0.3)
    monkeypatch.setattr(locking, "STALE", 1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fetch(store, name, folder):
    """What is in a workdir of the bucket, as a local one."""
    for path in store.names("bucket", f"{name}/"):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(store.objects["bucket", path][0])
    return folder / name


def steps(store, name):
    """Steps with a finished checkpoint."""
    names = [path.split("/") for path in store.names("bucket", f"{name}/checkpoints/")]
    return sorted(int(parts[2]) for parts in names if parts[3:] == ["commit_success.txt"])


def damage(store, prefix):
    for name in store.names("bucket", prefix):
        content, metadata = store.objects["bucket", name]
        if len(content) > 4 and not name.endswith(".txt"):
            store.objects["bucket", name] = content[: len(content) // 2], metadata


@pytest.mark.slow
def test_run_that_is_killed_stopped_and_damaged(store, straight_run, data_dir, tmp_path, capfd, caplog):
    """Data and run in the bucket; killed while step 8 is saved, stopped at 12, whose checkpoint is then damaged."""
    store.upload(Path(data_dir.partition("=")[2]), "bucket", "data/")
    arguments = tiny.arguments("gs://bucket/run", "--config.data.source=gs://bucket/data/digits")
    process = start(arguments, devices=8)

    def kill(name):
        if name.startswith("run/checkpoints/8/train/d/"):
            process.kill()
            process.wait()
            raise object_store.Refused(503)

    store.before_upload = kill
    try:
        said, _ = process.communicate(timeout=240)
    finally:
        store.before_upload = lambda name: None
    assert process.returncode == -9, said
    assert steps(store, "run") == [4] and store.names("bucket", "run/checkpoints/8/")
    assert "run/.lock" in store.names("bucket", "run/")

    assert main([*arguments, "--config.train.images=192", "--config.samples.every_images=192"]) == 0
    said = capfd.readouterr().err
    assert "Going on from step 4 " in said and "waiting" in said
    assert steps(store, "run") == [4, 8, 12] and "run/.lock" not in store.names("bucket", "run/")

    damage(store, "run/checkpoints/12/train/")
    assert main(arguments) == 0
    assert "checkpoint of step 12 is damaged" in caplog.text
    assert store.names("bucket", "run/damaged/12/train/")
    copy = fetch(store, "run", tmp_path)
    assert_same_end(copy, straight_run, 20)
    straight, resumed = ({row["step"]: row for row in rows(run)} for run in (straight_run, copy))
    assert list(straight) == list(resumed)
    for step in (12, 16, 20):
        assert resumed[step] == straight[step]
    config = json.loads((copy / "config.json").read_text())
    assert config["data"]["source"] == "gs://bucket/data/digits"
    for name in ("parameters.txt", "curves.png", "samples/000000000192.png"):
        assert (copy / name).stat().st_size > 100
    assert len(list((copy / "tensorboard").iterdir())) >= 2  # one for each start; the killed one may have had none yet


@pytest.mark.slow
def test_outage(store, straight_run, data_dir, tmp_path):
    """One that is longer than the clients try again ends a run, as a crash does, with a sentence; nothing is lost by it."""
    arguments = tiny.arguments("gs://bucket/outage", data_dir)
    process = start(arguments, devices=8)

    def fail(name):
        if name.startswith("outage/checkpoints/8/train/"):
            store.down = True
            raise object_store.Refused(503)

    store.before_upload = fail
    try:
        said, _ = process.communicate(timeout=400)
    finally:
        store.before_upload, store.down = (lambda name: None), False
    assert process.returncode == 1 and "Traceback" not in said, said
    assert "fdm train: Google Cloud Storage cannot be reached (" in said.splitlines()[-1]
    assert main(arguments) == 0
    assert_same_end(fetch(store, "outage", tmp_path), straight_run, 20)


@pytest.mark.slow
def test_two_processes_that_are_killed(store, straight_run, data_dir, tmp_path):
    """As on a pod that is taken away: the first finds its own old lock, and the other waits as long as it does."""
    store.upload(Path(data_dir.partition("=")[2]), "bucket", "data/")
    arguments = tiny.arguments("gs://bucket/pod", "--config.data.source=gs://bucket/data/digits")
    disks = tmp_path / "disk_of_HOST"
    processes = start_all([*arguments, "--config.train.images=16000000"], 2, cache=disks)
    deadline = time.monotonic() + 240
    while 8 not in steps(store, "pod"):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.communicate()
    damage(store, f"pod/checkpoints/{steps(store, 'pod')[-1]}/train/")
    last = 16 * (steps(store, "pod")[-1] + 4)
    said = finish(start_all([*arguments, f"--config.train.images={last}"], 2, cache=disks), [0, 0])
    # Compiled programs are kept where a new pod finds them, and not on disks that go with the old one.
    assert store.names("bucket", "pod/.jax_cache/jit_train_step-") and not list(tmp_path.glob("disk_of_?/*"))
    assert "holds gs://bucket/pod; waiting 60 s" in said[0] and "Going on from step" in said[0]
    assert all("is damaged" in text for text in said) and store.names("bucket", "pod/damaged/")
    straight = tmp_path / "straight"
    assert main(tiny.arguments(straight, data_dir, f"--config.train.images={last}")) == 0
    assert_same_losses(fetch(store, "pod", tmp_path), straight)


@pytest.fixture(scope="module")
def run(store, data_dir):
    """Four steps in the bucket."""
    arguments = tiny.arguments(
        "gs://bucket/short", data_dir, "--config.train.images=64", "--config.log.every_images=16"
    )
    assert main(arguments) == 0
    (events,) = store.names("bucket", "short/tensorboard/")
    assert b"learning_rate" in store.objects["bucket", events][0]
    return "gs://bucket/short"


def test_generate_evaluate_and_report(store, run, data_dir, tmp_path):
    copy = fetch(store, "short", tmp_path)
    for workdir, out in ((run, "a"), (copy, "b")):
        assert main(["generate", f"--workdir={workdir}", "--seeds=0-3", "--nfe=5", f"--out={tmp_path}/{out}.npz"]) == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        np.testing.assert_array_equal(a["image"], b["image"])

    where = data_dir.replace("--config.data.data_dir", "--data_dir")
    assert main(["evaluate", "ref", "--data=digits", where, "--extractor=pixels", f"--out={tmp_path}/ref.npz"]) == 0
    store.put("bucket", "ref.npz", (tmp_path / "ref.npz").read_bytes())
    figures = []
    for workdir, ref in ((run, "gs://bucket/ref.npz"), (copy, tmp_path / "ref.npz")):
        assert main(["evaluate", f"--workdir={workdir}", f"--ref={ref}", "--num=70", "--nfe=3", "--batch=64"]) == 0
    [name] = [name for name in store.names("bucket", "short/evaluations/") if name.endswith("result.json")]
    figures.append(json.loads(store.text("bucket", name))["metrics"])
    [path] = copy.glob("evaluations/*/result.json")
    assert [json.loads(path.read_text())["metrics"]] == figures
    assert not [name for name in store.names("bucket", "short/evaluations/") if "features" in name]

    assert main(["report", f"--workdir={run}", f"--out={tmp_path}/page.html"]) == 0
    assert "short" in (tmp_path / "page.html").read_text()


def test_generated_into_the_bucket(store, run, tmp_path, capsys):
    """The same as into a local folder; what is there is not made again, and nothing but what was asked for is left."""

    def generate(out, *more):
        return main(["generate", f"--workdir={run}", "--seeds=0-59", "--nfe=1", f"--out={out}", *more])

    for out in ("images", "grid.png", "all.npz"):
        assert generate(f"gs://bucket/out/{out}") == generate(tmp_path / out) == 0
    copy = fetch(store, "out", tmp_path / "copy")
    assert sorted(path.name for path in copy.iterdir()) == ["all.npz", "grid.png", "images"]
    assert sorted(path.name for path in (copy / "images").iterdir()) == [
        *(f"{seed:06d}.png" for seed in range(60)), "settings.json",
    ]  # fmt: skip
    for path in ["grid.png", *(f"images/{seed:06d}.png" for seed in range(60))]:
        assert (copy / path).read_bytes() == (tmp_path / path).read_bytes()
    with np.load(copy / "all.npz") as a, np.load(tmp_path / "all.npz") as b:
        for name in ("image", "seed", "label"):
            np.testing.assert_array_equal(a[name], b[name])

    before = store.names("bucket", "out/")
    store.put("bucket", "out/images/000007.png", b"")
    del store.objects["bucket", "out/images/000059.png"], store.requests[:]
    capsys.readouterr()
    assert generate("gs://bucket/out/images") == 0
    assert "then 2 images" in capsys.readouterr().err
    assert store.names("bucket", "out/") == before
    for name in ("images/000007.png", "images/000059.png"):
        assert store.objects["bucket", f"out/{name}"][0] == (copy / name).read_bytes()
    assert not [request for request in store.requests if "%2Fimages%2F0" in request]  # one list says what is there
    assert generate("gs://bucket/out/images", "--class=3") == 2
    assert "gs://bucket/out/images holds images made with another class" in capsys.readouterr().err
    store.put("bucket", "data/0.png", b"mine")
    assert generate("gs://bucket/data") == 2
    assert "gs://bucket/data holds 0.png, which fdm generate did not make" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("out", ["made", "made.npz"])
def test_two_processes_that_are_killed_while_they_generate(store, run, tmp_path, out):
    arguments = ["generate", f"--workdir={run}", "--seeds=0-79", "--nfe=1", "--batch=4"]
    store.before_upload = lambda name: time.sleep(0.1)  # so that they are not done before they are killed
    processes = start_all([*arguments, f"--out=gs://bucket/pod_{out}"], 2)

    def pictures():
        return [name for name in store.names("bucket", f"pod_{out}") if name.endswith(".png")]

    deadline = time.monotonic() + 240
    while len(pictures()) < 20:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.communicate()
    time.sleep(1)  # until what was under way has arrived
    store.before_upload = lambda name: None
    there = len(pictures())
    assert 20 <= there < 80
    said = finish(start_all([*arguments, f"--out=gs://bucket/pod_{out}"], 2), [0, 0])
    assert "waiting 60 s" in said[0] and f"then {80 - there} images" in said[0]
    assert main([*arguments, f"--out={tmp_path}/one.npz"]) == 0
    with np.load(tmp_path / "one.npz") as one:
        images = one["image"]
    if out == "made":
        made = [np.asarray(Image.open(io.BytesIO(store.objects["bucket", name][0])))[..., None] for name in pictures()]
    else:
        assert store.names("bucket", "pod_made.npz") == ["pod_made.npz"]
        with np.load(io.BytesIO(store.objects["bucket", "pod_made.npz"][0])) as two:
            made = two["image"]
    assert np.abs(np.asarray(made, int) - images).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_profile_of_a_loop(store, data_dir, tmp_path, processes):
    """What it leaves there is what it leaves in a local folder, and nothing of the run whose loop it was."""
    where = f"profile_{processes}"
    arguments = ["profile", f"--config={tiny.CONFIG}", *tiny.OVERRIDES, data_dir, "--what=loop", "--steps=2"]
    said = finish(start_all([*arguments, f"--out=gs://bucket/{where}"], processes, devices=2), [0] * processes)
    made = fetch(store, where, tmp_path)
    assert {path.name for path in made.iterdir()} == {"plugins", "profile.json", "profile.txt"}
    (trace,) = made.glob("plugins/profile/*/*.xplane.pb")
    assert f"Trace: gs://bucket/{trace.parent.relative_to(tmp_path)}" in said[0]
    assert gzip.decompress(trace.with_name("perfetto_trace.json.gz").read_bytes()).endswith(b"}")
    summary = json.loads((made / "profile.json").read_text())
    assert (summary["what"], summary["processes"], summary["steps"]) == ("loop", processes, 2)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (tiny.arguments("gs://elsewhere/run"), "gs://elsewhere/run cannot be written: there is no such bucket."),
        (["generate", "--workdir=gs://bucket/none", "--out=a.png"], "gs://bucket/none is not the workdir of a run"),
        (
            ["edit", "interpolate", "--workdir=gs://bucket/short", "--out=gs://bucket/a.png"],
            "--out must be a local path, and is gs://b",
        ),
        (
            ["generate", "--workdir=gs://bucket/short", "--out=gs://elsewhere/a.png"],
            "gs://elsewhere/a.png.parts cannot be written: there is no such bucket.",
        ),
        (
            ["profile", f"--config={tiny.CONFIG}", *tiny.OVERRIDES, "--out=gs://elsewhere/profile"],
            "gs://elsewhere/profile/.profile cannot be written: there is no such bucket.",
        ),
    ],
)
def test_refusals(run, data_dir, arguments, sentence, capsys):
    assert main([*arguments, data_dir] if arguments[0] == "train" else arguments) == 2
    assert sentence in capsys.readouterr().err


def test_right_that_is_missing(run, store, data_dir, capsys, monkeypatch):
    def refuse(name):
        raise object_store.Refused(403)

    monkeypatch.setattr(store, "before_upload", refuse)
    assert main(tiny.arguments("gs://bucket/shut", data_dir)) == 2
    assert "gs://bucket/shut cannot be written: Google Cloud Storage does not allow it" in capsys.readouterr().err


def test_gcsfs_is_missing(monkeypatch, capsys):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--workdir=gs://bucket/run", "--out=a.png"])
    assert stop.value.code == 2
    assert (
        'gs://bucket/run is on Google Cloud Storage, which needs gcsfs: pip install "fdm_jax[gcs]".'
        in capsys.readouterr().err
    )
