"""What a user gets wrong is one sentence on stderr and exit code 2, before anything is compiled or lost."""

import asyncio
import errno
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile

import jax.numpy as jnp
import pytest
import tiny

from fdm_jax.cli.main import entry_point, main, parse
from fdm_jax.errors import UserError


def refused(capsys, arguments, started=False):
    """The sentence, after checking that the code is 2 and that nothing else was said, unless training had started."""
    assert main(arguments) == 2
    *before, sentence = capsys.readouterr().err.strip().splitlines()
    assert sentence.startswith(f"fdm {arguments[0]}: ") and (started or not before)
    return sentence


@pytest.mark.parametrize(
    "override,sentence",
    [
        ("--config.train.batchsize=8", "no configuration field 'train.batchsize': did you mean 'train.batch_size'"),
        ("--config.train.batch_size=many", "train.batch_size must be a whole number, and is 'many'"),
        ("--config.train.batch_size=20", "train.batch_size is 20, and must divide by 8 device(s)"),
        ("--config.data.workers=4294967296", "data.workers must be at most 1024, and is 4294967296"),
        ("--config.data.num_classes=9223372036854775808", "data.num_classes must be below 2^31"),
        ("--config.samples.steps=100001", "samples.steps must be at most 100000, and is 100001"),
        ("--config.data.threads=1025", "data.threads must be at most 1024, and is 1025"),
        ("--config.train.accumulation=4", "must divide by 8 device(s) times 4 round(s)"),
        ("--config.train.batch_size=0", "train.batch_size must be 1 or more, and is 0"),
        ("--config.network.preset=unet", "no network preset 'unet'"),
        ("--config.network.model_channels=30", "model_channels = 30"),
        ("--config.network.channel_mult=(1,2,2,2,2)", "resolution must be divisible by 16"),
        (
            "--config.network.channel_mult=(1,'a')",
            "network.channel_mult must be a list of whole numbers such as (1, 2, 2)",
        ),
        ("--config.network.channel_mult_emb=x", "network.channel_mult_emb must be a whole number, and is 'x'"),
        ("--config.data.class_names=cat,dog", "data.class_names must be names such as ('cat', 'dog'), and is"),
        ("--config.data.class_names=(1,2)", "data.class_names must be names such as ('cat', 'dog'), and is '(1, 2)'"),
        ("--config.data.class_names=('a','a')", "data.class_names must be 10 different names, and is a, a."),
        ("--config.network.dtype=float16", "network.dtype is 'float16'"),
        ("--config.data.source=digts", "did you mean 'digits'"),
        ("--config.data.source=/nowhere/images.zip", "/nowhere/images.zip"),
        ("--config.data.split=validation", "no split 'validation'"),
        ("--config.data.resolution=16", "data.resolution is 16, but digits has 8"),
        ("--config.parallel=pjit", "no parallel mode 'pjit'"),
        ("--config.momentum.multiplier=-1", "momentum.multiplier must be 0 or more"),
        ("--config.warmup_steps=-1", "warmup_steps must be 0 or more"),
        ("--config.warmup_steps=9999999999", "warmup_steps must be below 2^31, and is 9999999999"),
        ("--config.network.num_blocks=1001", "network.num_blocks must be at most 1000, and is 1001"),
        (
            "--config.network.model_channels=4194304",
            "= 4194304 times 1 of network.channel_mult must be at most 1,048,576",
        ),
        ("--config.network.model_channels=65536", "parameters: with Adam's moments and the average they take"),
        ("--config.network.channel_mult_emb=999999", "= 4 times 999999 of network.channel_mult_emb must be at most"),
        ("--config.samples.rows=1001", "samples.rows = 1001 times 10 columns must be at most 10,000 images"),
        ("--config.init_from=", "init_from is empty"),
        ("--config.init_from=/nowhere", "/nowhere"),
        ("--config.eval.ref=pixels.npz", "with eval.every_images=0 nothing is measured"),
    ],
)
def test_bad_configuration(capsys, tmp_path, data_dir, override, sentence):
    arguments = tiny.arguments(tmp_path / "run", data_dir, override)
    if override.startswith("--config.data.source"):
        arguments += ["--config.data.class_conditional=False"]
    assert sentence in refused(capsys, arguments)
    assert sentence in refused(capsys, [*arguments, "--dry-run"])
    assert not list(tmp_path.rglob("checkpoints/[0-9]*"))


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["--config.eval.held_out_split=validation"], "no split 'validation'"),
        (["--config.eval.ref=nowhere.npz", "--config.eval.held_out_split="], "nowhere.npz cannot be read"),
    ],
)
def test_a_dry_run_looks_at_what_evaluates(capsys, tmp_path, data_dir, overrides, sentence):
    arguments = tiny.arguments(tmp_path / "run", data_dir, "--config.eval.every_images=64", *overrides)
    assert sentence in refused(capsys, arguments) and sentence in refused(capsys, [*arguments, "--dry-run"])


