"""Where the states of a population's clients are kept between their rounds.

SCAFFOLD's variates, error feedback's residuals and the ranges of static
quantisers belong to a client and outlive the round. A round needs those of its
cohort only: they are gathered before it and written back after it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax.types import Array, PyTree

Ids = Array | np.ndarray


class Store(NamedTuple):
  """The states of a population.

  Attributes:
    init: () -> what a checkpoint has to hold of it, a pytree of arrays.
    gather: (held, ids[cohort]) -> states[cohort, ...].
    scatter: (held, ids[cohort], states[cohort, ...]) -> held. Ids are distinct.
  """

  init: Callable[[], PyTree]
  gather: Callable[[PyTree, Ids], PyTree]
  scatter: Callable[[PyTree, Ids, PyTree], PyTree]


def on_device(client_state: PyTree, num_clients: int) -> Store:
  """Keeps the states as arrays on the device, leading axis [num_clients].

  Args:
    client_state: of a client that has not taken part yet.
    num_clients: size of the population.
  """

  def init():
    return jax.tree.map(
      lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], num_clients, 0),
      client_state,
    )

  @jax.jit
  def gather(held: PyTree, ids: Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[ids], held)

  @jax.jit
  def scatter(held: PyTree, ids: Array, states: PyTree) -> PyTree:
    return jax.tree.map(lambda old, new: old.at[ids].set(new), held, states)

  return Store(init, gather, scatter)
