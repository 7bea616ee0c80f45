"""launch/slurm.py: the batch script, and what it does under a small Slurm that runs one task."""

import os
import signal
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

JOB = {"SLURM_JOB_NAME": "fdm", "SLURM_JOB_ID": "42"}

# The file "code" is how srun ends; "75 1000" leaves the checkpoint 1000 first, and "75 a/b" what is so called.
PROGRAM = r"""
import os, pathlib, sys
stage, name = pathlib.Path(os.environ["STAGE"]), pathlib.Path(sys.argv[0]).name
with open(stage / "calls", "a") as calls:
    calls.write(" ".join([name, *sys.argv[1:]]) + "\n")
if name == "srun":
    assert os.environ["JAX_PLATFORMS"] == "cuda,cpu"
    code, _, saved = (stage / "code").read_text().strip().partition(" ")
    if saved:
        (stage / saved if "/" in saved else stage / "runs" / "my run" / "checkpoints" / saved).mkdir(parents=True)
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


def test_commands_that_nobody_reads(slurm):
    """`head` ends before it has read all."""
    reader, writer = os.pipe()
    os.close(reader)
    command = slurm.command("slurm", "--dry-run", *ARGUMENTS, *TRAIN)
    done = subprocess.run(command, cwd=slurm.folder, env=slurm.env, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize(
    ("codes", "requeued"),
    [
        (["0"], 0), (["2"], 0), (["130"], 0),
        (["75", "75", "75", "75"], 3),
        (["75", "75", "75 1000", "75", "75", "75", "75"], 6),
        (["137", "137", "137", "137"], 3),
        (["75 1000", "75 2000", "75 3000", "75 4000", "137", "75 5000", "137", "137", "137", "137"], 9),
        (["137 1000", "137 2000", "137 3000", "137 4000", "137", "137", "137"], 6),
    ],
)  # fmt: skip
def test_what_the_job_does_with_exit_codes(slurm, codes, requeued):
    """Stays that Slurm's limit of time ends, with a new checkpoint each, use up none of the restarts."""
    slurm.run("slurm", *ARGUMENTS, *TRAIN)
    for restarts, code in enumerate(codes):
        (slurm.folder / "code").write_text(code)
        env = slurm.env | JOB | {"SLURM_RESTART_COUNT": str(restarts)}
        job = subprocess.run(["bash", "fdm.sbatch"], cwd=slurm.folder, text=True, capture_output=True, env=env)
        assert job.returncode == int(code.split()[0]) and job.stderr == ""
        assert ("is queued again." in job.stdout) == (restarts < requeued), (restarts, job.stdout)
    calls = slurm.calls()[1:]
    assert calls[0] == SRUN.replace("'", "").strip()
    assert calls.count("scontrol requeue 42") == requeued and len(calls) == len(codes) + requeued
    assert ("not queued again" in job.stdout) == (codes[-1] in ("75", "137"))
    assert not (slurm.folder / "fdm-42.restarts").exists()


def test_a_job_whose_restarts_cannot_be_counted_is_not_queued_again(slurm):
    slurm.run("slurm", *ARGUMENTS, *TRAIN)
    (slurm.folder / "code").write_text("75")
    (slurm.folder / "fdm-42.restarts").symlink_to("gone/away")
    job = subprocess.run(["bash", "fdm.sbatch"], cwd=slurm.folder, text=True, capture_output=True, env=slurm.env | JOB)
    assert job.returncode == 75 and "scontrol requeue 42" not in slurm.calls()
    assert "not queued again: saved, and the file fdm-42.restarts cannot be written." in job.stdout


@pytest.mark.parametrize(
    ("command", "kept", "noun"),
    [
        (["generate", "--workdir=w", "--out=my images"], "my images/00000N.png", "picture"),
        (["evaluate", "--workdir=my run"], "my run/evaluations/abc/features/00000N.npz", "piece"),
    ],
)
def test_what_other_commands_keep_counts(slurm, command, kept, noun):
    """As long as something comes, the job goes on."""
    slurm.run("slurm", "--max-restarts=1", "--fdm=fdm", "--", *command)
    # The second one comes behind the first: there are more, and the last is the same.
    for saved, said in (
        ("5", "is queued"),
        ("4", "is queued"),
        ("7", "is queued"),
        ("", "is queued"),
        ("", "not queued"),
    ):
        (slurm.folder / "code").write_text(f"75 {kept.replace('N', saved)}" if saved else "75")
        job = subprocess.run(
            ["bash", "fdm.sbatch"], cwd=slurm.folder, text=True, capture_output=True, env=slurm.env | JOB
        )
        assert said in job.stdout and not job.stderr
    assert f"not queued again: no new {noun} in 2 stays." in job.stdout


@pytest.mark.parametrize(
    ("command", "asked", "listed"),
    [
        (["train", "--workdir=gs://b/run/"], "gs://b/run/checkpoints/", "gs://b/run/checkpoints/N/"),
        (["generate", "--out=gs://b/a.npz"], "gs://b/a.npz.parts/", "gs://b/a.npz.parts/N.png"),
        (["evaluate", "--workdir=gs://b/run"], "gs://b/run/evaluations/*/features/*", "gs://b/run/evaluations/x/features/N.npz"),
    ],
)  # fmt: skip
def test_what_is_kept_in_a_bucket_is_seen(slurm, command, asked, listed):
    calls = "str(len(open(os.environ['STAGE'] + '/calls').readlines()))"
    slurm.program(
        "gcloud",
        f"import os, sys\nassert sys.argv[1:] == ['storage', 'ls', {asked!r}]\nprint({listed!r}.replace('N', {calls}))\n",
    )
    slurm.run("slurm", "--max-restarts=1", "--fdm=fdm", "--", *command)
    (slurm.folder / "code").write_text("75")
    for _ in range(3):
        job = subprocess.run(
            ["bash", "fdm.sbatch"], cwd=slurm.folder, text=True, capture_output=True, env=slurm.env | JOB
        )
        assert "is queued again." in job.stdout and not job.stderr


def test_lines_of_setup_may_be_careless(slurm):
    """As what clusters and conda give to be sourced often is."""
    slurm.run("slurm", "--setup=echo careless $NO_SUCH_VARIABLE", *TRAIN)
    (slurm.folder / "code").write_text("0")
    job = subprocess.run(["bash", "fdm.sbatch"], cwd=slurm.folder, text=True, capture_output=True, env=slurm.env | JOB)
    assert (job.returncode, job.stdout, job.stderr) == (0, "careless\n", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--nodes=0", *TRAIN], "--nodes must be 1 or more, and is 0."),
        (["--time=tomorrow", *TRAIN], "--time must be as Slurm writes it"),
        (["--job-name=a b", *TRAIN], "--job-name must be one word without slashes and quotes, and is 'a b'."),
        (["--partition=a\n#SBATCH --nice", *TRAIN], "--partition must be one word"),
        (["--sbatch=mem=1G", *TRAIN], "--sbatch takes one option of sbatch"),
        (["--script=no/such/folder/x", *TRAIN], "no/such/folder/x cannot be written: No such file or directory."),
        (["--nodes=2"], "The fdm command comes after --"),
    ],
)
def test_bad_input(slurm, arguments, sentence):
    assert sentence in slurm.refused("slurm", *arguments)


def test_what_sbatch_says_is_the_exit_code(slurm):
    assert slurm.run("slurm", "--script=rejected", *TRAIN).returncode == 1
