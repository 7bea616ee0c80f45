"""launch/tpu.py against a small gcloud that plays the states of a queued resource and really runs the workers' side.

Each worker is a home folder of its own; `make` puts the fdm of the test where the locked packages would go.
"""

import json
import os
import shlex
import signal
import subprocess
import time

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ALIVE = "--ssh-flag=-oServerAliveInterval=30"

GCLOUD = r"""
import json, os, pathlib, shutil, signal, subprocess, sys
stage, arguments = pathlib.Path(os.environ["STAGE"]), sys.argv[1:]
with open(stage / "gcloud.log", "a") as log:
    log.write(json.dumps(arguments) + "\n")
pod = stage / "pod.json"
flags = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
words = [a for a in arguments if not a.startswith("--")]
state = json.loads(pod.read_text()) if pod.exists() else None
homes = [stage / f"worker-{i}" for i in range(2)]

def end_workers():
    for home in homes:
        try:
            os.kill(int((home / "fdm_run" / "pid").read_text()), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            pass

def leave(words):
    sys.exit("ERROR: (gcloud) " + words)

if words[:2] == ["storage", "ls"]:
    folder = stage / words[2].removeprefix("gs://")
    print("".join(f"gs://{words[2][5:]}{entry.name}/\n" for entry in folder.iterdir()) if folder.exists() else "")
    sys.exit()
kind, verb, name = words[2:5]
if verb == "create":
    made, refused = stage / "created", stage / "refused"
    n = int(made.read_text() if made.exists() else 0) + 1
    if refused.exists() and refused.read_text() == str(n):  # once
        refused.unlink()
        leave("RESOURCE_EXHAUSTED: Quota exceeded.")
    made.write_text(str(n))
    plays = json.loads((stage / "plays.json").read_text()) if (stage / "plays.json").exists() else []
    pod.write_text(json.dumps(plays[n - 1] if n <= len(plays) else ["PROVISIONING", "ACTIVE"]))
    for home in homes:
        home.mkdir()
elif state is None:
    leave("NOT_FOUND: Requested entity was not found.")
elif verb == "delete":
    end_workers()
    pod.unlink()
    (stage / "preempt").unlink(missing_ok=True)
    for home in homes:
        shutil.rmtree(home)
elif (stage / "preempt").exists():
    end_workers()
    if kind == "tpu-vm" and verb == "describe":
        print("PREEMPTED")
    elif verb != "describe":
        leave("the TPU is PREEMPTED")
    elif (stage / "late").exists():  # the queued resource notices later than the node
        (stage / "late").unlink()
        print("ACTIVE")
    else:
        (stage / "preempt").unlink()
        pod.write_text('["SUSPENDED"]')
        print("SUSPENDED")
elif (stage / "repair").exists():
    end_workers()
    if verb != "describe":
        leave("the TPU is not READY")
    looks = (stage / "repair").read_text()
    if kind == "queued-resources":
        print("ACTIVE")
    elif len(looks) > 1:
        (stage / "repair").write_text(looks[1:])
        print("REPAIRING")
    else:
        (stage / "repair").unlink()
        print("READY")
elif verb == "ssh" and (stage / "deaf").exists():
    (stage / "deaf").unlink()
    leave("ssh: connect to host: Connection timed out")
elif verb == "describe":
    pod.write_text(json.dumps(state[1:] or state))
    if state[0] == "no answer":
        leave("UNAVAILABLE: The service is currently unavailable.")
    print(state[0])
elif state[0] != "ACTIVE":
    leave("the TPU is not READY")
else:
    chosen = homes if flags["worker"] == "all" else [homes[int(flags["worker"])]]
    if verb == "scp":
        for home in chosen:
            shutil.copy(words[4], home)
    else:
        jobs = [subprocess.Popen(["bash", "-c", flags["command"]], cwd=h, env=os.environ | {"HOME": str(h)}) for h in chosen]
        sys.exit(max(job.wait() for job in jobs))
"""

