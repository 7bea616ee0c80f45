"""launch/slurm.py: the batch script, and what it does under a small Slurm that runs one task."""

import subprocess

import pytest

ARGUMENTS = ("--nodes=2", "--gpus-per-node=4", "--time=2-00:00:00", "--partition=gpu", "--sbatch=--mem=200G")
TRAIN = ("--fdm=/shared/.venv/bin/fdm", "--", "train", "--config=configs/edm.py:cifar10", "--workdir=runs/my run")

HEAD = """\
#!/bin/bash
#SBATCH --job-name=fdm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=2-00:00:00
#SBATCH --partition=gpu
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --mem=200G
"""
SRUN = (
    "srun --cpus-per-task=8 --kill-on-bad-exit=0 --wait=180 /shared/.venv/bin/fdm train "
    "--config=configs/edm.py:cifar10 '--workdir=runs/my run' --distributed=auto\n"
)

# The first line of "codes" is how srun ends; a line "75 saved" leaves a checkpoint first.
PROGRAM = r"""
import os, pathlib, sys
stage, name = pathlib.Path(os.environ["STAGE"]), pathlib.Path(sys.argv[0]).name
with open(stage / "calls", "a") as calls:
    calls.write(" ".join([name, *sys.argv[1:]]) + "\n")
if name == "srun":
    code, _, saved = (stage / "code").read_text().strip().partition(" ")
    if saved:
        (stage / "runs" / "my run" / "checkpoints" / "1000").mkdir(parents=True)
    sys.exit(int(code))
if name == "sbatch" and "rejected" in sys.argv[1]:
    sys.exit(1)
"""


@pytest.fixture
def slurm(stage):
    for name in ("sbatch", "srun", "scontrol"):
        stage.program(name, PROGRAM)
    stage.calls = lambda: (stage.folder / "calls").read_text().splitlines() if (stage.folder / "calls").exists() else []
    return stage


def test_dry_run(slurm):
    done = slurm.run("slurm", "--dry-run", *ARGUMENTS, "--setup=module load cuda", "--account=me", *TRAIN)
    first, *lines, end, last = done.stdout.splitlines()
    assert (first, end, last) == ("cat > fdm.sbatch << 'END'", "END", "sbatch fdm.sbatch")
    script = "\n".join(lines) + "\n"
    assert script.startswith(HEAD.replace("=gpu\n", "=gpu\n#SBATCH --account=me\n")) and SRUN in script
    assert "module load cuda\n" in script.partition("before=")[0]
    assert slurm.bash_accepts(script) and slurm.bash_accepts(done.stdout)
    assert slurm.calls() == [] and not (slurm.folder / "fdm.sbatch").exists()
    # Pasted into a shell, it submits what the launcher submits.
    subprocess.run(["bash", "-c", done.stdout], cwd=slurm.folder, env=slurm.env, check=True)
    pasted = (slurm.folder / "fdm.sbatch").read_text()
    assert slurm.run("slurm", *ARGUMENTS, "--setup=module load cuda", "--account=me", *TRAIN).returncode == 0
    assert (slurm.folder / "fdm.sbatch").read_text() == pasted == script
    assert slurm.calls() == ["sbatch fdm.sbatch"] * 2


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        ("0", 0, False), ("2", 0, False), ("75", 0, True), ("75", 3, False), ("75 saved", 50, True), ("137", 2, True),
        ("137", 3, False),
    ],
)  # fmt: skip
def test_what_the_job_does_with_exit_codes(slurm, code, restarts, requeued):
    slurm.run("slurm", *ARGUMENTS, *TRAIN)
    (slurm.folder / "code").write_text(code)
    job = subprocess.run(
        ["bash", "fdm.sbatch"], cwd=slurm.folder, text=True, capture_output=True,
        env=slurm.env | {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": str(restarts)},
    )  # fmt: skip
    assert job.returncode == int(code.split()[0]) and job.stderr == ""
    assert slurm.calls()[1] == SRUN.replace("'", "").strip()
    assert slurm.calls()[2:] == (["scontrol requeue 42"] if requeued else [])
    assert ("queued again" in job.stdout) == (code not in ("0", "2"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--nodes=0", *TRAIN], "--nodes must be 1 or more, and is 0."),
        (["--time=tomorrow", *TRAIN], "--time must be as Slurm writes it"),
        (["--sbatch=mem=1G", *TRAIN], "--sbatch takes one option of sbatch"),
        (["--script=no/such/folder/x", *TRAIN], "no/such/folder/x cannot be written: No such file or directory."),
        (["--nodes=2"], "The fdm command comes after --"),
    ],
)
def test_bad_input(slurm, arguments, sentence):
    assert sentence in slurm.refused("slurm", *arguments)


def test_what_sbatch_says_is_the_exit_code(slurm):
    assert slurm.run("slurm", "--script=rejected", *TRAIN).returncode == 1
