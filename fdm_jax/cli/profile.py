"""Trace a few training steps, the training loop with its data, or a sampling, and say where the time goes.

  fdm profile --config=configs/edm.py:cifar10 --out=profile
  fdm profile --config=configs/edm.py:cifar10 --out=profile --what=loop --steps=100
  fdm profile --config=configs/edm.py:cifar10 --out=profile --what=sample --dtype=bfloat16 --batch-size=64
  fdm profile --config=configs/edm.py:cifar10 --out=gs://BUCKET/profile --distributed=auto      the first worker of a TPU pod

--out then holds profile.txt (what is printed), profile.json (the same, unabridged) and the trace itself, which
TensorBoard's profile plugin and https://ui.perfetto.dev (perfetto_trace.json.gz) show.  Times are those of operations on
the devices; the idle share is how long a device had none to run between the first and the last, and where runs can be told
apart, how long between one run of a program and the next (waiting for the host or for data).  Of `train` and `sample`
images are synthetic, and loading is not in it.  `loop` is what `fdm train` does, from files to logged metrics, in a
workdir that is thrown away; only checkpoints, samples and evaluations are left out.  Of several processes the first one's
devices are traced; for their loop, all of them must see --out, where its workdir is until it ends (``.run_N``).  On
NVIDIA's GPUs the operations of samplers, and of several steps as one program, are launched one by one here, not in CUDA
graphs as otherwise, or the trace could not name them: a GPU may idle more.  On CPUs all threads are one device, whose
operations may run beside each other, and tracing itself takes time, a quarter and more.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fdm_jax.cli.checks import need_positive
from fdm_jax.cli.distributed import add_distributed_argument, joined
from fdm_jax.cli.places import place_argument
from fdm_jax.errors import UserError, nearest
from fdm_jax.progress import significant
from fdm_jax.whole_files import check_unclaimed, is_remote, remove_files, remove_folder, write_whole

if TYPE_CHECKING:
    from fdm_jax.cli.bench import Case, Program
    from fdm_jax.networks import SongUNet
    from fdm_jax.training.step import TrainSpec

HELP = "trace a few steps, and say where the time goes"

IDLE_SHARE = 0.02  # above which it is worth a word
LOOP_WARM_UP = 10  # steps of the loop before it is traced
MAX_STEPS = 1000  # so many of a small network on a CPU take 6 GB, and a minute and a half
WIDTH = 44  # of a name in the text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fdm_jax.cli.config import add_config_argument

    add_config_argument(parser)
    parser.add_argument(
        "--out", type=place_argument, required=True, metavar="DIR", help="for the trace and the tables; local or gs://"
    )
    parser.add_argument("--what", default="train", metavar="NAME", help="train, loop or sample (default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="train steps, or samplings (default: 5, of the loop 50)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="over all devices (default: the configuration's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute type (default: the configuration's)")
    parser.add_argument("--remat", metavar="RES,...", help="resolutions whose blocks are rematerialised")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="rows of a table (default: %(default)s)")
    add_distributed_argument(parser)


def run(args: argparse.Namespace) -> int:
    from fdm_jax.cli.bench import overriding
    from fdm_jax.cli.config import load
    from fdm_jax.xla_flags import launch_operations_singly

    if args.what not in WHAT:
        raise UserError(f"--what cannot be {args.what!r}: {nearest(args.what, WHAT)}")
    need_positive(args, "batch_size", "steps", "top")
    if args.steps is not None and args.steps > MAX_STEPS:
        raise UserError(f"--steps must be at most {MAX_STEPS}, or the trace fills the memory, and is {args.steps}.")
    if args.what == "sample" or (args.what == "loop" and load(overriding(args)).train.steps_at_once > 1):
        launch_operations_singly()  # now, before JAX starts
    with joined(args.distributed, None, leave_when_told=True):
        _profile(args)
    return 0


def _profile(args: argparse.Namespace) -> None:
    """Every process runs the same, and the first one traces it."""
    from fdm_jax import profiling

    with _filled(args.out) as folder:
        traced = WHAT[args.what](args, folder)
        if traced is None:
            return
        events = profiling.read_events(traced.trace)
        summary = {"what": args.what, **traced.described}
        summary |= profiling.summarise(events, traced.program, traced.parameters, traced.steps, top=max(args.top, 200))
        words = render(summary, args.top) + f"\nTrace: {args.out / traced.trace.parent.relative_to(folder)}"
        (folder / "profile.json").write_text(json.dumps(summary, indent=2) + "\n")
        (folder / "profile.txt").write_text(words + "\n")
    print(words)


@contextlib.contextmanager
def _filled(out: Path) -> Iterator[Path]:
    """A folder for the first process to fill: ``out`` itself, or a local one whose files are then put on gs://.

    Raises:
      UserError: ``out`` cannot be written, or is something else's; nothing has been compiled for it yet.
    """
    import jax

    from fdm_jax.training.agreement import all_or_none

    first, sign = jax.process_index() == 0, ".profile"
    with all_or_none(f"The first process cannot write --out={out}, and says why."):
        if first and is_remote(out):
            write_whole(out / sign, lambda path: path.write_bytes(b""))
            remove_files(out, [sign])
        elif first:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--out={out} cannot be made: {error.strerror}.") from error
        if first and not (out / "plugins").exists():  # the folder of traces, which comes before the other two
            check_unclaimed(out, ("profile.json", "profile.txt"), "--out")
    if not (first and is_remote(out)):
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="fdm_profile_") as name:  # JAX traces into local folders only
        folder = Path(name)
        yield folder
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            write_whole(out / file.relative_to(folder), functools.partial(shutil.copyfile, file))


class Traced(NamedTuple):
    """A trace, and what is needed to read it.

    Attributes:
      trace: the file.
      program: the compiled program that ran, as text.
      parameters: shapes of the network's, nested as its modules are.
      steps: how many runs of it the trace has.
      described: what was measured, and on what.
    """

    trace: Path
    program: str
    parameters: Any
    steps: int
    described: dict[str, Any]


def train(args: argparse.Namespace, folder: Path) -> Traced | None:
    """The train step."""
    from fdm_jax.cli.bench import cases, training_program

    (case,) = cases(args)
    return _traced(case, training_program(case), args.steps, folder)


def sample(args: argparse.Namespace, folder: Path) -> Traced | None:
    """The sampler of 18 steps."""
    from fdm_jax.cli.bench import cases, sampling_programs

    (case,) = cases(args)
    return _traced(case, sampling_programs(case, 18)[0], args.steps, folder)


def _traced(case: Case, program: Program, steps: int | None, folder: Path) -> Traced | None:
    """Of several processes, the first one's devices; None in the others."""
    import jax

    from fdm_jax.cli.bench import describe

    for _ in range(2):  # the first call sets up what later ones find
        jax.block_until_ready(program.call())
    steps, first = steps or 5, jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        traces = stack.enter_context(tracing(folder)) if first else []
        for step in range(steps):
            with jax.profiler.StepTraceAnnotation("step", step_num=step):
                result = program.call()
        jax.block_until_ready(result)
    if not first:
        return None
    shapes = parameter_shapes(case.network, case.spec, case.image_shape)
    described = describe(case.name, case.network, case.spec)
    return Traced(traces[0], program.compiled.as_text(), shapes, steps, described)