GIT = f"""
import io, os, pathlib, sys, tarfile, time
arguments = sys.argv[3:]
if arguments[0] == "rev-parse":
    print(os.environ.get("COMMIT", "{COMMIT}"))
elif arguments[0] == "archive":
    with tarfile.open(arguments[2].removeprefix("--output="), "w:gz") as archive:
        archive.add(pathlib.Path(sys.argv[2]) / "launch" / "tpu_worker.sh", "launch/tpu_worker.sh")
"""

MAKE = r"""
import os, pathlib, shutil, sys
with open(os.environ["STAGE"] + "/make.log", "a") as log:
    log.write(" ".join(sys.argv[3:]) + "\n")
folder = pathlib.Path(sys.argv[2]) / ".venv" / "bin"
folder.mkdir(parents=True, exist_ok=True)
shutil.copy(os.environ["STAGE"] + "/bin/worker_fdm", folder / "fdm")
"""

# The run of a worker: saves a checkpoint, as a rule, then does the next of the deeds in the file "deeds" (one per start).
FDM = r"""
import json, os, pathlib, signal, sys, time
stage, home = pathlib.Path(os.environ["STAGE"]), pathlib.Path(os.environ["HOME"])
assert os.environ["JAX_PLATFORMS"] == "tpu,cpu"
def save(*_):
    os._exit(75)
signal.signal(signal.SIGTERM, save)
def stay():
    for _ in range(3000):  # in pieces: a signal just before a sleep is handled after it
        time.sleep(0.02)
mine = stage / f"starts-{home.name}"
mine.write_text((mine.read_text() if mine.exists() else "") + " ".join(sys.argv[1:]) + "\n")
start = len(mine.read_text().splitlines())
deeds = json.loads((stage / "deeds.json").read_text())
deed = deeds[min(start, len(deeds)) - 1]
first = home.name == "worker-0"
checkpoints = stage / "bucket" / "run" / "checkpoints"
if first and deed not in ("stuck", "one crashes"):
    (checkpoints / str(start)).mkdir(parents=True, exist_ok=True)
print(f"start {start} of {home.name}: {deed}", flush=True)
if deed == "preempted":
    if first:
        (stage / "preempt").touch()
    stay()
elif deed == "repaired":
    if first:
        (stage / "repair").write_text("." * 15)
    stay()
elif deed == "wait":
    stay()
elif deed == "one crashes":
    if first:
        os._exit(9)
    stay()
os._exit({"done": 0, "stuck": 75, "lost": 75, "user": 2}[deed])
"""

TRAIN = ("--", "train", "--config=configs/edm.py:cifar10", "--workdir=gs://bucket/run", "--config.train.images=1 000")
SLICE = ("--name=my-pod", "--zone=us-central2-b", "--accelerator-type=v4-32")


