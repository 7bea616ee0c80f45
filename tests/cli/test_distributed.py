"""Several processes of this machine as one: --distributed."""

import inspect
import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from cli.conftest import assert_same_losses, checkpoint, finish, rows, start_all
from PIL import Image

from fdm_jax.cli.main import main
from fdm_jax.errors import RESTART_CODE
from fdm_jax.training.locking import locked

EVERY_STEP = "--config.log.every_images=16"
ENDLESS = "--config.train.images=16000000"


def wait_for_rows(workdir, processes, count):
    deadline = time.monotonic() + 240
    while not (workdir / "metrics.jsonl").exists() or len(rows(workdir)) < count:
        assert all(process.poll() is None for process in processes), finish(processes, [])
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_preempted_processes(data_dir, tmp_path):
    """SIGTERM to one of two saves in both at one step; a lone process of eight devices goes on."""
    workdir = tmp_path / "run"
    arguments = tiny.arguments(workdir, data_dir, EVERY_STEP, "--config.checkpoint.every_images=32")
    processes = start_all([*arguments, ENDLESS], 2)
    wait_for_rows(workdir, processes, 3)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes, [RESTART_CODE] * 2)
    (step,) = {int(text.split("at step ")[1].split(",")[0]) for text in said}
    arrays, meta = checkpoint(workdir, step)
    assert int(arrays["['train']['step']"]) == meta["data"]["batches"] == step == rows(workdir)[-1]["step"]
    assert "Parameters:" in said[0] and "Parameters:" not in said[1]
    assert not list(workdir.glob(".seen_by_all_*"))  # by which they found out that they share it

    images = f"--config.train.images={16 * (step + 8)}"
    assert main([*arguments, images]) == 0
    straight = tmp_path / "straight"
    assert main(tiny.arguments(straight, data_dir, EVERY_STEP, images)) == 0
    assert rows(workdir)[-1]["step"] == step + 8
    assert_same_losses(workdir, straight)


def test_processes_that_do_not_share_the_workdir(data_dir, tmp_path):
    """As with a path on each host's own disk: refused by all, where they would wait for each other."""
    for said in finish(start_all(tiny.arguments(tmp_path / "HOST" / "run", data_dir), 2), [2, 2]):
        assert "is another folder for process 1 than for process 0: give one that all of them see" in said


def test_processes_that_do_not_share_the_output(straight_run, tmp_path):
    """Here each would have a half of the images."""
    for host in "01":
        (tmp_path / host / "images").mkdir(parents=True)
    arguments = ["generate", f"--workdir={straight_run}", "--seeds=0-3", "--nfe=1", f"--out={tmp_path}/HOST/images"]
    for said in finish(start_all(arguments, 2), [2, 2]):
        assert "is another folder for process 1 than for process 0: give one that all of them see" in said
    assert not list(tmp_path.glob("*/images/*.png"))


COMPILE = """
import pathlib, sys
import jax
from fdm_jax.cli.compile_cache import share_compile_cache
from fdm_jax.cli.distributed import joined

folder, how = pathlib.Path(sys.argv[1]), sys.argv[-1].partition("=")[2]

def usual(name):
    jax.config.update("jax_compilation_cache_dir", str(folder / name))

def step(x):
    return x + 1

for bound in ("min_compile_time_secs", "min_entry_size_bytes"):
    jax.config.update(f"jax_persistent_cache_{bound}", 0)
usual("home")
with joined(how, folder / "run"):
    print("all see it:", jax.config.jax_compilation_cache_dir)
    usual(f"home_of_{how[-1]}")
    share_compile_cache(folder / "run")
    print("each its own:", jax.config.jax_compilation_cache_dir)
    jax.jit(step)(1.0)
    usual(f"home_of_{how[-1]}")
    share_compile_cache(None)
    jax.jit(lambda x: x + 2)(1.0)
"""


