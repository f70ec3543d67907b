"""Builds what a config asks for: data, clients, model, training, defences."""

import functools
import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.config import Config, images
from mpqfl_jax import (
  accounting,
  aggregate,
  attacks,
  client_state,
  codecs,
  datasets,
  defenses,
  encrypted,
  engine,
  errors,
  federated,
  local,
  models,
  own_images,
  partition,
  precision,
  schedules,
  specs,
)
from mpqfl_jax.attacks import imprint
from mpqfl_jax.types import Codec, Cohort, Examples, Model, Params

# Each use of randomness has its own stream, so that adding one moves no other.
PARTITION, SAMPLING, NOISE_IMAGES = range(3)
WEIGHTS, ROUNDS, ATTACKS, DOWNLINK, SPEEDS = range(5)


class Setting(NamedTuple):
  """What all defences of a run share.

  Attributes:
    data: the data set.
    model: the classifier, its convolutions in the plan's form.
    plan: how a cohort is executed.
    mesh: the devices.
    training: what a client computes.
    schedule: how it goes through its examples.
    clients: who holds which examples.
    template: shapes of the parameters.
    protocol: what guarantees depend on beside their mechanisms.
    defenses: in the order of the flag.
    places: defense -> where the states of its clients are kept.
    aggregator: how the server combines updates.
    rates: step sizes of clients and server by round.
    downlink: how the global model reaches the clients.
    float32_bytes: what an update costs without a codec, header included.
  """

  data: datasets.Dataset
  model: Model
  plan: engine.Plan
  mesh: jax.sharding.Mesh
  training: local.LocalTraining
  schedule: local.Schedule
  clients: partition.Partition
  template: Params
  protocol: accounting.Protocol
  defenses: list[defenses.Defense]
  places: dict[str, client_state.Place]
  aggregator: aggregate.Aggregator
  rates: federated.Rates
  downlink: Codec
  float32_bytes: int


def rng(config: Config, stream: int, *index: int) -> np.random.Generator:
  """The host's generator of one stream, at a place such as a round."""
  return np.random.default_rng([config.seed, stream, *index])


def key(config: Config, stream: int) -> jax.Array:
  """The device's key of one stream."""
  return jax.random.fold_in(jax.random.key(config.seed), stream)


def model(config: Config, data: datasets.Dataset, conv: str) -> Model:
  """The config's model for a data set, in one form of convolution.

  A malicious server's module is in it where an attack asks for that.
  """
  net = models.make(
    config.model,
    image_shape(data),
    len(data.class_names),
    data.mean,
    data.std,
    conv,
  )
  for spec in config.attack:
    name, options = specs.parse(spec)
    if name in attacks.MALICIOUS:
      bins = options.get("bins", imprint.BINS)
      net = imprint.implant(net, bins, _not_attacked(config, data))
  return net


def _not_attacked(config: Config, data: datasets.Dataset) -> np.ndarray:
  """Training images that the task `attack` does not invert."""
  split, rows = images(config.attack_images)
  if split == "test":
    return data.x_train
  return np.delete(data.x_train, np.s_[rows.start : rows.stop], axis=0)


def load_data(config: Config) -> datasets.Dataset:
  """The config's data set, by name or from a path of the user's own."""
  if own_images.is_path(config.dataset):
    return own_images.load(config.dataset)
  return datasets.load(config.dataset, config.data_dir)


def image_shape(data: datasets.Dataset) -> tuple[int, int, int]:
  """(height, width, channels)."""
  _, height, width, channels = data.x_train.shape
  return height, width, channels


