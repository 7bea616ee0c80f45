"""Say what a configuration needs in memory, operations, time and money, without running it.

  fdm plan --config=configs/edm.py:cifar10
  fdm plan --config=configs/edm.py:ffhq64 --config.network.dtype=bfloat16 --device=tpu-v4 --num-devices=16 --price=3.22
  fdm plan --config=configs/edm.py:cifar10 --config.network.dtype=bfloat16 --compile-for=v5litepod-16
  fdm plan --config=configs/edm.py:cifar10 --config.network.dtype=bfloat16 --compile-for=8xh100

Operations and the size of the network are counted from its shapes.  The time follows from the device's peak rate,
as its vendor gives it, and from the share of it that the run is assumed to reach: `fdm bench` measures that share.
The cost is that time at the price you give; nothing is looked up.  Devices are counted as JAX counts them: chips,
on TPU v4, v5 and v6 (a v4-32 slice has 16, a v5litepod-16 also), and cores, two to a chip, on TPU v3 and TPU7x.

With --compile-for the train step is also compiled, for a TPU slice or GPUs that need not be there, by their own compiler
(libtpu, of the extra `tpu`, or JAX's plugin for CUDA, of `cuda12` and `cuda13`): it says what memory the step takes on
each device.  That takes minutes.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING

from fdm_jax.cli.checks import need_positive
from fdm_jax.errors import UserError, nearest
from fdm_jax.progress import say, significant

if TYPE_CHECKING:
    from fdm_jax.accounting import Accelerator, Plan
    from fdm_jax.ahead import CompiledStep
    from fdm_jax.experiment import Experiment

HELP = "say what a configuration needs in memory, operations, time and money"

SAMPLES = 50_000  # what an FID takes
GPU_SHARE = 0.75  # of a GPU's memory, which JAX takes unless told otherwise
SHORT_STEP = 0.02  # seconds, under which the launching of kernels and the loading of data show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fdm_jax.cli.config import add_config_argument

    add_config_argument(parser)
    parser.add_argument("--device", metavar="NAME", help="such as tpu-v4 (default: h200)")
    parser.add_argument("--num-devices", type=int, metavar="N", help="default: 8")
    parser.add_argument(
        "--compile-for", metavar="DEVICES", help="a TPU slice, such as v4-32 or v5litepod-16, or GPUs, such as h200 or "
        "8xh100, in place of --device and --num-devices: also compile the train step for them",
    )  # fmt: skip
    parser.add_argument(
        "--utilisation", type=float, default=0.35, metavar="SHARE",
        help="share of the device's peak that the run is assumed to reach (default: %(default)s; 0.44 was measured with "
        "CIFAR-10's network on an H200, in bfloat16)",
    )  # fmt: skip
    parser.add_argument("--price", type=float, metavar="USD", help="of one device for an hour; adds what the run costs")
    parser.add_argument("--json", action="store_true", help="print the figures as one line of JSON")


def run(args: argparse.Namespace) -> int:
    from fdm_jax import ahead
    from fdm_jax.accounting import ACCELERATORS
    from fdm_jax.cli.config import load
    from fdm_jax.experiment import Experiment

    if args.compile_for and (args.device or args.num_devices):
        raise UserError(
            f"--compile-for={args.compile_for} says what the devices are: leave --device and --num-devices away."
        )
    if args.compile_for:
        device, num_devices = ahead.accelerator_of(args.compile_for)
        devices = ahead.absent_devices(args.compile_for)  # before JAX is used for anything else
    else:
        device, num_devices = args.device or "h200", 8 if args.num_devices is None else args.num_devices
    if device not in ACCELERATORS:
        try:
            one, count = ahead.accelerator_of(device)
        except UserError:
            raise UserError(f"There is no device {device!r}: {nearest(device, ACCELERATORS)}") from None
        raise UserError(f"--device={device} is {count} devices: give --device={one} --num-devices={count}.")
    need_positive(args, "num_devices")
    if not 0 < args.utilisation <= 1:
        raise UserError(f"--utilisation must be above 0 and at most 1, and is {args.utilisation}.")
    if args.price is not None and not 0 < args.price < math.inf:
        raise UserError(f"--price must be US dollars above 0 per device and hour, and is {args.price}.")
    experiment = Experiment.from_config(load(args))
    plan = make_plan(experiment, ACCELERATORS[device], num_devices, args.utilisation, args.price)
    gpus = device if num_devices == 1 else f"{num_devices}x{device}"
    words = render(plan, bool(args.compile_for), gpus if device in ahead.GPUS else None)
    numbers = figures(plan)
    if args.compile_for:
        say(f"Compiling for {num_devices} x {plan.accelerator.title}, which takes minutes.")
        try:
            compiled = ahead.compile_step(experiment, devices)
        except ahead.DoesNotFit as error:
            words += f"\nCompiled for {args.compile_for}: it does NOT fit. The compiler says: {error}"
            numbers |= {"compiled_for": args.compile_for, "compiled_fits": False}
        else:
            words += "\n" + render_compiled(compiled, args.compile_for, plan.accelerator)
            fits = share_of(compiled, plan.accelerator) <= 1
            numbers |= {"compiled_for": args.compile_for, "compiled_fits": fits, **compiled_figures(compiled)}
    print(json.dumps(numbers) if args.json else words)
    return 0


def make_plan(
    experiment: Experiment, accelerator: Accelerator, num_devices: int, utilisation: float, price: float | None = None
) -> Plan:
    """Count what an experiment needs; nothing is compiled, but its network is traced, which takes seconds.

    Raises:
      UserError: the batch cannot be dealt to so many devices.
    """
    from fdm_jax import accounting
    from fdm_jax.sampling.edm import evaluation_sigmas
    from fdm_jax.sampling.grids import edm_sigmas

    experiment.check_devices(num_devices)
    network, config = experiment.network, experiment.config
    one, two = (accounting.activation_bytes(network, experiment.image_shape, batch) for batch in (1, 2))
    family = type(experiment.family).__name__ + ("-FDM" if experiment.family.momentum else "")
    size = "x".join(map(str, experiment.image_shape))
    return accounting.Plan(
        title=f"{family} on {config.data.source} {size}, {network.preset} with {network.model_channels} x "
        f"{tuple(network.channel_mult)} channels in {config.network.dtype}",
        dtype=config.network.dtype,
        parameters=accounting.parameter_count(network, experiment.image_shape),
        forward_flops=accounting.forward_flops(network, experiment.image_shape),
        activation_bytes_fixed=2 * one - two,
        activation_bytes_per_image=two - one,
        images=config.train.images,
        batch_size=experiment.spec.batch_size,
        accumulation=experiment.spec.accumulation,
        nfe=len(evaluation_sigmas(edm_sigmas(config.samples.steps))),
        accelerator=accelerator,
        num_devices=num_devices,
        utilisation=utilisation,
        recomputed_flops=accounting.recomputed_flops(network, experiment.image_shape),
        price=price,
        dealt=config.parallel == "fsdp",
    )


def figures(plan: Plan) -> dict[str, str | int | float | bool | None]:
    """The plan for programs.  What follows from the assumed utilisation has ``estimated`` in its name."""
    sampling = SAMPLES * plan.nfe * plan.forward_flops
    priced = plan.price is not None
    return {
        "title": plan.title,
        "device": plan.accelerator.title,
        "num_devices": plan.num_devices,
        "dtype": plan.dtype,
        "assumed_utilisation": plan.utilisation,
        "assumed_price": plan.price,
        "parameters": plan.parameters,
        "forward_flops": plan.forward_flops,
        "state_bytes": plan.state_bytes,
        "activation_bytes": plan.activation_bytes,
        "fits": plan.memory_share <= 1,
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "training_flops": plan.training_flops,
        "sampling_flops": sampling,
        "estimated_images_per_second": plan.images_per_second,
        "estimated_training_seconds": plan.seconds(plan.training_flops),
        "estimated_sampling_seconds": plan.seconds(sampling),
        "estimated_training_dollars": plan.dollars(plan.training_flops) if priced else None,
        "estimated_sampling_dollars": plan.dollars(sampling) if priced else None,
    }


def render(plan: Plan, compiled: bool = False, compile_for: str | None = None) -> str:
    """The plan in words: one fact per line, then what to beware of.

    Args:
      compiled: the compiler will say whether it fits the memory, and the estimate need not.
      compile_for: what to ask the compiler with.
    """
    device, step_seconds = plan.accelerator, plan.seconds(plan.step_flops)
    image_flops = plan.step_flops // plan.batch_size
    training, sampling = plan.training_flops, SAMPLES * plan.nfe * plan.forward_flops
    share = "this device's part of " if plan.dealt else ""
    gathered = ", and whole parameters" if plan.gathered_bytes else ""
    at_once = f"{plan.images_at_once:,} images" + (f" ({plan.accumulation} rounds)" if plan.accumulation > 1 else "")
    facts = [
        ("parameters", f"{plan.parameters:,}"),
        ("operations", f"per image {_flops(plan.forward_flops)} forward, {_flops(image_flops)} in training"),
        ("memory", f"{_size(plan.state_bytes + plan.activation_bytes)} of each device's {device.memory_gib:g} GiB"),
        ("  state", f"{_size(plan.state_bytes)}: {share}parameters, gradients, Adam's moments, EMA; float32{gathered}"),
        ("  activations", f"about {_size(plan.activation_bytes)}: {at_once} at a time; {plan.dtype}"),
        ("training", f"{plan.steps:,} steps of {plan.batch_size:,} images, {_flops(training)}"),
        ("  speed", f"about {significant(plan.images_per_second, 3)} img/s, {_duration(step_seconds)} per step"),
        ("  time", f"about {_duration(plan.seconds(training))}"),
        *_cost(plan, training),
        ("sampling", f"{SAMPLES:,} images at {plan.nfe} NFE, {_flops(sampling)}"),
        ("  time", f"about {_duration(plan.seconds(sampling))}"),
        *_cost(plan, sampling),
    ]
    lines = [plan.title, *(f"  {name:<15}{fact}" for name, fact in facts)]
    lines.append(
        f"Estimates, not measurements: they assume that {plan.num_devices} x {device.title} reach "
        f"{significant(100 * plan.utilisation, 3)}% of the vendor's {device.peak_tflops(plan.dtype):g} TFLOP/s "
        f"in {plan.dtype}, and are as good as that assumption."
        + ("" if plan.price is None else " The price is yours, and covers devices alone: no storage, no waiting.")
    )
    if not compiled:
        lines += _memory_notes(plan, compile_for)
    if step_seconds < SHORT_STEP:
        lines.append("Note: steps so short are bound by launching kernels and loading data, and will take longer.")
    return "\n".join(lines)


def _memory_notes(plan: Plan, compile_for: str | None) -> list[str]:
    """A line if the estimated memory is more than there is, or than JAX takes of it; else none."""
    if plan.memory_share > 1:
        rounds = plan.fitting_accumulation()
        advice = (
            f"--config.train.accumulation={rounds} would"
            if rounds
            else "not even one image at a time would; take a smaller network or a larger device"
        )
        ask = f" (--compile-for={compile_for} asks the compiler, which may need less)" if compile_for else ""
        return [f"WARNING: by this estimate it does not fit the memory of {plan.accelerator.title}; {advice}{ask}."]
    if plan.memory_share > GPU_SHARE:
        return [
            f"Note: JAX takes {GPU_SHARE:.0%} of a GPU's memory, and this needs {plan.memory_share:.0%}: "
            "set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 on a GPU."
        ]
    return []


def compiled_figures(compiled: CompiledStep) -> dict[str, int | float | None]:
    """What the compiler says, for programs; bytes are of one device."""
    return {
        "compiled_argument_bytes": compiled.argument_bytes,
        "compiled_temporary_bytes": compiled.temporary_bytes,
        "compiled_all_reduces": compiled.all_reduces,
        "compile_seconds": round(compiled.seconds, 1),
    }


def share_of(compiled: CompiledStep, device: Accelerator) -> float:
    """Of a device's memory that the compiled step takes.  (XLA for GPUs compiles steps that do not fit, too.)"""
    return (compiled.argument_bytes + compiled.temporary_bytes) / (device.memory_gib * 2**30)


