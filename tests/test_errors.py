"""What is found out of errors of other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdm_jax.cli.main import devices_failed
from fdm_jax.errors import lost_another, memory_full


@pytest.mark.parametrize(
    ("allocate", "said"),
    [
        (lambda: jnp.zeros(2**46).block_until_ready(), "Out of memory"),
        (lambda: np.zeros(2**50), "Unable to allocate 8.00 PiB"),
        (lambda: bytearray(2**60), "the machine gives no more"),
    ],
)
def test_full_memory(allocate, said):
    with pytest.raises(Exception) as full:
        try:
            allocate()
        except Exception as error:
            raise RuntimeError("a thread failed") from error
    assert said in memory_full(full.value) and not memory_full(full.value).endswith(".")


def test_memory_is_not_to_blame_for_other_errors():
    assert memory_full(None) is None and memory_full(ValueError("RESOURCE_EXHAUSTED: quota")) is None
    assert memory_full(jax.errors.JaxRuntimeError("INVALID_ARGUMENT: a shape")) is None


def behind(cause):
    """An error that another one led to."""
    error = RuntimeError("A checkpoint was not written.")
    error.__cause__ = cause
    return error


def not_started(cause, said):
    """As JAX raises it at the first use of a device."""
    error = RuntimeError(f"Unable to initialize backend 'tpu': {said}")
    error.__context__ = jax.errors.JaxRuntimeError(cause)
    return error


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"), True),
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), True),
        (ValueError("UNKNOWN: Gloo all-reduce failed: Read error [127.0.0.1]:25279"), True),
        (behind(jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("operands could not be broadcast together"), False),
        (behind(KeyError("train")), False),
        (not_started("UNAVAILABLE: a host does not answer", "the same"), True),
        (not_started("INTERNAL: no libtpu", "libtpu.so: cannot open shared object file"), False),
    ],
)
def test_another_process_is_lost(error, lost):
    assert lost_another(error) is lost


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process 7."), 1),
        (
            behind(RuntimeError("Unable to initialize backend 'x': Backend 'x' is not in the list of known backends")),
            2,
        ),
    ],
)
def test_devices_that_do_not_start(error, code):
    sentence, ends_with = devices_failed(error)
    assert sentence.startswith("JAX does not start: Unable to initialize backend '") and ends_with == code


def test_devices_are_not_to_blame_for_other_errors():
    assert devices_failed(None) is None and devices_failed(RuntimeError("a thread failed")) is None
    with pytest.raises(AssertionError) as wrong:
        assert not jax.devices()
    assert devices_failed(wrong.value) is None
