"""The types that flow between the parts of the simulator.

Everything is a NamedTuple of plain functions or of arrays: states are pytrees,
and whatever stands on the training path works under `jit`, `vmap`, `scan` and
`shard_map`. Parameters are plain nested dicts whose paths name layers
(`conv1/kernel`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array
Key = jax.Array
PyTree = Any
Params = PyTree
Update = PyTree
Payload = PyTree


class Layer(NamedTuple):
  """One layer of a model that is a plain stack: affine map, then activation.

  Attributes:
    name: of its entry in the parameters; a kernel of four axes is a
      convolution's, one of two axes a dense layer's on the flattened input.
    activation: `leaky_relu`, `sigmoid` or `identity`.
    slope: of `leaky_relu` below zero; 0 is ReLU.
    stride: of a convolution, both ways.
    padding: of a convolution, zeros on every side.
  """

  name: str
  activation: str
  slope: float = 0.0
  stride: int = 1
  padding: int = 0


class Model(NamedTuple):
  """A classifier of images as two pure functions.

  Attributes:
    name: the name that flags and result files use.
    init: key -> params, a nested dict of float32 arrays.
    apply: (params, x[batch, height, width, channels] in [0, 1]) ->
      logits[batch, classes]. Normalisation by `mean` and `std` happens inside.
    image_shape: (height, width, channels).
    num_classes: number of classes.
    mean: [channels], the per-channel mean that `apply` subtracts.
    std: [channels], the per-channel deviation that `apply` divides by.
    layers: what `apply` does after normalisation, where it is a plain stack of
      layers; None where it has pooling, skip connections or other parts.
  """

  name: str
  init: Callable[[Key], Params]
  apply: Callable[[Params, Array], Array]
  image_shape: tuple[int, int, int]
  num_classes: int
  mean: np.ndarray
  std: np.ndarray
  layers: tuple[Layer, ...] | None = None


class Examples(NamedTuple):
  """The training set on the device, once, and who holds which part of it.

  Attributes:
    x: [examples, height, width, channels], uint8.
    y: [examples], int32.
    order: [examples], int32: client k holds the rows
      `order[offset[k] : offset[k] + size[k]]`.
  """

  x: Array
  y: Array
  order: Array


class Cohort(NamedTuple):
  """Clients of one round, described by where their examples lie.

  Attributes:
    client_id: [clients], int32, -1 where the entry is padding.
    offset: [clients], int32, start of the client's part of `Examples.order`.
    size: [clients], int32, its number of examples, 0 for padding. It is also
      the client's weight in the mean.
  """

  client_id: Array
  offset: Array
  size: Array


class ClientResult(NamedTuple):
  """What one client's local training yields.

  Attributes:
    update: params - local params, float32.
    loss: [] float32, the mean loss over the examples it visited.
    steps: [] int32, how many batches it went through.
  """

  update: Update
  loss: Array
  steps: Array


class RoundAux(NamedTuple):
  """What a round reports.

  Attributes:
    clients: an `engine.ClientReport`: losses, norms, bytes, who took part.
    payloads: the watched clients' payloads, leading axis [watched].
    broadcast: a `federated.Broadcast`: the parameters that the clients started
      from, as they came out of the downlink's codec, and the round's step size.
    downlink_bytes: [] int32, length of the message that each client received.
    encrypted: an `encrypted.Outcome` where updates were added as ciphertexts;
      `payloads` are empty then.
  """

  clients: Any
  payloads: Payload
  broadcast: Any
  downlink_bytes: Array
  encrypted: Any = None


class RoundParts(NamedTuple):
  """A round in three steps, for a cohort that is run block by block.

  Attributes:
    begin: (server_state, key) -> (what the clients get, its bytes, an empty
      sum of updates).
    block: (what the clients get, sum, client_states, examples, cohort, watched,
      key) -> (sum, client_states, `engine.ClientReport`, payloads).
    end: (server_state, sum, key) -> server_state.
  """

  begin: Callable[..., tuple[PyTree, Array, PyTree]]
  block: Callable[..., tuple[PyTree, PyTree, Any, Payload]]
  end: Callable[[PyTree, PyTree, Key], PyTree]


class FederatedAlgorithm(NamedTuple):
  """Federated training as two pure functions.

  Attributes:
    init: key -> server state.
    round: (server_state, client_states[clients, ...], examples, cohort,
      watched[watched] int32 client ids, key) -> (server_state, client_states,
      RoundAux). The states are those of the cohort, in its order; where those
      of the population are kept is a `client_state.Store`'s affair. Watching
      changes nothing: the program is the same whoever is watched, -1 for
      nobody.
    parts: the round in three steps, for a cohort that runs in blocks.
  """

  init: Callable[[Key], PyTree]
  round: Callable[..., tuple[PyTree, PyTree, RoundAux]]
  parts: RoundParts


class UpdateTransform(NamedTuple):
  """A stage between local training and the codec: clip, prune, noise.

  Attributes:
    init: params -> state of one client.
    apply: (key, update, state) -> (update, state).
  """

  init: Callable[[Params], PyTree]
  apply: Callable[[Key, Update, PyTree], tuple[Update, PyTree]]


class Bins(NamedTuple):
  """What a payload says about the update that went in, entry by entry.

  An adversary who knows the codec uses this instead of the decoded value.
  Entries below 2^-126 count as zero, those beyond ±2^126 as that.

  Attributes:
    lower, upper: pytrees like the update, float32: the interval that the entry
      lay in for certain; infinite where the payload does not bound it.
    variance: a pytree like the update, float32: the expected squared error of
      the decoded value, or of the interval's only one; infinite for an entry
      that the payload says nothing of.
    stochastic: a pytree like the update, of Python bools: whether the leaf was
      rounded at random, so that the likelihood of a value in the interval
      falls off linearly from the decoded value instead of being flat.
  """

  lower: Update
  upper: Update
  variance: Update
  stochastic: PyTree


class LeafRecord(NamedTuple):
  """How one leaf of an update was sent.

  Attributes:
    path: the leaf's name, such as `conv1/kernel`.
    rule: precision, mode and so on, in words.
    num_bytes: length of its record, bytes, before entropy coding.
  """

  path: str
  rule: str
  num_bytes: int


class Proof(NamedTuple):
  """How good a choice of precisions provably is.

  Attributes:
    objective: what the choice minimises, in words.
    gap: update -> [] float32, the share of the objective by which it can be
      above the least possible, 0 for a proven optimum; infinite where no choice
      was found that keeps the bounds.
  """

  objective: str
  gap: Callable[[Update], Array]


class Codec(NamedTuple):
  """The last stage at a client, and its inverse at the server.

  Attributes:
    init: params -> state of one client (error feedback), `()` where none.
    encode: (key, update, state) -> (payload, state). The payload's arrays are
      exactly what crosses the wire.
    decode: payload -> update, float32.
    num_bytes: payload -> [] int32, the length in bytes of `pack(payload)`,
      computed on the device (under entropy coding, on the host behind it).
    pack: payload -> bytes, on the host. A `wire.Coding` as a second argument
      codes the records; `entropy.coded` gives a codec that does.
    unpack: bytes -> payload, on the host; raises `wire.WireError`, and nothing
      else, on any input that `pack` cannot have produced. As in `pack`.
    bins: payload -> Bins.
    records: payload -> how each leaf was sent, in the order of
      `jax.tree.leaves`; on the host.
    agreement: what both sides must agree on, of which messages carry a hash:
      the policy's name and, a line a leaf, path, shape and rule.
    proof: of a policy that chooses for each update, else None.
  """

  init: Callable[[Params], PyTree]
  encode: Callable[[Key, Update, PyTree], tuple[Payload, PyTree]]
  decode: Callable[[Payload], Update]
  num_bytes: Callable[[Payload], Array]
  pack: Callable[..., bytes]
  unpack: Callable[..., Payload]
  bins: Callable[[Payload], Bins]
  records: Callable[[Payload], list[LeafRecord]]
  agreement: str
  proof: Proof | None = None


class Observation(NamedTuple):
  """What the adversary sees of one client's update, and what it knows.

  Leading axes may be added by `vmap`: the attacks batch over observations.

  Attributes:
    params: the global model that the client started from.
    update: the decoded update, `params - local params`, float32.
    bins: what the payload says beyond the decoded value; None for a blind
      adversary.
    labels: [steps, batch], int32, or None where the adversary must infer them.
    learning_rate: [] float32, the client's SGD step size.
    clips: [2] float32, the L1 and the L2 norm to which the client scaled its
      update down, infinite where it did not; None for a blind adversary.
    mixing: [epochs * steps] float32, what an image kept of itself in a step
      that mixed it with the next one; None where nothing was mixed, and for a
      blind adversary.
    focus: a pytree like the update, of [] float32: 1 for the leaves that a
      search compares, 0 for the others; None where it compares all.
  """

  params: Params
  update: Update
  bins: Bins | None
  labels: Array | None
  learning_rate: Array
  clips: Array | None = None
  mixing: Array | None = None
  focus: PyTree | None = None
