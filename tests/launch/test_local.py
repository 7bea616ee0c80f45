"""launch/local.py with small programs in the place of fdm: what it starts, stops and starts again."""

import os
import re
import shlex
import signal
import subprocess
import time

import pytest
import tiny

from fdm_jax.errors import RESTART_CODE

# Process I of N does what the words after "train" say for it, such as "1:exit=3" for process 1.  Each attempt leaves
# a line in the file "starts"; "once" limits a deed to the first attempt.  It sleeps in short pieces: Python handles a
# signal that comes just before a sleep only after it.
FDM = r"""
import os, pathlib, signal, sys, time
stage = pathlib.Path(os.environ["STAGE"])
address, total, index = sys.argv[-1].removeprefix("--distributed=").split(",")
attempt = len(list(stage.glob(f"start-{index}-*")))
environment = {k: os.environ.get(k) for k in ("CUDA_VISIBLE_DEVICES", "XLA_FLAGS", "JAX_PLATFORMS")}
(stage / f"start-{index}-{attempt}").write_text(f"{address} {total} {environment}")
code = {"term": 75, "int": 0}
def note(signum, frame):
    with open(stage / f"signals-{index}", "a") as file:
        file.write(signal.Signals(signum).name + "\n")
    if "stubborn" not in deeds:
        time.sleep(0.1)
        os._exit(75 if signum == signal.SIGTERM else 0)
deeds = [word.partition(":")[2] for word in sys.argv if word.startswith(index + ":")]
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGINT, note)
print(f"hello from {index}", flush=True)
(stage / f"ready-{index}-{attempt}").touch()
for deed in deeds:
    name, _, value = deed.partition("=")
    if name.endswith("once"):
        name = name.removesuffix("once")
        if attempt:
            continue
    if name == "sleep":
        end = time.monotonic() + float(value)
        while time.monotonic() < end:
            time.sleep(0.02)
    elif name == "exit":
        os._exit(int(value))
    elif name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "together":
        while len(list(stage.glob(f"ready-*-{attempt}"))) < int(total):
            time.sleep(0.02)
    elif name == "save":
        (stage / value.replace("N", str(attempt + 1))).mkdir(parents=True)
"""


@pytest.fixture
def local(stage):
    stage.program("fdm", FDM)
    stage.fast = ("--fdm=fdm", "--backoff=0.1", "--grace=20")
    stage.starts = lambda index=0: len(list(stage.folder.glob(f"start-{index}-*")))
    stage.signals = lambda index: (
        (stage.folder / f"signals-{index}").read_text().split() if (stage.folder / f"signals-{index}").exists() else []
    )
    return stage


def test_commands_of_a_dry_run(local):
    fdm = ("--", "train", "--config=configs/edm.py:digits", "--workdir=runs/my digits")
    done = local.run("local", "--dry-run", "--processes=2", "--devices-per-process=4", "--port=1234", "--fdm=fdm", *fdm)
    environment = "env JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4"
    train = "fdm train --config=configs/edm.py:digits '--workdir=runs/my digits'"
    assert done.stdout == (
        f"{environment} {train} --distributed=localhost:1234,2,0 &\n"
        f"{environment} {train} --distributed=localhost:1234,2,1\n"
    )
    assert done.returncode == 0 and local.bash_accepts(done.stdout) and not local.starts()
    done = local.run("local", "--dry-run", "--gpus=0,1,4,5", "--processes=2", "--port=9", "--fdm=python -m x", *fdm)
    assert [line.split(" --config")[0] for line in done.stdout.splitlines()] == [
        "env CUDA_VISIBLE_DEVICES=0,1 JAX_PLATFORMS=cuda,cpu python -m x train",
        "env CUDA_VISIBLE_DEVICES=4,5 JAX_PLATFORMS=cuda,cpu python -m x train",
    ]  # fmt: skip
    done = local.run("local", "--dry-run", "--gpus=0,1", "--port=9", "--fdm=fdm", *fdm)
    assert "env CUDA_VISIBLE_DEVICES=1 JAX_PLATFORMS=cuda,cpu fdm train" in done.stdout.splitlines()[1]
    done = local.run("local", "--dry-run", "--port=9", "--fdm=fdm", *fdm)
    assert done.stdout == f"{train} --distributed=localhost:9,1,0\n"


