#!/usr/bin/env python3
"""Build and run fdm_jax as a container, with docker or podman.

  python launch/container.py build
  python launch/container.py run --runs=runs --data=~/.cache/fdm_jax/data -- \\
      train --config=configs/edm.py:cifar10 --workdir=/runs/cifar10

The image holds the locked packages, whose hashes are checked, and the code; it runs as you, not as root, and a GPU
container has no network.  Inside, /runs is the folder of --runs, where workdirs and all other output must be, and
data sets prepared into the folder of --data are found by their names.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from common import DONE, REPOSITORY, Refusal, become, finish, need_command, option, parse, parser, run

DATA = "/cache/fdm_jax/data"
STOP_SECONDS = 180  # what `docker stop` leaves a run to save


def main(argv: Sequence[str]) -> int:
    made = parser(__doc__)
    made.add_argument("verb", choices=("build", "run"), metavar="VERB", help="build or run")
    made.add_argument("--engine", choices=("docker", "podman"), default="docker", help="default: %(default)s")
    made.add_argument("--target", choices=("gpu", "tpu"), default="gpu", help="default: %(default)s")
    made.add_argument("--cuda", choices=("12", "13"), default="12", help="of the image for GPUs (default: %(default)s)")
    made.add_argument("--tag", help="of the image (default: fdm_jax:cuda12, fdm_jax:cuda13 or fdm_jax:tpu)")
    made.add_argument("--gpus", default="all", metavar="all|0,1,...", help="which the container sees (default: all)")
    made.add_argument("--runs", default="runs", metavar="DIR", help="becomes /runs (default: %(default)s)")
    made.add_argument("--data", default="~/.cache/fdm_jax/data", metavar="DIR", help="default: %(default)s")
    made.add_argument("--network", help="default: none for GPUs; host for TPUs, whose workers talk over it")
    args, command = parse(made, argv)
    extra = f"cuda{args.cuda}" if args.target == "gpu" else "tpu"
    tag = args.tag or f"fdm_jax:{extra}"
    if args.verb == "build":
        if command:
            raise Refusal("The verb build takes no fdm command.")
        commands = [build_command(args, extra, tag)]
    else:
        need_command(command, adds_distributed=False)
        commands = [["mkdir", "-p", *map(str, folders(args))], run_command(args, tag, command)]
    if args.dry_run:
        print("\n".join(shlex.join(each) for each in commands))
        return DONE
    for each in commands[:-1]:
        if code := run(each).returncode:
            return code
    become(commands[-1])


def build_command(args: argparse.Namespace, extra: str, tag: str) -> list[str]:
    """Make the image from this repository; .dockerignore lists what of it is seen."""
    dockerfile = REPOSITORY / "launch" / f"Dockerfile.{args.target}"
    return [args.engine, "build", f"--file={dockerfile}", f"--build-arg=EXTRA={extra}", f"--tag={tag}", str(REPOSITORY)]


def folders(args: argparse.Namespace) -> tuple[Path, Path]:
    """Runs and data on this machine.

    Raises:
      Refusal: the engine could not be told of one.
    """
    runs, data = (Path(os.path.expanduser(given)).absolute() for given in (args.runs, args.data))
    for folder in (runs, data):
        if ":" in str(folder):
            raise Refusal(f"The folders of --runs and --data cannot have a colon in their names, and one is {folder}.")
    return runs, data


def run_command(args: argparse.Namespace, tag: str, command: Sequence[str]) -> list[str]:
    """Run the fdm command in the image.

    Raises:
      Refusal: its output would vanish with the container, or --gpus cannot be read.
    """
    workdir = option(command, "workdir")
    if workdir is not None and not workdir.startswith(("/runs/", "gs://")):
        raise Refusal(f"--workdir must be in /runs, which the folder of --runs becomes, or gs://, and is {workdir!r}.")
    if args.gpus != "all" and not all(gpu.isdecimal() for gpu in args.gpus.split(",")):
        raise Refusal(f"--gpus must be all, or numbers with commas between them, as in 0,1, and is {args.gpus!r}.")
    runs, data = folders(args)
    return [
        args.engine, "run", "--rm", "--init", f"--stop-timeout={STOP_SECONDS}", *devices(args),
        f"--user={os.getuid()}:{os.getgid()}", *(["--userns=keep-id"] if args.engine == "podman" else []),
        f"--network={args.network or ('none' if args.target == 'gpu' else 'host')}", "--shm-size=2g",
        f"--volume={runs}:/runs", f"--volume={data}:{DATA}", tag, *command,
    ]  # fmt: skip


def devices(args: argparse.Namespace) -> list[str]:
    """How the engine is asked for the accelerators."""
    if args.target == "tpu":
        return ["--privileged"]  # as Google's pages ask for; there is no finer way to the chips
    dropped = ["--cap-drop=ALL", "--security-opt=no-new-privileges"]
    if args.engine == "docker":
        # The quotation marks are docker's: without them the commas would part its own options.
        return [f'--gpus="device={args.gpus}"' if args.gpus != "all" else "--gpus=all", *dropped]
    return [f"--device=nvidia.com/gpu={gpu}" for gpu in args.gpus.split(",")] + dropped


if __name__ == "__main__":
    finish(main)
