"""Arrays on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fdm_jax.devices import AXIS, make_mesh, one_copy_per_process, replicated, sent_ahead, sharded


def test_one_copy_of_what_all_hold():
    """The first device's own buffer; arrays that are dealt out are left as they are, also where some hold the same."""
    mesh, values = make_mesh(), np.arange(16.0, dtype=np.float32)
    whole, rows = jax.device_put(values, replicated(mesh)), jax.device_put(values, sharded(mesh))
    pairs = jax.device_put(values, NamedSharding(jax.make_mesh((4, 2), (AXIS, "copies")), PartitionSpec(AXIS)))
    lone = jnp.float32(3)
    thin = one_copy_per_process({"whole": whole, "rows": rows, "pairs": pairs, "lone": lone})
    assert thin["rows"] is rows and thin["pairs"] is pairs and thin["lone"] is lone
    assert thin["whole"].devices() == {mesh.devices[0]}
    assert thin["whole"].unsafe_buffer_pointer() == whole.addressable_shards[0].data.unsafe_buffer_pointer()
    np.testing.assert_array_equal(thin["whole"], values)


@pytest.mark.parametrize(
    "on_host, first_events", [((), ["sent 0", "sent 1", "given 0"]), (("cpu", "gpu", "tpu"), ["sent 0", "given 0"])]
)
def test_devices_work_while_the_host_does(monkeypatch, on_host, first_events):
    monkeypatch.setattr("fdm_jax.devices.ON_HOST", on_host)
    events = []
    sent = (events.append(f"sent {i}") or i for i in range(3))
    for i in sent_ahead(sent, make_mesh()):
        events.append(f"given {i}")
    assert events[: len(first_events)] == first_events
    assert [event for event in events if event.startswith("given")] == ["given 0", "given 1", "given 2"]
