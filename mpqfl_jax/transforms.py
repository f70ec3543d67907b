"""What a client does to its update before the codec: clip, add noise.

Each is an `UpdateTransform`; `chain` composes them in order.
"""

import jax
from jax import flatten_util
import jax.numpy as jnp

from mpqfl_jax import errors, trees
from mpqfl_jax.types import UpdateTransform


def identity() -> UpdateTransform:
  """Leaves the update as it is."""
  return chain()


def chain(*stages: UpdateTransform) -> UpdateTransform:
  """Applies stages in order, each with its own key and state."""

  def init(params):
    return tuple(stage.init(params) for stage in stages)

  def apply(key, update, state):
    states = []
    for i, stage in enumerate(stages):
      update, new = stage.apply(jax.random.fold_in(key, i), update, state[i])
      states.append(new)
    return update, tuple(states)

  return UpdateTransform(init, apply)


def _stateless(fn) -> UpdateTransform:
  return UpdateTransform(
    lambda params: (), lambda key, update, state: (fn(key, update), state)
  )


def clip(max_norm: float) -> UpdateTransform:
  """Scales the update down to an L2 norm of at most `max_norm`.

  Source: Abadi et al. 2016, algorithm 1, "clip gradient", on the whole update.

  Args:
    max_norm: largest L2 norm over all leaves.

  Raises:
    UserError: `max_norm` is not positive.
  """
  _positive("clip", max_norm)

  def fn(key, update):
    del key
    factor = jnp.minimum(1.0, max_norm / jnp.maximum(trees.norm(update), 1e-12))
    return trees.scale(factor, update)

  return _stateless(fn)


def gaussian_noise(stddev: float) -> UpdateTransform:
  """Adds independent N(0, stddev^2) to every entry.

  Args:
    stddev: standard deviation of the noise, in the update's units.

  Raises:
    UserError: `stddev` is not positive.
  """
  _positive("stddev", stddev)

  def fn(key, update):
    # One draw for all leaves compiles, and runs, several times faster than one
    # a leaf.
    flat, unflatten = flatten_util.ravel_pytree(update)
    return unflatten(flat + stddev * jax.random.normal(key, flat.shape))

  return _stateless(fn)


def _positive(name: str, value: float) -> None:
  if not value > 0:
    raise errors.UserError(f"{name} is {value}. Expected a number above 0.")
