"""The work of `benchmarks.federated` in this package."""

from collections.abc import Callable
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax

from benchmarks import federated_task
from mpqfl_jax import (
  aggregate,
  client_state,
  engine,
  federated,
  local,
  models,
  precision,
  transforms,
)
from mpqfl_jax.types import Cohort, Examples, Key, Model, PyTree


class Trainer(NamedTuple):
  """A round of the benchmark's work, ready to run.

  Attributes:
    fn: jitted (server state, client states, examples, cohort, watched, key) ->
      (server state, client states, outputs); the first two are donated.
    first: () -> its arguments in the first round, the one to be checked.
    store: where the clients' states are kept between rounds.
    held: what it keeps.
  """

  fn: Any
  first: Callable[[], tuple]
  store: Any
  held: PyTree


def network(model: str, task: federated_task.Arrays, conv: str) -> Model:
  """The task's classifier, with convolutions of a form."""
  shape, classes = task["x"].shape[2:], federated_task.CLASSES
  return models.make(model, shape, classes, np.zeros(1), np.ones(1), conv)


def trainer(
  model: str, task: federated_task.Arrays, plan: engine.Plan, mesh: Mesh
) -> Trainer:
  """Sets up what `experiments.main` runs, from the task's weights.

  Args:
    model: one of `federated_task.ARCHITECTURES`.
    task: from `federated_task.make`.
    plan: how many clients run side by side, and in which form they convolve.
    mesh: the devices.
  """
  clients, size = task["y"].shape
  shape = task["x"].shape[2:]
  net = network(model, task, plan.conv)
  params: dict[str, dict[str, np.ndarray]] = {}
  for name, value in task.items():
    if "/" in name:
      layer, leaf = name.split("/")
      params.setdefault(layer, {})[leaf] = value
  schedule = local.Schedule(federated_task.BATCH, size)
  codec, transform = precision.make("none", params), transforms.identity()
  client = federated.client(
    local.sgd(net, optax.sgd, schedule), transform, codec
  )
  algorithm = federated.federated(
    net,
    client,
    codec,
    federated.server_optimizer("sgd"),
    federated.Rates(lambda _: federated_task.LEARNING_RATE, lambda _: 1.0),
    aggregate.make("mean"),
    clients * size,
    plan,
    mesh,
  )
  ids = np.arange(clients, dtype=np.int32)
  sizes = np.full(clients, size, np.int32)
  key = jax.random.key(0)
  whole = NamedSharding(mesh, PartitionSpec())
  examples, cohort, watched, placed = jax.device_put(
    (
      Examples._make(
        (
          task["x"].reshape(-1, *shape),
          task["y"].ravel(),
          _order(schedule, key, ids, size),
        )
      ),
      Cohort._make((ids, size * ids, sizes)),
      np.full(1, -1, np.int32),
      key,
    ),
    whole,
  )
  state = algorithm.init(key)._replace(params=params)
  store = client_state.make("device", client.init(params), clients, mesh)
  held = store.open(store.init())

  def arguments() -> tuple:
    states = store.gather(held, cohort.client_id)
    # A copy: the round's program writes over it.
    fresh = jax.tree.map(jax.numpy.array, jax.device_put(state, whole))
    return fresh, states, examples, cohort, watched, placed

  return Trainer(
    # As there, the state's buffers become the next state's.
    jax.jit(algorithm.round, donate_argnums=(0, 1)),
    arguments,
    store,
    held,
  )


def _order(
  schedule: local.Schedule, first: Key, ids: np.ndarray, size: int
) -> np.ndarray:
  """The clients' lists of examples, permuted the other way round.

  The program shuffles: so it meets them in the task's order in the checked
  round.
  """
  total = len(ids) * size

  @jax.jit
  @jax.vmap
  def visited(client, offset):
    key = federated.client_keys(first, client).batches
    steps = size // federated_task.BATCH
    rows = jax.numpy.arange(total)
    return schedule.rows(key, offset, jax.numpy.int32(size), rows, steps)[0]

  order = np.empty(total, np.int32)
  order[np.asarray(visited(ids, size * ids)).ravel()] = np.arange(total)
  return order


def train(
  trainer: Trainer,
  fn: Callable,
  rounds: int,
  started: Callable[[int], None] = lambda number: None,
) -> tuple[list[float], federated_task.Arrays]:
  """Runs rounds from the task's weights on.

  Args:
    trainer: what to run.
    fn: `trainer.fn`, or what it was compiled to.
    rounds: how many.
    started: called with the number of each round before its clock starts.

  Returns:
    Seconds of each round, and the weights after the first, by name.
  """
  state, states, examples, cohort, watched, key = trainer.first()
  held, first = trainer.held, key
  seconds, weights = [], {}
  for number in range(rounds):
    started(number)
    began = time.perf_counter()
    if number:
      key = jax.random.fold_in(first, number)
      key = jax.device_put(key, first.sharding)
      states = trainer.store.gather(held, cohort.client_id)
    state, states, aux = fn(state, states, examples, cohort, watched, key)
    jax.device_get(aux.clients)
    held = trainer.store.scatter(held, cohort.client_id, states)
    jax.block_until_ready(state)
    seconds.append(time.perf_counter() - began)
    if number == 0:
      weights = {
        f"{layer}/{leaf}": np.array(value)
        for layer, leaves in state.params.items()
        for leaf, value in leaves.items()
      }
  return seconds, weights