def test_field_that_a_file_leaves_without_a_value(capsys, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from fdm_jax.defaults import recipe\ndef get_config():\n    config = recipe('digits')\n"
        "    config.train.ema_rampup_ratio = None\n    return config\n"
    )
    sentence = refused(capsys, ["train", f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}"])
    assert "train.ema_rampup_ratio has no value, and needs one such as 0.05" in sentence


@pytest.mark.parametrize(
    "lines, words",
    [
        (
            "config = recipe('digits'); config.train.learning_rat = 1e-4",
            "'train.learning_rat', which does not exist: did",
        ),
        ("config = recipe('digits'); config.network.chanel_mult = (1, 2)", "did you mean 'network.channel_mult'"),
        ("config = ConfigDict({'seed': 3})", "has no field 'augment.labels': let get_config begin with"),
    ],
)
def test_fields_of_a_file_that_do_not_exist(capsys, tmp_path, lines, words):
    """A misspelt one trained as if it were not there, and what it trained could not be loaded."""
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\nfrom fdm_jax.defaults import recipe\n"
        f"def get_config():\n    {lines}\n    return config\n"
    )
    sentence = refused(capsys, ["train", f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}"])
    assert f"The configuration file '{tmp_path / 'mine.py'}' has " in sentence and words in sentence


def test_unknown_recipe_and_file(capsys, tmp_path):
    for config, sentence in (
        ("configs/edm.py:digit", "did you mean 'digits'"),
        ("configs/edn.py:digits", f"'configs/edn.py' in {tiny.ROOT}, nor in fdm_jax: did you mean 'configs/edm.py'?"),
        ("/nowhere/edm.py:digits", "no configuration file '/nowhere/edm.py': "),
    ):
        assert sentence in refused(capsys, ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config=configs/edm.py:digits", "--workdir="],
        ["train", "--config=configs/edm.py:digits", "--workdir=runs/x", "--init_from="],
        ["generate", "--workdir", "", "--seeds=0", "--out=x.png"],
        ["generate", "--workdir=runs/x", "--seeds=0", "--out="],
        ["dataset", "stats", "digits", "--out="],
    ],
)
def test_an_empty_path_is_not_the_current_folder(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "the path is empty" in capsys.readouterr().err


def test_paths_in_a_home(capsys, monkeypatch):
    """Bash leaves the ~ of --workdir=~/runs as it is, which made a folder called ~."""
    monkeypatch.setenv("HOME", "/home/me")
    assert str(parse(["train", "--config=edm.py", "--workdir=~/runs"]).workdir) == "/home/me/runs"
    assert str(parse(["dataset", "stats", "digits", "--out=~/grid.png"]).out) == "/home/me/grid.png"
    sentence = "~nobody-is-called-so/x cannot be found: the home of its user is not known here"
    assert sentence in refused(capsys, ["dataset", "stats", "~nobody-is-called-so/x"])
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config=edm.py", "--workdir=~nobody-is-called-so/x"])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--wrkdir=3", "--dry"])
def test_unknown_argument_is_an_argparse_error(capsys, tmp_path, argument):
    """Part of a name is no name."""
    with pytest.raises(SystemExit) as stopped:
        main(tiny.arguments(tmp_path / "run", argument))
    assert stopped.value.code == 2 and argument in capsys.readouterr().err


