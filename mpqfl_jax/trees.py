"""Pytrees of parameters: path names, norms, sums."""

import jax
import jax.numpy as jnp

from mpqfl_jax.types import Array, PyTree


def path_name(path: tuple) -> str:
  """Joins a key path into a name such as `conv1/kernel`."""
  return "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)


def leaf_names(tree: PyTree) -> list[str]:
  """Names of all leaves, in the order of `jax.tree.leaves`."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [path_name(path) for path, _ in flat]


def get(tree: PyTree, path: tuple[str, ...]) -> PyTree:
  """What lies in nested dicts at a path of keys."""
  for name in path:
    tree = tree[name]
  return tree


def replace(tree: PyTree, path: tuple[str, ...], value: PyTree) -> PyTree:
  """Nested dicts like `tree`, with another value at a path of keys."""
  if not path:
    return value
  return {**tree, path[0]: replace(tree[path[0]], path[1:], value)}


def size(tree: PyTree) -> int:
  """Number of entries in all leaves."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def add(a: PyTree, b: PyTree) -> PyTree:
  """Leafwise a + b."""
  return jax.tree.map(jnp.add, a, b)


def subtract(a: PyTree, b: PyTree) -> PyTree:
  """Leafwise a - b."""
  return jax.tree.map(jnp.subtract, a, b)


def scale(factor: Array | float, tree: PyTree) -> PyTree:
  """Leafwise factor * tree."""
  return jax.tree.map(lambda leaf: factor * leaf, tree)


def vdot(a: PyTree, b: PyTree) -> Array:
  """Inner product over all leaves, [] float32."""
  products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
  return sum(jax.tree.leaves(products), start=jnp.float32(0))


def squared_norm(tree: PyTree) -> Array:
  """Squared L2 norm over all leaves, [] float32."""
  return vdot(tree, tree)


def norm(tree: PyTree) -> Array:
  """L2 norm over all leaves, [] float32."""
  return jnp.sqrt(squared_norm(tree))


def l1_norm(tree: PyTree) -> Array:
  """L1 norm over all leaves, [] float32."""
  sums = jax.tree.map(lambda leaf: jnp.sum(jnp.abs(leaf)), tree)
  return sum(jax.tree.leaves(sums), start=jnp.float32(0))