def test_quoting_of_a_dry_run(local):
    printed = local.run("local", "--dry-run", "--processes=2", "--port=77", *local.fast, "--", "train", "1:a b").stdout
    arguments = [shlex.split(line.removesuffix(" &")) for line in printed.splitlines()]
    assert arguments[1] == ["fdm", "train", "1:a b", "--distributed=localhost:77,2,1"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--processes=2"], "The fdm command comes after --"),
        (["--processes=0", "--", "train"], "--processes must be 1 or more, and is 0."),
        (["--processes=9999999", "--", "train"], "--processes can be 1024 at most, on one machine, and is 9999999."),
        (["--port=65536", "--", "train"], "--port must be at most 65535, and is 65536."),
        (["--gpus=0,x", "--", "train"], "--gpus must be different numbers"),
        (["--gpus=0,0", "--", "train"], "--gpus must be different numbers"),
        (["--gpus=0,1,2", "--processes=2", "--", "train"], "3 GPUs cannot be dealt evenly to --processes=2."),
        (["--gpus=0", "--devices-per-process=2", "--", "train"], "--gpus and --devices-per-process exclude each other"),
        (["--", "train", "--distributed=auto"], "Leave --distributed out"),
        (["--fdm=no-such-program", "--", "train"], "'no-such-program' cannot be started"),
    ],
)
def test_bad_input(local, arguments, sentence):
    assert sentence in local.refused("local", *arguments)


@pytest.mark.parametrize(
    ("launcher", "argument", "sentence"),
    [
        ("local", "--fdm=a 'b", 'cannot be read as a shell reads it (No closing quotation), and is "a \'b".'),
        ("slurm", "--fdm=", "names no program."),
        ("local", "--grace=nan", "must be 0 seconds or more, and is 'nan'."),
        ("tpu", "--poll=-1", "must be 0 seconds or more, and is '-1'."),
    ],
)
def test_values_that_cannot_be_read(local, launcher, argument, sentence):
    done = local.run(launcher, *(["train", "--zone=z"] if launcher == "tpu" else []), argument, "--", "train")
    name = argument.partition("=")[0]
    assert done.returncode == 2 and done.stderr.endswith(f"error: argument {name}: {sentence}\n"), done.stderr


def test_help(local):
    done = local.run("local", "--help")
    assert done.returncode == 0 and "--gpus" in done.stdout and "Exit codes of fdm" in done.stdout
    assert os.access(local.root / "launch" / "local.py", os.X_OK)


def test_all_succeed(local):
    done = local.run("local", "--processes=3", "--devices-per-process=2", *local.fast, "--", "train")
    assert done.returncode == 0 and done.stderr == ""
    assert sorted(done.stdout.splitlines()) == ["[1] hello from 1", "[2] hello from 2", "hello from 0"]
    starts = [(local.folder / f"start-{i}-0").read_text() for i in range(3)]
    assert len(set(starts)) == 1 and starts[0].startswith("localhost:") and " 3 {" in starts[0]
    assert "device_count=2" in starts[0] and "'JAX_PLATFORMS': 'cpu'" in starts[0]


def test_one_is_killed(local):
    done = local.run(
        "local",
        "--processes=3",
        *local.fast,
        "--",
        "train",
        "0:sleeponce=30",
        "1:together",
        "1:killonce",
        "2:sleeponce=30",
    )
    assert done.returncode == 0
    assert "process 1 ended by SIGKILL, the others are stopped." in done.stderr
    assert "starting again in 0.1 s: restart 1 of at most 3." in done.stderr
    assert [local.starts(i) for i in range(3)] == [2, 2, 2]
    assert local.signals(0) == local.signals(2) == ["SIGTERM"]


