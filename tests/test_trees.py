"""Path names and norms of pytrees."""

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import trees

TREE = {
  "conv1": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.ones(4)},
  "dense1": [jnp.float32(3.0)],
}


def test_names_follow_the_order_of_leaves():
  assert trees.leaf_names(TREE) == ["conv1/bias", "conv1/kernel", "dense1/0"]


def test_norms_equal_numpy():
  flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(TREE)])
  assert trees.size(TREE) == flat.size == 11
  np.testing.assert_allclose(trees.squared_norm(TREE), np.sum(flat**2))
  np.testing.assert_allclose(trees.norm(TREE), np.linalg.norm(flat))
  twice = trees.scale(2.0, TREE)
  np.testing.assert_allclose(trees.vdot(TREE, twice), 2 * np.sum(flat**2))
  back = trees.subtract(trees.add(TREE, twice), twice)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(TREE), strict=True):
    np.testing.assert_array_equal(a, b)