def render_compiled(compiled: CompiledStep, name: str, device: Accelerator) -> str:
    """The same in words."""
    sums = ""
    if compiled.all_reduces is not None:
        sums = f", with {compiled.all_reduces} all-reduce" + "s" * (compiled.all_reduces != 1)
    misfit = "it does NOT fit: " if share_of(compiled, device) > 1 else ""
    return (
        f"Compiled for {name} in {_duration(compiled.seconds)}: {misfit}a step takes "
        f"{_size(compiled.argument_bytes + compiled.temporary_bytes)} of each device's {device.memory_gib:g} GiB "
        f"({_size(compiled.argument_bytes)} of state and batch, {_size(compiled.temporary_bytes)} beside them){sums}."
    )


def _cost(plan: Plan, flops: int) -> list[tuple[str, str]]:
    """One line if there is a price, else none."""
    if plan.price is None:
        return []
    hours = plan.seconds(flops) / 3600 * plan.num_devices
    cost, price = _dollars(plan.dollars(flops)), _dollars(plan.price)
    return [("  cost", f"about {cost}: {significant(hours, 3)} device hours at {price}")]


def _dollars(value: float) -> str:
    """To the cent, and what is less than a dime to two digits: a price is never shown as nothing."""
    return f"${value:,.2f}" if value >= 0.0995 else f"${value:.2g}"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _flops(count: int) -> str:
    for unit, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= unit:
            return f"{count / unit:.4g} {prefix}FLOP"
    return f"{count / 1e6:.4g} MFLOP"


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")):
        if seconds >= unit:
            return f"{significant(seconds / unit, 3)} {name}"
    return f"{significant(seconds * 1000, 3)} ms"
