"""A federated round whose updates reach the server as ciphertext only.

Who can read what, under an honest-but-curious server that colludes with nobody:
the server sees ciphertexts and sizes; a client sees the global model, and the
round's key holder the sum of the round, from which the models of two rounds
follow anyway. Everyone in the cohort encrypts its weighted update under one
public key, the server adds the ciphertexts, and the round's key holder, one of
the clients, opens the sum, applies the server's optimiser (deterministic, and
known to all) and hands the new model to the next cohort. It does so by ordinary
authenticated encryption, which costs a few bytes a message. The sum never goes
back to the server in the clear: approximate decryptions that an adversary sees
can give the secret key away (Li and Micciancio 2021).

keys=shared: one pair for all clients, made by one of them and handed to the
others. Whoever holds it, a single client is enough, reads every update that it
can get hold of.

keys=threshold: the cohort makes a joint key in every round, one step a client,
and opens the sum together; nobody can open anything alone. The shares go to the
key holder, which holds no key here. A client that drops out after the key was
made takes its share along: the others make another key and encrypt again.

keys=per_client: each client has a pair of its own, made when it first is the
key holder, and the cohort encrypts under that of the round's. A client that
colludes with the server gives away the rounds whose key it held and no others.
The model goes to each client of the next cohort under that client's key. Where
the key holder drops out, the cohort encrypts again, under another's key.
"""

from collections.abc import Callable, Iterator, Sequence
import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from mpqfl_jax import bfv, ckks, errors, he, threshold
from mpqfl_jax.types import Array, Cohort, Params, Update

KEYS = ("shared", "per_client", "threshold")
# What authenticated encryption adds to a message: a nonce of 24 bytes and a tag
# of 16 under a key that both have (XSalsa20-Poly1305); an ephemeral public key
# of 32 and a tag under the receiver's public key (X25519).
_SEAL_BYTES = {"shared": 24 + 16, "per_client": 32 + 16, "threshold": 32 + 16}
MODULUS_BITS = 54  # the largest at degree 4096
BOUND = 4.0  # of entries that are sent as they are
UNREADABLE = "the server sees ciphertext"


class Options(NamedTuple):
  """What `he(...)` says.

  Attributes:
    keys: `shared`, `per_client` or `threshold`.
    degree, modulus_bits, bound: as for `ckks.parameters`; `threshold` has its
      own modulus.
    bits: of an entry, as for `bfv.parameters`; None where entries are sent as
      they are.
    min_clients: a sum of fewer is not opened: with two clients in it, the key
      holder could subtract its own update and read the other's.
    attacker_holds_key: the server has got hold of the shared key.
  """

  keys: str
  degree: int
  modulus_bits: int
  bound: float
  bits: int | None
  min_clients: int
  attacker_holds_key: bool

  @property
  def rounding_stddev(self) -> float:
    """Of an entry of an update of weight 1, about; 0 where none is rounded.

    Rounding up or down at random, by the fraction f between two levels, has a
    variance of f * (1 - f), in the mean over f a sixth.
    """
    if self.bits is None:
      return 0.0
    return self.bound / bfv.levels(self.bits) / math.sqrt(6)


def options(
  keys: str,
  degree: int,
  modulus_bits: int | None,
  bound: float | None,
  bits: int | None,
  min_clients: int,
  attacker_holds_key: bool,
) -> Options:
  """Checks the parameters of the defence `he`.

  Raises:
    UserError: a value that no protocol can have, or its library is missing.
  """
  if keys not in KEYS:
    raise errors.unknown_name("keys", str(keys), KEYS)
  if not isinstance(min_clients, int) or min_clients < 3:
    raise errors.UserError(
      f"min_clients={min_clients}. Expected a whole number from 3: of a sum of"
      " two, the key holder knows one and so the other."
    )
  holds = attacker_holds_key
  if not isinstance(holds, bool):
    raise errors.UserError(
      f"attacker_holds_key={attacker_holds_key}. Expected true or false."
    )
  if holds and keys != "shared":
    raise errors.UserError(
      f"attacker_holds_key=true goes with keys=shared; with keys={keys} there"
      " is no key that opens every round."
    )
  if keys == "threshold" and modulus_bits not in (None, threshold.MODULUS_BITS):
    raise errors.UserError(
      f"modulus_bits={modulus_bits}. Expected none with keys=threshold, whose"
      f" modulus has {threshold.MODULUS_BITS} bits."
    )
  if bits is not None and keys == "threshold":
    raise errors.UserError(
      f"bits={bits} goes with keys=shared and keys=per_client. Expected no bits"
      " with keys=threshold, which has no scheme of whole numbers."
    )
  if bits is not None and bound is None:
    raise errors.UserError(
      f"bits={bits} without a bound. Expected one, as bound=0.05: entries of an"
      " update are cut off there, and its levels lie between -bound and bound."
    )
  made = Options(
    keys,
    degree,
    modulus_bits or MODULUS_BITS,
    BOUND if bound is None else bound,
    bits,
    min_clients,
    holds,
  )
  _parameters(made, min_clients)
  (threshold if keys == "threshold" else he).library()
  return made