def test_those_that_do_not_stop_are_killed(local):
    arguments = ("--processes=2", "--fdm=fdm", "--grace=0.5", "--max-restarts=0", "--")
    started = time.monotonic()
    done = local.run("local", *arguments, "train", "0:stubborn", "0:sleep=50", "1:together", "1:exit=9")
    assert done.returncode == 9 and time.monotonic() - started < 20
    assert "process 1 ended with exit code 9, the others are stopped." in done.stderr
    assert "1 still running after 0.5 s: killed." in done.stderr and local.signals(0) == ["SIGTERM"]


def test_crashes_are_bounded(local):
    done = local.run(
        "local", "--processes=2", "--max-restarts=2", *local.fast, "--", "train", "0:sleep=30", "1:together", "1:exit=1"
    )
    assert done.returncode == 1 and local.starts(0) == local.starts(1) == 3
    assert "starting again in 0.2 s: restart 2 of at most 2." in done.stderr
    assert "not started again: crash 3 without a new checkpoint in between, and --max-restarts is 2." in done.stderr


def test_code_75_starts_again(local):
    """The others get to save by themselves: no signal is sent to them."""
    done = local.run(
        "local", "--processes=2", *local.fast, "--", "train", "0:sleeponce=0.5", "0:exitonce=75", "1:exitonce=75"
    )
    assert done.returncode == 0 and local.starts(0) == local.starts(1) == 2
    assert "starting again: code 75 asks for it." in done.stderr and local.signals(0) == []


def test_code_75_without_progress_ends(local):
    done = local.run("local", "--max-restarts=2", *local.fast, "--", "train", "--workdir=runs", "0:exit=75")
    assert done.returncode == 75 and local.starts() == 3
    assert "not started again: 3 starts in a row brought no new checkpoint." in done.stderr


@pytest.mark.parametrize("code", [75, 1])
@pytest.mark.parametrize(
    ("command", "kept"),
    [
        ("train --workdir runs", "runs/checkpoints/N"),
        ("generate --workdir=runs --out=a/b/", "a/b/00000N.png"),
        ("generate --workdir=runs --out=c.npz", "c.npz.parts/00000N.png"),
        ("evaluate --workdir=runs --ref=r.npz", "runs/evaluations/abc/features/00000N.npz"),
        ("evaluate --images=i --ref=r.npz", "evaluations/abc/features/00000N.npz"),
        ("evaluate --images=i --out=d", "d/features/00000N.npz"),
    ],
)
def test_with_progress_it_goes_on(local, command, kept, code):
    (local.folder / kept).with_name("tmp").mkdir(parents=True)
    program = FDM.replace(
        '"exit":', f'"last":\n        os._exit(0 if attempt == 3 else {code})\n    elif name == "exit":'
    )
    local.program("fdm", program)
    done = local.run("local", "--max-restarts=1", *local.fast, "--", *command.split(), f"0:save={kept}", "0:last")
    assert done.returncode == 0 and local.starts() == 4


def test_one_that_is_still_being_written_is_no_progress(local):
    arguments = ("--max-restarts=1", *local.fast, "--", "train", "--workdir=runs")
    done = local.run("local", *arguments, "0:save=runs/checkpoints/N.orbax-checkpoint-tmp", "0:exit=75")
    assert done.returncode == 75 and local.starts() == 2


def test_pictures_that_are_not_made_end_it(local):
    done = local.run("local", "--max-restarts=0", *local.fast, "--", "generate", "--out=a", "0:exit=75")
    assert done.returncode == 75 and "not started again: 1 starts in a row brought no new picture." in done.stderr


def test_code_2_is_not_restarted(local):
    done = local.run("local", "--processes=2", *local.fast, "--", "train", "0:together", "0:exit=2", "1:sleep=30")
    assert done.returncode == 2 and local.starts() == 1 and local.signals(1) == ["SIGTERM"]
    assert "not started again: code 2 is something to mend first." in done.stderr


def test_ctrl_c_of_one_process_is_not_restarted(local):
    done = local.run("local", "--processes=2", *local.fast, "--", "train", "0:together", "0:exit=130", "1:sleep=30")
    assert done.returncode == 130 and local.starts() == 1
    assert "not started again: code 130 is Ctrl-C's." in done.stderr


