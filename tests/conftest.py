"""Shared by all tests: the devices, the compile cache, golden files.

They run on the CPU as eight devices; `make test-device` runs those marked "device" on a GPU or TPU instead.
"""

import gc
import importlib.metadata
import os
import pathlib
import signal

ON_CPU = os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu"
# Most of the tests' time goes into compiling, and these halve it: no optimisation by LLVM, and XLA's older way of
# compiling fused operations, while there is one: XLA ends the program at flags that it does not know, as 0.12 does at this.
QUICK_COMPILES = "--xla_backend_optimization_level=0"
if tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2]) < (0, 11):
    QUICK_COMPILES += " --xla_cpu_use_fusion_emitters=false"
# Two workers' BLAS threads would wait for each other in busy loops.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if ON_CPU:
    # Before JAX starts, and with eight devices for the sharding tests. Flags from outside come last and win.
    outside = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK_COMPILES} {outside}"
elif any(plugin.name.startswith("xla_cuda") for plugin in importlib.metadata.entry_points(group="jax_plugins")):
    # Sums in a fixed order, for tests of equal bits.
    os.environ["XLA_FLAGS"] = f"--xla_gpu_exclude_nondeterministic_ops=true {os.environ.get('XLA_FLAGS', '')}"

import jax
import jax.experimental
import numpy as np
import pytest

from fdm_jax.experiment import Experiment
from fdm_jax.xla_flags import avoid_slow_convolutions

# Python looks for cycles among the objects that JAX's traces leave: at its usual pace 6 % of the tests' time.
gc.set_threshold(50_000, 10, 10)

avoid_slow_convolutions()  # as the program does, so that tests share compiled programs with those that they start

GOLDEN = pathlib.Path(__file__).parent / "golden"

jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
if not ON_CPU:
    # Golden numbers are float32's; by default accelerators multiply with fewer digits (bfloat16, TF32).
    jax.config.update("jax_default_matmul_precision", "highest")


class Clock:
    """Stands in for the module ``time`` where a test says what time it is."""

    now = 0.0

    def monotonic(self):
        return self.now


def pytest_configure():
    if not ON_CPU and jax.default_backend() == "cpu":
        raise pytest.UsageError("JAX finds no GPU or TPU here: give EXTRA=cuda12, cuda13 or tpu.")


def pytest_collection_modifyitems(items):
    """Golden numbers hold on every device."""
    for item in items:
        if item.name.startswith("test_golden"):
            item.add_marker("device")


def pytest_report_header():
    return f"devices: {jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"


def needs_devices(count):
    """A mark that skips a test where there are fewer devices."""
    return pytest.mark.skipif(jax.device_count() < count, reason=f"needs {count} devices")


@pytest.fixture(scope="session")
def golden():
    """golden(name) -> the arrays of tests/golden/name.npz, from the PyTorch original."""
    return lambda name: np.load(GOLDEN / f"{name}.npz")


# The public name since jax 0.8; before, an experimental one.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def nhwc(array):
    """[..., C, H, W] -> [..., H, W, C]."""
    return np.moveaxis(np.asarray(array), -3, -1)


@pytest.fixture(scope="session", autouse=True)
def one_step_for_all_runs_alike():
    """Runs of one configuration, begun by this process, share a train step: to trace and to load it is most of a tiny run."""
    steps, parallelised = {}, Experiment.parallelised

    def shared(self, mesh):
        made_from = (self.config.parallel, self.network, self.family, self.spec, mesh)
        if made_from not in steps:
            steps[made_from] = parallelised(self, mesh)
        return steps[made_from]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "parallelised", shared)
        yield


@pytest.fixture(scope="session")
def store():
    """A server that stands in for Google Cloud Storage, with the bucket "bucket"; this process and its children use it."""
    import object_store  # needs the extra gcs, which `make test-device` may do without

    with object_store.serve("bucket") as running, pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment(running).items():
            patch.setenv(name, value)
        yield running


@pytest.fixture
def handled_by():
    """handled_by(signum, how): until the end of the test, and in the programs that it starts.

    For tests of Ctrl-C and hang-ups: in the background of a script, or under nohup, all would be ignoring them.
    """
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)}
    yield signal.signal
    for signum, how in before.items():
        signal.signal(signum, how)


@pytest.fixture
def nameless(monkeypatch):
    """Nobody has a name here, as in a container that runs as a number which it does not know."""

    def unknown(number):
        raise KeyError(f"no name for {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("grp.getgrgid", unknown)
