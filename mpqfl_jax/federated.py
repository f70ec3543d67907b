"""Federated algorithms: a round as one pure function.

client: local training -> transforms -> codec   (local, transforms, precision)
server: decode -> weighted mean -> optax optimiser       (engine, aggregate)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from mpqfl_jax import (
  aggregate,
  encrypted,
  engine,
  errors,
  local,
  schedules,
  trees,
)
from mpqfl_jax import central as central_lib
from mpqfl_jax.types import (
  Array,
  Codec,
  FederatedAlgorithm,
  Key,
  Model,
  Params,
  PyTree,
  RoundAux,
  RoundParts,
  UpdateTransform,
)


class ServerState(NamedTuple):
  """All that the server carries from round to round.

  Attributes:
    params: the global model.
    variate: SCAFFOLD's control variate, like the parameters; `()` elsewhere.
    opt_state: the server optimiser's state.
    round: [] int32, how many rounds there have been.
    clip: [] float32, the norm that the server clips to under central
      differential privacy; `()` elsewhere.
  """

  params: Params
  variate: PyTree
  opt_state: PyTree
  round: Array
  clip: PyTree = ()


class Broadcast(NamedTuple):
  """What the clients of a round know of the server.

  Attributes:
    params: the global model, as it came out of the downlink's codec.
    variate: SCAFFOLD's control variate, likewise; `()` elsewhere.
    learning_rate: [] float32, the clients' step size, which both sides know
      from the schedule.
    clip: see `ServerState`; no client uses it.
  """

  params: Params
  variate: PyTree
  learning_rate: Array
  clip: PyTree = ()


class ClientState(NamedTuple):
  """What a client carries from one of its rounds to the next.

  Attributes:
    transform: of its transforms.
    codec: of its codec.
    variate: SCAFFOLD's control variate; `()` elsewhere.
  """

  transform: PyTree
  codec: PyTree
  variate: PyTree


class Client(NamedTuple):
  """One client's side of an algorithm.

  Attributes:
    init: params -> ClientState of a client that has not taken part yet.
    turn: its part of a round, and the server's decoding of it.
    scaffold: whether it sends (update, change of its control variate) and takes
      the server's control variate, each through a `codecs.pair`.
    central: what a trusted server does to the decoded updates; None where it
      takes their weighted mean.
  """

  init: Callable[[Params], ClientState]
  turn: engine.ClientFn
  scaffold: bool
  central: central_lib.Central | None = None


class Deadline(NamedTuple):
  """When the server stops waiting for the clients of a round.

  A client's time is the batches that it went through, times its slowness. The
  slowness is its own for good, log-normal, and 1 for the median client.

  Attributes:
    batches: what the median client manages in time.
    sigma: standard deviation of the logarithm of the slowness.
    key: of the population's slowness.
  """

  batches: float
  sigma: float
  key: Key

  def is_met(self, client_id: Array, batches: Array) -> Array:
    """Whether a client that went through `batches` is in time, [] bool."""
    z = jax.random.normal(jax.random.fold_in(self.key, client_id))
    return batches * jnp.exp(self.sigma * z) <= self.batches


class Rates(NamedTuple):
  """The step sizes of clients and server, by round from 0."""

  client: schedules.Schedule
  server: schedules.Schedule


class ClientKeys(NamedTuple):
  """One client's keys in a round, each for one use."""

  batches: Key
  noise: Key
  rounding: Key
  dropout: Key


# The server's places among the round's keys; clients have theirs from 0.
_DOWNLINK = 2**32 - 1
_SERVER_NOISE = 2**32 - 2


def client_keys(round_key: Key, client_id) -> ClientKeys:
  """Keys of a client's batches, transforms, codec and way to the server."""
  key = jax.random.fold_in(round_key, client_id)
  return ClientKeys(*(jax.random.fold_in(key, i) for i in range(4)))


