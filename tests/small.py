"""A linear classifier and a small population, quick to compile."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import (
  aggregate,
  client_state,
  codecs,
  engine,
  federated,
  local,
  precision,
  transforms,
)
from mpqfl_jax.types import Cohort, Examples, Model

SHAPE, CLASSES = (3, 2, 1), 4
SIZES = np.array([5, 1, 7, 4, 2, 8, 3, 6, 1, 10, 4])
OFFSETS = np.cumsum(SIZES) - SIZES


def model() -> Model:
  def init(key):
    kernel = 0.1 * jax.random.normal(key, (6, CLASSES))
    return {"dense1": {"kernel": kernel, "bias": jnp.zeros(CLASSES)}}

  def apply(params, x):
    layer = params["dense1"]
    return x.reshape(len(x), -1) @ layer["kernel"] + layer["bias"]

  return Model("linear", init, apply, SHAPE, CLASSES, np.zeros(1), np.ones(1))


def examples() -> Examples:
  rng = np.random.default_rng(0)
  n = int(SIZES.sum())
  return Examples(
    jnp.asarray(rng.integers(0, 256, (n, *SHAPE)), jnp.uint8),
    jnp.asarray(rng.integers(0, CLASSES, n), jnp.int32),
    jnp.asarray(rng.permutation(n), jnp.int32),
  )


def cohort(ids) -> Cohort:
  ids = np.asarray(ids)
  return Cohort(
    jnp.asarray(ids, jnp.int32),
    jnp.asarray(OFFSETS[ids], jnp.int32),
    jnp.asarray(SIZES[ids], jnp.int32),
  )


class Rounds(NamedTuple):
  """An algorithm together with the states of all its clients.

  Attributes:
    client: one client's side.
    init: key -> (server state, states of all clients).
    round: ((server state, states), examples, cohort, watched, key) -> the same,
      and what the round reports.
  """

  client: federated.Client
  init: Callable
  round: Callable


def algorithm(
  training: local.LocalTraining,
  plan: str = "loop",
  devices: int = 1,
  codec: str = "none",
  transform=None,
  server=("sgd", 1.0),
  client_lr=0.3,
  aggregator: str = "mean",
  dropout: float = 0.0,
  downlink: str = "none",
  scaffold: bool = False,
  deadline: federated.Deadline | None = None,
  central=None,
  net: Model | None = None,
  sizes: np.ndarray = SIZES,
  protocol=None,
) -> Rounds:
  net = net or model()
  params = net.init(jax.random.key(0))
  up, down = precision.make(codec, params), precision.make(downlink, params)
  if scaffold:
    up, down = codecs.pair(up), codecs.pair(down)
  client = federated.client(
    training,
    transform or transforms.identity(),
    up,
    dropout,
    scaffold,
    deadline,
    central,
  )
  name, server_lr = server
  built = federated.federated(
    net,
    client,
    down,
    federated.server_optimizer(name),
    federated.Rates(lambda r: client_lr, lambda r: server_lr),
    aggregate.make(aggregator),
    int(sizes.sum()),
    engine.plan(plan, "cpu"),
    engine.mesh(devices),
    protocol,
  )
  store = client_state.make("device", client.init(params), len(sizes))

  def init(key):
    return built.init(key), store.init()

  def round(state, examples, cohort, watched, key):
    server, held = state
    states = store.gather(held, cohort.client_id)
    server, states, aux = built.round(
      server, states, examples, cohort, watched, key
    )
    return (server, store.scatter(held, cohort.client_id, states)), aux

  return Rounds(client, init, round)