def build(config: Config, data: datasets.Dataset | None = None) -> Setting:
  """Builds everything, so that a mistake shows before anything is written.

  Args:
    config: the run's.
    data: its data set, where it is loaded already.

  Raises:
    UserError: whatever is wrong with the values together.
  """
  mesh = engine.mesh(config.devices)
  data = data or load_data(config)
  plan = engine.resolve(
    config.plan,
    mesh,
    _capacity(config, config.num_clients),
    functools.partial(model, config, data),
    config.batch_size,
  )
  net = model(config, data, plan.conv)
  template = jax.eval_shape(net.init, jax.random.key(0))
  if config.task in ("attack", "leakage"):
    clients = _one_client_an_update(config, data)
  else:
    clients = _population(config, data)
  schedule = local.Schedule(
    batch_size=config.batch_size,
    max_examples=int(clients.sizes.max()),
    epochs=config.local_epochs,
    steps=config.local_steps,
  )
  protocol = protocol_of(config, clients, schedule)
  built = [defenses.make(spec, template, protocol) for spec in config.defense]
  for defense in built:
    if defense.encryption is not None and config.task == "train":
      encrypted.check(
        defense.encryption,
        config.cohort_size,
        config.aggregator,
        config.algorithm,
      )
    _check_proof(config, defense)
  if config.algorithm == "scaffold":
    built = [d._replace(codec=codecs.pair(d.codec)) for d in built]
  return Setting(
    data,
    net,
    plan,
    mesh,
    _training(config, net, schedule),
    schedule,
    clients,
    template,
    protocol,
    built,
    {
      defense.spec: _place(
        config,
        plan,
        mesh,
        client(config, _training(config, net, schedule, defense), defense),
        template,
      )
      for defense in built
    },
    aggregate.make(config.aggregator),
    federated.Rates(
      schedules.make(
        config.client_lr_schedule, config.client_lr, config.rounds
      ),
      schedules.make(
        config.server_lr_schedule, config.server_lr, config.rounds
      ),
    ),
    _downlink(config, template),
    message_bytes(config, template),
  )


def _training(
  config: Config,
  net: Model,
  schedule: local.Schedule,
  defense: defenses.Defense | None = None,
) -> local.LocalTraining:
  """What a client computes, by the defence's own gradient where it has one."""
  if config.algorithm == "fed_sgd":
    return local.gradient(net, schedule)
  gradient = None
  if defense is not None and defense.gradient is not None:
    gradient = defense.gradient(net)
    schedule = schedule._replace(poisson=defense.poisson)
  prox_mu = config.prox_mu if config.algorithm == "fed_prox" else 0.0
  return local.sgd(net, optax.sgd, schedule, prox_mu, gradient)


def training(
  config: Config, built: Setting, defense: defenses.Defense
) -> local.LocalTraining:
  """What a client computes under one defence."""
  if defense.gradient is None:
    return built.training
  return _training(config, built.model, built.schedule, defense)


def _check_proof(config: Config, defense: defenses.Defense) -> None:
  """Refuses what a proof does not cover; raises UserError."""
  scaffold = config.algorithm == "scaffold"
  if scaffold and (defense.noise_in_codec or defense.central is not None):
    raise errors.UserError(
      "--algorithm=scaffold exchanges control variates, which the proof of"
      f" {defense.spec} does not cover. Expected dp_gaussian or dp_laplace,"
      " whose noise the variates share, or another algorithm."
    )
  if defense.central is not None and config.aggregator != "mean":
    raise errors.UserError(
      f"--aggregator={config.aggregator} with {defense.spec}, whose proof is"
      " about a sum. Expected --aggregator=mean."
    )

  if config.algorithm == "fed_sgd" and defense.gradient is not None:
    raise errors.UserError(
      f"--algorithm=fed_sgd takes one gradient over all examples, which"
      f" {defense.spec} does not replace. Expected fed_avg, fed_prox or"
      " scaffold."
    )
  if config.attack and defense.poisson:
    raise errors.UserError(
      f"--attack on {defense.spec}: how many images a Poisson batch holds is"
      " secret, which the attacks do not model. Expected batches=fixed."
    )