def check(
  chosen: Options, cohort_size: int, aggregator: str, algorithm: str
) -> None:
  """Refuses a run that the protocol cannot carry out.

  Raises:
    UserError: before anything was computed.
  """
  if cohort_size < chosen.min_clients:
    raise errors.UserError(
      f"--cohort_size={cohort_size}, but he opens no sum of fewer than"
      f" min_clients={chosen.min_clients}. Expected at least as many."
    )
  if aggregator != "mean":
    raise errors.UserError(
      f"--aggregator={aggregator} compares updates, which he hides. Expected"
      " mean."
    )
  if algorithm == "scaffold":
    raise errors.UserError(
      "--algorithm=scaffold moves a client's control variate before it is known"
      " whether the sum can be opened. Expected another one with he."
    )
  if jax.process_count() > 1:
    raise errors.UserError(
      "he encrypts on one host and this run has"
      f" {jax.process_count()}. Expected --num_processes=1."
    )
  _parameters(chosen, cohort_size)


def _parameters(chosen: Options, clients: int) -> he.Parameters:
  bound, degree = chosen.bound, chosen.degree
  if chosen.keys == "threshold":
    return threshold.parameters(clients, bound, degree)
  if chosen.bits is not None:
    return bfv.parameters(
      clients, chosen.bits, bound, degree, chosen.modulus_bits
    )
  return ckks.parameters(clients, bound, degree, chosen.modulus_bits)


class SetUp(NamedTuple):
  """What has to be done before the first round.

  Attributes:
    key_pairs: pairs made.
    key_seconds: for making them.
    key_bytes: that cross the wire to hand the keys out, all clients together.
  """

  key_pairs: int
  key_seconds: float
  key_bytes: int


class Costs(NamedTuple):
  """Of one round, beyond what any round costs.

  Attributes:
    key_holder: the client that opened the sum, -1 where none was opened.
    key_pairs, key_seconds, key_bytes: as in SetUp, for keys made in the round.
    attempts: how often the cohort encrypted; 2 where somebody whose key is
      needed dropped out.
    encrypt_seconds: of one client, the mean.
    add_seconds: of the server.
    share_seconds: of one client, the mean; 0 where one alone opens the sum.
    decrypt_seconds: of the key holder.
    message_bytes: one client's message, the mean.
    key_holder_bytes: the encrypted sum and the shares, to the key holder, and
      the new model, from it.
    relative_error: L2 norm of what encryption changed in the mean, with what
      rounding did, over that of the mean; None where no sum was opened.
    clipped_share: of the entries of all updates, those beyond the bound.
  """

  key_holder: int
  key_pairs: int
  key_seconds: float
  key_bytes: int
  attempts: int
  encrypt_seconds: float
  add_seconds: float
  share_seconds: float
  decrypt_seconds: float
  message_bytes: float
  key_holder_bytes: int
  relative_error: float | None
  clipped_share: float


class Seen(NamedTuple):
  """What the server has of a client's update.

  Attributes:
    message: the ciphertexts that crossed the wire.
    update: what the shared key makes of them, None where the server has none.
  """

  message: bytes
  update: Update | None


