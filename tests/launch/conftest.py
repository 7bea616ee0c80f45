"""Running the launchers as programs, with small programs in the place of fdm, gcloud, sbatch and docker."""

import pathlib
import shlex
import stat
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Stage:
    """A folder with programs that stand first on the path, and a way to run a launcher there."""

    root = ROOT

    def __init__(self, folder):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        # Nothing of the machine is reached but the shell's usual tools.
        self.env = {
            "PATH": f"{self.bin}:{pathlib.Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(folder), "STAGE": str(folder), "LC_ALL": "C.UTF-8",
        }  # fmt: skip

    def program(self, name, text):
        """A program in Python, started without the packages of the environment: that is faster."""
        path = self.bin / name
        # By way of the shell, as pip does it: the path of Python may hold a space.
        path.write_text(f"#!/bin/sh\n'''exec' {shlex.quote(sys.executable)} -IS \"$0\" \"$@\"\n' '''\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def command(self, launcher, *arguments):
        return [sys.executable, "-S", str(ROOT / "launch" / f"{launcher}.py"), *map(str, arguments)]

    def run(self, launcher, *arguments, timeout=120):
        return subprocess.run(
            self.command(launcher, *arguments), cwd=self.folder, env=self.env, text=True, capture_output=True,
            timeout=timeout,
        )  # fmt: skip

    def start(self, launcher, *arguments):
        return subprocess.Popen(
            self.command(launcher, *arguments), cwd=self.folder, env=self.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def refused(self, launcher, *arguments):
        """The one sentence that a launcher refuses these arguments with."""
        done = self.run(launcher, *arguments)
        assert done.returncode == 2 and done.stdout == "", done
        lines = done.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("launch: "), done.stderr
        return lines[0].removeprefix("launch: ")

    def bash_accepts(self, text):
        checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr
        return True


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)
