#!/usr/bin/env python3
"""Run one fdm command as several processes on this machine, which share the work.

  python launch/local.py -- train --config=configs/edm.py:cifar10 --workdir=runs/cifar10
  python launch/local.py --gpus=0,1,2,3 -- train --config=configs/edm.py:cifar10 --workdir=runs/cifar10
  python launch/local.py --processes=2 --devices-per-process=4 -- train --config=configs/edm.py:digits --workdir=runs/d

On a machine with several GPUs one process that has them all, the first line, is the simplest and in JAX as a rule as
fast as any: take --gpus for one process per GPU only if loading the data is what limits a single process, or to try
out here what will run on a cluster.  --devices-per-process makes CPUs play several devices, for trying out.

If a process ends with an error the others are stopped, and all are started again as their exit code says; the run
goes on from its newest checkpoint.  SIGTERM and Ctrl-C are passed on to all processes, which save and end, as they do
when the launcher is killed (kill -9).
Lines of the first process appear as they are, those of process I with [I] in front.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence

from common import (
    DONE,
    RESTART,
    Refusal,
    Restarts,
    default_fdm,
    finish,
    kept,
    need_command,
    need_positive,
    parse,
    parser,
    say,
    seconds,
    shell_words,
    show,
    verdict,
)

MOST = 1024  # processes; far more than anybody has use for, and few enough to start

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
POLL = 0.1  # seconds
# Told the numbers of the launcher's processes, it waits for its end.  Linux's own way (PR_SET_PDEATHSIG) may send SIGTERM
# once for each thread of the launcher, and a second SIGTERM ends fdm before it has saved.
LAST_WILL = """
import contextlib, os, signal, sys
for number in sys.stdin.read().split():
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(number), signal.SIGTERM)
"""


def main(argv: Sequence[str]) -> int:
    made = parser(__doc__)
    made.add_argument("--processes", type=int, metavar="N", help="default: 1, or one per GPU of --gpus")
    made.add_argument("--gpus", metavar="0,1,...", help="deal these GPUs out to the processes")
    made.add_argument("--devices-per-process", type=int, metavar="M", help="of fake CPU devices, instead of GPUs")
    made.add_argument("--max-restarts", type=int, default=3, metavar="N", help="after crashes, and after code 75, in a "
                      "row that brings nothing new, such as a checkpoint (default: %(default)s)")  # fmt: skip
    made.add_argument("--backoff", type=seconds, default=5, metavar="SECONDS", help="wait so long after the first crash, "
                      "then twice as long each time (default: %(default)s)")  # fmt: skip
    made.add_argument("--grace", type=seconds, default=120, metavar="SECONDS", help="what processes get to save before "
                      "they are killed (default: %(default)s)")  # fmt: skip
    made.add_argument("--port", type=int, metavar="PORT", help="where the processes meet (default: a free one)")
    made.add_argument("--fdm", type=shell_words, default=default_fdm(), metavar="COMMAND", help="the fdm to run "
                      "(default: %(default)s)")  # fmt: skip
    args, command = parse(made, argv)
    need_command(command)
    need_positive(args, "processes", "devices_per_process", "port")
    if args.port is not None and args.port > 65535:
        raise Refusal(f"--port must be at most 65535, and is {args.port}.")
    environments = [environment(i, args) for i in range(count_processes(args))]

    def commands() -> list[list[str]]:
        port, total = args.port or free_port(), len(environments)
        shared = [*args.fdm, *command]
        return [[*shared, f"--distributed=localhost:{port},{total},{i}"] for i in range(total)]

    if args.dry_run:
        lines = [
            shlex.join([*(["env", *(f"{k}={v}" for k, v in extra.items())] if extra else []), *one])
            for extra, one in zip(environments, commands(), strict=True)
        ]
        print(" &\n".join(lines))  # pasted into a shell, all run at once
        return DONE

    group = Group(args.grace)
    restarts = Restarts(args.max_restarts, args.backoff, kept(command))
    while True:
        code = group.run(commands(), environments)
        if code == DONE or group.told:
            return code
        wait, reason = restarts.after(code)
        if wait is None:
            say(f"not started again: {reason}.")
            return code
        say(f"starting again{f' in {wait:g} s' if wait else ''}: {reason}.")
        if group.sleep(wait):
            return code


def count_processes(args: argparse.Namespace) -> int:
    """How many processes these arguments ask for.

    Raises:
      Refusal: they contradict each other.
    """
    if (args.processes or 1) > MOST:
        raise Refusal(f"--processes can be {MOST} at most, on one machine, and is {args.processes}.")
    if args.gpus is None:
        return args.processes or 1
    gpus = args.gpus.split(",")
    if args.devices_per_process is not None:
        raise Refusal("--gpus and --devices-per-process exclude each other: fake devices are CPUs.")
    if not all(gpu.isdecimal() for gpu in gpus) or len(set(gpus)) < len(gpus):
        raise Refusal(
            f"--gpus must be different numbers with commas between them, as in 0,1,2,3, and is {args.gpus!r}."
        )
    processes = args.processes or len(gpus)
    if len(gpus) % processes:
        raise Refusal(f"{len(gpus)} GPUs cannot be dealt evenly to --processes={processes}.")
    return processes


def environment(index: int, args: argparse.Namespace) -> dict[str, str]:
    """What process ``index`` gets on top of the launcher's environment."""
    if args.devices_per_process is not None:
        flag = f"--xla_force_host_platform_device_count={args.devices_per_process}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    if args.gpus is not None:
        gpus = args.gpus.split(",")
        share = len(gpus) // count_processes(args)
        # Where they do not start, JAX would else go on with the CPU.
        platforms = os.environ.get("JAX_PLATFORMS") or "cuda,cpu"
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * share : (index + 1) * share]), "JAX_PLATFORMS": platforms}
    return {}