class Outcome(NamedTuple):
  """A round's aggregate by way of ciphertexts.

  Attributes:
    update: the weighted mean, float32; zero where no sum was opened.
    accepted: [clients] bool, is in the sum.
    uplink_bytes: [clients] int64, sent by each.
    seen: client -> what the server has of it, for the watched ones.
    costs: of the round.
  """

  update: Update
  accepted: np.ndarray
  uplink_bytes: np.ndarray
  seen: dict[int, Seen]
  costs: Costs


class Protocol(NamedTuple):
  """Encrypted aggregation with its keys.

  Attributes:
    set_up: its costs.
    seal_bytes: what authenticated encryption adds to the model's message.
    combine: (updates[clients, ...], ready[clients] bool, arrived[clients] bool,
      cohort, watched ids, length of the model's message, the round's key) ->
      Outcome; `ready` are the clients with a finite update that arrived.
  """

  set_up: SetUp
  seal_bytes: int
  combine: Callable[..., Outcome]


class _Keys(NamedTuple):
  """The keys of one attempt at a round, and how they are used.

  `open` takes the sum's message and the number of clients in it and gives the
  sum, the bytes of the shares, and the seconds that one share took.
  """

  made: SetUp
  encrypt: Callable[[np.ndarray, float, np.random.Generator], bytes]
  add: Callable[[Sequence[bytes]], bytes]
  open: Callable[[bytes, int], tuple[he.Sum, int, float]]


def _with_pair(pair: he.SecretKey, made: SetUp) -> _Keys:
  return _Keys(
    made,
    lambda update, weight, rng: he.encrypt(pair.public, update, weight, rng),
    lambda messages: he.add(pair.public, messages),
    lambda message, count: (he.decrypt(pair, message, count), 0, 0.0),
  )


def _group(
  chosen: Options, clients: int, members: Sequence[int]
) -> threshold.Group:
  params = threshold.parameters(clients, chosen.bound, chosen.degree)
  return threshold.generate(params, members)


def _with_group(chosen: Options, clients: int, members: Sequence[int]) -> _Keys:
  start = time.perf_counter()
  group = _group(chosen, clients, members)
  made = SetUp(len(members), time.perf_counter() - start, group.wire_bytes)

  def open_sum(message, count):
    start = time.perf_counter()
    shares = {c: threshold.share(group, c, message) for c in group.members}
    each = (time.perf_counter() - start) / len(shares)
    found = threshold.open_shares(group, message, shares, count)
    # Everybody needs the sum to make a share of it.
    size = sum(map(len, shares.values())) + (len(shares) - 1) * len(message)
    return found, size, each

  return _Keys(
    made,
    lambda update, weight, rng: threshold.encrypt(group, update, weight),
    lambda messages: threshold.add(group, messages),
    open_sum,
  )


def _handed_out(pair: he.SecretKey, clients: int) -> int:
  """Bytes in which who made a shared pair hands it on, sealed for each."""
  size = len(pair.serialized) + len(pair.public.serialized)
  return (clients - 1) * (size + _SEAL_BYTES["per_client"])