@pytest.fixture
def pod(stage):
    stage.program("gcloud", GCLOUD)
    stage.program("git", GIT)
    stage.program("make", MAKE)
    stage.program("worker_fdm", FDM)
    stage.deeds = lambda *deeds: (stage.folder / "deeds.json").write_text(json.dumps(deeds))
    stage.starts = lambda worker=0: (stage.folder / f"starts-worker-{worker}").read_text().splitlines()
    stage.train = lambda *more, deeds: (
        stage.deeds(*deeds), stage.run("tpu", "train", *SLICE, "--poll=0.2", *more, *TRAIN)
    )[1]  # fmt: skip
    stage.called = lambda verb: [
        line for line in map(json.loads, (stage.folder / "gcloud.log").read_text().splitlines()) if line[3:4] == [verb]
    ]
    yield stage
    for home in stage.folder.glob("worker-*"):
        if (home / "fdm_run" / "pid").exists() and not (home / "fdm_run" / "exit").exists():
            try:
                os.kill(int((home / "fdm_run" / "pid").read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue


def test_commands_of_a_dry_run(pod):
    done = pod.run("tpu", "train", "--dry-run", *SLICE, "--project=mine", "--spot", *TRAIN)
    place = "my-pod --zone=us-central2-b --project=mine"
    queued, vm = "gcloud compute tpus queued-resources", "gcloud compute tpus tpu-vm"
    build, worker = f"{pod.folder}/.cache/fdm_jax/launch", "bash fdm_jax/launch/tpu_worker.sh"
    lines = done.stdout.splitlines()
    key = lines[6].split(" start ")[1].split()[0]
    assert lines == [
        f"{queued} create my-pod --node-id={place} --accelerator-type=v4-32 --runtime-version=tpu-ubuntu2204-base --spot",
        f"{queued} describe {place} '--format=value(state.state)'",
        f"mkdir -p {build}",
        f"git -C {shlex.quote(str(pod.root))} archive --format=tar.gz --output={build}/fdm_jax-{COMMIT}.tar.gz {COMMIT}",
        f"{vm} scp {build}/fdm_jax-{COMMIT}.tar.gz my-pod: --zone=us-central2-b --project=mine --quiet --worker=all",
        f"{vm} ssh {place} --quiet --worker=all {ALIVE} "
        f"'--command=mkdir -p fdm_jax && tar -xzmf fdm_jax-{COMMIT}.tar.gz -C fdm_jax && {worker} install {COMMIT}'",
        f"{vm} ssh {place} --quiet --worker=all {ALIVE} " + shlex.quote(
            f"--command={worker} start {key} train --config=configs/edm.py:cifar10 --workdir=gs://bucket/run "
            "'--config.train.images=1 000' --distributed=auto"
        ),
        f"{vm} ssh {place} --quiet --worker=all {ALIVE} '--command={worker} status'",
    ]  # fmt: skip
    assert done.returncode == 0 and len(key) == 12 and pod.bash_accepts(done.stdout)
    assert not (pod.folder / "gcloud.log").exists()
    single = [
        pod.run("tpu", verb, "--dry-run", *SLICE, "--project=mine", "--spot").stdout for verb in ("create", "setup")
    ]
    assert single[0].splitlines() == lines[:1] and single[1].splitlines() == lines[2:6]
    assert pod.run("tpu", "run", "--dry-run", *SLICE, "--project=mine", *TRAIN).stdout.splitlines() == lines[6:7]
    assert pod.run("tpu", "status", "--dry-run", *SLICE, "--project=mine").stdout.splitlines() == [lines[1], lines[7]]


@pytest.mark.parametrize(
    ("verb", "line"),
    [
        (
            "stop",
            f"tpu-vm ssh my-pod --zone=z --quiet --worker=all {ALIVE} '--command=bash fdm_jax/launch/tpu_worker.sh stop 120'",
        ),
        ("tail", f"tpu-vm ssh my-pod --zone=z --quiet --worker=1 {ALIVE} '--command=tail -n 40 -F fdm_run/log'"),
        ("delete", "queued-resources delete my-pod --zone=z --force --quiet"),
    ],
)
def test_dry_run_of_single_steps(pod, verb, line):
    done = pod.run("tpu", verb, "--dry-run", "--name=my-pod", "--zone=z", "--worker=1")
    assert done.stdout == f"gcloud compute tpus {line}\n"


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v3-32", "tpu-ubuntu2204-base"), ("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"), ("tpu7x-8", "v2-alpha-tpu7-ubuntu2404"),
    ],
)  # fmt: skip
def test_runtime_versions(pod, kind, runtime):
    done = pod.run("tpu", "create", "--dry-run", "--zone=z", f"--accelerator-type={kind}", "--create-flag=--reserved")
    assert done.stdout.endswith(f"--accelerator-type={kind} --runtime-version={runtime} --reserved\n")


def test_v5e_is_what_gcloud_calls_v5litepod(pod):
    done = pod.run("tpu", "create", "--dry-run", "--zone=z", "--accelerator-type=v5e-16")
    assert done.stdout.endswith("--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train", *SLICE), "The fdm command comes after --"),
        (("run", *SLICE, "--", "train", "--workdir=runs/x"), "--workdir must be gs://BUCKET/FOLDER"),
        (("train", *SLICE, "--", "train", "--workdir", "/nfs/x"), "and is '/nfs/x'."),
        (("train", *SLICE, "--", "train", "--distributed=off"), "Leave --distributed out"),
        (("create", "--zone=z"), "--accelerator-type says what to create"),
        (
            ("create", "--zone=z", "--accelerator-type=h100-8"),
            "No runtime version is known for --accelerator-type=h100-8",
        ),
        (("delete", "--zone=z", "--", "train"), "The verb delete takes no fdm command."),
    ],
)
def test_bad_input(pod, arguments, sentence):
    assert sentence in pod.refused("tpu", *arguments)