def test_compiled_programs_are_kept_where_all_see_them(tmp_path):
    """JAX has process 0 write alone: on GPUs another that does not see it waits for its share of a compilation for ever."""
    said = finish(start_all([str(tmp_path)], 2, program=("-c", COMPILE)), [0, 0])
    for text in said:
        assert f"all see it: {tmp_path}/home\n" in text and f"each its own: {tmp_path}/run/.jax_cache\n" in text
    assert "Compiled programs are not kept: " in said[0] and "not kept" not in said[1]
    kept = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    (elsewhere,) = [path for path in kept if not path.startswith("home/")]  # where the sum that connects them is
    assert elsewhere.startswith("run/.jax_cache/jit_step-"), kept


def test_workdir_that_is_in_use(straight_run, data_dir):
    """All end with 2, or a scheduler that goes by the highest code would start them again."""
    with locked(straight_run):
        said = finish(start_all(tiny.arguments(straight_run, data_dir), 2), [2, 2])
    assert f"Another process is at work in {straight_run}: stop it, or give another folder." in said[0]
    assert f"{straight_run} cannot be had by another process, which says why." in said[1]


ONE_CANNOT_READ = """
import sys
import orbax.checkpoint as ocp
from fdm_jax.cli.main import main

restore = ocp.StandardCheckpointHandler.restore

def failing(self, directory, *args, **kwargs):
    if directory.parent.name == "20":
        raise OSError("Input/output error")
    return restore(self, directory, *args, **kwargs)

if sys.argv[-1].endswith(",1"):
    ocp.StandardCheckpointHandler.restore = failing
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_checkpoint_that_one_process_cannot_read(straight_run, data_dir, tmp_path):
    """All go on from the one before; each from its own, they would wait for each other, or add up two runs."""
    workdir = shutil.copytree(straight_run, tmp_path / "run")
    said = finish(start_all(tiny.arguments(workdir, data_dir), 2, program=("-c", ONE_CANNOT_READ)), [0, 0])
    for text, cause in zip(said, ("another process cannot read it", "Input/output error"), strict=True):
        assert f"The checkpoint of step 20 is damaged ({cause}); trying the one before." in text
    assert "Going on from step 16" in said[0]
    assert (workdir / "checkpoints" / "damaged" / "20").is_dir() and (workdir / "checkpoints" / "20").is_dir()
    assert_same_losses(workdir, straight_run)


@pytest.mark.slow
def test_bereaved_processes(data_dir, tmp_path):
    """One of two is killed: the other stops, with a sentence; both started again go on from the newest checkpoint."""
    workdir = tmp_path / "run"
    arguments = tiny.arguments(workdir, data_dir, EVERY_STEP, "--config.checkpoint.every_images=32")
    processes = start_all([*arguments, ENDLESS], 2)
    wait_for_rows(workdir, processes, 7)
    processes[1].kill()
    said = finish(processes, [RESTART_CODE, -signal.SIGKILL])
    assert "another process was lost" in said[0] and "Traceback" not in said[0]
    steps = len(rows(workdir)) + 8
    images = f"--config.train.images={16 * steps}"
    said = finish(start_all([*arguments, images], 2), [0, 0])
    assert "Going on from step" in said[0] and rows(workdir)[-1]["step"] == steps
    straight = tmp_path / "straight"
    assert main(tiny.arguments(straight, data_dir, EVERY_STEP, images)) == 0
    assert_same_losses(workdir, straight)


SLOW_TO_SAY = """
import time
from fdm_jax import errors
made = errors.UserError.__init__
errors.UserError.__init__ = lambda self, said: (time.sleep(2 if "41 images" in said else 0), made(self, said))[1]
from fdm_jax.cli.main import entry_point
entry_point()
"""


def test_different_data_in_two_processes(data_dir, tmp_path):
    """As if one host had a picture more; each would shuffle in an order of its own.

    The first process connects the others: it waits for one that takes longer to say what is wrong.
    """
    arguments = tiny.arguments(tmp_path / "run", data_dir, "--config.data.max_images=4HOST")
    said = finish(start_all(arguments, 2, program=("-c", SLOW_TO_SAY)), [2, 2])
    for text, count in zip(said, (40, 41), strict=True):
        assert text.startswith("Waiting for the other processes of --distributed=localhost:")
        assert f"The processes have different data (digits, {count} images of 8x8x1" in text


@pytest.mark.parametrize(
    "command, words", [("train", "cannot train on its data"), ("generate", "is not the workdir of a run for another")]
)
def test_what_another_process_lacks(straight_run, data_dir, tmp_path, monkeypatch, capsys, command, words):
    """As a file that is on the disks of some hosts: all end with 2, or a scheduler would start them again."""
    monkeypatch.setattr("fdm_jax.training.agreement.in_all", lambda holds: False)
    arguments = ["generate", f"--workdir={straight_run}", f"--out={tmp_path}/a.png"]
    if command == "train":
        arguments = tiny.arguments(tmp_path / "run", data_dir)
    assert main(arguments) == 2
    assert words in (said := capsys.readouterr().err) and "says why" in said and not list(tmp_path.iterdir())


DAMAGED_FOR_ONE = """
import sys
from fdm_jax.data.sources import Subset
from fdm_jax.errors import UserError
read, times = Subset.read, []
def damaged(self, indices):
    times.append(1)
    if sys.argv[-1].endswith(",2,REFUSING") and len(times) > 40:
        raise UserError("Image 17 is damaged.")
    return read(self, indices)