def protocol(chosen: Options, cohort_size: int, num_clients: int) -> Protocol:
  """Makes the keys that are needed from the start.

  Args:
    chosen: the defence's parameters.
    cohort_size: clients in a round.
    num_clients: clients in the population, all of whom may open sums.

  Raises:
    UserError: the library is not installed, or parameters that are not sound.
  """
  params = _parameters(chosen, cohort_size)
  pairs: dict[int, he.SecretKey] = {}
  set_up = SetUp(0, 0.0, 0)
  if chosen.keys == "shared":
    start = time.perf_counter()
    shared = he.key_pair(params)
    seconds = time.perf_counter() - start
    set_up = SetUp(1, seconds, _handed_out(shared, num_clients))

  def pair_of(client: int) -> _Keys:
    start, new = time.perf_counter(), client not in pairs
    if new:
      pairs[client] = he.key_pair(params)
    # Its public key goes to the server, and on to the rest of the cohort.
    size = cohort_size * len(pairs[client].public.serialized)
    made = SetUp(int(new), time.perf_counter() - start, size)
    return _with_pair(pairs[client], made)

  def attempts(ids: list[int], present: list[int]) -> Iterator[_Keys]:
    """The keys that the cohort encrypts under, one set after another."""
    if chosen.keys == "shared":
      yield _with_pair(shared, SetUp(0, 0.0, 0))
    elif chosen.keys == "per_client":
      # A cohort is in random order, so that its first client is a random one.
      yield pair_of(ids[0])
      if present and present[0] != ids[0]:
        yield pair_of(present[0])
    else:
      yield _with_group(chosen, cohort_size, ids)
      if 2 <= len(present) < len(ids):
        yield _with_group(chosen, cohort_size, present)

  def combine(
    updates: Update,
    ready: np.ndarray,
    arrived: np.ndarray,
    cohort: Cohort,
    watched: Sequence[int],
    model_bytes: int,
    key: Array,
  ) -> Outcome:
    ids, sizes = np.asarray(cohort.client_id), np.asarray(cohort.size)
    flat = _flatten(updates)
    beyond = np.abs(flat) > params.bound
    taking = ready
    if chosen.bits is None:
      # An update that cannot be encoded is not sent, as one that is not finite.
      taking = ready & ~beyond.any(axis=1)
    weights = sizes / max(int(sizes.max()), 1)
    present = ids[arrived].tolist()
    sent = np.zeros(len(ids), np.int64)
    messages: dict[int, bytes] = {}
    made, spent, tries = SetUp(0, 0.0, 0), 0.0, 0
    for keys in attempts(ids.tolist(), present):
      tries += 1
      made = SetUp(
        made.key_pairs + keys.made.key_pairs,
        made.key_seconds + keys.made.key_seconds,
        made.key_bytes + keys.made.key_bytes,
      )
      start = time.perf_counter()
      for i in np.flatnonzero(taking).tolist():
        rng = _rounding(key, int(ids[i]))
        messages[i] = keys.encrypt(flat[i], float(weights[i]), rng)
        sent[i] += len(messages[i])
      spent += time.perf_counter() - start
    costs = Costs(
      key_holder=-1,
      key_pairs=made.key_pairs,
      key_seconds=made.key_seconds,
      key_bytes=made.key_bytes,
      attempts=tries,
      encrypt_seconds=spent / max(int(taking.sum()), 1),
      add_seconds=0.0,
      share_seconds=0.0,
      decrypt_seconds=0.0,
      message_bytes=float(np.mean([len(m) for m in messages.values()] or [0])),
      key_holder_bytes=0,
      relative_error=None,
      clipped_share=float(beyond[taking].mean()) if taking.any() else 0.0,
    )
    seen = {
      int(ids[i]): Seen(
        message,
        _unflatten(he.decrypt(shared, message, 1).mean, updates)
        if chosen.attacker_holds_key
        else None,
      )
      for i, message in messages.items()
      if ids[i] in watched
    }
    if len(messages) < chosen.min_clients:
      nothing = np.zeros(flat.shape[1])
      return Outcome(
        _unflatten(nothing, updates), np.zeros_like(taking), sent, seen, costs
      )
    start = time.perf_counter()
    total = keys.add(list(messages.values()))
    middle = time.perf_counter()
    opened, share_bytes, share_seconds = keys.open(total, len(messages))
    end = time.perf_counter()
    exact = np.average(
      flat[taking].astype(np.float64), axis=0, weights=weights[taking]
    )
    copies = 1 if chosen.keys == "shared" else cohort_size
    seal = _SEAL_BYTES[chosen.keys]
    shares = len(present) if chosen.keys == "threshold" else 0
    return Outcome(
      _unflatten(opened.mean, updates),
      taking,
      sent,
      seen,
      costs._replace(
        # Of those whose key is the last one's, the first opens the sum.
        key_holder=present[0],
        add_seconds=middle - start,
        share_seconds=share_seconds,
        decrypt_seconds=end - middle - shares * share_seconds,
        key_holder_bytes=len(total)
        + share_bytes
        + copies * (model_bytes + seal),
        relative_error=_relative_error(opened.mean, exact),
      ),
    )

  return Protocol(set_up, _SEAL_BYTES[chosen.keys], combine)


