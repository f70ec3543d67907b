"""Federated algorithms: a round as one pure function.

client: local training -> transforms -> codec   (local, transforms, precision)
server: decode -> weighted mean -> optax optimiser       (engine, aggregate)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from mpqfl_jax import aggregate, engine, errors, local
from mpqfl_jax.types import (
  Codec,
  FederatedAlgorithm,
  Key,
  Model,
  Params,
  PyTree,
  RoundAux,
  UpdateTransform,
)


class ServerState(NamedTuple):
  """All that a run carries from round to round.

  Attributes:
    params: the global model.
    opt_state: the server optimiser's state.
    client_states: states of transforms and codec of every client of the
      population, leading axis [num_clients]; without leaves where none has any.
  """

  params: Params
  opt_state: PyTree
  client_states: PyTree


class ClientKeys(NamedTuple):
  """One client's keys in a round, each for one use."""

  batches: Key
  noise: Key
  rounding: Key
  dropout: Key


# The downlink's place among the round's keys; clients have theirs from 0.
_DOWNLINK = 2**32 - 1


def client_keys(round_key: Key, client_id) -> ClientKeys:
  """Keys of a client's batches, transforms, codec and way to the server."""
  key = jax.random.fold_in(round_key, client_id)
  return ClientKeys(*(jax.random.fold_in(key, i) for i in range(4)))


def client_turn(
  training: local.LocalTraining,
  transform: UpdateTransform,
  codec: Codec,
  dropout: float = 0.0,
) -> engine.ClientFn:
  """One client's part of a round, and the server's decoding of it.

  Args:
    training: what the client computes.
    transform: what it does to its update before the codec.
    codec: how the update crosses the wire.
    dropout: probability that the update does not arrive.
  """

  def turn(params, examples, client, state, round_key):
    keys = client_keys(round_key, client.client_id)
    result = training(
      params, examples, client.offset, client.size, keys.batches
    )
    update, kept = transform.apply(keys.noise, result.update, state[0])
    payload, residual = codec.encode(keys.rounding, update, state[1])
    arrived = client.size > 0
    if dropout:
      arrived &= ~jax.random.bernoulli(keys.dropout, dropout)
    return engine.ClientOutput(
      update=codec.decode(payload),
      payload=payload,
      # Who drops out has sent nothing, and its state is as it was.
      state=jax.tree.map(
        lambda new, old: jnp.where(arrived, new, old), (kept, residual), state
      ),
      finite=aggregate.is_finite(update),
      arrived=arrived,
      loss=result.loss,
      uplink_bytes=jnp.where(arrived, codec.num_bytes(payload), 0),
    )

  return turn


def federated(
  model: Model,
  client: engine.ClientFn,
  client_init: Callable[[Params], PyTree],
  downlink: Codec,
  server_optimizer: optax.GradientTransformation,
  aggregator: aggregate.Aggregator,
  num_clients: int,
  plan: engine.Plan,
  mesh: Mesh,
) -> FederatedAlgorithm:
  """Rounds of local training, an aggregate and a server step.

  With `local.sgd` and a server that subtracts the mean this is FedAvg
  (McMahan et al. 2017, algorithm 1); with `local.gradient`, FedSGD; with a
  proximal term, FedProx (Li et al. 2020); with an adaptive server optimiser,
  FedOpt (Reddi et al. 2021, algorithm 2).

  Args:
    model: the classifier; only its `init` is used here.
    client: one client's turn, from `client_turn`.
    client_init: params -> a client's first state, of transform and codec.
    downlink: how the global model reaches the clients; it keeps no state.
    server_optimizer: takes the aggregate as a gradient; `optax.sgd(1.0)`
      replaces the model by the weighted mean of the clients' models.
    aggregator: how the decoded updates are combined.
    num_clients: size of the population.
    plan: how a cohort is executed.
    mesh: the devices.

  Returns:
    A FederatedAlgorithm whose state is a ServerState; `round` is jitted.
  """
  run = engine.run_cohort(client, plan, mesh, aggregator)

  def init(key):
    params = model.init(key)
    states = jax.tree.map(
      lambda leaf: jnp.repeat(leaf[None], num_clients, 0), client_init(params)
    )
    return ServerState(params, server_optimizer.init(params), states)

  @jax.jit
  def round(state, examples, cohort, watched, key):
    message, _ = downlink.encode(
      jax.random.fold_in(key, _DOWNLINK),
      state.params,
      downlink.init(state.params),
    )
    broadcast = downlink.decode(message)
    states = jax.tree.map(lambda s: s[cohort.client_id], state.client_states)
    result = run(broadcast, examples, cohort, states, watched, key)
    change, opt_state = server_optimizer.update(
      result.update, state.opt_state, state.params
    )
    client_states = jax.tree.map(
      lambda old, new: old.at[cohort.client_id].set(new),
      state.client_states,
      result.states,
    )
    params = optax.apply_updates(state.params, change)
    aux = RoundAux(
      result.report, result.payloads, broadcast, downlink.num_bytes(message)
    )
    return ServerState(params, opt_state, client_states), aux

  return FederatedAlgorithm(init, round)


SERVER_OPTIMIZERS: dict[str, Callable] = {
  "sgd": lambda rate: optax.sgd(rate),
  "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
  # Reddi et al. 2021, section 5.1: beta1 0.9, beta2 0.99, tau 1e-3.
  "adam": lambda rate: optax.adam(rate, b1=0.9, b2=0.99, eps=1e-3),
  "yogi": lambda rate: optax.yogi(rate, b1=0.9, b2=0.99, eps=1e-3),
  "adagrad": lambda rate: optax.adagrad(
    rate, initial_accumulator_value=0.0, eps=1e-3
  ),
}


def server_optimizer(
  name: str, learning_rate: float
) -> optax.GradientTransformation:
  """Builds a server optimiser by name.

  Raises:
    UserError: no such optimiser.
  """
  if name not in SERVER_OPTIMIZERS:
    raise errors.unknown_name("server optimizer", name, SERVER_OPTIMIZERS)
  return SERVER_OPTIMIZERS[name](learning_rate)
