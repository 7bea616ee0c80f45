"""Running the program, here and as a process of its own."""

import contextlib
import dataclasses
import gc
import json
import os
import random
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from conftest import QUICK_COMPILES

from fdm_jax.cli.main import main
from fdm_jax.model import load_run


@pytest.fixture
def in_bfloat16(monkeypatch):
    """Runs, when loaded, have networks that compute in bfloat16."""

    def load(*arguments):
        model = load_run(*arguments)
        network = model.network.clone(dtype=jnp.bfloat16)
        return dataclasses.replace(model, experiment=dataclasses.replace(model.experiment, network=network))

    monkeypatch.setattr("fdm_jax.model.load_run", load)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return f"--config.data.data_dir={tmp_path_factory.mktemp('data')}"


def checkpoint(workdir, step):
    """All arrays of a checkpoint as {path: array}, and its JSON part."""
    manager = ocp.CheckpointManager(
        (workdir / "checkpoints").resolve(), item_names=("model", "train", "meta"),
        options=ocp.CheckpointManagerOptions(read_only=True),
    )  # fmt: skip
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        part: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            ocp.StandardCheckpointHandler().metadata(workdir.resolve() / "checkpoints" / str(step) / part).tree,
        )
        for part in ("model", "train")
    }
    parts = manager.restore(step, args=ocp.args.Composite(
        **{part: ocp.args.StandardRestore(tree) for part, tree in like.items()}, meta=ocp.args.JsonRestore()
    ))  # fmt: skip
    leaves = jax.tree_util.tree_leaves_with_path({"model": parts["model"], "train": parts["train"]})
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, parts["meta"]


def rows(workdir):
    """metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("img_per_s", "seconds")} for row in lines]


def assert_same_end(a, b, step):
    """Two runs ended with the same bits."""
    (arrays_a, meta_a), (arrays_b, meta_b) = checkpoint(a, step), checkpoint(b, step)
    assert arrays_a.keys() == arrays_b.keys() and len(arrays_a) > 50
    for name, value in arrays_a.items():
        np.testing.assert_array_equal(value, arrays_b[name], err_msg=name)
    assert meta_a["data"] == meta_b["data"]


@pytest.fixture(scope="session")
def straight_run(tmp_path_factory, data_dir):
    """20 steps without a stop, on the eight devices of this process; nothing goes to, between or from them unasked."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    with jax.transfer_guard("disallow"):
        assert main(tiny.arguments(workdir, data_dir)) == 0
    return workdir


def environment(devices=1, cache=None):
    """For a process of its own with so many CPU devices, and a compile cache: by default that of the tests."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILES}",
        "JAX_COMPILATION_CACHE_DIR": cache or jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "PYTHONUNBUFFERED": "1",
    }


def start(arguments, devices=1, program=("-m", "fdm_jax"), cache=None, **kwargs):
    """The program as a process."""
    return subprocess.Popen(
        [sys.executable, *program, *arguments], env=environment(devices, cache), cwd=tiny.ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs,
    )  # fmt: skip


@contextlib.contextmanager
def nothing_left_on_devices():
    """What the block made is freed when its last name is gone, and not when Python looks for cycles."""
    gc.collect()
    gc.disable()
    try:
        before = {id(array) for array in jax.live_arrays()}
        yield
        left = [array.shape for array in jax.live_arrays() if id(array) not in before and array.size > 100]
    finally:
        gc.enable()
    assert not left


def free_port():
    """Below those that connections get: there one may take it in the seconds before the first process listens."""
    for port in random.sample(range(20_000, 32_768), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("", port))
            return port
    raise AssertionError("there is no free port")


def start_all(arguments, processes, devices=1, cache=None, **kwargs):
    """The program as so many processes of so many devices each, which find each other.

    "HOST" in the arguments and the folder of the compile cache is a process's number.
    """
    if processes == 1:
        return [start(arguments, devices, cache=cache, **kwargs)]
    address = f"localhost:{free_port()}"
    each = [
        [*(a.replace("HOST", str(i)) for a in arguments), f"--distributed={address},{processes},{i}"]
        for i in range(processes)
    ]
    return [
        start(own, devices, cache=cache and str(cache).replace("HOST", str(i)), **kwargs) for i, own in enumerate(each)
    ]


def finish(processes, codes):
    """Wait for all; what each said."""
    deadline, said = time.monotonic() + 300, []
    for process in processes:
        try:
            said.append(process.communicate(timeout=max(deadline - time.monotonic(), 0))[0])
        except subprocess.TimeoutExpired:
            process.kill()
            said.append(process.communicate()[0])
    assert [process.returncode for process in processes] == codes, said
    return said


def assert_same_losses(workdir, reference, rtol=1e-6):
    ours, theirs = rows(workdir), rows(reference)[: len(rows(workdir))]
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    np.testing.assert_allclose([row["loss"] for row in ours], [row["loss"] for row in theirs], rtol=rtol)
