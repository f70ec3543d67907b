"""How the server combines what it decoded."""

import jax
import jax.numpy as jnp

from mpqfl_jax import trees
from mpqfl_jax.types import Array, Update


def is_finite(update: Update) -> Array:
  """Whether every entry is a finite number, [] bool.

  A server that averaged one NaN in would lose the model: such an update is
  rejected and counted.
  """
  checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(update)]
  return jnp.all(jnp.stack(checks))


def accumulate(total: Update, update: Update, weight: Array) -> Update:
  """total + weight * update, and total itself where the weight is 0.

  The product is guarded because 0 * inf is NaN.
  """
  return jax.tree.map(
    lambda t, u: t + jnp.where(weight > 0, weight * u, 0.0), total, update
  )


def mean(total: Update, weight: Array) -> Update:
  """total / weight; zero where nobody's update arrived."""
  return trees.scale(jnp.where(weight > 0, 1.0 / weight, 0.0), total)