Subset.read = damaged
from fdm_jax.cli.main import entry_point
entry_point()
"""


AWAY_FOR_ONE = """
import sys
from fdm_jax.errors import UserError
def away(*args, **kwargs):
    try:
        raise OSError(116, "Stale file handle", "/data/a.zip")
    except OSError as error:
        raise UserError("a.zip cannot be opened (Stale file handle).") from error
if sys.argv[-1].endswith(",2,FAILING"):
    import fdm_jax.data.opening
    fdm_jax.data.opening.open_source = away
from fdm_jax.cli.main import entry_point
entry_point()
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_a_file_server_that_fails_for_one_process(data_dir, tmp_path, failing):
    """Launchers try again after 1 and 75, but not after 2."""
    program = ("-c", AWAY_FOR_ONE.replace("FAILING", str(failing)))
    began = time.monotonic()
    codes = [RESTART_CODE, RESTART_CODE]
    codes[failing] = 1
    said = finish(start_all(tiny.arguments(tmp_path / "run", data_dir), 2, program=program), codes)
    assert time.monotonic() - began < 90  # JAX gives a process up after 100 s
    assert said[failing].endswith("fdm train: a.zip cannot be opened (Stale file handle).\n")
    assert said[1 - failing].endswith("fdm train: Another process cannot train on its data, and says why.\n")


STOPPED_AT_A_SAVE = """
import os, signal, sys, time
from fdm_jax.training.checkpoints import Checkpoints
save = Checkpoints.save
def stopped(self, step, *rest):
    save(self, step, *rest)
    self.wait()
    if step == 12 and sys.argv[-1].endswith(",2,1"):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(4)  # until all know of it
Checkpoints.save = stopped
from fdm_jax.cli.main import entry_point
entry_point()
"""


@pytest.mark.slow
def test_told_to_end_right_after_a_save_in_a_run_that_went_on(data_dir, tmp_path):
    """The last to have asked JAX's service for the step to stop at was Orbax, with a number of its own."""
    arguments = tiny.arguments(tmp_path / "run", data_dir, "--config.checkpoint.every_images=64")
    assert main([*arguments, "--config.train.images=128"]) == 0
    said = finish(start_all([*arguments, ENDLESS], 2, program=("-c", STOPPED_AT_A_SAVE)), [RESTART_CODE] * 2)
    assert "at step 13, saved" in said[0]