@pytest.mark.parametrize(
    ("signum", "received", "code"),
    [(signal.SIGTERM, "SIGTERM", 75), (signal.SIGINT, "SIGINT", 0), (signal.SIGHUP, "SIGTERM", 75)],
)
def test_signals_are_passed_on(local, handled_by, signum, received, code):
    handled_by(signum, signal.SIG_DFL)
    launcher = local.start("local", "--processes=2", *local.fast, "--", "train", "0:sleep=30", "1:sleep=30")
    wait_for(local.folder / "ready-0-0", local.folder / "ready-1-0")
    launcher.send_signal(signum)
    _, errors = launcher.communicate(timeout=20)
    assert launcher.returncode == code and local.signals(0) == local.signals(1) == [received]
    assert local.starts() == 1 and "again" not in errors


def test_a_hang_up_is_passed_on_once(local, handled_by):
    """A terminal that closes tells it by its shell, and itself; of fdm's processes a second SIGTERM would be the end."""
    handled_by(signal.SIGHUP, signal.SIG_DFL)
    launcher = local.start("local", *local.fast, "--", "train", "0:stubborn", "0:sleep=2")
    wait_for(local.folder / "ready-0-0")
    launcher.send_signal(signal.SIGHUP)
    wait_for(local.folder / "signals-0")
    launcher.send_signal(signal.SIGHUP)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 0 and local.signals(0) == ["SIGTERM"]


def test_under_nohup_a_hang_up_is_nothing(local, handled_by):
    handled_by(signal.SIGHUP, signal.SIG_IGN)
    launcher = local.start("local", "--processes=2", *local.fast, "--", "train", "0:sleep=30", "1:sleep=30")
    wait_for(local.folder / "ready-0-0", local.folder / "ready-1-0")
    launcher.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        launcher.wait(timeout=1)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 75 and local.signals(0) == local.signals(1) == ["SIGTERM"]


def test_a_launcher_that_is_killed_does_not_leave_its_run_alone(local):
    launcher = local.start("local", "--processes=2", *local.fast, "--", "train", "0:sleep=30", "1:sleep=30")
    wait_for(local.folder / "ready-0-0", local.folder / "ready-1-0")
    launcher.kill()
    launcher.communicate(timeout=20)  # until its first process, too, has closed the pipes
    end = time.monotonic() + 20
    while not local.signals(0) == local.signals(1) == ["SIGTERM"]:
        assert time.monotonic() < end, (local.signals(0), local.signals(1))
        time.sleep(0.02)


def test_output_that_nobody_takes_ends_nothing(local):
    """Here more of it than a pipe holds."""
    chatty = FDM.replace("hello from", 2_000 * (100 * "x" + r"\n")).replace("print(", 'index == "0" or print(')
    local.program("fdm", chatty)
    arguments = ("--processes=2", *local.fast, "--", "train", "1:exitonce=9")
    launcher = local.start("local", *arguments)
    launcher.stdout.close()
    launcher.stderr.close()
    assert launcher.wait(timeout=60) == 0 and local.starts(0) == local.starts(1) == 2
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *local.command("local", *arguments)]
    assert subprocess.run(command, cwd=local.folder, env=local.env, timeout=60).returncode == 0
    assert local.starts(0) == local.starts(1) == 3


def test_a_workdir_that_cannot_be_looked_into(local):
    """As on a file server that is away: the run is started again all the same."""
    done = local.run("local", *local.fast, "--", "train", "--workdir", 300 * "x", "0:exitonce=1")
    assert done.returncode == 0 and local.starts() == 2


def test_a_signal_ends_the_wait_before_a_restart(local):
    launcher = local.start("local", "--fdm=fdm", "--backoff=100", "--", "train", "0:exit=1")
    while "starting again in 100 s" not in launcher.stderr.readline():
        assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 1 and local.starts() == 1


def wait_for(*paths):
    end = time.monotonic() + 20
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, paths
        time.sleep(0.02)


def test_the_exit_code_for_a_restart_is_that_of_fdm():
    text = (tiny.ROOT / "launch" / "common.py").read_text()
    assert re.search(r"^DONE, USER_ERROR, RESTART = (.*?) +#", text, re.MULTILINE)[1] == f"0, 2, {RESTART_CODE}"