def test_damaged_note_of_when_a_checkpoint_was_written(capsys, straight_run, data_dir, tmp_path, nameless):
    """Orbax reads those of all checkpoints before it gives any, and without one asks for the folder's age and owner."""
    shutil.copytree(straight_run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "20" / "_CHECKPOINT_METADATA"
    file.write_text("[1]")
    generate = ["generate", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out.png'}"]
    for command in (generate, tiny.arguments(tmp_path / "run", data_dir)):
        sentence = refused(capsys, command, started=True)
        assert f"{file} is damaged (" in sentence and sentence.endswith(
            "delete it, nothing of the checkpoint itself is in it."
        )
    file.unlink()
    assert main([*generate, "--seeds=0", "--nfe=1"]) == 0


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda meta: [meta], "No checkpoint in RUN/checkpoints can be read."),
        (lambda meta: meta | {"config": {"warmup_steps": "x"}}, "has 'x' for warmup_steps, which is of another type."),
        (lambda meta: meta | {"config": {"warmup": 1}}, "has a field 'warmup' that this version of fdm_jax does not know."),
    ],
)  # fmt: skip
def test_configuration_in_a_checkpoint_that_is_none(capsys, straight_run, tmp_path, change, words):
    run = tmp_path / "run"
    shutil.copytree(straight_run, run)
    file = run / "checkpoints" / "20" / "meta" / "metadata"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    generate = ["generate", f"--workdir={run}", "--checkpoint=20", f"--out={tmp_path / 'out.png'}"]
    assert refused(capsys, generate, started=True).endswith(words.replace("RUN", str(run)))


def test_workdir_of_another_configuration_names_the_fields(capsys, straight_run, data_dir):
    sentence = refused(capsys, tiny.arguments(straight_run, data_dir, "--config.warmup_steps=99", "--config.seed=4"))
    assert "seed (0 there, 4 here)" in sentence and "warmup_steps (13 there, 99 here)" in sentence
    more = ["--config.eval.every_images=64", "--config.eval.ref=nowhere.npz"]
    assert "nowhere.npz cannot be read" in refused(capsys, tiny.arguments(straight_run, data_dir, *more))
    config = json.loads((straight_run / "config.json").read_text())
    assert config["seed"] == 0 and config["eval"]["ref"] is None


def test_the_folder_of_something_else_as_the_workdir(capsys, tmp_path, data_dir):
    (tmp_path / "config.json").write_text("mine")
    sentence = refused(capsys, tiny.arguments(tmp_path, data_dir))
    assert f"{tmp_path} holds config.json of something else: give another --workdir." in sentence
    assert (tmp_path / "config.json").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json", ".lock", "checkpoints"}


def test_workdir_that_cannot_be_written(capsys, tmp_path, data_dir):
    (tmp_path / "file").write_text("")
    sentence = refused(capsys, tiny.arguments(tmp_path / "file" / "run", data_dir))
    assert "file/run cannot be written: Not a directory; give another folder." in sentence


def test_workdir_in_use(capsys, tmp_path, data_dir):
    from fdm_jax.training.locking import locked

    with locked(tmp_path / "run"):
        assert "Another process is at work" in refused(capsys, tiny.arguments(tmp_path / "run", data_dir))