SAVES_FOR_EVER = """
import time
import orbax.checkpoint
orbax.checkpoint.CheckpointManager.close = lambda manager: time.sleep(1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("refusing, before", [(0, ""), (1, ""), (0, SAVES_FOR_EVER)], ids=["first", "second", "saving"])
def test_process_that_ends_alone_for_what_the_user_can_mend(data_dir, tmp_path, refusing, before):
    """The other one, which knows nothing of it, ends likewise: after 75 a scheduler would start both again.

    A checkpoint that is being written may need the other one for ever, which waits for a step (seen on busy machines).
    """
    arguments = tiny.arguments(tmp_path / "run", data_dir, "--config.data.max_images=1000", ENDLESS)
    program = ("-c", before + DAMAGED_FOR_ONE.replace("REFUSING", str(refusing)))
    said = finish(start_all(arguments, 2, program=program), [2, 2])
    assert said[refusing].endswith("fdm train: Image 17 is damaged.\n")
    assert said[1 - refusing].endswith(f"fdm: process {refusing} has ended: Image 17 is damaged.\n")


PLATFORM_FOR_ONE = """
import os, sys
if sys.argv[-1].endswith(",REFUSING"):
    os.environ["JAX_PLATFORMS"] = "nonsense"
from fdm_jax.cli.main import entry_point
entry_point()
"""


@pytest.mark.slow
@pytest.mark.parametrize("refusing", [0, 1])
def test_devices_that_one_process_lacks(data_dir, tmp_path, refusing):
    """The other one waits for it, and is told."""
    program = ("-c", PLATFORM_FOR_ONE.replace("REFUSING", str(refusing)))
    said = finish(start_all(tiny.arguments(tmp_path / "run", data_dir), 2, program=program), [2, 2])
    assert "\nfdm train: JAX does not start: Unable to initialize backend 'nonsense'" in said[refusing]
    assert f"\nfdm: process {refusing} has ended: JAX does not start:" in said[1 - refusing]


def test_different_commands_in_two_processes(data_dir, tmp_path):
    """One would save where the other does not, and wait for it; its paths and threads are each one's own affair."""
    free = [data_dir, "--config.data.threads=1HOST", "--config.data.cache_mb=10HOST"]
    said = finish(
        start_all(tiny.arguments(tmp_path / "run", *free, "--config.checkpoint.every_images=6HOST"), 2), [2, 2]
    )
    assert "The processes differ in their configurations, and the others say where: give" in said[0]
    assert "configurations in checkpoint.every_images (60 in process 0, 61 here): give" in said[1]


