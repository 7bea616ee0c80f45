"""Arrays on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fdm_jax.devices import AXIS, make_mesh, one_copy_per_process, replicated, sharded


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
