"""`fdm plan`: what it counts for a configuration, and how it says it."""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import pytest
import tiny

from fdm_jax import ahead
from fdm_jax.accounting import ACCELERATORS, Plan
from fdm_jax.cli import plan
from fdm_jax.cli.config import load
from fdm_jax.cli.main import main
from fdm_jax.errors import UserError
from fdm_jax.experiment import Experiment
from fdm_jax.training.step import init_state
from fdm_jax.xla_flags import has_cuda_plugin

CIFAR10 = Plan(
    title="EDM-FDM on cifar10", dtype="bfloat16", parameters=55_735_299, forward_flops=42_254_603_008,
    activation_bytes_fixed=100 * 2**20, activation_bytes_per_image=160 * 2**20, images=200_000_000, batch_size=512,
    accumulation=1, nfe=35, accelerator=ACCELERATORS["h200"], num_devices=8, utilisation=0.35,
)  # fmt: skip


def experiment(*overrides):
    return Experiment.from_config(load(argparse.Namespace(config=tiny.CONFIG, overrides=[*tiny.OVERRIDES, *overrides])))


def test_rendering():
    text = plan.render(CIFAR10)
    for fact in (
        "55,735,299", "42.25 GFLOP forward", "126.8 GFLOP in training", "390,625 steps of 512 images",
        "25.35 EFLOP",  # 2e8 x 126.8e9
        "2.54 hours",  # 25.35e18 / (8 x 0.35 x 989e12) = 9155 s
        "about 21,845 img/s, 23.4 ms per step",  # 2e8 / 9155 s
        "64 images at a time", "1.0 GiB: parameters", "10.1 GiB: 64 images", "of each device's 141 GiB",
        "73.95 PFLOP",  # 5e4 x 35 x 42.25e9
        "26.7 seconds", "8 x NVIDIA H200 reach 35% of the vendor's 989 TFLOP/s in bfloat16",
        "Estimates, not measurements",
    ):  # fmt: skip
        assert fact in text
    assert "WARNING" not in text and "Note" not in text and "$" not in text


def test_a_dealt_state():
    """fsdp: an eighth of 5 x 4 x 55,735,299 bytes on each of eight devices."""
    text = plan.render(dataclasses.replace(CIFAR10, dealt=True))
    assert "132.9 MiB: this device's part of parameters" in text
    made = plan.make_plan(experiment("--config.parallel=fsdp"), ACCELERATORS["h100"], 2, 0.3)
    assert made.dealt and made.state_bytes == (2 * 5 + 4) * made.parameters  # in float32 gathered ones are no casts
    assert "EMA; float32, and whole parameters" in plan.render(made) and "whole" not in text


def test_cost():
    priced = dataclasses.replace(CIFAR10, price=4.0)
    text = plan.render(priced)
    assert "about $81.38: 20.3 device hours at $4.00" in text  # 9155 s x 8 devices
    assert "about $0.24: 0.0593 device hours at $4.00" in text  # 26.7 s of sampling
    assert "The price is yours" in text
    cheap = plan.render(dataclasses.replace(CIFAR10, price=0.04))
    assert "device hours at $0.04" in cheap and "about $0.0024: 0.0593 device hours" in cheap
    assert "device hours at $0.10" in plan.render(dataclasses.replace(CIFAR10, price=0.0996))
    slow = plan.render(dataclasses.replace(priced, utilisation=0.005))  # 70 times as long
    assert ": 1,424 device hours at $4.00" in slow and "reach 0.5% of the vendor's" in slow
    assert priced.dollars(priced.training_flops) == pytest.approx(9155.3 / 3600 * 8 * 4, rel=1e-3)


def test_figures():
    counted = plan.figures(dataclasses.replace(CIFAR10, price=4.0))
    assert counted["estimated_images_per_second"] == pytest.approx(200e6 / counted["estimated_training_seconds"])
    assert counted["estimated_training_dollars"] == pytest.approx(81.38, abs=0.01)
    assert (counted["fits"], counted["steps"], counted["num_devices"]) == (True, 390_625, 8)
    assert plan.figures(CIFAR10)["estimated_training_dollars"] is None


