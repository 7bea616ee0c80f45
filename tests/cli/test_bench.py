"""`fdm bench`: what it prints, and that its arithmetic is right.  No assertion on this machine's speed."""

import argparse
import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import tiny

from fdm_jax.cli import bench
from fdm_jax.cli.main import main
from fdm_jax.errors import UserError


@pytest.fixture
def matmul(monkeypatch):
    """Eight devices of 0.5 TFLOP/s each."""
    monkeypatch.setattr(bench, "matmul_tflops", lambda dtype: 0.5)


def test_both_measurements(capsys, matmul):
    """One run of the command on the eight devices of the tests, whose train step other tests compile as well."""
    assert main(["bench", f"--config={tiny.CONFIG}", *tiny.OVERRIDES, "--steps=2", "--sampling-steps=2"]) == 0
    train, sample = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (train["what"], sample["what"]) == ("train", "sample")
    for line in (train, sample):
        assert line["batch_size"] == 16 and line["devices"] == 8 and line["device"] == "cpu"
        assert line["jax"] == jax.__version__ and line["dtype"] == "float32"
        low, high = line["images_per_second_range"]
        assert 0 < low <= line["images_per_second"] <= high
        assert line["tflops"] == pytest.approx(line["images_per_second"] * line["gflop_per_image"] / 1000, rel=1e-2)
        assert line["matmul_tflops"] == 4 and line["matmul_share"] == pytest.approx(line["tflops"] / 4, rel=1e-2)
        assert line["compile_seconds"] > 0
        assert line["peak_from"] == "compiler" and line["peak_mib"] > line["temporary_mib"] > 0
    assert sample["nfe"] == 3 and sample["sampler_overhead"] > -0.9
    assert sample["gflop_per_image"] == pytest.approx(train["gflop_per_image"], rel=1e-3)  # 3 passes each


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("--what=training", "--what cannot be 'training': did you mean 'train'?"),
        ("--config=", "There is no configuration file ''"),
        ("--steps=0", "--steps must be 1 or more, and is 0."),
        ("--remat=8,fine", "--remat must be resolutions such as 32,16, and is '8,fine'."),
        ("--remat=16", "remat names the resolution 16, and the network's are [8, 4]."),
        ("--batch-size=9223372036854775808", "The batch size is 9223372036854775808, more than can be counted"),
        ("--batch-size=12", "The batch size is 12, and must divide by 8 device(s)"),
    ],
)
def test_mistakes(capsys, wrong, sentence):
    assert main(["bench", wrong]) == 2
    assert sentence in capsys.readouterr().err


def cases(**changes):
    args = dict(config=None, batch_size=None, dtype=None, remat=None, cifar10=False, overrides=[]) | changes
    return list(bench.cases(argparse.Namespace(**args)))


def test_built_in_cases():
    (digits,) = cases()
    assert (digits.name, digits.spec.batch_size, digits.image_shape) == ("digits", 128 * 8, (8, 8, 1))
    _, cifar10 = cases(cifar10=True, dtype="bfloat16", batch_size=16)
    assert cifar10.spec.batch_size == 16 and jnp.dtype(cifar10.network.dtype) == jnp.bfloat16
    assert cifar10.network.channel_mult == (2, 2, 2) and cifar10.image_shape == (32, 32, 3)


def test_rematerialised_cases():
    (digits,) = cases(remat="8,4")
    assert digits.network.remat == (8, 4)
    (digits,) = cases(remat="")
    assert digits.network.remat == ()


def test_what_the_arguments_set_is_part_of_the_configuration():
    """cuDNN's attention, for one, needs the bfloat16 that --dtype asks for."""
    settings = {"dtype": "bfloat16", "remat": "8", "batch_size": 24}
    overrides = ["--config.network.attention=cudnn", "--config.parallel=fsdp", "--config.network.dtype=float32"]
    (case,) = cases(config=tiny.CONFIG, overrides=overrides, **settings)
    assert (case.network.attention, case.network.dtype, case.network.remat) == ("cudnn", jnp.bfloat16, (8,))
    assert (case.spec.batch_size, case.parallel) == (24, "fsdp")
    with pytest.raises(UserError, match=r"needs network.dtype = 'bfloat16', and that is 'float32'"):
        cases(config=tiny.CONFIG, overrides=overrides)
    (case,) = cases(config=tiny.CONFIG, overrides=["--config.remat=(8,)"], remat="")
    assert case.network.remat == ()


class Memory:
    argument_size_in_bytes, output_size_in_bytes, alias_size_in_bytes, temp_size_in_bytes = (
        5 << 20,
        4 << 20,
        3 << 20,
        2 << 20,
    )


@pytest.mark.parametrize(
    ("memory", "before", "after", "peak"),
    [
        (Memory, None, None, (8, "compiler")),
        (Memory, 10 << 20, 20 << 20, (20, "device")),
        (Memory, 20 << 20, 20 << 20, (8, "compiler")),  # what ran before had needed more
        (None, None, None, (None, None)),
    ],
)
def test_peak_memory(memory, before, after, peak):
    assert bench._peak(memory, before, after) == dict(zip(("peak_mib", "peak_from"), peak, strict=True))


def test_accumulation_of_a_configuration_counts():
    with pytest.raises(UserError, match=r"8 device\(s\) times 4 round"):
        cases(config=tiny.CONFIG, overrides=["--config.train.accumulation=4"], batch_size=16)


def test_timing_covers_work_that_runs_behind_python():
    calls = []

    def call():
        calls.append(None)
        return jax.pure_callback(lambda x: time.sleep(0.01) or x, jnp.zeros(()), jnp.zeros(()))

    seconds = bench.time_calls(jax.jit(call), 2, 3)
    assert len(seconds) == 2 and all(0.01 <= s < 1 for s in seconds)

    calls.clear()
    bench.time_calls(call, 2, 3)
    assert len(calls) == 1 + 2 * 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matrix_products(dtype):
    assert 1e-5 < bench.matmul_tflops(dtype, size=64, seconds=1e-3) < 100


def test_rate_of_matrix_products(monkeypatch):
    """Of products that take 3 ms each, one time in two."""
    monkeypatch.setattr(bench, "_product_chain", lambda: lambda count, matrix: count)
    monkeypatch.setattr(bench, "time_calls", lambda call, repeats, calls: [0.004 * call(), 0.003 * call()])
    assert bench.matmul_tflops(jnp.float32, size=64) == pytest.approx(2 * 64**3 / 0.003 / 1e12)


def test_what_a_sampler_adds(monkeypatch, matmul):
    """Six seconds for five passes of one second each."""
    compiled = SimpleNamespace(memory_analysis=lambda: None)
    programs = [bench.Program(compiled, 1.0, seconds) for seconds in (6.0, 1.0)]
    monkeypatch.setattr(bench, "sampling_programs", lambda case, steps: programs)
    monkeypatch.setattr(bench, "time_calls", lambda call, repeats, calls: [call] * repeats)
    (case,) = cases(batch_size=24)
    line = bench.bench_sampling(case, argparse.Namespace(sampling_steps=3, steps=2))
    assert (line["nfe"], line["sampler_overhead"], line["images_per_second"]) == (5, 0.2, 4)
