"""A round with the states of its clients, gathered before and written after.

Where the states of a cohort do not fit on the device beside everything else,
the round runs in blocks of clients: while one block trains, the states of the
next are read.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from mpqfl_jax import client_state, engine, sharding
from mpqfl_jax.types import (
  Cohort,
  Examples,
  FederatedAlgorithm,
  Key,
  PyTree,
  RoundAux,
)


class Done(NamedTuple):
  """What is left of a round.

  Attributes:
    state: the server's.
    held: what the store holds.
    aux: what the round reports.
    before: watched client -> its state before the round, on the host.
  """

  state: PyTree
  held: PyTree
  aux: RoundAux
  before: dict[int, PyTree]


# (server state, held, examples, cohort on the host, watched ids, key) -> Done
RoundFn = Callable[[PyTree, PyTree, Examples, Cohort, np.ndarray, Key], Done]


def compiled(
  algorithm: FederatedAlgorithm,
  store: client_state.Store,
  block: int,
  mesh: jax.sharding.Mesh,
  state: PyTree,
  held: PyTree,
  examples: Examples,
  cohort: Cohort,
  watched: np.ndarray,
  key: Key,
) -> RoundFn:
  """Compiles a round for all cohorts of one size.

  Args:
    algorithm: whose round it is.
    store: of the clients' states.
    block: clients whose states are on the device at a time.
    mesh: the devices; what goes there and what comes back is whole on each, so
      that every process can read it.
    state: the server's. Its buffers, here and in each round, become the next
      state's: whoever needs what was before has to take it first.
    held: what the store holds; used up in each round likewise.
    examples: on the devices.
    cohort: on the host; all are as long as this one.
    watched: ids of the clients whose payloads are kept, -1 for nobody.
    key: the round's.
  """
  count = len(cohort.client_id)

  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def put(tree):
    return sharding.put(tree, mesh)

  def gather(held, ids):
    return put(store.gather(held, ids))

  if block >= count:
    compiled_round = (
      jax.jit(algorithm.round, donate_argnums=(0, 1), out_shardings=whole)
      .lower(
        state,
        gather(held, cohort.client_id),
        examples,
        *put((cohort, watched, key)),
      )
      .compile()
    )

    def at_once(state, held, examples, cohort, watched, key):
      states = gather(held, cohort.client_id)
      before = _rows(states, cohort.client_id, watched)
      state, states, aux = compiled_round(
        state, states, examples, *put((cohort, watched, key))
      )
      held = store.scatter(held, cohort.client_id, states)
      return Done(state, held, aux, before)

    return at_once

  def blocks(cohort):
    padded = jax.tree.map(np.asarray, engine.pad(cohort, block))
    return [
      jax.tree.map(lambda leaf: leaf[i : i + block], padded)
      for i in range(0, count, block)
    ]

  parts, first = algorithm.parts, blocks(cohort)[0]
  begin = (
    jax.jit(parts.begin, out_shardings=whole).lower(state, put(key)).compile()
  )
  sent, _, sums = begin(state, put(key))
  one = (
    jax.jit(parts.block, donate_argnums=(1, 2), out_shardings=whole)
    .lower(
      sent,
      sums,
      gather(held, first.client_id),
      examples,
      *put((first, watched, key)),
    )
    .compile()
  )
  end = (
    jax.jit(parts.end, donate_argnums=0, out_shardings=whole)
    .lower(state, sums, put(key))
    .compile()
  )

  def in_blocks(state, held, examples, cohort, watched, key):
    before: dict[int, PyTree] = {}
    todo, reports = blocks(cohort), []
    watched_there, key_there = put((watched, key))
    sent, size, sums = begin(state, key_there)
    kept = None
    states = gather(held, todo[0].client_id)
    for i, part in enumerate(todo):
      before |= _rows(states, part.client_id, watched)
      sums, new, report, payloads = one(
        sent, sums, states, examples, put(part), watched_there, key_there
      )
      if i + 1 < len(todo):  # meanwhile; no client is in two blocks
        states = gather(held, todo[i + 1].client_id)
      held = store.scatter(held, part.client_id, new)
      reports.append(jax.device_get(report))
      here = np.isin(watched, part.client_id) & (watched >= 0)
      kept = _merge(kept, jax.device_get(payloads), here)
    report = jax.tree.map(
      lambda *leaves: np.concatenate(leaves)[:count], *reports
    )
    aux = RoundAux(report, kept, sent, size)
    return Done(end(state, sums, key_there), held, aux, before)

  return in_blocks


def on_host(
  algorithm: FederatedAlgorithm,
  store: client_state.Store,
  mesh: jax.sharding.Mesh,
) -> RoundFn:
  """A round that leaves the program in between, for all clients at once.

  It compiles its parts by itself when it first runs.
  """

  def round(state, held, examples, cohort, watched, key):
    states = sharding.put(store.gather(held, cohort.client_id), mesh)
    before = _rows(states, cohort.client_id, watched)
    state, states, aux = algorithm.round(
      state, states, examples, *sharding.put((cohort, watched, key), mesh)
    )
    return Done(
      state, store.scatter(held, cohort.client_id, states), aux, before
    )

  return round


def _rows(
  states: PyTree, ids: np.ndarray, watched: np.ndarray
) -> dict[int, PyTree]:
  return {
    int(ids[place]): jax.tree.map(lambda leaf: np.asarray(leaf[place]), states)
    for place in np.flatnonzero((ids >= 0) & np.isin(ids, watched))
  }


def _merge(kept: PyTree, payloads: PyTree, here: np.ndarray) -> PyTree:
  """Takes the slots of the watched clients that were in this block."""
  if kept is None:
    return payloads

  def leaf(old, new):
    return np.where(here.reshape(-1, *[1] * (old.ndim - 1)), new, old)

  return jax.tree.map(leaf, kept, payloads)
