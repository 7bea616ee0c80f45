"""What is found out of errors of other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    ],
)
def test_another_process_is_lost(error, lost):
    assert lost_another(error) is lost
