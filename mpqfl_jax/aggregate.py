"""How the server combines what it decoded."""

import jax
import jax.numpy as jnp

from mpqfl_jax import trees
from mpqfl_jax.types import Array, Update


def is_finite(update: Update) -> Array:
  """Whether every entry is a finite number, [] bool.

  A client whose training diverged takes no part in the mean and is counted as
  rejected.
  """
  checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(update)]
  return jnp.all(jnp.stack(checks))


def accumulate(total: Update, update: Update, weight: Array) -> Update:
  """total + weight * update."""
  return jax.tree.map(lambda t, u: t + weight * u, total, update)


def mean(total: Update, weight: Array) -> Update:
  """total / weight; zero where nobody's update arrived."""
  return trees.scale(jnp.where(weight > 0, 1.0 / weight, 0.0), total)
