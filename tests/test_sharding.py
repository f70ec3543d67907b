"""Arrays over a mesh, and sums over it."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from mpqfl_jax import engine, sharding


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_ordered_sum_adds_in_the_order_of_devices(devices):
  rng = np.random.default_rng(0)
  tree = {
    # Of very different sizes, so that another order gives other bits.
    "a": np.float32(
      rng.normal(size=(devices, 3, 5))
      * 10.0 ** rng.integers(-3, 4, (devices, 1, 1))
    ),
    "b": np.float32(rng.normal(size=devices)),
  }
  split = PartitionSpec(engine.AXIS)
  total = jax.jit(
    jax.shard_map(
      lambda tree: sharding.ordered_sum(
        jax.tree.map(lambda leaf: leaf[0], tree), engine.AXIS, devices
      ),
      mesh=engine.mesh(devices),
      in_specs=split,
      out_specs=PartitionSpec(),
      check_vma=False,
    )
  )(tree)
  for name, leaf in tree.items():
    want = leaf[0]
    for part in leaf[1:]:
      want = want + part
    np.testing.assert_array_equal(total[name], want)


def test_put_keeps_values_keys_and_splits():
  mesh = engine.mesh(8)
  tree = (np.arange(16, dtype=np.int64), jax.random.key(3))
  numbers, key = sharding.put(tree, mesh)
  assert numbers.is_fully_replicated and numbers.dtype == jnp.int32
  np.testing.assert_array_equal(numbers, tree[0])
  assert jnp.all(jax.random.key_data(key) == jax.random.key_data(tree[1]))
  split = sharding.put(tree[0], mesh, PartitionSpec(engine.AXIS))
  assert [s.data.shape for s in split.addressable_shards] == [(2,)] * 8