def test_without_gcloud(stage):
    stage.env["PATH"] = str(stage.bin)
    assert (
        stage.refused("tpu", "delete", "--zone=z") == "There is no 'gcloud' on the path: install it, or give --dry-run."
    )


def test_from_nothing_to_the_end(pod):
    done = pod.train("--delete-when-done", deeds=["done"])
    assert done.returncode == 0, done.stderr
    assert pod.starts(0) == pod.starts(1) == [" ".join([*TRAIN[1:], "--distributed=auto"])]
    assert [len(pod.called(verb)) for verb in ("create", "scp", "delete")] == [1, 1, 1]
    for sentence in ("asking for v4-32.", "the slice is PROVISIONING.", "to 2 workers and installing", "exit code 0."):
        assert sentence in done.stderr
    made = (pod.folder / "make.log").read_text().splitlines()
    assert len(made) == 2 and all("install EXTRA=tpu PYTHON=/" in line for line in made)
    assert "failed" not in done.stderr


@pytest.mark.parametrize("late", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_preemption(pod, late):
    """The slice is suspended under the run: deleted, asked for again, set up again, and the same command goes on."""
    if late:
        (pod.folder / "late").touch()
    times = 2 if late else 1
    done = pod.train(deeds=[*["preempted"] * times, "done"])
    assert done.returncode == 0, done.stderr
    assert len(pod.starts(0)) == len(pod.starts(1)) == times + 1 and len(set(pod.starts(0))) == 1
    assert [len(pod.called(verb)) for verb in ("create", "scp", "delete")] == [times + 1, times + 1, times]
    assert pod.called("create")[0] == pod.called("create")[-1]
    assert done.stderr.count("the slice was preempted (SUSPENDED)") == 1
    assert done.stderr.count("the slice was preempted (PREEMPTED)") == times - 1
    assert "`tpu.py delete` gives it back" in done.stderr


def test_a_refusal(pod):
    """The first is the user's to see; later, beside a run that is to go on, it may pass."""
    (pod.folder / "refused").write_text("1")
    done = pod.train(deeds=["done"])
    assert done.returncode == 1 and "Quota exceeded" in done.stderr and len(pod.called("create")) == 1
    (pod.folder / "refused").write_text("2")
    done = pod.train(deeds=["preempted", "done"])
    assert done.returncode == 0 and "it was refused." in done.stderr and len(pod.called("create")) == 1 + 3


def test_a_setup_that_fails_is_tried_again(pod):
    fails_once = "if not os.path.exists('failed'):\n    open('failed', 'w').close()\n    sys.exit(1)\n"
    pod.program("make", f"import os, sys\n{fails_once}{MAKE}")
    done = pod.train(deeds=["done"])
    assert done.returncode == 0 and done.stderr.count("the setup failed.") == 1
    assert len(pod.called("scp")) == 2 and len(pod.starts(0)) == len(pod.starts(1)) == 1


def test_workers_that_do_not_answer_are_asked_again(pod):
    """Their slice is fine, and is kept."""
    (pod.folder / "deaf").touch()
    done = pod.train(deeds=["done"])
    assert done.returncode == 0 and done.stderr.count("not all workers answer.") == 1
    assert len(pod.called("create")) == 1 and not pod.called("delete")


@pytest.mark.slow
def test_a_slice_in_repair_is_waited_for(pod):
    """However long it takes; its workers are there again as after a reboot, and the run goes on."""
    done = pod.train("--poll=0.05", deeds=["repaired", "done"])
    assert done.returncode == 0, done.stderr
    assert len(pod.starts(0)) == len(pod.starts(1)) == 2
    assert [len(pod.called(verb)) for verb in ("create", "scp")] == [1, 1] and not pod.called("delete")
    assert "its workers are REPAIRING." in done.stderr and "exit codes: 137." in done.stderr


def test_a_run_keeps_the_commit_that_it_began_with(pod):
    """Commits made while it is watched are for other runs: its workers are known by the commit."""
    pod.program("git", GIT.replace(f'os.environ.get("COMMIT", "{COMMIT}")', 'f"{time.time_ns():040x}"'))
    done = pod.train(deeds=["preempted", "done"])
    assert done.returncode == 0 and len(pod.starts()) == 2
    first, again = pod.called("scp")
    assert first == again


def test_what_is_copied_counts_as_new(pod):
    """Else `make install` would leave the packages of an older commit that was installed later."""
    (pod.folder / "plays.json").write_text(json.dumps([["ACTIVE"]]))
    began = time.time() - 1
    assert pod.run("tpu", "create", *SLICE).returncode == pod.run("tpu", "setup", *SLICE).returncode == 0
    copied = pod.folder / "worker-1" / "fdm_jax" / "launch" / "tpu_worker.sh"
    assert (pod.root / "launch" / "tpu_worker.sh").stat().st_mtime < began < copied.stat().st_mtime


@pytest.mark.slow
def test_preemptions_without_progress_end(pod):
    for step in "123":  # which the first worker would write
        (pod.folder / "bucket" / "run" / "checkpoints" / step).mkdir(parents=True)
    done = pod.train("--max-restarts=1", deeds=["preempted"])
    assert done.returncode == 75 and len(pod.starts()) == 2
    assert "given up: 2 starts in a row brought no new checkpoint." in done.stderr


@pytest.mark.slow
def test_a_slice_that_is_not_granted(pod):
    (pod.folder / "plays.json").write_text(json.dumps([["WAITING_FOR_RESOURCES", "FAILED"], ["SUSPENDED"]]))
    done = pod.train(deeds=["done"])
    assert done.returncode == 0 and len(pod.called("create")) == 3


@pytest.mark.slow
def test_gcloud_may_fail_now_and_then_in_a_long_wait(pod):
    (pod.folder / "plays.json").write_text(json.dumps([["no answer", "WAITING_FOR_RESOURCES"] * 12 + ["ACTIVE"]]))
    done = pod.train("--poll=0", deeds=["done"])
    assert done.returncode == 0 and "UNAVAILABLE" in done.stderr, done.stderr


def test_gcloud_that_keeps_failing_is_given_up(pod):
    (pod.folder / "plays.json").write_text(json.dumps([["no answer"]]))
    done = pod.train("--poll=0", deeds=["done"])
    assert done.returncode == 1 and "given up after 11 failures in a row." in done.stderr


@pytest.mark.slow
def test_a_slice_that_is_never_granted(pod):
    (pod.folder / "plays.json").write_text(json.dumps([["FAILED"]] * 50))
    done = pod.train(deeds=["done"])
    assert done.returncode == 1 and "given up after 11 failures in a row." in done.stderr


def test_code_75_starts_again_on_the_same_slice(pod):
    done = pod.train(deeds=["lost", "lost", "done"])
    assert done.returncode == 0 and len(pod.starts()) == 3
    assert len(pod.called("create")) == len(pod.called("scp")) == 1
    assert "starting again: code 75 asks for it." in done.stderr and "start 1 of worker-0: lost" in done.stdout


def test_a_crash_of_one_worker(pod):
    """The other one is stopped, saves, and both are started again; a number of times."""
    done = pod.train(deeds=["one crashes", "done"])
    assert done.returncode == 0 and len(pod.starts(0)) == len(pod.starts(1)) == 2
    assert "starting again: restart 1 of at most 3." in done.stderr


@pytest.mark.slow
def test_crashes_are_bounded(pod):
    done = pod.train("--max-restarts=1", deeds=["one crashes"])
    assert (
        done.returncode == 9
        and len(pod.starts(1)) == 2
        and "crash 2 without a new checkpoint in between, and --max-restarts is 1." in done.stderr
    )


def test_a_users_error_is_not_restarted(pod):
    done = pod.train(deeds=["user"])
    assert done.returncode == 2 and len(pod.starts()) == 1 and "start 1 of worker-0: user" in done.stdout
    # Mended, it is given again.
    assert pod.train(deeds=["done"]).returncode == 0 and len(pod.starts()) == 2


def test_an_exit_code_that_is_still_to_be_written_is_waited_for(pod):
    pod.program("mv", "import subprocess, sys, time; time.sleep(0.5); subprocess.run(['/bin/mv', *sys.argv[1:]])")
    pod.deeds("wait")
    watcher = pod.start("tpu", "train", *SLICE, "--poll=0.2", *TRAIN)
    while "start 1 of worker-0" not in watcher.stdout.readline():
        assert watcher.poll() is None
    watcher.kill()
    watcher.communicate(timeout=20)
    stopped = pod.run("tpu", "stop", *SLICE).stdout
    assert stopped.count(" exit=75 ") == 2


def test_watching_again(pod, handled_by):
    """Ctrl-C leaves the run alone, and the same command finds it; another command is refused."""
    handled_by(signal.SIGINT, signal.default_int_handler)
    pod.deeds("wait")
    watcher = pod.start("tpu", "train", *SLICE, "--poll=0.2", *TRAIN)
    while "start 1 of worker-0" not in watcher.stdout.readline():
        assert watcher.poll() is None
    watcher.send_signal(signal.SIGINT)
    _, errors = watcher.communicate(timeout=20)
    assert watcher.returncode == 130 and "the run goes on" in errors
    status = pod.run("tpu", "status", *SLICE).stdout
    assert status.startswith("ACTIVE\n") and status.count(" running ") == 2 and status.count(COMMIT) == 2
    assert "Another command is running on my-pod" in pod.run("tpu", "train", *SLICE, *TRAIN, "--more").stderr
    assert pod.run("tpu", "run", *SLICE, *TRAIN).returncode == 1
    looks = len(pod.called("describe"))
    watcher = pod.start("tpu", "train", *SLICE, "--poll=0.2", *TRAIN)
    while len(pod.called("describe")) < looks + 4:
        time.sleep(0.05)
        assert watcher.poll() is None
    assert len(pod.starts()) == 1
    watcher.send_signal(signal.SIGINT)
    output, errors = watcher.communicate(timeout=20)
    assert output.count("start 1 of worker-0") == errors.count("the slice is ACTIVE.") == 1  # not at each look
    stopped = pod.run("tpu", "stop", *SLICE).stdout
    assert stopped.count(" exit=75 ") == 2
    pod.deeds("done", "done")
    pod.env["COMMIT"] = "f" * 40
    done = pod.run("tpu", "train", *SLICE, "--poll=0.2", *TRAIN)
    assert done.returncode == 0 and len(pod.starts()) == 2 and len(pod.called("scp")) == 2


def test_a_worker_without_a_python_that_will_do(pod):
    """As on TPU images: uv is installed for the user, and what it fetches makes .venv."""
    said = 'import sys; print("/fetched/python" * ("find" in sys.argv), end=""); sys.exit("-c" in sys.argv)'
    for name in ("python3.11", "python3.12", "python3.13", "python3.14", "python3"):
        pod.program(name, f"{said}\n")
    script = (pod.root / "launch" / "tpu_worker.sh").read_text()
    assert pod.bash_accepts(script)
    (pod.folder / "fdm_jax" / "launch").mkdir(parents=True)
    (pod.folder / "fdm_jax" / "launch" / "tpu_worker.sh").write_text(script)
    worker = ["bash", "fdm_jax/launch/tpu_worker.sh"]
    subprocess.run([*worker, "install", COMMIT], cwd=pod.folder, env=pod.env, check=True)
    assert (pod.folder / "make.log").read_text() == "install EXTRA=tpu PYTHON=/fetched/python\n"
    status = subprocess.run([*worker, "status"], cwd=pod.folder, env=pod.env, text=True, capture_output=True)
    assert status.stdout.endswith(f" idle - {COMMIT}\n")
    (pod.folder / "fdm_run" / "commit").write_text("")  # a full disk
    status = subprocess.run([*worker, "status"], cwd=pod.folder, env=pod.env, text=True, capture_output=True)
    assert status.stdout.endswith(" idle - -\n")