def test_rendering_of_what_does_not_fit():
    text = plan.render(dataclasses.replace(CIFAR10, accelerator=ACCELERATORS["v100"], num_devices=1))
    warning = (
        "WARNING: by this estimate it does not fit the memory of NVIDIA V100 32GB; --config.train.accumulation=4 would"
    )
    assert f"{warning}." in text
    too_large = dataclasses.replace(CIFAR10, parameters=10**10)
    assert "not even one image at a time would" in plan.render(too_large)
    asking = plan.render(too_large, compile_for="8xh200")
    assert "a larger device (--compile-for=8xh200 asks the compiler, which may need less)." in asking
    assert "WARNING" not in plan.render(too_large, compiled=True)
    text = plan.render(
        dataclasses.replace(CIFAR10, accelerator=ACCELERATORS["a100"], num_devices=1, accumulation=1, batch_size=400)
    )
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in text and "WARNING" not in text


def test_short_steps_are_called_so():
    assert "bound by launching kernels" in plan.render(dataclasses.replace(CIFAR10, forward_flops=10**6))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5e5, "5.79 days"), (4e3, "1.11 hours"), (90, "1.5 minutes"), (1.5, "1.5 seconds"), (0.0123, "12.3 ms")],
)
def test_durations(seconds, words):
    assert plan._duration(seconds) == words


def test_counting():
    counted = plan.make_plan(experiment("--config.train.accumulation=2"), ACCELERATORS["a100"], 4, 0.5)
    assert (counted.images, counted.batch_size, counted.accumulation, counted.steps) == (320, 16, 2, 20)
    assert counted.images_at_once == 2
    assert counted.nfe == 35 and counted.dtype == "float32"
    # Known once the network is: one level of 4 channels on 8x8 pixels.
    assert 1e5 < counted.forward_flops < 1e6 and 1000 < counted.parameters < 10_000
    assert counted.activation_bytes_per_image > 0 and counted.activation_bytes_fixed >= 0
    assert "EDM-FDM on digits 8x8x1, ddpmpp with 4 x (1,) channels in float32" in plan.render(counted)


def test_devices_that_the_batch_does_not_divide_by():
    with pytest.raises(UserError, match="train.batch_size is 16, and must divide by 3"):
        plan.make_plan(experiment(), ACCELERATORS["a100"], 3, 0.5)