def keys_for(chosen: Options, clients: int) -> SetUp:
  """What it costs until each of so many clients has its keys.

  Pairs of their own (`per_client`) are made here for three clients, and counted
  for all: each takes what any other takes. A joint key (`threshold`) is that of
  one round in which all of them take part.

  Args:
    chosen: the defence's parameters.
    clients: that need keys.

  Raises:
    UserError: parameters that are not sound for so many.
  """
  params = _parameters(chosen, clients)
  if chosen.keys == "threshold":
    return _with_group(chosen, clients, range(clients)).made
  tries = 3
  start = time.perf_counter()
  pairs = [he.key_pair(params) for _ in range(tries)]
  each = (time.perf_counter() - start) / tries
  if chosen.keys == "per_client":
    public = len(pairs[0].public.serialized)
    return SetUp(clients, clients * each, clients * public)
  return SetUp(1, each, _handed_out(pairs[0], clients))


def _rounding(key: Array, client: int) -> np.random.Generator:
  """What a client rounds with: of a round's key and its own id."""
  words = np.asarray(jax.random.key_data(key)).ravel().tolist()
  return np.random.Generator(np.random.Philox([*words, client, 0x4845]))


def seen_alone(
  chosen: Options, update: Update, key: Array, client: int
) -> Seen:
  """What the server has of one client's update, outside of any round.

  Args:
    chosen: the defence's parameters.
    update: finite; no entry beyond the bound, where none is rounded.
    key: the round's.
    client: its id.

  Raises:
    UserError: an entry beyond the bound.
  """
  params = _parameters(chosen, chosen.min_clients)
  batch = jax.tree.map(lambda leaf: np.asarray(leaf)[None], update)
  flat = _flatten(batch)[0]
  if chosen.keys == "threshold":
    group = _group(chosen, chosen.min_clients, range(chosen.min_clients))
    return Seen(threshold.encrypt(group, flat, 1.0), None)
  pair = he.key_pair(params)
  message = he.encrypt(pair.public, flat, 1.0, _rounding(key, client))
  if not chosen.attacker_holds_key:
    return Seen(message, None)
  return Seen(message, _unflatten(he.decrypt(pair, message, 1).mean, batch))


def _flatten(updates: Update) -> np.ndarray:
  """[clients, values] of leaves with a leading axis of clients."""
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(updates)]
  return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)


def _unflatten(flat: np.ndarray, updates: Update) -> Params:
  """One update of the shape that `updates` has without its leading axis."""
  leaves, treedef = jax.tree.flatten(updates)
  sizes = [math.prod(leaf.shape[1:]) for leaf in leaves]
  parts = np.split(flat.astype(np.float32), np.cumsum(sizes)[:-1])
  return jax.tree.unflatten(
    treedef,
    [p.reshape(leaf.shape[1:]) for p, leaf in zip(parts, leaves, strict=True)],
  )


def _relative_error(found: np.ndarray, exact: np.ndarray) -> float:
  norm = float(np.linalg.norm(exact))
  return float(np.linalg.norm(found - exact)) / norm if norm else 0.0


def figures(set_up: SetUp, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """A run's costs of encryption, for `summary.json`.

  Args:
    set_up: before the first round.
    rounds: each round's `Costs` as a dict.
  """
  errors_ = [
    r["relative_error"] for r in rounds if r["relative_error"] is not None
  ]

  def mean(name: str) -> float | None:
    return float(np.mean([r[name] for r in rounds])) if rounds else None

  return {
    "key_pairs": set_up.key_pairs + sum(r["key_pairs"] for r in rounds),
    "key_seconds": set_up.key_seconds + sum(r["key_seconds"] for r in rounds),
    "key_bytes": set_up.key_bytes + sum(r["key_bytes"] for r in rounds),
    "encrypt_seconds_per_client": mean("encrypt_seconds"),
    "add_seconds": mean("add_seconds"),
    "share_seconds_per_client": mean("share_seconds"),
    "decrypt_seconds": mean("decrypt_seconds"),
    "key_holder_bytes": mean("key_holder_bytes"),
    "relative_error_max": max(errors_, default=None),
    "clipped_share": mean("clipped_share"),
    "rounds_not_opened": sum(r["key_holder"] < 0 for r in rounds),
  }
