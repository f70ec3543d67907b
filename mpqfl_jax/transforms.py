"""What a client does to its update before the codec: clip, add noise.

Each is an `UpdateTransform`; `chain` composes them in order.
"""

import math

import jax
from jax import flatten_util
import jax.numpy as jnp

from mpqfl_jax import errors, numerics, trees
from mpqfl_jax.types import Array, Update, UpdateTransform


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


def clip(max_norm: float, order: int = 2) -> UpdateTransform:
  """Scales the update down to a norm of at most `max_norm`.

  An update that is not finite becomes zero, so that the norm holds for
  whatever local training comes to.

  Source: Abadi et al. 2016, algorithm 1, "clip gradient", on the whole update.

  Args:
    max_norm: largest norm over all leaves.
    order: 1 or 2, the L1 or the L2 norm.

  Raises:
    UserError: `max_norm` is not a positive number.
  """
  require_finite("clip", max_norm)

  def fn(key, update):
    del key
    return clip_to(update, max_norm, order)[0]

  return _stateless(fn)


def clip_to(
  update: Update, max_norm: Array | float, order: int = 2
) -> tuple[Update, Array]:
  """`clip` with a norm that may be traced.

  Args:
    update: any pytree.
    max_norm: [] float32.
    order: 1 or 2.

  Returns:
    The clipped update; [] bool, whether it was finite and within the norm.
  """
  norm = {1: trees.l1_norm, 2: trees.norm}[order](update)
  factor = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
  clipped = jax.tree.map(
    lambda leaf: jnp.where(jnp.isfinite(norm), factor * leaf, 0.0), update
  )
  return clipped, norm <= max_norm


def gaussian_noise(stddev: float) -> UpdateTransform:
  """Adds independent N(0, stddev^2) to every entry.

  Args:
    stddev: standard deviation of the noise, in the update's units.

  Raises:
    UserError: `stddev` is not a positive number.
  """
  return _noise(stddev, jax.random.normal)


def laplace_noise(stddev: float) -> UpdateTransform:
  """Adds independent Laplace noise to every entry.

  Args:
    stddev: standard deviation of the noise, sqrt(2) of its scale.

  Raises:
    UserError: `stddev` is not a positive number.
  """
  return _noise(
    stddev, lambda key, shape: jax.random.laplace(key, shape) / math.sqrt(2)
  )


def _noise(stddev: float, draw) -> UpdateTransform:
  require_finite("stddev", stddev)

  def fn(key, update):
    # One draw for all leaves compiles, and runs, several times faster than one
    # a leaf.
    flat, unflatten = flatten_util.ravel_pytree(update)
    return unflatten(flat + stddev * draw(key, flat.shape))

  return _stateless(fn)


def require_finite(what: str, given: float) -> None:
  """Raises UserError unless `given` is a finite number above zero."""
  numerics.require_positive(what, given)
  if given == float("inf"):
    raise errors.UserError(f"{what}=inf: expected a finite number.")