def test_generated_by_two_processes(straight_run, tmp_path):
    more = ["--seeds=0-9", "--steps=3", "--batch=4"]
    assert main(["generate", f"--workdir={straight_run}", f"--out={tmp_path}/one.png", *more]) == 0
    said = finish(start_all(["generate", f"--workdir={straight_run}", f"--out={tmp_path}/two.png", *more], 2), [0, 0])
    assert "Compiling the sampler; then 10 images, 4 at a time." in said[0] and "Compiling" not in said[1]
    assert "10 images in" in said[0] and "images in" not in said[1]
    one, two = (np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 1 and one.std() > 10


@pytest.mark.parametrize("what", ["sample", pytest.param("train", marks=pytest.mark.slow)])
def test_speed_of_two_processes(what):
    """Of all their devices together."""
    arguments = [f"--config={tiny.CONFIG}", *tiny.OVERRIDES, f"--what={what}", "--steps=1", "--sampling-steps=1"]
    said = finish(start_all(["bench", *arguments], 2, devices=2), [0, 0])
    (line,) = [json.loads(line) for line in said[0].splitlines() if line.startswith("{")]
    assert (line["what"], line["devices"], line["processes"], line["batch_size"]) == (what, 4, 2, 16)
    assert line["images_per_second"] > 0 and line["matmul_tflops"] > 0
    assert "{" not in said[1] and "timing" not in said[1]


@pytest.mark.slow
@pytest.mark.parametrize(("what", "out"), [("train", "HOST"), ("sample", "HOST"), ("loop", "0")])
def test_profile_of_two_processes(data_dir, tmp_path, what, out):
    """The first one's, which all the others run with."""
    arguments = ["profile", f"--config={tiny.CONFIG}", *tiny.OVERRIDES, data_dir, f"--what={what}", "--steps=2"]
    said = finish(start_all([*arguments, f"--out={tmp_path}/{out}"], 2, devices=2), [0, 0])
    assert "Of 2 processes, this is the first one with its devices." in said[0] and "Of 2" not in said[1]
    assert {path.name for path in (tmp_path / "0").iterdir()} == {"plugins", "profile.json", "profile.txt"}
    assert not (tmp_path / "1").exists()
    summary = json.loads((tmp_path / "0" / "profile.json").read_text())
    assert (summary["devices"], summary["processes"], summary["steps"]) == (4, 2, 2)
    kinds = {row["name"] for row in summary["categories"]}
    assert "convolution" in kinds and "not in the program" not in kinds
    assert any("all-reduce" in row["operation"] for row in summary["operations"]) == (what != "sample")


@pytest.mark.slow
def test_profile_of_a_loop_whose_processes_do_not_share_the_output(data_dir, tmp_path):
    arguments = ["profile", f"--config={tiny.CONFIG}", *tiny.OVERRIDES, data_dir, "--what=loop"]
    for said in finish(start_all([*arguments, f"--out={tmp_path}/HOST"], 2), [2, 2]):
        assert (
            f"{tmp_path}/" in said and "is another folder for process 1 than for process 0: give one that all" in said
        )
    assert not list(tmp_path.glob("*/.run_*"))


TOLD_IN_C = """
import ctypes, signal
from fdm_jax.cli.distributed import _leave_when_told
signal.signal(signal.SIGINT, signal.default_int_handler)
_leave_when_told()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])  # so that they do not wake the main thread
print("up", flush=True)
ctypes.CDLL(None).sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, RESTART_CODE, "fdm: stopped by SIGTERM; the same command begins again or goes on."),
        (signal.SIGINT, 130, "fdm: stopped; the same command begins again or goes on."),
    ],
)
def test_told_to_end_where_python_does_not_come_to_signals(number, code, said):
    """As in a compilation, or in a sum with a process that has ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", TOLD_IN_C], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=50)
    assert (process.returncode, errors) == (code, said + "\n")


@pytest.mark.slow
def test_generation_that_is_told_to_end(straight_run, tmp_path):
    """First the one whose end ends the service of both.  They keep what they made; the same command, in one process, makes
    the rest.
    """
    more = ["generate", f"--workdir={straight_run}", f"--out={tmp_path}/all", "--steps=3", "--batch=2"]
    processes = start_all([*more, "--seeds=0-999"], 2)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("all/*.png")):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
    said = finish(processes, [RESTART_CODE] * 2)
    assert all("stopped by SIGTERM" in text for text in said)
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("all/*.png")}
    assert 0 < len(made) < 1000 and main([*more, "--seeds=0-15"]) == 0
    assert all((tmp_path / "all" / name).stat().st_mtime_ns == at for name, at in made.items())


@pytest.mark.slow
def test_samples_and_evaluation_of_a_run_in_two_processes(data_dir, tmp_path):
    """What the loop does beside training, against one process, with the state dealt out."""
    more = ["--config.samples.every_images=64", "--config.samples.rows=1", "--config.samples.steps=3",
            "--config.train.images=64", "--config.eval.every_images=64", "--config.eval.held_out_images=20"]  # fmt: skip
    runs = [tmp_path / "two", tmp_path / "one"]
    finish(start_all(tiny.arguments(runs[0], data_dir, *more, "--config.parallel=fsdp"), 2), [0, 0])
    assert main(tiny.arguments(runs[1], data_dir, *more)) == 0
    two, one = (rows(run)[-1] for run in runs)
    assert two.keys() == one.keys() and two["val/error"] == pytest.approx(one["val/error"], rel=1e-5)
    two, one = (np.asarray(Image.open(run / "samples" / "000000000064.png"), int) for run in runs)
    assert two.shape == one.shape and np.abs(two - one).max() <= 1


SLOW_TO_COMPILE = """
import sys, time
from fdm_jax.cli.main import main
from fdm_jax.training.loop import _Run

begin = _Run._begin

def late(self):
    begin(self)
    time.sleep(40 if sys.argv[-1].endswith(",1") else 0)

_Run._begin = late
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_process_that_compiles_for_longer(data_dir, tmp_path):
    """On CPUs a first sum over some devices waits for half a minute only; the others find their programs, and it does not."""
    arguments = tiny.arguments(tmp_path / "run", data_dir, "--config.train.images=32")
    said = finish(start_all(arguments, 2, devices=2, program=("-c", SLOW_TO_COMPILE)), [0, 0])
    assert "32 of 32 images (100%)" in said[0]


SLOW_TO_MEASURE = """
import functools, sys, time
import jax
import fdm_jax.evaluation.measures as measures
from fdm_jax.cli.main import main

