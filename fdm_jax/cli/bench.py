"""Measure training and sampling on this machine's devices, on synthetic images: one JSON line per measurement.

  fdm bench                                              a small network on 8x8 images
  fdm bench --cifar10                                    also CIFAR-10's (minutes to compile on a CPU)
  fdm bench --config=configs/edm.py:ffhq64 --what=train --batch-size=256 --dtype=bfloat16
  fdm bench --config=configs/edm.py:cifar10 --distributed=auto     all devices of a TPU pod or a Slurm job together

Fields: images_per_second (median, with the lowest and highest of up to five repeats), gflop_per_image (2 x
multiply-adds of convolutions and matrix products, training as three forward passes), tflops (what these come to),
matmul_tflops (of large matrix products of the same type on the same devices in the same run) and matmul_share (the
ratio of the two: how much of the machine the network uses).  compile_seconds is short when JAX's compile cache has
the program; temporary_mib is what the compiler sets aside per device beside inputs and outputs; peak_mib is the
most that was in use on a device, as the device says (peak_from "device") or, where it does not or had seen more
before, inputs, outputs and temporary memory as the compiler gives them ("compiler").  Of sampling, sampler_overhead
is the share by which the sampler takes longer than nfe forward passes of the network on the same batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from fdm_jax.cli.checks import need_positive
from fdm_jax.cli.distributed import add_distributed_argument, joined
from fdm_jax.errors import UserError, nearest
from fdm_jax.host_memory import program_check
from fdm_jax.progress import say

if TYPE_CHECKING:
    import jax

    from fdm_jax.families import Family
    from fdm_jax.networks import SongUNet
    from fdm_jax.training.step import TrainSpec

HELP = "measure training and sampling speed on this machine"

REPEATS = 5
MATMUL_SECONDS = 0.2  # how long a timed run of matrix products takes, roughly


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fdm_jax.cli.config import add_config_argument

    add_config_argument(parser, required=False)
    parser.add_argument("--batch-size", type=int, metavar="N", help="over all devices (default: by network)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="train steps to time (default: %(default)s)")
    parser.add_argument("--what", default="train,sample", help="default: %(default)s")
    parser.add_argument(
        "--sampling-steps", type=int, default=18, metavar="N", help="of the sampler (default: %(default)s)"
    )
    parser.add_argument(
        "--remat", metavar="RES,...", help="resolutions whose blocks are rematerialised (default: the configuration's)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute type (default: the configuration's)")
    parser.add_argument("--cifar10", action="store_true", help="without --config: also the network for CIFAR-10")
    add_distributed_argument(parser)


def run(args: argparse.Namespace) -> int:
    what = [name.strip() for name in args.what.split(",")]
    for name in what:
        if name not in MEASURES:
            raise UserError(f"--what cannot be {name!r}: {nearest(name, MEASURES)}")
    need_positive(args, "batch_size", "steps", "sampling_steps")
    with joined(args.distributed, None, leave_when_told=True):
        _measure(args, what)
    return 0


def _measure(args: argparse.Namespace, what: list[str]) -> None:
    """Every process does the same, and the first one prints."""
    import jax

    for case in cases(args):
        for name in what:
            if jax.process_index() == 0:
                say(f"{case.name}: compiling and timing {name}, {case.spec.batch_size} images at once")
            found = json.dumps(MEASURES[name](case, args))
            if jax.process_index() == 0:
                print(found, flush=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: a network with all that belongs to it; ``spec.batch_size`` images at a time.

    ``parallel`` is how training uses the devices, see ``fdm_jax.training.parallel``.
    """

    name: str
    network: SongUNet
    family: Family
    spec: TrainSpec
    image_shape: tuple[int, int, int]
    parallel: str = "jit"


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The configured network, or the built-in ones, as the arguments change them.

    Raises:
      UserError: a batch that cannot be dealt to the devices.
    """
    import jax

    for case in builtin_cases(args) if args.config is None else configured_case(args):
        batch, rounds = case.spec.batch_size, case.spec.accumulation
        if batch % (jax.device_count() * rounds):
            raise UserError(
                f"The batch size is {batch}, and must divide by {jax.device_count()} device(s) times "
                f"{rounds} round(s) of accumulation: set --batch-size."
            )
        if batch * math.prod(case.image_shape) >= 2**62:  # NumPy counts no further; what memory lacks is said later
            raise UserError(f"The batch size is {batch}, more than can be counted: set --batch-size.")
        yield case


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a configuration that ``--batch-size``, ``--dtype`` and ``--remat`` set."""
    remat = None
    if args.remat is not None:
        try:
            remat = tuple(int(part) for part in args.remat.split(",") if part.strip())
        except ValueError:
            raise UserError(f"--remat must be resolutions such as 32,16, and is {args.remat!r}.") from None
    fields = {"train.batch_size": args.batch_size, "network.dtype": args.dtype, "remat": remat}
    return {field: value for field, value in fields.items() if value is not None}