def client(
  training: local.LocalTraining,
  transform: UpdateTransform,
  codec: Codec,
  dropout: float = 0.0,
  scaffold: bool = False,
  deadline: Deadline | None = None,
  central: central_lib.Central | None = None,
) -> Client:
  """What a client does in a round.

  SCAFFOLD (Karimireddy et al. 2020, algorithm 1) adds the difference of the
  server's control variate and the client's to every gradient and sends the
  change of its variate beside the update. The new variate is option II of what
  is sent: the update after the transforms, noise included, over the steps and
  their size. So the second message tells nothing that the first has not told,
  and a proof of privacy for the first covers both. The client moves its variate
  by what the server decodes, so that the server's variate stays the mean of the
  clients', whatever the codec loses.

  Args:
    training: what the client computes.
    transform: what it does to its update before the codec.
    codec: how what it sends crosses the wire: the update, or with `scaffold` a
      `codecs.pair` of update and change of the variate.
    dropout: probability that what it sends does not arrive.
    scaffold: whether there are control variates.
    deadline: after which nothing arrives; None where the server waits for all.
    central: what a trusted server does to the decoded updates, not with
      `scaffold`.
  """

  def init(params):
    variate = jax.tree.map(jnp.zeros_like, params) if scaffold else ()
    return ClientState(transform.init(params), codec.init(params), variate)

  def turn(broadcast, examples, who, state, round_key):
    keys = client_keys(round_key, who.client_id)
    drift = None
    if scaffold:
      drift = trees.subtract(broadcast.variate, state.variate)
    result = training(
      broadcast.params,
      examples,
      who.offset,
      who.size,
      keys.batches,
      broadcast.learning_rate,
      drift,
    )
    update, kept = transform.apply(keys.noise, result.update, state.transform)
    if scaffold:
      way = jnp.maximum(result.steps, 1) * broadcast.learning_rate
      change = jax.tree.map(lambda u, c: u / way - c, update, broadcast.variate)
      update = (update, change)
    payload, residual = codec.encode(keys.rounding, update, state.codec)
    decoded = codec.decode(payload)
    variate = trees.add(state.variate, decoded[1]) if scaffold else ()
    finite = aggregate.is_finite(update)
    arrived = who.size > 0
    if dropout:
      arrived &= ~jax.random.bernoulli(keys.dropout, dropout)
    if deadline is not None:
      arrived &= deadline.is_met(who.client_id, result.steps)
    weight = who.size
    if central is not None:
      decoded = central.contribution(decoded, broadcast.clip)
      weight = jnp.float32(1)
    return engine.ClientOutput(
      update=decoded,
      payload=payload,
      # Who drops out or is rejected has sent nothing, and its state is as it
      # was.
      state=jax.tree.map(
        lambda new, old: jnp.where(arrived & finite, new, old),
        ClientState(kept, residual, variate),
        state,
      ),
      finite=finite,
      arrived=arrived,
      loss=result.loss,
      uplink_bytes=jnp.where(arrived, codec.num_bytes(payload), 0),
      weight=weight,
    )

  return Client(init, turn, scaffold, central)


def broadcast(
  downlink: Codec, params: Params, variate: PyTree, key: Key
) -> tuple[Params, PyTree, Array]:
  """What the clients make of the server's message.

  Args:
    downlink: a codec that keeps no state; of a pair where there is a variate.
    params: the global model.
    variate: SCAFFOLD's control variate, or `()`.
    key: the round's.

  Returns:
    The decoded model, the decoded variate, the message's length in bytes.
  """
  sent = (params, variate) if jax.tree.leaves(variate) else params
  message, _ = downlink.encode(
    jax.random.fold_in(key, _DOWNLINK), sent, downlink.init(params)
  )
  got = downlink.decode(message)
  size = downlink.num_bytes(message)
  return (*got, size) if jax.tree.leaves(variate) else (got, (), size)