measure = measures.measure

def slow(*arguments, **more):
    time.sleep(12)
    return measure(*arguments, **more)

measures.measure = slow
jax.distributed.initialize = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=4)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    "shutdown_timeout_seconds" not in inspect.signature(jax.distributed.initialize).parameters,
    reason="this jax has five minutes, fixed",
)
def test_others_wait_for_the_first_one_that_measures(straight_run, tmp_path):
    """JAX gives up a process that parts so much later than the others, and all of them with it."""
    stats, out = tmp_path / "stats.npz", tmp_path / "out"
    assert main(["evaluate", "ref", "--data=digits", "--extractor=pixels", f"--out={stats}"]) == 0
    arguments = ["evaluate", f"--workdir={straight_run}", f"--ref={stats}", "--metrics=frechet"]
    arguments += ["--num=64", "--nfe=1", f"--out={out}"]
    said = finish(start_all(arguments, 2, program=("-c", SLOW_TO_MEASURE)), [0, 0])
    assert "frechet_distance" in said[0] and (out / "result.json").exists()


@pytest.mark.slow
def test_processes_and_devices_give_one_curve(data_dir, tmp_path):
    """1x1, 1x4, 2x2, 4x1; and a run moved 2x2 -> 1x4 -> 4x1."""
    more = [data_dir, EVERY_STEP]
    shapes = [(1, 4), (1, 1), (2, 2), (4, 1)]
    for processes, devices in shapes:
        workdir = tmp_path / f"{processes}x{devices}"
        finish(start_all(tiny.arguments(workdir, *more), processes, devices), [0] * processes)
        assert len(rows(workdir)) == 20
        assert_same_losses(workdir, tmp_path / "1x4")
        written = (workdir / "checkpoints" / "20").glob("train/ocdbt.process_*")
        assert len(list(written)) == processes, "each process writes its part"
    for (processes, devices), steps in (((2, 2), 7), ((1, 4), 13), ((4, 1), 20)):
        arguments = tiny.arguments(tmp_path / "moved", *more, f"--config.train.images={16 * steps}")
        finish(start_all(arguments, processes, devices), [0] * processes)
    assert_same_losses(tmp_path / "moved", tmp_path / "1x4")
    (moved, _), (straight, _) = checkpoint(tmp_path / "moved", 20), checkpoint(tmp_path / "1x4", 20)
    for name, value in straight.items():
        # The keys' bias has no gradient (softmax does not see it), and Adam makes steps of its rounding errors.
        atol = 2e-4 if name.endswith("['qkv']['bias']") else 2e-5
        np.testing.assert_allclose(moved[name], value, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    "how, words",
    [
        ("localhost:99999,2,0", "cannot listen at port 99999 (bind(): port must be 0-65535.)"),
        ("localhost:1,2,2", "I from 0 to N - 1, and is 'localhost:1,2,2'"),
        ("somehow", "must be off, auto"),
    ],
)
@pytest.mark.parametrize("command", ["train", "generate"])
def test_bad_input(straight_run, data_dir, tmp_path, capsys, command, how, words):
    arguments = ["generate", f"--workdir={straight_run}", f"--out={tmp_path}/a.png"]
    if command == "train":
        arguments = tiny.arguments(tmp_path / "run", data_dir)
    assert main([*arguments, f"--distributed={how}"]) == 2
    assert words in capsys.readouterr().err


def test_port_of_another_program(data_dir, tmp_path, capsys):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        assert main([*tiny.arguments(tmp_path / "run", data_dir), f"--distributed=localhost:{port},2,0"]) == 2
    assert f"=localhost:{port},2,0 cannot listen at port {port} (Address already in use)" in capsys.readouterr().err
