#!/usr/bin/env python3
"""Run an fdm command on a Cloud TPU slice, through gcloud.

  python launch/tpu.py train --name=fdm --zone=us-central2-b --accelerator-type=v4-32 --spot -- \\
      train --config=configs/edm.py:cifar10 --workdir=gs://BUCKET/cifar10 --config.data.data_dir=gs://BUCKET/data

The verb `train` does everything: it asks for the slice (a queued resource), waits for it, copies this repository at
its current commit to all workers, installs the locked packages, starts the command on all of them, and watches.  When
the slice is preempted it is deleted, asked for again, and the same command goes on from its newest checkpoint; when
the command ends with code 75 or crashes it is started again.  It looks at what is there before it does anything, so
that it may be stopped (Ctrl-C: the run goes on without it) and given again, from any machine.

The other verbs are the single steps:

  create   ask for the slice                        status   the slice, and what each worker does
  setup    copy the repository, install             tail     the end of a worker's log, and what follows
  run      start the command in the background      stop     SIGTERM to all workers: the run is saved and ends
  delete   give the slice back, which ends its bill
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from common import (
    DONE,
    INTERRUPTED,
    REPOSITORY,
    RESTART,
    USER_ERROR,
    Refusal,
    Restarts,
    finish,
    kept,
    need_command,
    option,
    parse,
    parser,
    run,
    say,
    seconds,
    show,
    verdict,
)

VERBS = ("train", "create", "setup", "run", "status", "tail", "stop", "delete")

# What Google's list of TPU software versions names for JAX.
RUNTIMES = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
    "tpu7x": "v2-alpha-tpu7-ubuntu2404",  # not on that list yet: as Google's own benchmarks create it
}

GONE = ("SUSPENDED", "FAILED")  # states of a queued resource that only deleting it ends
NODE_GONE = ("PREEMPTED", "TERMINATED", "STOPPED")
NODE_COMES_BACK = ("REPAIRING", "RESTARTING", "STARTING")  # by itself, its workers as after a reboot
FAILURES = 10  # of gcloud in a row, before it is given up
SAVING = 120  # seconds that workers get to save
# A worker that is taken back in the middle of a command does not say so: without it ssh would wait for hours.
KEEP_ALIVE = "--ssh-flag=-oServerAliveInterval=30"

WORKER = "fdm_jax/launch/tpu_worker.sh"


def main(argv: Sequence[str]) -> int:
    made = parser(__doc__)
    made.add_argument("verb", choices=VERBS, metavar="VERB", help=", ".join(VERBS))
    made.add_argument("--name", default="fdm", help="of the queued resource and its slice (default: %(default)s)")
    made.add_argument("--zone", required=True, help="such as us-central2-b")
    made.add_argument("--project", help="default: gcloud's")
    made.add_argument("--accelerator-type", metavar="TYPE", help="such as v4-32 or v5litepod-16; to create")
    made.add_argument("--runtime-version", metavar="VERSION", help="default: by accelerator type")
    made.add_argument("--spot", action="store_true", help="cheaper, and preempted at any time")
    made.add_argument("--create-flag", action="append", default=[], metavar="FLAG", help="one more for gcloud's create, "
                      "such as --create-flag=--service-account=NAME; may be repeated")  # fmt: skip
    made.add_argument("--worker", default="0", help="whose log `tail` shows (default: %(default)s)")
    made.add_argument("--max-restarts", type=int, default=3, metavar="N", help="after crashes, and after preemptions, "
                      "in a row that brings nothing new, such as a checkpoint (default: %(default)s)")  # fmt: skip
    made.add_argument(
        "--poll", type=seconds, default=60, metavar="SECONDS", help="between looks (default: %(default)s)"
    )
    made.add_argument("--delete-when-done", action="store_true", help="`train` gives the slice back when the command "
                      "has ended with code 0 or 2")  # fmt: skip
    args, command = parse(made, argv)
    if args.verb in ("train", "run"):
        need_command(command)
        workdir = option(command, "workdir")
        if workdir is not None and not workdir.startswith("gs://"):
            raise Refusal(f"--workdir must be gs://BUCKET/FOLDER, which all workers can write to, and is {workdir!r}.")
    elif command:
        raise Refusal(f"The verb {args.verb} takes no fdm command.")
    if args.verb in ("train", "create"):
        need_runtime(args)
    pod = Pod(args)
    if args.verb == "train":
        return dry_train(pod, command) if args.dry_run else Train(pod, command, args)()
    if args.verb == "setup":
        return pod.setup(current_commit())
    if args.verb == "run":
        return pod.do(pod.start(command))
    if args.verb == "status":
        return pod.do(pod.describe) or pod.do(pod.on_workers(f"bash {WORKER} status"))
    if args.verb == "tail":
        return pod.do(pod.on_workers("tail -n 40 -F fdm_run/log", args.worker))
    if args.verb == "stop":
        return pod.do(pod.on_workers(f"bash {WORKER} stop {SAVING}"))
    return pod.do(pod.create if args.verb == "create" else pod.delete)


def need_runtime(args: argparse.Namespace) -> None:
    """Fill in the runtime version, and the accelerator type as gcloud calls it.

    Raises:
      Refusal: no accelerator type, or an unknown one without a runtime version.
    """
    if not args.accelerator_type:
        raise Refusal("--accelerator-type says what to create, such as v4-32 or v5litepod-16.")
    args.accelerator_type = re.sub("^v5e-", "v5litepod-", args.accelerator_type)  # gcloud's name for what all call v5e
    args.runtime_version = args.runtime_version or RUNTIMES.get(args.accelerator_type.partition("-")[0])
    if not args.runtime_version:
        raise Refusal(
            f"No runtime version is known for --accelerator-type={args.accelerator_type}: give --runtime-version, or a "
            f"type that begins with one of {', '.join(RUNTIMES)}."
        )


class Pod:
    """The commands for one slice."""

    def __init__(self, args: argparse.Namespace):
        self.name, self._dry = args.name, args.dry_run
        place = [f"--zone={args.zone}", *([f"--project={args.project}"] if args.project else [])]
        queued, self._vm = ["gcloud", "compute", "tpus", "queued-resources"], ["gcloud", "compute", "tpus", "tpu-vm"]
        self._place = place
        self.create = [
            *queued, "create", args.name, f"--node-id={args.name}", *place,
            f"--accelerator-type={args.accelerator_type}", f"--runtime-version={args.runtime_version}",
            *(["--spot"] if args.spot else []), *args.create_flag,
        ]  # fmt: skip
        self.describe = [*queued, "describe", args.name, *place, "--format=value(state.state)"]
        self.delete = [*queued, "delete", args.name, *place, "--force", "--quiet"]
        self.describe_node = [*self._vm, "describe", args.name, *place, "--format=value(state)"]

    def on_workers(self, script: str, worker: str = "all") -> list[str]:
        """A line of shell on the workers."""
        where = [self.name, *self._place, "--quiet", f"--worker={worker}"]
        return [*self._vm, "ssh", *where, KEEP_ALIVE, f"--command={script}"]

    def start(self, command: Sequence[str]) -> list[str]:
        """The fdm command on all workers, in the background."""
        arguments = ["bash", WORKER, "start", key_of(command), *command, "--distributed=auto"]
        return self.on_workers(shlex.join(arguments))

    def setup_commands(self, commit: str) -> list[list[str]]:
        """Copy this repository at a commit, and install."""
        archive = Path.home() / ".cache" / "fdm_jax" / "launch" / f"fdm_jax-{commit}.tar.gz"
        # -m: git dates files as the commit, which may be older than what make has installed there for another one.
        unpack = f"mkdir -p fdm_jax && tar -xzmf {archive.name} -C fdm_jax"
        return [
            ["mkdir", "-p", str(archive.parent)],
            ["git", "-C", str(REPOSITORY), "archive", "--format=tar.gz", f"--output={archive}", commit],
            [*self._vm, "scp", str(archive), f"{self.name}:", *self._place, "--quiet", "--worker=all"],
            self.on_workers(f"{unpack} && bash {WORKER} install {commit}"),
        ]

    def setup(self, commit: str) -> int:
        """Do that; the exit code of the first step that fails."""
        if run(["git", "-C", str(REPOSITORY), "status", "--porcelain"], capture_output=True).stdout:
            say("what is not committed in this repository is not copied.")
        for step in self.setup_commands(commit):
            if code := self.do(step):
                return code
        return DONE

    def do(self, command: Sequence[str]) -> int:
        """Run a command, or print it."""
        if self._dry:
            print(shlex.join(command), flush=True)
            return DONE
        return run(command).returncode

    def ask(self, command: Sequence[str]) -> tuple[int, str, str]:
        """(exit code, standard output, standard error) of a command that only looks; 255 if it takes too long."""
        try:
            done = run(command, capture_output=True, timeout=300)
        except subprocess.TimeoutExpired:
            return 255, "", f"{shlex.join(command)} took more than 300 s"
        return done.returncode, done.stdout, done.stderr

    def workers(self) -> list[tuple[str, str, str]] | None:
        """(what, key, commit) of each worker, see tpu_worker.sh; None if not all of them answer."""
        status = f"bash {WORKER} status"
        script = f"if [ -e {WORKER} ]; then {status}; else echo worker $(hostname) idle - -; fi"
        code, output, _ = self.ask(self.on_workers(script))
        fields = [line.split() for line in output.splitlines() if line.startswith("worker ")]
        found = [(line[2], line[3], line[4]) for line in fields if len(line) == 5]
        return found if found and not code else None


def key_of(command: Sequence[str]) -> str:
    """A short name for a command, by which it is known again."""
    return hashlib.sha256(shlex.join(command).encode()).hexdigest()[:12]


def current_commit() -> str:
    """Raises:
    Refusal: this repository is none of git's.
    """
    asked = run(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True)
    if asked.returncode:
        raise Refusal(
            f"{REPOSITORY} is no git checkout, from which the workers could get a commit: clone the repository."
        )
    return asked.stdout.strip()


def dry_train(pod: Pod, command: Sequence[str]) -> int:
    """Print what `train` does when nothing goes wrong."""
    for step in (pod.create, pod.describe, *pod.setup_commands(current_commit()), pod.start(command)):
        pod.do(step)
    return pod.do(pod.on_workers(f"bash {WORKER} status"))


class Train:
    """Brings a slice from whatever state it is in to "the command has ended", looking again and again."""

    def __init__(self, pod: Pod, command: Sequence[str], args: argparse.Namespace):
        self._pod, self._command, self._args = pod, command, args
        self._key, self._commit = key_of(command), current_commit()
        # In a row: a look that works says nothing about the deeds, so those are counted by themselves.
        self._failed_looks = self._failures = 0
        self._created = self._granted = False  # the slice: by this program, and now
        self._seen_running = self._ending = False  # the command
        self._said = self._shown = ""  # last, by this program and of the log
        self._restarts = Restarts(args.max_restarts, 0, kept(command))

    def __call__(self) -> int:
        try:
            while (code := self._look()) is None:
                time.sleep(self._args.poll)
        except KeyboardInterrupt:
            say("not watching any more; the run goes on, and so does its bill. The same command watches again.")
            return INTERRUPTED
        say(f"ended with exit code {code}.")
        if self._args.delete_when_done and code in (DONE, USER_ERROR):
            return self._pod.do(self._pod.delete) or code
        say("if the slice is still there it is billed: `tpu.py delete` gives it back.")
        return code

    def _tell(self, text: str) -> None:
        """Say it, unless it was the last thing said."""
        if text != self._said:
            say(text)
        self._said = text

    def _look(self) -> int | None:
        """One look at the slice and at most one deed; an exit code when there is nothing left to do."""
        failed, state, error = self._pod.ask(self._pod.describe)
        state = state.strip()
        if failed and "NOT_FOUND" in error:
            return self._create()
        if failed:
            self._failed_looks += 1
            return self._give_up_after(self._failed_looks, error.strip().rstrip("."))
        self._failed_looks = 0
        self._tell(f"the slice is {state}.")
        if state in GONE:
            return self._delete(state)
        if state != "ACTIVE":
            return None
        workers = self._pod.workers()
        if workers is None:
            node = self._pod.ask(self._pod.describe_node)[1].strip()
            if node in NODE_COMES_BACK:
                self._tell(f"its workers are {node}.")
                return None
            return self._delete(node) if node in NODE_GONE else self._failed("not all workers answer")
        self._granted = True
        return self._act(workers)

    def _create(self) -> int | None:
        say(f"asking for {self._args.accelerator_type}.")
        if code := self._pod.do(self._pod.create):
            return self._failed("it was refused") if self._created else code
        self._created = True
        return None

    def _delete(self, state: str) -> int | None:
        """The slice is gone: delete what is left of it; the next look asks for it again."""
        if self._granted:
            say(f"the slice was preempted ({state}): it is deleted and asked for again.")
            wait, reason = self._restarts.after(RESTART)
            if wait is None:
                say(f"given up: {reason}.")
                return RESTART
            self._failures = 0
        elif self._created and (code := self._failed(f"the slice was not granted ({state})")) is not None:
            return code
        self._granted = self._ending = False
        return self._failed("it could not be deleted") if self._pod.do(self._pod.delete) else None

    def _failed(self, what: str) -> int | None:
        """What may pass, and is tried again a number of times."""
        self._failures += 1
        return self._give_up_after(self._failures, what)

    def _give_up_after(self, failures: int, what: str) -> int | None:
        self._tell(f"{what}.")
        if failures > FAILURES:
            say(f"given up after {failures} failures in a row.")
            return 1
        return None

    def _act(self, workers: list[tuple[str, str, str]]) -> int | None:
        """What the workers' states ask for."""
        pod, running = self._pod, [worker for worker in workers if worker[0] == "running"]
        if any(key != self._key for _, key, _ in running):
            raise Refusal(f"Another command is running on {pod.name}: stop it first, or take another --name.")
        ours = [what for what, key, _ in workers if key == self._key]
        codes = [int(what.removeprefix("exit=")) for what in ours if what.startswith("exit=")]
        if len(codes) == len(workers) and not any(codes):
            return DONE
        if not running and any(commit != self._commit for _, _, commit in workers):
            say(f"copying commit {self._commit[:12]} to {len(workers)} workers and installing: some minutes.")
            return self._failed("the setup failed") if pod.setup(self._commit) else None
        if len(running) + codes.count(DONE) == len(workers):
            self._failures, self._seen_running = 0, True
            self._show_log(1)
            return None
        if any(codes) and self._seen_running:  # else it ended before this program came, and is simply started
            if running and not self._ending:
                self._ending = True  # the others may be saving: they get until the next look
                return None
            self._show_log()
            code = verdict(codes)
            say(f"the workers' exit codes: {', '.join(map(str, sorted(set(codes))))}.")
            wait, reason = self._restarts.after(code)
            if wait is None:
                say(f"not started again: {reason}.")
                return code
            say(f"starting again: {reason}.")
        if running:
            pod.do(pod.on_workers(f"bash {WORKER} stop {SAVING}"))
            pod.do(pod.on_workers(f"bash {WORKER} kill"))
        self._ending, self._seen_running = False, True
        return self._failed("the start failed") if pod.do(pod.start(self._command)) else None

    def _show_log(self, lines: int = 20) -> None:
        code, output, _ = self._pod.ask(self._pod.on_workers(f"tail -n {lines} fdm_run/log", "0"))
        if not code and output != self._shown:
            show(output)
            self._shown = output


if __name__ == "__main__":
    finish(main)