def alone(built: Setting, client: int) -> tuple[Examples, Cohort]:
  """One client's examples on the device, and the client among them.

  Args:
    built: the run's.
    client: its id.
  """
  rows = built.clients.client(client)
  examples = Examples(
    jnp.asarray(built.data.x_train[rows]),
    jnp.asarray(built.data.y_train[rows], jnp.int32),
    jnp.arange(len(rows), dtype=jnp.int32),
  )
  who = Cohort(jnp.int32(client), jnp.int32(0), jnp.int32(len(rows)))
  return examples, who


def sample(
  config: Config, clients: partition.Partition, round_number: int
) -> Cohort:
  """The round's cohort, which the seed decides.

  Every round's cohort is of the same length, so that nothing is compiled again:
  where fewer clients than that were drawn, others stand in for them with no
  examples, who do and send nothing.

  Args:
    config: the run's.
    clients: the population.
    round_number: from 1.
  """
  ids = _drawn(config, clients.num_clients, round_number)
  present = np.ones(_capacity(config, clients.num_clients), bool)
  if len(ids) < len(present):
    present[len(ids) :] = False
    absent = np.setdiff1d(np.arange(clients.num_clients), ids)
    ids = np.concatenate([ids, absent[: np.count_nonzero(~present)]])
  sizes = np.where(present, clients.sizes[ids], 0)
  places = (ids, clients.offsets[ids], sizes)
  return Cohort._make(place.astype(np.int32) for place in places)


def _drawn(config: Config, num_clients: int, round_number: int) -> np.ndarray:
  """Ids of the clients that take part in a round."""
  stream = rng(config, SAMPLING, round_number)
  if config.client_sampling == "poisson":
    rate = config.cohort_size / num_clients
    return np.flatnonzero(stream.random(num_clients) < rate)
  return stream.choice(num_clients, config.cohort_size, replace=False)


@functools.lru_cache
def _capacity(config: Config, num_clients: int) -> int:
  """Clients of the run's largest cohort."""
  if config.client_sampling == "uniform":
    return config.cohort_size
  rounds = range(1, config.rounds + 1)
  return max(1, *(len(_drawn(config, num_clients, r)) for r in rounds))


def protocol_of(
  config: Config, clients: partition.Partition, schedule: local.Schedule
) -> accounting.Protocol:
  """How often each client sends in the run, which its seed has decided."""
  rounds, participations = 1, np.ones(clients.num_clients, np.int64)
  sampling_rate = None
  if config.task == "train":
    rounds, participations[:] = config.rounds, 0
    for number in range(1, rounds + 1):
      participations[_drawn(config, clients.num_clients, number)] += 1
    if config.client_sampling == "poisson":
      sampling_rate = config.cohort_size / clients.num_clients
  return accounting.Protocol(
    accounting.Ledger(rounds, participations),
    config.delta,
    config.cohort_size,
    sampling_rate,
    sizes=clients.sizes,
    schedule=schedule,
  )


def digests(built: Setting) -> dict[str, str]:
  """What the processes of a run must hold alike: name -> SHA-256."""

  def digest(*arrays: np.ndarray) -> str:
    found = hashlib.sha256()
    for array in arrays:
      found.update(f"{array.dtype}{array.shape}".encode())
      found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()

  data = built.data
  return {
    "training set": digest(np.asarray(data.x_train), data.y_train),
    "test set": digest(np.asarray(data.x_test), data.y_test),
    "partition": digest(built.clients.order, built.clients.offsets),
  }


def _downlink(config: Config, template: Params) -> Codec:
  name, options = specs.parse(config.downlink)
  codec = precision.make(name, template, **options)
  if jax.tree.leaves(jax.eval_shape(codec.init, template)):
    raise errors.UserError(
      f"--downlink={config.downlink} keeps a state for each client, which the"
      " broadcast has not. Expected a codec without one, such as int8."
    )
  return codecs.pair(codec) if config.algorithm == "scaffold" else codec