def loop(args: argparse.Namespace, folder: Path) -> Traced | None:
    """The training loop, from files to metrics; None in all processes but the first."""
    import jax

    from fdm_jax.ahead import lower_step
    from fdm_jax.cli.bench import describe, overriding
    from fdm_jax.cli.config import load
    from fdm_jax.experiment import Experiment, open_data
    from fdm_jax.training.loop import steps_together, train

    config = load(overriding(args))
    steps = args.steps or 50
    at_once = config.train.steps_at_once
    warm_up = max(LOOP_WARM_UP, 2 * at_once)
    images = config.train.batch_size * (warm_up + steps + 2 * at_once)
    config.update_from_flattened_dict({
        "train.images": images, "checkpoint.every_images": images, "samples.every_images": 0, "eval.every_images": 0,
    })  # fmt: skip
    source = open_data(config)
    experiment = Experiment.from_config(config, source.spec)
    lowered = lower_step(experiment, jax.devices(), steps_together(experiment))  # raises what it cannot do at once
    first, traces = jax.process_index() == 0, list[list[Path]]()
    ends: list[int] = []  # of what is traced, in steps
    with _thrown_away(args.out) as workdir, contextlib.ExitStack() as stack:

        def watch(step: int, state: Any) -> None:
            if ends and step >= ends[0] + steps:
                ends.append(step)
                jax.block_until_ready(state)
                stack.close()
                raise _Enough
            if step >= warm_up and not ends:
                ends.append(step)
                # To begin takes a while, in which some of what is under way would be done, and nobody knows how much.
                jax.block_until_ready(state)
                if first:
                    traces.append(stack.enter_context(tracing(folder)))

        with contextlib.suppress(_Enough):
            train(experiment, source, workdir, watch)
            raise KeyboardInterrupt  # which the loop keeps to itself; nothing else ends it so early
    network, spec = experiment.network, experiment.spec
    shapes = parameter_shapes(network, spec, experiment.image_shape)
    text = lowered.compile().as_text()  # by all: on GPUs they share out the timing of kernels
    if not first:
        return None
    # Of several steps as one program, there are whole programs in the trace, and perhaps more steps than asked for.
    return Traced(traces[0][0], text, shapes, ends[1] - ends[0], describe(args.config, network, spec))