def overriding(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with ``settings`` as overrides of ``--config``: what one field allows may hang on another."""
    changes = [f"--config.{field}={value}" for field, value in settings(args).items()]
    return argparse.Namespace(config=args.config, overrides=[*args.overrides, *changes])


def configured_case(args: argparse.Namespace) -> Iterator[Case]:
    """The network of ``--config``."""
    from fdm_jax.cli.config import load
    from fdm_jax.experiment import Experiment

    experiment = Experiment.from_config(load(overriding(args)))
    yield Case(
        args.config, experiment.network, experiment.family, experiment.spec, experiment.image_shape,
        experiment.config.parallel,
    )  # fmt: skip


def builtin_cases(args: argparse.Namespace) -> Iterator[Case]:
    """The two networks that are followed from version to version; their batch grows with the devices."""
    import jax

    from fdm_jax.families import EDM
    from fdm_jax.momentum import Momentum
    from fdm_jax.networks import SongUNet
    from fdm_jax.training.step import TrainSpec

    family, changes = EDM(momentum=Momentum(multiplier=2.0)), settings(args)
    batch_size = changes.pop("train.batch_size", None)
    changes = {field.removeprefix("network."): value for field, value in changes.items()}

    def case(name: str, network: SongUNet, batch: int) -> Case:
        spec = TrainSpec(
            batch_size=batch_size or batch * jax.device_count(), learning_rate=1e-3, warmup_steps=200, num_classes=10
        )
        shape = (network.resolution, network.resolution, network.channels)
        return Case(name, network.clone(**changes), family, spec, shape)

    yield case("digits", SongUNet(8, 1, 10, 9, "ddpmpp", 32, (1, 2), 4, 1, (), 0.13), 128)
    if args.cifar10:
        yield case("cifar10", SongUNet(32, 3, 10, 9, "ddpmpp", 128, (2, 2, 2), 4, 4, (16,), 0.13), 4)


class Program(NamedTuple):
    """A compiled program with its inputs.

    Attributes:
      compiled: see ``jax.stages.Compiled``.
      compile_seconds: that it took.
      call: runs it once, and does not wait for it.
    """

    compiled: Any
    compile_seconds: float
    call: Callable[[], Any]


def training_program(case: Case) -> Program:
    """The whole train step, fed with the same batch over and over; data loading is not in it."""
    import jax
    import numpy as np

    from fdm_jax.devices import make_mesh
    from fdm_jax.training.parallel import parallelise
    from fdm_jax.training.starting import fresh_state
    from fdm_jax.training.step import make_train_step

    network, spec = case.network, case.spec
    parallel = parallelise(
        case.parallel, lambda axis: make_train_step(network, case.family, spec, axis=axis), make_mesh()
    )
    _, init = fresh_state(network, spec, case.image_shape, parallel.state_sharding)
    state = parallel.put_state(init())
    rng = np.random.default_rng(0)
    local = spec.batch_size // jax.process_count()
    batch = parallel.put_batch({
        "image": rng.integers(0, 256, (local, *case.image_shape), np.uint8),
        "label": rng.integers(0, max(spec.num_classes, 1), local, np.int32),
        "index": np.arange(local, dtype=np.int32) + local * jax.process_index(),
    })  # fmt: skip
    step, compile_seconds = _compile(parallel.step, state, batch)

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return Program(step, compile_seconds, call)


def bench_training(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The train step."""
    from fdm_jax import accounting

    before = _peak_bytes()
    program = training_program(case)
    repeats = min(REPEATS, args.steps)
    seconds = time_calls(program.call, repeats, args.steps // repeats)
    flops = accounting.train_flops(case.network, case.image_shape)
    return _report("train", case, flops, program, seconds, before) | {"parallel": case.parallel}


def sampling_programs(case: Case, steps: int) -> tuple[Program, Program]:
    """EDM's deterministic sampler from seeds to 8-bit images, and one forward pass of the network on such a batch.

    Parameters are random, which costs the same.
    """
    import jax
    import jax.numpy as jnp

    from fdm_jax.devices import make_mesh, replicated, sharded
    from fdm_jax.sampling.generate import make_generate_fn
    from fdm_jax.sampling.seeds import to_uint8
    from fdm_jax.training.starting import fresh_state

    mesh, spec, network = make_mesh(), case.spec, case.network
    rows, whole = sharded(mesh), replicated(mesh)
    generate = make_generate_fn(network, case.family, case.image_shape, spec.num_classes, steps=steps)

    # Made by training's program, which JAX's cache has already where training is measured too.
    state = fresh_state(network, spec, case.image_shape, lambda like: jax.tree.map(lambda _: whole, like))[1]()
    variables = {"params": state.ema, **state.constants}

    def inputs() -> tuple[jax.Array, ...]:
        seeds = jnp.arange(spec.batch_size, dtype=jnp.uint32)
        labels = (seeds % max(spec.num_classes, 1)).astype(jnp.int32)
        images = jnp.ones((spec.batch_size, *case.image_shape))
        return seeds, labels, images

    seeds, labels, images = jax.jit(inputs, out_shardings=rows)()

    def forward(variables: Any, images: jax.Array, labels: jax.Array) -> Any:
        class_labels = jax.nn.one_hot(labels, spec.num_classes) if spec.num_classes else None
        return network.apply(variables, images, jnp.ones(len(images)), class_labels)

    def program(function: Any, *args: Any) -> Program:
        jitted = jax.jit(function, in_shardings=(whole, rows, rows), out_shardings=rows)
        compiled, compile_seconds = _compile(jitted, *args)
        return Program(compiled, compile_seconds, lambda: compiled(*args))

    def sample(*inputs: Any) -> Any:
        return to_uint8(generate(*inputs))

    return program(sample, variables, seeds, labels), program(forward, variables, images, labels)


def bench_sampling(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The sampler, and by how much it takes longer than its forward passes."""
    from fdm_jax import accounting

    before = _peak_bytes()
    sampler, forward = sampling_programs(case, args.sampling_steps)
    nfe, seconds, overheads = 2 * args.sampling_steps - 1, [], []
    for _ in range(min(REPEATS, args.steps)):  # one after the other: a machine's speed changes with the minute
        seconds += time_calls(sampler.call, 1, 1)
        overheads.append(seconds[-1] / (nfe * time_calls(forward.call, 1, nfe)[0]) - 1)
    flops = nfe * accounting.forward_flops(case.network, case.image_shape)
    overhead = round(statistics.median(overheads), 4)
    return _report("sample", case, flops, sampler, seconds, before) | {"nfe": nfe, "sampler_overhead": overhead}


MEASURES: dict[str, Callable[[Case, argparse.Namespace], dict[str, Any]]] = {
    "train": bench_training,
    "sample": bench_sampling,
}


def _compile(jitted: Any, *args: Any) -> tuple[Any, float]:
    """The program for these arguments, and the seconds that tracing and compiling it took."""
    start = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    seconds = time.perf_counter() - start
    if check := program_check():
        check(compiled)
    return compiled, seconds


def time_calls(call: Callable[[], Any], repeats: int, calls: int) -> list[float]:
    """Seconds per call in each repeat of so many calls, after one call to warm up.

    Within a repeat a call is not waited for before the next is made: accelerators run behind Python.
    """
    import jax

    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / calls)
    return seconds


def matmul_tflops(dtype: Any, size: int | None = None, seconds: float = MATMUL_SECONDS) -> float:
    """Measured rate of one device in square matrix products of a type, in 10^12 operations per second.

    Args:
      dtype: what is multiplied; the precision is JAX's default, as in the networks.
      size: rows and columns; by default large enough for the device to reach its best.
      seconds: rough length of each of three timed runs, of which the fastest counts.
    """
    import jax

    if size is None:
        size = 1024 if jax.default_backend() == "cpu" else 8192
    # Entries of the product are of the size of the factors', so that it can be multiplied again and again.
    matrix = (jax.random.normal(jax.random.key(0), (size, size)) / size**0.5).astype(dtype)
    chain = _product_chain()

    def best(count: int) -> float:
        return min(time_calls(lambda: chain(count, matrix), 3, 1))

    count = 1
    while best(count) < seconds / 2:
        count *= 2
    return count * 2 * size**3 / best(count) / 1e12


@functools.cache  # compiled once for all measurements: on GPUs, choosing the kernel takes a while
def _product_chain() -> Callable[[int, jax.Array], jax.Array]:
    """(n, A) -> A^(n + 1), one product after another."""
    import jax

    return jax.jit(lambda count, matrix: jax.lax.fori_loop(0, count, lambda _, x: x @ matrix, matrix))


def _peak_bytes() -> int | None:
    """The most that was ever in use on one of this process's devices; None where devices do not say."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


def _peak(memory: Any, before: int | None, after: int | None) -> dict[str, Any]:
    """Peak memory of a program, in MiB, and who says so.

    Args:
      memory: what the compiler says of it, if it does.
      before, after: :func:`_peak_bytes`; devices remember the peak of all that has run, not of one program.
    """
    if after is not None and (before is None or after > before):
        return {"peak_mib": _digits(after / 2**20), "peak_from": "device"}
    if not memory:
        return {"peak_mib": None, "peak_from": None}
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"peak_mib": _digits((held + memory.temp_size_in_bytes) / 2**20), "peak_from": "compiler"}


def _report(
    what: str, case: Case, flops: int, program: Program, seconds: list[float], peak_before: int | None
) -> dict[str, Any]:
    """One measurement; ``flops`` are per image, ``seconds`` per batch."""
    from fdm_jax.accounting import parameter_count

    network, described = case.network, describe(case.name, case.network, case.spec)
    rates = [case.spec.batch_size / s for s in seconds]
    rate = statistics.median(rates)
    memory = program.compiled.memory_analysis()
    peak = _peak(memory, peak_before, _peak_bytes())
    matmul = described["devices"] * matmul_tflops(network.dtype)
    return {
        "what": what,
        **described,
        "network": f"{network.preset} {network.model_channels}x{tuple(network.channel_mult)}",
        "parameters": parameter_count(network, case.image_shape),
        "image": list(case.image_shape),
        "compile_seconds": round(program.compile_seconds, 2),
        "images_per_second": _digits(rate),
        "images_per_second_range": [_digits(min(rates)), _digits(max(rates))],
        "gflop_per_image": _digits(flops / 1e9),
        "tflops": _digits(rate * flops / 1e12),
        "matmul_tflops": _digits(matmul),
        "matmul_share": _digits(rate * flops / 1e12 / matmul),
        "temporary_mib": _digits(memory.temp_size_in_bytes / 2**20) if memory else None,
        **peak,
        "remat": list(network.remat),
    }


def describe(name: str, network: SongUNet, spec: TrainSpec) -> dict[str, Any]:
    """What was measured, and on what."""
    import jax
    import jax.numpy as jnp

    return {
        "name": name,
        "batch_size": spec.batch_size,
        "dtype": jnp.dtype(network.dtype).name,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _digits(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
