"""launch/container.py and its Dockerfiles, as far as they can be checked without docker."""

import os
import re
import shlex
import signal

import pytest

RUN = ("--runs=my runs", "--data=/data", "--", "train", "--config=configs/edm.py:cifar10", "--workdir=/runs/cifar10")
USER = f"--user={os.getuid()}:{os.getgid()}"
FDM = "train --config=configs/edm.py:cifar10 --workdir=/runs/cifar10"

PROGRAM = r"""
import os, pathlib, sys
with open(os.environ["STAGE"] + "/calls", "a") as calls:
    calls.write("\n".join(sys.argv[1:]) + "\n")
sys.exit(75)
"""

SAVING = r"""
import os, signal, time
def save(*_):
    time.sleep(0.5)
    os.write(1, b"saved\n")
    os._exit(75)
signal.signal(signal.SIGTERM, save)
os.write(1, b"up\n")
for _ in range(1500):  # in pieces: a signal just before a sleep is handled after it
    time.sleep(0.02)
"""


@pytest.mark.parametrize("target", ["gpu", "tpu"])
def test_build(stage, target):
    extra = {"gpu": "cuda12", "tpu": "tpu"}[target]
    done = stage.run("container", "build", "--dry-run", f"--target={target}")
    assert done.stdout.count("\n") == 1 and shlex.split(done.stdout) == [
        "docker", "build", f"--file={stage.root}/launch/Dockerfile.{target}", f"--build-arg=EXTRA={extra}",
        f"--tag=fdm_jax:{extra}", str(stage.root),
    ]  # fmt: skip
    done = stage.run("container", "build", "--dry-run", "--engine=podman", "--cuda=13", "--tag=mine")
    assert done.stdout.startswith("podman build ") and "EXTRA=cuda13 --tag=mine" in done.stdout


def test_run_on_gpus(stage):
    runs, tail = (
        f"'--volume={stage.folder}/my runs:/runs'",
        f"--volume=/data:/cache/fdm_jax/data fdm_jax:cuda12 {FDM}\n",
    )
    made = f"mkdir -p '{stage.folder}/my runs' /data\n"
    done = stage.run("container", "run", "--dry-run", *RUN)
    assert done.stdout == (
        f"{made}docker run --rm --init --stop-timeout=180 --gpus=all --cap-drop=ALL --security-opt=no-new-privileges "
        f"{USER} --network=none --shm-size=2g {runs} {tail}"
    )
    assert stage.bash_accepts(done.stdout) and not (stage.folder / "my runs").exists()
    done = stage.run("container", "run", "--dry-run", "--engine=podman", "--gpus=0,3", *RUN)
    assert done.stdout == (
        f"{made}podman run --rm --init --stop-timeout=180 --device=nvidia.com/gpu=0 --device=nvidia.com/gpu=3 "
        f"--cap-drop=ALL --security-opt=no-new-privileges {USER} --userns=keep-id --network=none --shm-size=2g {runs} {tail}"
    )
    done = stage.run("container", "run", "--dry-run", "--gpus=0,3", *RUN)
    assert '--gpus="device=0,3"' in shlex.split(done.stdout.splitlines()[1])


def test_run_on_tpus(stage):
    done = stage.run("container", "run", "--dry-run", "--target=tpu", *RUN, "--distributed=auto")
    line = done.stdout.splitlines()[1]
    assert " --privileged " in line and " --network=host " in line and " fdm_jax:tpu train " in line


def test_exit_code_and_folders(stage):
    stage.program("docker", PROGRAM)
    assert stage.run("container", "run", "--runs=new", "--data=data", *RUN[2:]).returncode == 75
    assert (stage.folder / "new").is_dir() and (stage.folder / "data").is_dir()
    assert (stage.folder / "calls").read_text().splitlines()[-3:] == FDM.split()


def test_signals_reach_the_engine(stage):
    """Which passes them on to the run, and waits for it to save."""
    stage.program("docker", SAVING)
    launcher = stage.start("container", "run", "--data=data", *RUN[2:])
    assert launcher.stdout.readline() == "up\n"
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=20)
    assert (output, launcher.returncode) == ("saved\n", 75)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("run",), "The fdm command comes after --"),
        (("build", "--", "train"), "The verb build takes no fdm command."),
        (("run", "--", "train", "--workdir=runs/x"), "--workdir must be in /runs"),
        (("run", "--gpus=a", "--", "train"), "--gpus must be all, or numbers"),
        (("run", "--data=a:b", "--", "train"), "The folders of --runs and --data cannot have a colon in their names"),
    ],
)
def test_bad_input(stage, arguments, sentence):
    assert sentence in stage.refused("container", *arguments)


def test_without_docker(stage):
    stage.env["PATH"] = str(stage.bin)
    assert stage.refused("container", "build").startswith("There is no 'docker' on the path")


def test_a_docker_that_cannot_be_started(stage):
    stage.env["PATH"] = str(stage.bin)  # a real one elsewhere on the path would be started
    (stage.bin / "docker").touch(mode=0o755)
    (stage.bin / "docker").write_bytes(b"\x7fELF of another machine")
    assert stage.refused("container", "build").startswith("'docker' cannot be started (Exec format error)")


@pytest.mark.parametrize("target", ["gpu", "tpu"])
def test_dockerfiles(stage, target):
    """What they copy is there and let through, pip is called as by the Makefile, and the user is not root."""
    text = (stage.root / "launch" / f"Dockerfile.{target}").read_text()
    seen = re.findall(r"^!(.*)$", (stage.root / ".dockerignore").read_text(), re.M)
    makefile = (stage.root / "Makefile").read_text()
    extras = {"gpu": ("cuda12", "cuda13"), "tpu": ("tpu",)}[target]
    assert f"ARG EXTRA={extras[0]}" in text
    for copied in re.findall(r"^COPY (.*) \S+$", text, re.M):
        for source in copied.split():
            for extra in extras:
                assert (stage.root / source.replace("${EXTRA}", extra)).exists(), source
            assert source.replace("${EXTRA}", "*") in seen, source
    calls = [call.replace("--no-cache-dir ", "") for call in re.findall(r"^RUN python (-m pip .*)$", text, re.M)]
    in_makefile = re.findall(r"^\t\$\(python\) (-m pip .*)$", makefile, re.M)
    assert calls == [call.replace("$(lock)", "requirements-${EXTRA}.lock") for call in in_makefile] and len(calls) == 2
    assert text.index("USER fdm") < text.index("ENTRYPOINT") and text.count("FROM ") == 1
    for extra in extras:
        lock = (stage.root / f"requirements-{extra}.lock").read_text()
        assert "--hash=sha256:" in lock and re.search(r"^setuptools==", lock, re.M)  # builds without the network