def free_port() -> int:
    """A port that nobody uses just now; below those that connections get, or one might get it before it is used here."""
    for port in random.sample(range(20_000, 32_768), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("", port))
            return port
    raise Refusal("No free port was found from 20000 to 32767: give one with --port.")


class Group:
    """The processes of a run: started together, ended together.

    Attributes:
      told: a signal asked the launcher to stop.
    """

    def __init__(self, grace: float):
        self._grace, self.told = grace, False
        self._children: list[subprocess.Popen[str]] = []
        for signum in FORWARDED:
            # Under nohup a hang-up is ignored, and stays so.
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._forward)

    def _forward(self, signum: int, frame: object) -> None:
        if signum == signal.SIGHUP and self.told:
            return  # a terminal that closes may tell it twice; and processes that are saving are not to be disturbed
        self.told = True
        self._send(signal.SIGTERM if signum == signal.SIGHUP else signum)

    def _send(self, signum: int) -> None:
        for child in self._children:
            if child.poll() is None:
                child.send_signal(signum)

    def run(self, commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> int:
        """Start them all, wait until all have ended, and give the exit code of the whole."""
        self._children = []
        will = last_will()
        try:
            return self._run(commands, environments, will)
        except BaseException:
            self._send(signal.SIGKILL)  # else those that were started would wait for the rest
            raise
        finally:
            will.kill()
            will.communicate()

    def _run(
        self, commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], will: subprocess.Popen[str]
    ) -> int:
        readers = []
        for i, (command, extra) in enumerate(zip(commands, environments, strict=True)):
            if self.told:  # in the middle of starting
                break
            pipe = subprocess.PIPE if i else None
            try:
                # A group of its own: Ctrl-C on the terminal reaches it through the launcher alone, once.
                child = subprocess.Popen(
                    command, env=os.environ | extra, stdin=subprocess.DEVNULL, stdout=pipe,
                    stderr=subprocess.STDOUT if i else None, text=True, errors="replace", process_group=0,
                )  # fmt: skip
            except OSError as error:
                raise Refusal(f"{command[0]!r} cannot be started ({error.strerror}): see --fdm.") from error
            self._children.append(child)
            with contextlib.suppress(BrokenPipeError):  # somebody killed that one
                print(child.pid, file=will.stdin, flush=True)
            if self.told:  # it came between the line above and the start
                child.send_signal(signal.SIGTERM)
            if i:
                readers.append(threading.Thread(target=copy_lines, args=(child.stdout, f"[{i}] "), daemon=True))
                readers[-1].start()
        code = self._wait()
        for reader in readers:
            reader.join(timeout=5)  # a grandchild may hold the pipe open
        return code

    def _wait(self) -> int:
        """Until all have ended; an end in error, or the launcher's being told to stop, sets a limit to the others."""
        code, deadline, asked = DONE, None, False
        while True:
            codes = [child.poll() for child in self._children]
            running = codes.count(None)
            if code == DONE and (code := verdict(codes)) != DONE and not self.told:
                self._report(running)
            if not running:
                break
            if deadline is None and (self.told or code != DONE):
                deadline = time.monotonic() + self._grace
                if not self.told and code != RESTART:
                    asked = True
                    self._send(signal.SIGTERM)
                # After code 75 the others save as well and end by themselves: a signal would only disturb them.
            if deadline is not None and time.monotonic() > deadline:
                if asked or self.told:
                    say(f"{running} still running after {self._grace:g} s: killed.")
                    self._send(signal.SIGKILL)
                else:
                    self._send(signal.SIGTERM)
                asked, deadline = True, time.monotonic() + self._grace
            time.sleep(POLL)
        if self.told:
            return verdict(codes) if codes else RESTART
        return code

    def _report(self, running: int) -> None:
        for i, child in enumerate(self._children):
            if child.poll() not in (None, DONE):
                say(f"process {i} ended {words(child.returncode)}{', the others are stopped' if running else ''}.")

    def sleep(self, seconds: float) -> bool:
        """Wait; True as soon as the launcher is told to stop."""
        end = time.monotonic() + seconds
        while not self.told and time.monotonic() < end:
            time.sleep(POLL)
        return self.told


def last_will() -> subprocess.Popen[str]:
    """A process that sends SIGTERM to all whose numbers it is told, as soon as the launcher is gone without a word.

    Raises:
      Refusal: it cannot be started.
    """
    command = [sys.executable, "-IS", "-c", LAST_WILL]
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise Refusal(f"No process can be started ({error.strerror}).") from error


def words(code: int) -> str:
    """Such as "by SIGKILL"."""
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def copy_lines(source: Iterable[str], prefix: str) -> None:
    """From a process to standard output, each with a prefix."""
    for line in source:
        show(prefix + line if line.endswith("\n") else f"{prefix}{line}\n")


if __name__ == "__main__":
    finish(main)
