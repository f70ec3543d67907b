"""A say in what XLA makes one loop of."""

from collections.abc import Callable
import functools

import jax
from jax.experimental import xla_metadata


def alone(fn: Callable) -> Callable:
  """Keeps XLA from fusing `fn` with what comes before and after it.

  XLA would compute the former again for each use, or all of it in the latter's
  shape, whose loops it may not vectorise. A barrier does not help: XLA:CPU
  drops it before it fuses. `fn` calls nothing that is compiled itself, such as
  `jnp.where`, which would stand alone, too.
  """
  compiled = jax.jit(fn)

  @functools.wraps(fn)
  def call(*args):
    with xla_metadata.set_xla_metadata(inlineable="false"):
      return compiled(*args)

  return call