def _place(
  config: Config,
  plan: engine.Plan,
  mesh: jax.sharding.Mesh,
  side: federated.Client,
  template: Params,
) -> client_state.Place:
  cohort = _capacity(config, config.num_clients)
  memory = mesh.local_devices[0].memory_stats() or {}
  place = client_state.place(
    config.client_state,
    jax.eval_shape(side.init, template),
    config.num_clients,
    cohort,
    # A robust aggregate, and clients all side by side, need the whole cohort.
    cohort
    if plan.size == 0 or aggregate.make(config.aggregator).combine
    else plan.size * mesh.devices.size,
    memory.get("bytes_limit"),
  )
  if place.name == "disk" and jax.process_count() > 1:
    raise errors.UserError(
      f"--client_state={config.client_state} keeps the clients' states"
      f" ({place.num_bytes:,} bytes) in a file, which several processes cannot"
      " share. Expected --client_state=host, or one process."
    )
  return place


def client(
  config: Config, training: local.LocalTraining, defense: defenses.Defense
) -> federated.Client:
  """A client's side of the algorithm under one defence."""
  return federated.client(
    training,
    defense.transform,
    defense.codec,
    config.dropout,
    config.algorithm == "scaffold",
    None
    if config.straggler_deadline is None
    else federated.Deadline(
      config.straggler_deadline,
      config.straggler_sigma,
      key(config, SPEEDS),
    ),
    defense.central,
  )


def message_bytes(config: Config, template: Params) -> int:
  """Length of what a client sends in float32, headers included."""
  codec = precision.make("none", template)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)
  sent = zeros
  if config.algorithm == "scaffold":
    codec, sent = codecs.pair(codec), (zeros, zeros)
  payload, _ = codec.encode(jax.random.key(0), sent, codec.init(zeros))
  return int(codec.num_bytes(payload))


def _population(config: Config, data: datasets.Dataset) -> partition.Partition:
  options = {}
  if config.partition == "dirichlet":
    options["alpha"] = config.dirichlet_alpha
  if config.size_sigma and config.partition != "shards":
    options["size_sigma"] = config.size_sigma
  return partition.make(
    config.partition,
    data.y_train,
    config.num_clients,
    rng(config, PARTITION),
    config.client_examples,
    **options,
  )


def _one_client_an_update(
  config: Config, data: datasets.Dataset
) -> partition.Partition:
  """Each update's images as one client's; `order` are rows of the split."""
  split, rows = images(config.attack_images)
  have = len(data.y_train if split == "train" else data.y_test)
  if rows.stop > have:
    raise errors.UserError(
      f"--attack_images={config.attack_images}, but the {split} split of"
      f" {config.dataset} has {have} images. Expected rows 0 to {have - 1}."
    )
  size = config.batch_size * (config.local_steps or 1)
  if len(rows) % size:
    raise errors.UserError(
      f"--attack_images={config.attack_images} are {len(rows)} images, which"
      f" do not make whole updates of {size} (batch_size times local_steps)."
      " Give a multiple."
    )
  order = np.arange(rows.start, rows.stop)
  return partition.Partition(order, np.arange(0, len(rows) + 1, size))


def update_shape(
  config: Config, schedule: local.Schedule, size: int
) -> attacks.Work | None:
  """What an attacker knows of how a client of `size` examples trained.

  Returns:
    Its steps, images in each, and epochs; None where batches of one epoch
    differ in size or the last epoch is not whole, which the attacks do not
    model.
  """
  if size == 0:
    return None
  if config.algorithm == "fed_sgd":
    return attacks.Work(1, size)
  steps = int(schedule.num_steps(jnp.int32(size)))
  batch = min(size, schedule.batch_size)
  if size >= steps * batch:
    return attacks.Work(steps, batch)
  epoch = -(-size // batch)
  if size % batch == 0 and steps % epoch == 0:
    return attacks.Work(epoch, batch, steps // epoch)
  return None
