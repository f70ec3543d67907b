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


def client_keys(round_key: Key, client_id) -> tuple[Key, Key, Key]:
  """Keys of a client's batches, of its transforms and of its codec."""
  key = jax.random.fold_in(round_key, client_id)
  return tuple(jax.random.fold_in(key, i) for i in range(3))  # type: ignore


def client_turn(
  training: local.LocalTraining, transform: UpdateTransform, codec: Codec
) -> engine.ClientFn:
  """One client's part of a round, and the server's decoding of it."""

  def turn(params, examples, client, state, round_key):
    batches, noise, rounding = client_keys(round_key, client.client_id)
    result = training(params, examples, client.offset, client.size, batches)
    update, kept = transform.apply(noise, result.update, state[0])
    payload, residual = codec.encode(rounding, update, state[1])
    return engine.ClientOutput(
      update=codec.decode(payload),
      payload=payload,
      state=(kept, residual),
      finite=aggregate.is_finite(update),
      loss=result.loss,
      uplink_bytes=codec.num_bytes(payload),
    )

  return turn


def federated(
  model: Model,
  training: local.LocalTraining,
  transform: UpdateTransform,
  codec: Codec,
  server_optimizer: optax.GradientTransformation,
  num_clients: int,
  plan: engine.Plan,
  mesh: Mesh,
) -> FederatedAlgorithm:
  """Rounds of local training, a weighted mean and a server step.

  With `local.sgd` and a server that subtracts the mean this is FedAvg
  (McMahan et al. 2017, algorithm 1); with `local.gradient`, FedSGD; with an
  adaptive server optimiser, FedOpt (Reddi et al. 2021, algorithm 2).

  Args:
    model: the classifier; only its `init` is used here.
    training: what a client computes.
    transform: what it does to its update before the codec.
    codec: how the update crosses the wire.
    server_optimizer: takes the mean update as a gradient; `optax.sgd(1.0)`
      replaces the model by the weighted mean of the clients' models.
    num_clients: size of the population.
    plan: how a cohort is executed.
    mesh: the devices.

  Returns:
    A FederatedAlgorithm whose state is a ServerState; `round` is jitted.
  """
  run = engine.run_cohort(client_turn(training, transform, codec), plan, mesh)

  def init(key):
    params = model.init(key)
    one = (transform.init(params), codec.init(params))
    states = jax.tree.map(
      lambda leaf: jnp.repeat(leaf[None], num_clients, 0), one
    )
    return ServerState(params, server_optimizer.init(params), states)

  @jax.jit
  def round(state, examples, cohort, watched, key):
    states = jax.tree.map(lambda s: s[cohort.client_id], state.client_states)
    result = run(state.params, examples, cohort, states, watched, key)
    change, opt_state = server_optimizer.update(
      result.mean, state.opt_state, state.params
    )
    client_states = jax.tree.map(
      lambda old, new: old.at[cohort.client_id].set(new),
      state.client_states,
      result.states,
    )
    params = optax.apply_updates(state.params, change)
    return ServerState(params, opt_state, client_states), result.aux

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