def test_corrupt_zip_is_named(capsys, tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK\x03\x04 not a zip")
    arguments = tiny.arguments(tmp_path / "run", f"--config.data.source={tmp_path / 'images.zip'}")
    assert "images.zip" in refused(capsys, arguments)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    arguments = tiny.arguments(tmp_path / "run", f"--config.data.source={tmp_path / 'empty.zip'}")
    assert "holds no image files" in refused(capsys, arguments)


TENSORSTORE = 'Error writing "ema/.zarray" in OCDBT database at local file "/a/b/": Failed to {} [os_error_code=\'{}\']'


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (
            ValueError('INTERNAL: Error writing "ocdbt": [OS error 28: ENOSPC No space left on device]'),
            2, "The disk, or your quota of it, is full: make room; nothing already saved is lost",
        ),
        (OSError(errno.EDQUOT, "?"), 2, "your quota of it, is full"),
        (ValueError("INTERNAL: " + TENSORSTORE.format("write: Disk quota exceeded", 122)), 2, "your quota of it, is full"),
        (PermissionError(errno.EACCES, "?", "/a/x"), 2, "/a/x cannot be used (Permission denied): give the right to it"),
        (
            ValueError("PERMISSION_DENIED: " + TENSORSTORE.format("open: Permission denied", 13)),
            2, "/a/b/ cannot be used (Permission denied): give the right to it",
        ),
        (OSError(errno.EMFILE, "?", "/a/x"), 2, "/a/x cannot be used (Too many open files): let more files be open"),
        (OSError(errno.EFBIG, "?", "/a/x"), 2, "/a/x cannot be used (File too large): let files be larger"),
        (
            IsADirectoryError(errno.EISDIR, "?", "/a/.x.17", None, "/a/x"),
            2, "/a/x cannot be used (Is a directory): move away what is there, or give another place",
        ),
        (OSError(errno.EROFS, "?"), 2, "A file cannot be used (Read-only file system)"),
        (OSError(errno.ESTALE, "?", "/a/x"), 1, "/a/x cannot be used (Stale file handle): wait until its disk, or the"),
        (
            ValueError("UNKNOWN: " + TENSORSTORE.format("get file info: Input/output error", 5)),
            1, "/a/b/ cannot be used (Input/output error): wait until its disk, or the network to it, works again",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "Memory is full (Cannot allocate memory)"),
    ],
)  # fmt: skip
def test_trouble_with_files_is_one_sentence(capsys, monkeypatch, error, code, sentence):
    """As the system says it, or TensorStore of the system, behind another error; what may pass ends as a crash does."""

    def run(args):
        raise RuntimeError("async save failed") from error

    monkeypatch.setattr("fdm_jax.cli.plan.run", run)
    assert main(["plan", "--config=configs/edm.py:digits"]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and sentence in said


def test_own_sentence_about_what_may_pass_ends_as_a_crash(capsys, monkeypatch):
    """Else launchers would give up where a file server is down for a moment."""

    def run(args):
        raise UserError("The workdir cannot be written.") from OSError(errno.ESTALE, "?", "/a/x")

    monkeypatch.setattr("fdm_jax.cli.plan.run", run)
    assert main(["plan", "--config=configs/edm.py:digits"]) == 1
    assert capsys.readouterr().err == "fdm plan: The workdir cannot be written.\n"


def test_a_current_folder_that_was_deleted(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["plan", "--config=edm.py:digits"]) == 2
    assert capsys.readouterr().err.startswith("fdm plan: The current folder is there no more: ")


@pytest.mark.parametrize(
    "arguments", [["plan", "--config=LONG"], ["generate", "--workdir=LONG", "--out=a.png"], tiny.arguments("LONG")]
)
def test_a_name_that_is_too_long(arguments, capsys):
    assert main([argument.replace("LONG", "x" * 300) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert "File name too long" in said and len(said.splitlines()) == 1


def test_links_in_a_circle(tmp_path, capsys):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    assert main(["report", f"--workdir={tmp_path}/a", f"--out={tmp_path}/page.html"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1  # Python 3.13 takes it for something that is not there


def test_a_workdir_whose_name_is_not_utf_8(tmp_path, capsys):
    """It is refused before anything is compiled: TensorStore would refuse it at the first save."""
    workdir = tmp_path / os.fsdecode(b"caf\xe9")
    assert main(tiny.arguments(workdir)) == 2
    assert "bytes that are not UTF-8, and cannot hold data" in capsys.readouterr().err


def test_other_errors_of_files_are_not_hidden(monkeypatch):
    """Such as a missing file of ours."""

    def run(args):
        raise FileNotFoundError(errno.ENOENT, "?", "/a/x")

    monkeypatch.setattr("fdm_jax.cli.plan.run", run)
    with pytest.raises(FileNotFoundError):
        main(["plan", "--config=configs/edm.py:digits"])


def test_writes_that_a_failed_save_leaves_behind_are_not_reported(monkeypatch):
    """As TensorStore's threads, which call a loop that asyncio has closed from C++, where nobody catches."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(sys, "__unraisablehook__", lambda error: reported.append(str(error.exc_value)))
    monkeypatch.setattr(sys, "argv", ["fdm", "--version"])
    with pytest.raises(SystemExit):
        entry_point()

    class Failing:
        def __init__(self, error):
            self.error = error

        def __del__(self):
            raise self.error

    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError) as echo:
        loop.call_soon_threadsafe(print)
    Failing(echo.value)
    Failing(
        Exception("Encountered error while reading array index: (slice(0, 3, 1),). See full TensorStore details: ...")
    )
    Failing(RuntimeError("another one"))
    assert reported == ["another one"]


FAULT_OF_OURS = """
import threading, time
from fdm_jax.cli import main
def fail(argv):
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise KeyError("a fault of ours")
main.main = fail
main.entry_point()
"""


def test_a_fault_of_ours_ends_the_program_at_once():
    """With its traceback, and though a thread, such as one that saves, may wait for other processes."""
    began = time.monotonic()
    ended = tiny.run_script(FAULT_OF_OURS)
    assert ended.returncode == 1 and time.monotonic() - began < 30
    assert ended.stderr.startswith("Traceback") and ended.stderr.endswith("KeyError: 'a fault of ours'\n")


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("JAX_ENABLE_X64", "maybe", "JAX does not start with a value that the environment gives: invalid truth value 'maybe'"),
        ("JAX_PLATFORMS", "nonsense", "JAX does not start: Unable to initialize backend 'nonsense'"),
        pytest.param(
            "JAX_PLATFORMS", "cuda", "JAX_PLATFORMS is 'cuda', and there is no such device here: unset it, or take another.",
            marks=pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is one"),
        ),
    ],
)  # fmt: skip
def test_what_jax_does_not_start_with(monkeypatch, variable, value, sentence):
    monkeypatch.setenv(variable, value)
    bench = [sys.executable, "-m", "fdm_jax", "bench", "--what=train", "--config=configs/edm.py:digits"]
    ended = subprocess.run(bench, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.splitlines()[-1].startswith(f"fdm bench: {sentence}")


DRAWS = """
from fdm_jax.cli import main
main.main = lambda argv: __import__("matplotlib") and 0
main.entry_point()
"""


def test_a_back_end_of_matplotlib_that_is_not_here(monkeypatch):
    """It is not asked for, as nothing is shown on a screen."""
    monkeypatch.setenv("MPLBACKEND", "nonsense")
    ended = tiny.run_script(DRAWS)
    assert ended.returncode == 0 and not ended.stderr


SAID_TO_A_FULL_LOG = """
import resource
from fdm_jax.cli import main
from fdm_jax.errors import RestartNeeded
def end(args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # from now on there is no room
    if args.config == "saved":
        raise RestartNeeded("saved.")
    print("The table.")
    return 0
main.main.__globals__["parse"] = lambda argv: __import__("argparse").Namespace(command="train", run=end, config=argv[0])
main.entry_point()
"""


@pytest.mark.parametrize(("how", "code"), [("saved", 75), ("done", 2)])
def test_the_exit_code_is_had_where_a_log_is_full(tmp_path, how, code):
    """Launchers go by it, whether there is room for the sentence or not; but a result that is lost is a failure."""
    with open(tmp_path / "log", "w") as log:
        command = [sys.executable, "-c", SAID_TO_A_FULL_LOG, how]
        assert subprocess.run(command, stdout=log, stderr=log).returncode == code


SAID_OF_A_NAME = """
from fdm_jax.cli import main
main.main = lambda argv: print("Kept in caf\\udce9.")
main.entry_point()
"""


def test_results_tell_of_names_that_cannot_be_shown(monkeypatch):
    """Else the work would be done, and end as a fault of ours."""
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    ended = tiny.run_script(SAID_OF_A_NAME)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "Kept in caf\\udce9.\n", "")


SAID_TO_NOBODY = """
import os, sys, types
from fdm_jax.__main__ import start
class Opens:  # as libffi does once ctypes is imported
    def find_spec(self, name, *rest):
        if name == "numpy":
            self.file = open(os.devnull)
sys.meta_path.insert(0, Opens())
def run(args):
    print("The table."), print("A line.", file=sys.stderr), os.write(2, b"what a library says")
    sys.exit(sys.stdin.read() != "" or open(args.file, "w").fileno() < 3)
plan = types.SimpleNamespace(HELP="", __doc__="", add_arguments=lambda parser: parser.add_argument("file"), run=run)
sys.modules["fdm_jax.cli.plan"] = plan
start()
"""


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-"])
def test_closed_streams(tmp_path, closed):
    """As some who start services leave them: no file of a run gets their numbers, and what is printed to them."""
    program = [sys.executable, "-c", SAID_TO_NOBODY, "plan", str(tmp_path / "file")]
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *program]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no device that is always full")
def test_output_to_a_full_disk():
    """A log is often on the same disk: the exit code is left to say it."""
    plan = [sys.executable, "-m", "fdm_jax", "plan", "--config=configs/edm.py:digits"]
    with open("/dev/full", "w") as full:
        assert subprocess.run([*plan, "--config.seed=x"], stdout=full, stderr=full).returncode == 2
        ended = subprocess.run(plan, stdout=full, stderr=subprocess.PIPE, text=True)
        assert ended.returncode == 2 and "is full" in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (
            ["bench", "--what=train", f"--batch-size={8 * 10**13}"],
            "give a smaller --batch-size, or with the same one a larger",
        ),
        (["generate", "--workdir=RUN", f"--batch={8 * 10**13}"], f"give a smaller --batch than {8 * 10**13}. Nothing"),
    ],
)
def test_full_memory_is_one_sentence(capsys, straight_run, tmp_path, monkeypatch, command, remedy):
    """NumPy's and the device's."""
    monkeypatch.setattr(
        "fdm_jax.sampling.generate.BatchedGenerator.__call__",
        lambda *args: [jnp.zeros(2**46)],  # more than any CPU can address
    )
    command = [part.replace("RUN", str(straight_run)) for part in command]
    if command[0] == "generate":
        command.append(f"--out={tmp_path / 'out.png'}")
    sentence = refused(capsys, command, started=True)
    assert "Memory is full (" in sentence and remedy in sentence and sentence.endswith("Nothing already saved is lost.")


def test_gradients_that_stay_bad_end_the_run(capsys, tmp_path, data_dir):
    arguments = tiny.arguments(
        tmp_path / "run", data_dir, "--config.train.learning_rate=1e30", "--config.train.max_bad_steps=3",
        "--config.train.lr_rampup_images=0",
    )  # fmt: skip
    sentence = refused(capsys, arguments, started=True)
    assert "not finite in 3 steps in a row" in sentence and "train.learning_rate" in sentence


def test_gradients_that_are_bad_to_the_end_of_a_short_run_are_named(capsys, tmp_path, data_dir):
    """Too short to be ended for it."""
    changes = ["learning_rate=1e30", "lr_rampup_images=0", "images=64"]
    arguments = tiny.arguments(tmp_path / "run", data_dir, *(f"--config.train.{change}" for change in changes))
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "values of gradients were not finite since the last line" in said


@pytest.mark.parametrize("command", ["train", "bench", "generate"])
def test_a_program_that_outgrows_the_machine(command, straight_run, data_dir, tmp_path, capsys, monkeypatch):
    """Linux would give the memory and kill the program that uses it."""
    monkeypatch.setattr("fdm_jax.host_memory.machine_memory", lambda: 2**12)
    train = tiny.arguments(tmp_path / "run", data_dir)
    bench = ["bench", "--what=train", *(a for a in train[1:] if a.startswith("--config"))]
    generate = ["generate", f"--workdir={straight_run}", f"--out={tmp_path / 'out.png'}", "--seeds=0-3"]
    sentence = refused(capsys, {"train": train, "bench": bench, "generate": generate}[command], started=True)
    assert "Memory is full (the program takes 0.0 GiB, and there are 0.0 GiB): give a smaller --" in sentence
