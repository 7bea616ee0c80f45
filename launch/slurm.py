#!/usr/bin/env python3
"""Run an fdm command on the GPUs of a Slurm cluster: writes a batch script and submits it.

  python launch/slurm.py --nodes=2 --gpus-per-node=8 --time=24:00:00 --partition=gpu -- \\
      train --config=configs/edm.py:cifar10 --workdir=runs/cifar10

One task runs per GPU, because that is what JAX assumes under Slurm: the task with local number I takes GPU I of its
node.  So no GPUs are bound to tasks; each sees all of its node.  The repository with its .venv (`make install
EXTRA=cuda12`), the data and the workdir must be on a file system that all nodes share.

Before the time limit (--save-seconds) Slurm sends SIGTERM to all tasks; they save and end with code 75, and the job
puts itself into the queue again.  So do preempted jobs.  `scancel --signal=INT JOB` saves and ends for good.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from common import (
    DONE,
    KEPT,
    Refusal,
    default_fdm,
    finish,
    kept,
    need_command,
    need_positive,
    parse,
    parser,
    run,
    shell_words,
)

TIMES = r"(\d+-)?\d+(:\d+){0,2}"  # minutes, minutes:seconds, hours:minutes:seconds, days-hours, ...
WORD = r"[^\s/\\\"'#]+"


def main(argv: Sequence[str]) -> int:
    made = parser(__doc__)
    made.add_argument("--nodes", type=int, default=1, metavar="N", help="default: %(default)s")
    made.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="default: %(default)s")
    made.add_argument("--cpus-per-gpu", type=int, default=8, metavar="C", help="default: %(default)s")
    made.add_argument("--time", default="24:00:00", metavar="LIMIT", help="of one stay (default: %(default)s)")
    made.add_argument("--job-name", default="fdm", metavar="NAME", help="default: %(default)s")
    made.add_argument("--partition", metavar="NAME")
    made.add_argument("--account", metavar="NAME")
    made.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="one more #SBATCH line, such as "
                      "--sbatch=--mem=200G; may be repeated")  # fmt: skip
    made.add_argument("--setup", action="append", default=[], metavar="LINE", help="a line of shell before the command, "
                      "such as --setup='module load cuda'; may be repeated")  # fmt: skip
    made.add_argument("--save-seconds", type=int, default=180, metavar="S", help="before the time limit, to save "
                      "(default: %(default)s)")  # fmt: skip
    made.add_argument("--max-restarts", type=int, default=3, metavar="N", help="requeues in a row that brings nothing "
                      "new, such as a checkpoint (default: %(default)s)")  # fmt: skip
    made.add_argument("--script", default="fdm.sbatch", metavar="FILE", help="to write (default: %(default)s)")
    made.add_argument("--fdm", type=shell_words, default=default_fdm(), metavar="COMMAND", help="the fdm to run "
                      "(default: %(default)s)")  # fmt: skip
    args, command = parse(made, argv)
    need_command(command)
    need_positive(args, "nodes", "gpus_per_node", "cpus_per_gpu", "save_seconds")
    if not re.fullmatch(TIMES, args.time):
        raise Refusal(f"--time must be as Slurm writes it, such as 24:00:00 or 2-00:00:00, and is {args.time!r}.")
    for name in ("job_name", "partition", "account"):  # the first is part of names of files
        if (value := getattr(args, name)) and not re.fullmatch(WORD, value):
            raise Refusal(f"--{name.replace('_', '-')} must be one word without slashes and quotes, and is {value!r}.")
    for given in args.sbatch:
        if not given.startswith("-") or "\n" in given:
            raise Refusal(f"--sbatch takes one option of sbatch, such as --sbatch=--mem=200G, and is {given!r}.")
    text, submit = script(args, command), ["sbatch", args.script]
    if args.dry_run:
        print(f"cat > {shlex.quote(args.script)} << 'END'\n{text}END\n{shlex.join(submit)}")
        return DONE
    try:
        Path(args.script).write_text(text)
    except OSError as error:
        raise Refusal(f"{args.script} cannot be written: {error.strerror}.") from error
    return run(submit).returncode


def script(args: argparse.Namespace, command: Sequence[str]) -> str:
    """The batch script."""
    options = [
        f"--job-name={args.job_name}",
        f"--nodes={args.nodes}",
        f"--ntasks-per-node={args.gpus_per_node}",
        f"--gpus-per-node={args.gpus_per_node}",
        f"--cpus-per-task={args.cpus_per_gpu}",
        f"--time={args.time}",
        *([f"--partition={args.partition}"] if args.partition else []),
        *([f"--account={args.account}"] if args.account else []),
        f"--signal=TERM@{args.save_seconds}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.log",
        *args.sbatch,
    ]
    fdm = shlex.join([*args.fdm, *command, "--distributed=auto"])
    setup = "".join(f"{line}\n" for line in args.setup)
    return TEMPLATE.format(
        options="\n".join(f"#SBATCH {given}" for given in options),
        listing=kept(command).listing(),
        names=KEPT,
        noun=kept(command).noun,
        limit=args.max_restarts,
        setup=setup,
        cpus=args.cpus_per_gpu,
        wait=args.save_seconds,
        fdm=fdm,
    )


# --signal without "B:" goes to the tasks and not to this script, which outlives them.  srun gives the highest exit
# code of all tasks.  A task that has saved must not end the others, which may still be saving: hence
# --kill-on-bad-exit=0, and --wait for those that never end because they wait for one that crashed.
TEMPLATE = """\
#!/bin/bash
{options}
{setup}set -uo pipefail

# Where a GPU does not start, JAX would else go on with the CPU.
export JAX_PLATFORMS="${{JAX_PLATFORMS:-cuda,cpu}}"

# What the run has kept: how many, and the last one.
progress() {{
  local names
  names=$({listing} 2> /dev/null | sed 's,/$,,; s,.*/,,' | grep -xE '{names}' | sort -n)
  [ -z "$names" ] || echo "$(wc -l <<< "$names") ${{names##*$'\\n'}}"
}}

# Slurm's own SLURM_RESTART_COUNT also counts the stays that ended at the limit of time.
counts=$SLURM_JOB_NAME-$SLURM_JOB_ID.restarts
crashes=0 # since there was a new {noun}
idle=0 # stays that ended with code 75, and brought none, in a row
[ -e "$counts" ] && read -r crashes idle < "$counts"

requeue() {{
  # Without the counts it might be queued again for ever.
  echo "$crashes $idle" > "$counts" || {{ give_up "$1, and the file $counts cannot be written"; return; }}
  echo "launch: $1; job $SLURM_JOB_ID is queued again."
  scontrol requeue "$SLURM_JOB_ID"
}}

give_up() {{
  echo "launch: not queued again: $1."
  rm -f "$counts"
}}

before=$(progress)
srun --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait={wait} {fdm}
code=$?
after=$(progress)
moved=0
if [ -n "$after" ] && [ "$after" != "$before" ]; then moved=1 crashes=0 idle=0; fi
case $code in
  0 | 2 | 130) rm -f "$counts" ;; # 130: by Ctrl-C, or --signal=INT, without saving
  75)
    idle=$((idle + 1 - moved))
    if [ "$idle" -le {limit} ]; then requeue "saved"; else give_up "no new {noun} in $idle stays"; fi
    ;;
  *)
    crashes=$((crashes + 1))
    if [ "$crashes" -le {limit} ]; then requeue "exit code $code"; else give_up "exit code $code, crash $crashes"; fi
    ;;
esac
exit $code
"""


if __name__ == "__main__":
    finish(main)