def federated(
  model: Model,
  client: Client,
  downlink: Codec,
  server_optimizer: Callable[[Array], optax.GradientTransformation],
  rates: Rates,
  aggregator: aggregate.Aggregator,
  num_examples: int,
  plan: engine.Plan,
  mesh: Mesh,
  protocol: encrypted.Protocol | None = None,
) -> FederatedAlgorithm:
  """Rounds of local training, an aggregate and a server step.

  With `local.sgd` and a server that subtracts the mean this is FedAvg
  (McMahan et al. 2017, algorithm 1); with `local.gradient`, FedSGD; with a
  proximal term, FedProx (Li et al. 2020); with an adaptive server optimiser,
  FedOpt (Reddi et al. 2021, algorithm 2); with control variates, SCAFFOLD
  (Karimireddy et al. 2020, algorithm 1), where the mean over the population is
  weighted by examples as everywhere here: clients of equal size have the
  paper's |S| / N.

  Args:
    model: the classifier; only its `init` is used here.
    client: one client's side.
    downlink: how the global model reaches the clients; it keeps no state. With
      control variates a `codecs.pair`.
    server_optimizer: step size -> an optimiser that takes the aggregate as a
      gradient; `optax.sgd` at 1.0 replaces the model by the weighted mean of
      the clients' models.
    rates: the step sizes.
    aggregator: how the decoded updates are combined.
    num_examples: of all clients of the population together.
    plan: how a cohort is executed.
    mesh: the devices.
    protocol: adds the updates as ciphertexts, on the host; None where they
      stay in the program.

  Returns:
    A FederatedAlgorithm whose state is a ServerState; `round` is jitted, under
    a protocol its two parts are.
  """
  run = engine.run_cohort(
    client.turn, plan, mesh, aggregator, keep_updates=protocol is not None
  )

  def init(key):
    params = model.init(key)
    return ServerState(
      params,
      jax.tree.map(jnp.zeros_like, params) if client.scaffold else (),
      server_optimizer(jnp.float32(0)).init(params),
      jnp.int32(0),
      () if client.central is None else jnp.float32(client.central.clip),
    )

  def begin(state, key):
    params, variate, size = broadcast(
      downlink, state.params, state.variate, key
    )
    rate = jnp.float32(rates.client(state.round))
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    total = zeros
    if client.scaffold:
      total = (zeros, zeros)
    if client.central is not None:
      total = (zeros, jnp.float32(0))
    sent = Broadcast(params, variate, rate, state.clip)
    return sent, size, (total, jnp.float32(0))

  def block(sent, sums, client_states, examples, cohort, watched, key):
    result = run(sent, examples, cohort, client_states, watched, key)
    sums = trees.add(sums, (result.total, result.weight))
    return sums, result.states, result.report, result.payloads

  def end(state, sums, key):
    variate, clip = state.variate, state.clip
    if client.central is None:
      update = aggregate.mean(*sums)
    else:
      update, clip = client.central.release(
        sums[0], clip, jax.random.fold_in(key, _SERVER_NOISE)
      )
    if client.scaffold:
      update, change = update
      share = sums[1] / num_examples
      variate = trees.add(variate, trees.scale(share, change))
    rule = server_optimizer(jnp.float32(rates.server(state.round)))
    step, opt_state = rule.update(update, state.opt_state, state.params)
    return ServerState(
      optax.apply_updates(state.params, step),
      variate,
      opt_state,
      state.round + 1,
      clip,
    )

  parts = RoundParts(begin, block, end)

  @jax.jit
  def round(state, client_states, examples, cohort, watched, key):
    sent, size, sums = begin(state, key)
    sums, client_states, report, payloads = block(
      sent, sums, client_states, examples, cohort, watched, key
    )
    aux = RoundAux(report, payloads, sent, size)
    return end(state, sums, key), client_states, aux

  if protocol is not None:
    return FederatedAlgorithm(
      init, _encrypted_round(parts, run, protocol), parts
    )
  return FederatedAlgorithm(init, round, parts)


def _encrypted_round(
  parts: RoundParts, run: Callable, protocol: encrypted.Protocol
) -> Callable:
  """A round whose updates leave the program and come back as their mean."""

  @jax.jit
  def clients(state, client_states, examples, cohort, watched, key):
    sent, size, _ = parts.begin(state, key)
    result = run(sent, examples, cohort, client_states, watched, key)
    return result, sent, size

  end = jax.jit(parts.end)

  def round(state, client_states, examples, cohort, watched, key):
    result, sent, size = clients(
      state, client_states, examples, cohort, watched, key
    )
    report = jax.device_get(result.report)
    outcome = protocol.combine(
      jax.device_get(result.updates),
      report.accepted,
      report.arrived,
      jax.device_get(cohort),
      np.asarray(watched),
      int(size),
      key,
    )
    report = report._replace(
      accepted=outcome.accepted, uplink_bytes=outcome.uplink_bytes
    )
    opened = np.float32(outcome.accepted.any())
    size = size + protocol.seal_bytes
    aux = RoundAux(report, (), sent, size, encrypted=outcome)
    return end(state, (outcome.update, opened), key), result.states, aux

  return round


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
  name: str,
) -> Callable[[Array], optax.GradientTransformation]:
  """Step size -> the server optimiser of that name.

  Raises:
    UserError: no such optimiser.
  """
  if name not in SERVER_OPTIMIZERS:
    raise errors.unknown_name("server optimizer", name, SERVER_OPTIMIZERS)
  return SERVER_OPTIMIZERS[name]
