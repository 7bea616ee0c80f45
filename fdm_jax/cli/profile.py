"""Trace a few training steps, or a sampling of one batch, and say where the time goes.

  fdm profile --config=configs/edm.py:cifar10 --out=profile
  fdm profile --config=configs/edm.py:cifar10 --out=profile --what=sample --dtype=bfloat16 --batch-size=64

--out then holds profile.txt (what is printed), profile.json (the same, unabridged) and the trace itself, which
TensorBoard's profile plugin and https://ui.perfetto.dev (perfetto_trace.json.gz) show.  Images are synthetic, so
loading data is not in it.  Times are those of operations on the devices; the idle share is how long a device had
none to run between the first and the last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdm_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from fdm_jax.cli.bench import Case, Program

HELP = "trace a few steps, and say where the time goes"

IDLE_SHARE = 0.02  # above which it is worth a word
WIDTH = 44  # of a name in the text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fdm_jax.cli.config import add_config_argument

    add_config_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the trace and the tables")
    parser.add_argument("--what", default="train", metavar="NAME", help="train or sample (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="train steps, or samplings (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="over all devices (default: the configuration's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute type (default: the configuration's)")
    parser.add_argument("--remat", metavar="RES,...", help="resolutions whose blocks are rematerialised")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="rows of a table (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from fdm_jax import profiling
    from fdm_jax.cli.bench import cases

    if args.what not in WHAT:
        raise UserError(f"--what cannot be {args.what!r}: {nearest(args.what, WHAT)}")
    for field in ("batch_size", "steps", "top"):
        value = getattr(args, field)
        if value is not None and value < 1:
            raise UserError(f"--{field.replace('_', '-')} must be 1 or more, and is {value}.")
    (case,) = cases(args)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={args.out} cannot be made: {error.strerror}.") from error
    program, parameters = WHAT[args.what](case)
    trace = record(program, args.out, args.steps)
    events, text = profiling.read_events(trace), program.compiled.as_text()
    summary = {"what": args.what, **describe(case)}
    summary |= profiling.summarise(events, text, parameters, args.steps, top=max(args.top, 200))
    words = render(summary, args.top) + f"\nTrace: {trace.parent}"
    (args.out / "profile.json").write_text(json.dumps(summary, indent=2) + "\n")
    (args.out / "profile.txt").write_text(words + "\n")
    print(words)
    return 0


def train(case: Case) -> tuple[Program, Any]:
    """The train step, and the shapes of the network's parameters."""
    from fdm_jax.cli.bench import training_program

    return training_program(case), parameter_shapes(case)


def sample(case: Case) -> tuple[Program, Any]:
    """The sampler of 18 steps, and the shapes of the network's parameters."""
    from fdm_jax.cli.bench import sampling_programs

    return sampling_programs(case, 18)[0], parameter_shapes(case)


WHAT = {"train": train, "sample": sample}


def parameter_shapes(case: Case) -> Any:
    import jax

    from fdm_jax.training.step import init_state

    return jax.eval_shape(lambda: init_state(case.network, case.spec, case.image_shape)).params


def describe(case: Case) -> dict[str, Any]:
    """What was measured, and on what."""
    import jax
    import jax.numpy as jnp

    return {
        "name": case.name,
        "batch_size": case.spec.batch_size,
        "dtype": jnp.dtype(case.network.dtype).name,
        "devices": jax.device_count(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def record(program: Program, out: Path, steps: int) -> Path:
    """Run a program so many times under the profiler; returns the trace that it wrote."""
    import jax

    for _ in range(2):  # the first call sets up what later ones find
        jax.block_until_ready(program.call())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing every call of Python would slow down what is measured
    before = set(out.rglob("*.xplane.pb"))
    with jax.profiler.trace(out, create_perfetto_trace=True, profiler_options=options):
        for step in range(steps):
            with jax.profiler.StepTraceAnnotation("step", step_num=step):
                result = program.call()
        jax.block_until_ready(result)
    written = set(out.rglob("*.xplane.pb")) - before
    if not written:
        raise UserError(f"JAX wrote no trace to {out}.")
    return max(written)


def render(summary: dict[str, Any], top: int) -> str:
    """The tables in words."""
    s = summary
    noun = {"train": "step", "sample": "sampling"}[s["what"]]
    lines = [
        f"{s['name']}, {s['what']}: {s['milliseconds']:.4g} ms of operations per {noun} of {s['batch_size']} images on "
        f"{s['devices']} x {s['device']}, {s['dtype']}, jax {s['jax']}; mean of {s['steps']}."
    ]
    for title, rows in (
        ("pass", s["passes"]), ("kind of work", s["categories"]), ("module", s["modules"]), ("operation", s["operations"]),
    ):  # fmt: skip
        lines += ["", f"{'ms':>10} {'share':>6}  {title}"]
        for row in rows[:top]:
            name = row["name"] if "name" in row else row["operation"]
            more = ""
            if "operation" in row:
                more = "  " + ", ".join(dict.fromkeys((row["category"], row["module"], row["pass"])))
            lines.append(f"{row['milliseconds']:>10.4g} {row['share']:>6.1%}  {name:<{WIDTH if more else 0}}{more}")
    lines.append("")
    for device, found in s["idle"].items():
        lines.append(
            f"{device}: idle {found['idle']:.2%} of {found['window']:.4g} ms, at most {found['longest_gap']:.3g} ms at a time"
            + (f"; more than {IDLE_SHARE:.0%} is lost time." if found["idle"] > IDLE_SHARE else ".")
        )
    return "\n".join(lines)
