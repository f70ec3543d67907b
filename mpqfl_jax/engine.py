"""How a cohort is executed: one after another, side by side, over devices.

Every plan gives the same numbers, up to the order of float32 sums: a client's
randomness depends on the round and on its id, never on where it runs. Updates
are accumulated as they are decoded, so that memory does not grow with the
cohort.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from mpqfl_jax import (
  aggregate,
  errors,
  layers,
  models,
  sharding,
  specs,
  trees,
)
from mpqfl_jax.types import (
  Array,
  Cohort,
  Examples,
  Key,
  Model,
  Payload,
  PyTree,
  Update,
)

AXIS = "clients"


class Plan(NamedTuple):
  """How many clients run side by side on a device.

  Attributes:
    name: what the flag said, or what `auto` picked: `loop`, `vmap`, `chunk`.
    size: clients side by side; 1 is a loop, 0 is all of them.
    conv: the form of convolution that is fast under this plan.
    reason: why, for `config.json`.
  """

  name: str
  size: int
  conv: str
  reason: str


# Side by side on an accelerator, at most: more gained little on an H200.
_MOST = 512


def plan(
  spec: str,
  backend: str,
  cohort: int = _MOST,
  room: Callable[[str], int] = lambda conv: _MOST,
) -> Plan:
  """Resolves `--plan`.

  Args:
    spec: `auto`, `loop`, `vmap` or `chunk(size=8)`; all but `auto` take a form
      of convolution, `loop(conv=canonical)`, other than the backend's fastest.
    backend: `cpu`, `gpu` or `tpu`.
    cohort: clients in a round on one device.
    room: form of convolution -> how many clients side by side a device has
      memory for; asked for by `auto` alone, where it is no CPU.

  Raises:
    UserError: no such plan or form, or a chunk size below 1.
  """
  name, params = specs.parse(spec)

  def named(why: str, name: str, size: int, conv: str | None = None) -> Plan:
    if conv is None:
      # Side by side on a CPU, clients still take turns in every convolution:
      # twice as fast as batched products of slices, as measured.
      fast = "xla" if size == 1 else "slices"
      conv = "winograd" if backend == "cpu" else fast
    if not isinstance(conv, str) or conv not in layers.FORMS:
      raise errors.unknown_name("convolution form", str(conv), layers.FORMS)
    return Plan(name, size, conv, why)

  def auto() -> Plan:
    if backend == "cpu":
      return named(
        "cpu: one client at a time keeps the convolutions fast", "loop", 1
      )
    most = min(room("slices"), _MOST)
    # As equal as can be, for the last chunk is filled up.
    size = -(-cohort // -(-cohort // most))
    return named(
      f"{backend}: the more side by side, the fuller the device; there is"
      f" memory for {most} of a cohort's {cohort} clients on it",
      "chunk",
      size,
    )

  def chunk(size: int = 8, conv: str | None = None) -> Plan:
    if not isinstance(size, int) or size < 1:
      raise errors.UserError(
        f"chunk(size={size}) is not a plan. Expected a whole number from 1."
      )
    return named("asked for", "chunk", size, conv)

  def loop(conv: str | None = None) -> Plan:
    return named("asked for", "loop", 1, conv)

  def vmap(conv: str | None = None) -> Plan:
    return named("asked for", "vmap", 0, conv)

  plans: dict[str, Callable] = {
    "auto": auto,
    "loop": loop,
    "vmap": vmap,
    "chunk": chunk,
  }
  if name not in plans:
    raise errors.unknown_name("plan", name, plans)
  return specs.call(f"plan {name}", plans[name], params)


def room(
  model: Model, batch: int, device: jax.Device, share: float = 0.25
) -> int:
  """How many clients side by side a device has memory for, at least one.

  A client is counted with its parameters eight times (local ones, gradient,
  update, codes, sums) and with what the forward pass of a step computes, which
  the backward pass needs. What else there is, such as the gradients of single
  examples of DP-SGD, has to do with the rest of the memory.

  Args:
    model: the classifier, in the form in which it will convolve.
    batch: images in a step.
    device: where they run; one that does not tell its memory counts as 8 GB.
    share: of the device's memory that they may take.
  """
  memory = (device.memory_stats() or {}).get("bytes_limit", 8 << 30)
  params = jax.eval_shape(model.init, jax.random.key(0))
  numbers = 8 * trees.size(params) + batch * models.activations(model)
  return max(1, int(share * memory / (4 * numbers)))


def resolve(
  spec: str,
  mesh: Mesh,
  clients: int,
  network: Callable[[str], Model],
  batch: int,
) -> Plan:
  """The plan of a spec on these devices; see `plan` and `room`.

  Args:
    spec: as for `plan`.
    mesh: the devices.
    clients: in a round, on all of them.
    network: form of convolution -> the classifier.
    batch: images in a step.

  Raises:
    UserError: as `plan`.
  """
  return plan(
    spec,
    jax.default_backend(),
    -(-clients // mesh.devices.size),
    lambda conv: room(network(conv), batch, jax.local_devices()[0]),
  )


def mesh(num_devices: int | None = None) -> Mesh:
  """A one-dimensional mesh named `clients` over the first devices.

  Args:
    num_devices: how many of each process; all of them where None.

  Raises:
    UserError: there are not that many.
  """
  mine = jax.local_devices()
  if num_devices is not None and not 1 <= num_devices <= len(mine):
    raise errors.UserError(
      f"--devices={num_devices}, but this machine has {len(mine)} "
      f"{mine[0].platform} device(s). Expected 1 to {len(mine)}."
    )
  # Process by process, so that a client's place does not depend on how many
  # processes share the devices.
  by_process: dict[int, list] = {}
  for device in sorted(jax.devices(), key=lambda d: (d.process_index, d.id)):
    by_process.setdefault(device.process_index, []).append(device)
  devices = [d for some in by_process.values() for d in some[:num_devices]]
  return Mesh(np.array(devices), (AXIS,))


class ClientOutput(NamedTuple):
  """What one client's turn yields, server side decoding included.

  Attributes:
    update: what the server decoded.
    payload: what crossed the wire.
    state: the client's new state.
    finite: [] bool, whether what the client wanted to send was finite; the
      wire carries finite values only, so that the codec has to drop the rest.
    arrived: [] bool, False for a client that dropped out on the way.
    loss: [] float32, mean local training loss.
    uplink_bytes: [] int32, length of the packed payload.
    weight: [] int32 or float32, the client's in the mean.
  """

  update: Update
  payload: Payload
  state: PyTree
  finite: Array
  arrived: Array
  loss: Array
  uplink_bytes: Array
  weight: Array


# (broadcast, examples, client as a Cohort of scalars, state, round key); the
# broadcast is whatever the clients need of the server.
ClientFn = Callable[[PyTree, Examples, Cohort, PyTree, Key], ClientOutput]


class ClientReport(NamedTuple):
  """What the cohort's clients report, each [clients] in its order.

  Attributes:
    loss: float32, mean local training loss.
    update_norm: float32, L2 norm of the decoded update.
    uplink_bytes: int32, length of the packed payload, 0 where none arrived.
    accepted: bool, took part in the aggregate.
    arrived: bool, did not drop out.
  """

  loss: Array
  update_norm: Array
  uplink_bytes: Array
  accepted: Array
  arrived: Array


class CohortResult(NamedTuple):
  """The sum of the updates, the clients' new states, their report.

  Attributes:
    total: the accepted updates, each times its weight; a robust aggregate
      times the weight of all.
    weight: [] float32, of the accepted updates together.
    states: [clients, ...].
    report: of the clients.
    payloads: of the watched clients, leading axis [watched], zeros for one that
      is not in the cohort.
    updates: [clients, ...] decoded, where they were to be kept.
  """

  total: Update
  weight: Array
  states: PyTree
  report: ClientReport
  payloads: Payload
  updates: PyTree = ()


def pad(cohort: Cohort, multiple: int) -> Cohort:
  """Fills the cohort up with clients of id -1, no examples and no weight."""
  missing = -len(cohort.client_id) % multiple
  fill = Cohort._make((-1, 0, 0))
  return jax.tree.map(
    lambda leaf, value: jnp.pad(leaf, (0, missing), constant_values=value),
    cohort,
    fill,
  )


def balanced(sizes: Array, width: int, devices: int) -> Array:
  """An order in which clients side by side, and devices, have equal work.

  Clients side by side wait for the largest of them, and devices for the one
  with the most to do. So clients of like sizes stand together, the largest
  first, and groups of them are dealt to the devices there and back again.

  Args:
    sizes: [clients] int32, a multiple of `devices * width`; 0 for padding.
    width: clients side by side.
    devices: each gets a contiguous share of the order.

  Returns:
    [clients] int32, places in `sizes`.
  """
  rounds = len(sizes) // (width * devices)
  deal = np.arange(rounds * devices).reshape(rounds, devices)
  deal[1::2] = deal[1::2, ::-1]
  ranked = jnp.argsort(-sizes, stable=True).reshape(-1, width)
  return ranked[deal.T.reshape(-1)].reshape(-1)


def run_cohort(
  client_fn: ClientFn,
  plan: Plan,
  mesh: Mesh,
  aggregator: aggregate.Aggregator,
  keep_updates: bool = False,
) -> Callable:
  """Builds the compiled part of a round: all clients, then the aggregate.

  Args:
    client_fn: one client's turn.
    plan: how many clients run side by side on a device.
    mesh: the devices.
    aggregator: the weighted mean, or a robust aggregate, which keeps every
      update of the round.
    keep_updates: whether the result holds every client's update, too.

  Returns:
    (broadcast, examples, cohort, states[clients, ...], watched[watched], key)
    -> CohortResult. The cohort's length is free, and its order: it is padded
    and put into a `balanced` order inside, and what is reported is in the
    order that it came in.
  """

  def turn(broadcast, examples, client, state, key):
    out = client_fn(broadcast, examples, client, state, key)
    weight = jnp.where(out.finite & out.arrived, out.weight, 0)
    return out, weight.astype(jnp.float32)

  def one(broadcast, examples, key, total, client, state):
    out, weight = turn(broadcast, examples, client, state, key)
    return aggregate.accumulate(total, out.update, weight), out, weight

  def side_by_side(broadcast, examples, key, total, clients, states):
    out, weight = jax.vmap(turn, (None, None, 0, 0, None))(
      broadcast, examples, clients, states, key
    )
    total = jax.tree.map(
      lambda t, u: t + jnp.tensordot(weight, u, 1), total, out.update
    )
    return total, out, weight

  def on_device(broadcast, examples, cohort, states, watched, key):
    count = len(cohort.client_id)
    size = count if plan.size == 0 else plan.size
    step = one if size == 1 else side_by_side
    if size > 1:
      cohort, states = jax.tree.map(
        lambda leaf: leaf.reshape(count // size, size, *leaf.shape[1:]),
        (cohort, states),
      )

    def body(carry, client_and_state):
      total, total_weight, slots = carry
      client, state = client_and_state
      total, out, weight = step(broadcast, examples, key, total, client, state)
      slots = _record(slots, out.payload, client.client_id, watched)
      norms = jnp.sqrt(_per_client_squared_norm(out.update, weight.ndim))
      report = (out.loss, norms, out.uplink_bytes, weight > 0, out.arrived)
      keep = keep_updates or aggregator.combine is not None
      kept = (out.update, weight) if keep else ()
      carry = (total, total_weight + jnp.sum(weight), slots)
      return carry, (out.state, report, kept)

    out, _ = jax.eval_shape(
      lambda c, s: turn(broadcast, examples, c, s, key),
      *jax.tree.map(
        lambda leaf: leaf[0, 0] if size > 1 else leaf[0], (cohort, states)
      ),
    )
    slots = jax.tree.map(
      lambda leaf: jnp.zeros((len(watched), *leaf.shape), leaf.dtype),
      out.payload,
    )
    total = jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), out.update)
    start = (total, jnp.float32(0), slots)
    (total, total_weight, slots), per_client = lax.scan(
      body, start, (cohort, states)
    )
    states, report, kept = jax.tree.map(
      lambda leaf: leaf.reshape(count, *leaf.shape[1 + int(size > 1) :]),
      per_client,
    )
    sums = sharding.ordered_sum((total, total_weight), AXIS, mesh.devices.size)
    # A client runs on one device: everywhere else its slot is zero, so that a
    # sum of bits hands the payload over exactly.
    slots = jax.tree.map(_psum_bits, slots)
    return sums, (states, report, kept), slots

  split, whole = PartitionSpec(AXIS), PartitionSpec()
  sharded = jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(whole, whole, split, split, whole, whole),
    out_specs=(whole, split, whole),
    # The carries start as replicated zeros and end as each device's own.
    check_vma=False,
  )

  def run(broadcast, examples, cohort, states, watched, key):
    count = len(cohort.client_id)
    devices = mesh.devices.size
    size = -(-count // devices) if plan.size == 0 else plan.size
    padded = pad(cohort, devices * size)
    states = jax.tree.map(
      lambda leaf: jnp.pad(
        leaf,
        [(0, len(padded.client_id) - count)] + [(0, 0)] * (leaf.ndim - 1),
      ),
      states,
    )
    # One client after another on one device leaves nothing to balance, and
    # everybody at once neither.
    order = None
    if devices > 1 or 1 < size < count:
      order = balanced(padded.size, size, devices)
      padded, states = jax.tree.map(lambda leaf: leaf[order], (padded, states))
    (total, weight), per_client, payloads = sharded(
      broadcast, examples, padded, states, watched, key
    )
    if order is not None:
      back = jnp.argsort(order)[:count]
      per_client = jax.tree.map(lambda leaf: leaf[back], per_client)
    states, report, kept = jax.tree.map(lambda leaf: leaf[:count], per_client)
    if aggregator.combine is not None:
      total = trees.scale(weight, aggregator.combine(*kept))
    report = ClientReport(*report)
    updates = kept[0] if keep_updates else ()
    return CohortResult(total, weight, states, report, payloads, updates)

  return run


def _per_client_squared_norm(update: Update, batch_dims: int) -> Array:
  squares = jax.tree.map(
    lambda u: jnp.sum(u * u, axis=tuple(range(batch_dims, u.ndim))), update
  )
  return functools.reduce(jnp.add, jax.tree.leaves(squares))


def _record(slots: Payload, payload: Payload, ids: Array, watched: Array):
  """Writes the payload of each watched client into its slot."""
  ids = jnp.atleast_1d(ids)

  def write(slots):
    hit = (watched[:, None] == ids[None, :]) & (watched[:, None] >= 0)
    found, which = jnp.any(hit, 1), jnp.argmax(hit, 1)

    def leaf(slot, value):
      value = value.reshape(len(ids), *slot.shape[1:])[which]
      mask = found.reshape(-1, *[1] * (slot.ndim - 1))
      return jnp.where(mask, value, slot)

    return jax.tree.map(leaf, slots, payload)

  if watched.shape[0] == 0:
    return slots
  seen = jnp.any((watched[:, None] == ids[None, :]) & (ids >= 0)[None, :])
  return lax.cond(seen, write, lambda slots: slots, slots)


def _psum_bits(leaf: Array) -> Array:
  if leaf.dtype == jnp.bool_:
    return lax.psum(leaf.astype(jnp.uint8), AXIS).astype(jnp.bool_)
  bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
  whole = lax.psum(lax.bitcast_convert_type(leaf, bits), AXIS)
  return lax.bitcast_convert_type(whole, leaf.dtype)


def evaluate(model, mesh: Mesh, x: np.ndarray, y: np.ndarray) -> Callable:
  """Builds params -> (mean loss, accuracy) over a test set that is kept there.

  Args:
    model: the classifier.
    mesh: the test set is spread over its devices.
    x: [examples, height, width, channels] uint8.
    y: [examples] int32.
  """
  # Small batches bound the memory of the convolutions' patches.
  batch = 125
  blocks = -(-len(x) // (batch * mesh.devices.size)) * mesh.devices.size
  fill = blocks * batch - len(x)
  x = np.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1))
  mask = np.pad(np.ones(len(y), np.float32), (0, fill))
  y = np.pad(y, (0, fill))
  data = jax.tree.map(
    lambda leaf: leaf.reshape(blocks, batch, *leaf.shape[1:]), (x, y, mask)
  )
  split = PartitionSpec(AXIS)
  data = sharding.put(data, mesh, split)

  def on_device(params, data):
    def block(carry, xym):
      images, labels, mask = xym
      logits = model.apply(params, images.astype(jnp.float32) / 255.0)
      log_probs = jax.nn.log_softmax(logits)
      losses = -jnp.take_along_axis(log_probs, labels[:, None], 1)[:, 0]
      hits = jnp.argmax(logits, -1) == labels
      sums = jnp.stack([jnp.sum(mask * losses), jnp.sum(mask * hits)])
      return carry + sums, None

    sums, _ = lax.scan(block, jnp.zeros(2), data)
    sums = sharding.ordered_sum(sums, AXIS, mesh.devices.size)
    return sums / jnp.float32(len(x) - fill)

  sharded = jax.jit(
    jax.shard_map(
      on_device,
      mesh=mesh,
      in_specs=(PartitionSpec(), split),
      out_specs=PartitionSpec(),
      check_vma=False,
    )
  )

  def run(params) -> tuple[float, float]:
    loss, accuracy = np.asarray(sharded(params, data))
    return float(loss), float(accuracy)

  return run
