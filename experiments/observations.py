"""What the server keeps of a run: single updates as they crossed the wire."""

from collections.abc import Sequence
import io
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import folder
from mpqfl_jax import attacks, encrypted, federated, local
from mpqfl_jax.defenses import Defense
from mpqfl_jax.types import Params


class Watched(NamedTuple):
  """One client's update as it crossed the wire, and the truth behind it.

  Attributes:
    defense: what the client did; its codec is public.
    round: from 1; 0 where no training took place.
    client: its id.
    params: the global model that the client started from.
    message: the bytes that crossed the wire; under encryption the ciphertexts,
      or, where the server holds the key, the update that it found in them.
    split: which split the images are from.
    rows: [steps * batch], their rows there, in the order of training.
    shape: its steps, images in each, and epochs.
    learning_rate: the client's step size.
    variates: the server's control variate, as the client got it, and the
      client's own before the round, which is the sum of what it has sent; None
      outside SCAFFOLD.
    mixing: [epochs * steps], see `Observation.mixing`; None where the client
      mixed nothing.
  """

  defense: Defense
  round: int
  client: int
  params: Params
  message: bytes
  split: str
  rows: np.ndarray
  shape: attacks.Work
  learning_rate: float
  variates: tuple[Params, Params] | None
  mixing: np.ndarray | None = None


def message(defense: Defense, seen: encrypted.Seen) -> bytes:
  """What is kept of an encrypted update: see Watched."""
  if seen.update is None:
    return seen.message
  codec = defense.codec
  payload, _ = codec.encode(
    jax.random.key(0), seen.update, codec.init(seen.update)
  )
  return codec.pack(jax.device_get(payload))


def visited(
  schedule: local.Schedule,
  order: np.ndarray,
  round_key,
  client: int,
  offset: int,
  size: int,
  shape: attacks.Work,
) -> np.ndarray:
  """Rows of the training set that a client's first epoch shows, in order.

  Args:
    schedule: how it went through its examples.
    order: [examples], the population's, see `Examples.order`.
    round_key: the round's.
    client: its id.
    offset: where its part of `order` starts.
    size: its number of examples.
    shape: its steps, images in each, and epochs.
  """
  batches = federated.client_keys(round_key, client).batches
  # A gradient over all of the client's data is one step of many batches.
  rows, mask = schedule.rows(
    batches,
    jnp.int32(offset),
    jnp.int32(size),
    jnp.asarray(order, jnp.int32),
    -(-shape.images // schedule.batch_size),
  )
  return np.asarray(rows)[np.asarray(mask) > 0][: shape.images]


def mixing(
  defense: Defense, round_key, client: int, shape: attacks.Work
) -> np.ndarray | None:
  """With what weights a client mixed its batches, None where it did not."""
  if defense.mixup is None:
    return None
  batches = federated.client_keys(round_key, client).batches
  steps = shape.steps * shape.epochs
  return np.asarray(defense.mixup.weights(batches, steps))


def store(run_dir: pathlib.Path, watched: Sequence[Watched]) -> None:
  """Writes what the server keeps to `observations/`, a file an update."""
  for w in watched:
    buffer = io.BytesIO()
    leaves = jax.tree.leaves(w.params)
    named = {f"param_{i}": leaf for i, leaf in enumerate(leaves)}
    for i, leaf in enumerate(jax.tree.leaves(w.variates)):
      named[f"variate_{i}"] = leaf
    if w.mixing is not None:
      named["mixing"] = w.mixing
    np.savez(
      buffer,
      message=np.frombuffer(w.message, np.uint8),
      rows=w.rows,
      shape=np.array(w.shape),
      split=w.split,
      learning_rate=w.learning_rate,
      **named,
    )
    folder.write_atomically(_place(run_dir, w), buffer.getvalue())


def _place(run_dir: pathlib.Path, w: Watched) -> pathlib.Path:
  name = f"{folder.slug(w.defense.spec)}_round{w.round}_client{w.client}.npz"
  return run_dir / "observations" / name


def load(
  run_dir: pathlib.Path, defense: Defense, last_round: int, params: Params
) -> list[Watched]:
  """Reads what `store` wrote of one defence, up to a round.

  Args:
    run_dir: the run's folder.
    defense: whose updates.
    last_round: later ones are left out.
    params: gives the structure of the parameters.

  Returns:
    In the order in which they were kept.
  """
  pattern = re.compile(
    re.escape(folder.slug(defense.spec)) + r"_round(\d+)_client(\d+)\.npz"
  )
  template, treedef = jax.tree.flatten(params)
  found = []
  for path in (run_dir / "observations").glob("*.npz"):
    match = pattern.fullmatch(path.name)
    if match is None or int(match[1]) > last_round:
      continue
    with np.load(path) as file:
      leaves = [file[f"param_{i}"] for i in range(len(template))]
      halves = [
        [file[f"variate_{i + n}"] for i in range(len(template))]
        for n in (0, len(template))
        if "variate_0" in file
      ]
      found.append(
        Watched(
          defense,
          int(match[1]),
          int(match[2]),
          jax.tree.unflatten(treedef, leaves),
          file["message"].tobytes(),
          str(file["split"]),
          file["rows"],
          attacks.Work(*(int(n) for n in file["shape"])),
          float(file["learning_rate"]),
          (
            jax.tree.unflatten(treedef, halves[0]),
            jax.tree.unflatten(treedef, halves[1]),
          )
          if halves
          else None,
          file.get("mixing"),
        )
      )
  return sorted(found, key=lambda w: (w.round, len(w.rows), w.client))