def test_command(capsys):
    arguments = ["plan", f"--config={tiny.CONFIG}", *tiny.OVERRIDES, "--num-devices=2"]
    assert main([*arguments, "--device=tpu-v4"]) == 0
    assert "2 x TPU v4 reach 35%" in capsys.readouterr().out
    assert main([*arguments, "--device=t4", "--config.train.batch_size=20000000"]) == 0
    assert "(--compile-for=2xt4 asks the compiler" in capsys.readouterr().out
    assert main([*arguments, "--price=2.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["assumed_price"] == 2.5
    for wrong, sentence in (
        ("--device=h20", "did you mean 'h200'?"),
        ("--device=v5e-16", "--device=v5e-16 is 16 devices: give --device=tpu-v5e --num-devices=16."),
        ("--device=8xh100", "--device=8xh100 is 8 devices: give --device=h100 --num-devices=8."),
        ("--num-devices=0", "--num-devices must be 1 or more, and is 0."),
        ("--price=-1", "--price must be US dollars above 0 per device and hour, and is -1.0."),
        ("--price=nan", "--price must be US dollars above 0 per device and hour, and is nan."),
        ("--utilisation=0", "--utilisation must be above 0 and at most 1, and is 0.0."),
    ):
        assert main([*arguments, wrong]) == 2
        assert sentence in capsys.readouterr().err


def test_slices():
    assert ahead.accelerator_of("v5litepod-16") == ("tpu-v5e", 16)
    assert ahead.accelerator_of("v5e-16") == ("tpu-v5e", 16)
    assert ahead.accelerator_of("v4-32") == ("tpu-v4", 16)  # counts cores
    assert ahead.accelerator_of("tpu7x-8") == ("tpu7x", 8)  # cores, each of them a device
    for name, topology in ahead.SLICES.items():
        accelerator, devices = ahead.accelerator_of(name)
        per_chip = 2 if accelerator == "tpu7x" else 1
        assert (
            accelerator in ACCELERATORS and math.prod(map(int, topology.split(":")[1].split("x"))) * per_chip == devices
        )
    assert ahead.accelerator_of("h100") == ("h100", 1) and ahead.accelerator_of("16xa100-40") == ("a100-40", 16)
    for name in ("v5x-16", "0xh100", "8xv5litepod-16", "8x", "v100"):
        with pytest.raises(UserError, match=f"There is no TPU slice or GPU '{name}' to compile for: "):
            ahead.accelerator_of(name)


def test_descriptions_of_gpus():
    """By NVIDIA's data sheet of the H100 SXM: 132 multiprocessors, 3.35 TB/s, 50 MB of L2."""
    text = ahead.gpu_description("h100")
    for line in ("core_count: 132", "memory_bandwidth: 3350000000000", "major: 9 minor: 0", "l2_cache_size: 52428800"):
        assert line in text
    assert all(name in ACCELERATORS and ahead.gpu_description(name) for name in ahead.GPUS)


def test_what_the_compiler_says():
    """Of the step on the eight devices of this process, as other tests compile it."""
    made = experiment()
    compiled = ahead.compile_step(made, jax.devices())
    state = jax.eval_shape(lambda: init_state(made.network, made.spec, made.image_shape))
    batch = 16 // 8 * (64 + 4 + 4)  # a byte to the pixel; label and index
    assert compiled.argument_bytes == pytest.approx(sum(a.size * 4 for a in jax.tree.leaves(state)) + batch, rel=0.02)
    assert compiled.all_reduces == 1 and compiled.temporary_bytes > 0 and compiled.seconds > 0
    with pytest.raises(UserError, match="parallel=pmap compiles for the devices of this process only"):
        ahead.compile_step(experiment("--config.parallel=pmap"), jax.devices())
    cudnn = experiment("--config.network.attention=cudnn", "--config.network.dtype=bfloat16")
    with pytest.raises(UserError, match="network.attention is 'cudnn', which cannot be compiled without the GPU"):
        ahead.compile_step(cudnn, jax.devices())


def test_compiling_for_a_slice(capsys, monkeypatch):
    arguments = ["plan", f"--config={tiny.CONFIG}", *tiny.OVERRIDES, "--compile-for=v5litepod-8"]
    found = ahead.CompiledStep(argument_bytes=3 * 2**30, temporary_bytes=2**29, all_reduces=2, seconds=150.0)
    monkeypatch.setattr(ahead, "absent_devices", lambda name: [name])
    monkeypatch.setattr(ahead, "compile_step", lambda experiment, devices: found)
    made = plan.make_plan(experiment(), ACCELERATORS["tpu-v5e"], 8, 0.35)  # once: to count operations takes seconds
    monkeypatch.setattr(
        plan, "make_plan", lambda _, *how: made if how == (ACCELERATORS["tpu-v5e"], 8, 0.35, None) else None
    )
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "Compiling for 8 x TPU v5e" in printed.err and "8 x TPU v5e reach 35%" in printed.out
    assert "Compiled for v5litepod-8 in 2.5 minutes: a step takes 3.5 GiB of each device's 16 GiB" in printed.out
    assert "(3.0 GiB of state and batch, 512.0 MiB beside them), with 2 all-reduces." in printed.out
    assert main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["compiled_fits"] and figures["compiled_temporary_bytes"] == 2**29 and figures["num_devices"] == 8

    monkeypatch.setattr(ahead, "compile_step", lambda *_: dataclasses.replace(found, all_reduces=None))
    assert main(arguments) == 0
    assert "512.0 MiB beside them)." in capsys.readouterr().out
    monkeypatch.setattr(ahead, "compile_step", lambda *_: dataclasses.replace(found, temporary_bytes=14 * 2**30))
    assert main(arguments) == 0
    assert "minutes: it does NOT fit: a step takes 17.0 GiB of each device's 16 GiB" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compiled_fits"] is False

    def too_large(experiment, devices):
        raise ahead.DoesNotFit("Ran out of memory.")

    monkeypatch.setattr(ahead, "compile_step", too_large)
    assert main(arguments) == 0
    assert "it does NOT fit. The compiler says: Ran out of memory." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--compile-for=v5litepod-2"], "There is no TPU slice or GPU 'v5litepod-2' to compile for: did you mean"),
        (["--compile-for=v4-32", "--device=tpu-v4"], "leave --device and --num-devices away"),
        (["--compile-for=v4-32"], "takes libtpu, the TPU's compiler, which is not installed"),
        (["--compile-for=8xh100"], "takes JAX's plugin for NVIDIA GPUs, which is not installed"),
    ],
)
def test_slices_that_cannot_be_compiled_for(capsys, monkeypatch, more, sentence):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ahead, "has_cuda_plugin", lambda: False)
    assert main(["plan", f"--config={tiny.CONFIG}", *tiny.OVERRIDES, *more]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("parallel", ["jit", "fsdp"])
def test_real_slice(parallel):
    """v4-32: sixteen chips on four hosts, by the TPU's own compiler."""
    figures = compiled_for("v4-32", parallel)
    assert figures["compiled_fits"] and figures["num_devices"] == 16
    assert figures["compiled_all_reduces"] == 1 or parallel == "fsdp"
    assert 2**16 < figures["compiled_argument_bytes"] < 2**26


@pytest.mark.slow
@pytest.mark.skipif(not has_cuda_plugin(), reason="JAX's plugin for CUDA is not installed")
@pytest.mark.parametrize("parallel", ["jit", "fsdp"])
@pytest.mark.parametrize("gpus", ["8xh100", "t4"])
def test_absent_gpus(tmp_path, parallel, gpus):
    """By XLA for NVIDIA's GPUs; it may cut the sum of the gradients into several."""
    figures = compiled_for(gpus, parallel, f"--xla_dump_to={tmp_path} --xla_dump_hlo_module_re=step")
    assert figures["compiled_fits"] and figures["num_devices"] == (8 if gpus == "8xh100" else 1)
    if figures["compiled_all_reduces"] is not None:  # in jax 0.7 the compiler does not say
        assert (figures["compiled_all_reduces"] > 0) == (gpus == "8xh100")
    # Parameters, their average and Adam's two moments; in fsdp too, since so small arrays are not dealt out.
    assert figures["compiled_argument_bytes"] == pytest.approx(4 * 4 * figures["parameters"], rel=0.1)
    assert figures["compiled_temporary_bytes"] > 0
    # What the GPU is to run, before and after XLA's passes over it: no CUDA graphs, which the step is compiled without
    # (fdm_jax.xla_flags.without_graphs).  In jax 0.7 there would be none in any case, as there is no GPU.
    programs = [path.read_text() for path in tmp_path.glob("*step*.thunk_sequence*.txt")]
    assert programs and not any("kCommandBuffer" in program for program in programs)


def compiled_for(devices: str, parallel: str, flags: str = "") -> dict:
    """What `fdm plan --compile-for` says; in a process of its own, as JAX must not have been used before."""
    more = ["--config.train.batch_size=16", f"--config.parallel={parallel}", f"--compile-for={devices}", "--json"]
    command = [sys.executable, "-m", "fdm_jax", "plan", f"--config={tiny.CONFIG}", *tiny.OVERRIDES, *more]
    environment = os.environ | {"XLA_FLAGS": flags}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