@contextlib.contextmanager
def _thrown_away(out: Path) -> Iterator[Path]:
    """A workdir for as long as the block takes.

    Raises:
      UserError: of several processes, which have their workdir in ``out``, one sees another folder there.
    """
    import jax

    from fdm_jax.training.agreement import check_shared, of_the_first

    if jax.process_count() == 1:
        with tempfile.TemporaryDirectory(prefix="fdm_profile_") as folder:
            yield Path(folder) / "run"
        return
    check_shared(out)
    (number,) = of_the_first([secrets.randbelow(2**31)])
    workdir = out / f".run_{number}"
    try:
        yield workdir
    finally:
        if jax.process_index() == 0 and workdir.exists():
            remove_folder(workdir)


class _Enough(Exception):
    """Ends the training loop."""


WHAT = {"train": train, "loop": loop, "sample": sample}


def parameter_shapes(network: SongUNet, spec: TrainSpec, image_shape: tuple[int, int, int]) -> Any:
    import jax

    from fdm_jax.training.step import init_state

    return jax.eval_shape(lambda: init_state(network, spec, image_shape)).params


@contextlib.contextmanager
def tracing(out: Path) -> Iterator[list[Path]]:
    """Trace what runs within; the list then holds the file that was written."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing every call of Python would slow down what is measured
    before, found = set(out.rglob("*.xplane.pb")), list[Path]()
    with jax.profiler.trace(out, create_perfetto_trace=True, profiler_options=options):
        yield found
    found += sorted(set(out.rglob("*.xplane.pb")) - before)
    if not found:
        raise UserError(f"JAX wrote no trace to {out}.")


def render(summary: dict[str, Any], top: int) -> str:
    """The tables in words."""
    s = summary
    noun = "sampling" if s["what"] == "sample" else "step"
    lines = [
        f"{s['name']}, {s['what']}: {significant(s['milliseconds'])} ms of operations per {noun} of {s['batch_size']} images on "
        f"{s['devices']} x {s['device']}, {s['dtype']}, jax {s['jax']}; mean of {s['steps']}."
    ]
    if s["processes"] > 1:
        lines.append(f"Of {s['processes']} processes, this is the first one with its devices.")
    for title, rows in (
        ("pass", s["passes"]), ("kind of work", s["categories"]), ("module", s["modules"]), ("operation", s["operations"]),
    ):  # fmt: skip
        lines += ["", f"{'ms':>10} {'share':>6}  {title}"]
        for row in rows[:top]:
            name = row["name"] if "name" in row else row["operation"]
            more = ""
            if "operation" in row:
                more = "  " + ", ".join(dict.fromkeys((row["category"], row["module"], row["pass"])))
            lines.append(
                f"{significant(row['milliseconds']):>10} {row['share']:>6.1%}  {name:<{WIDTH if more else 0}}{more}"
            )
    lines.append("")
    for device, found in s["idle"].items():
        lost = found["idle"] if found["between"] is None else found["between"]
        lines.append(
            f"{device}: idle {found['idle']:.2%} of {significant(found['window'])} ms, "
            + f"at most {significant(found['longest_gap'], 3)} ms at a time"
            + (f"; {lost:.2%} between one program and the next" if found["between"] is not None else "")
            + (f"; more than {IDLE_SHARE:.0%} is lost time." if lost > IDLE_SHARE else ".")
        )
    return "\n".join(lines)
