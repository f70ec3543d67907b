"""Where the states of a population's clients are kept between their rounds.

SCAFFOLD's variates, error feedback's residuals and the ranges of static
quantisers belong to a client and outlive the round. A round needs those of its
cohort only: they are gathered before it and written back after it. All stores
hand out the same bits; they differ in what they cost:

  device  an array over the population on the device: the fastest, and a
          checkpoint holds all of it.
  host    the same in the host's memory.
  disk    a file with a row for each client that has taken part. A checkpoint
          holds the place of each row, 8 bytes a client, and no row: rows that
          a checkpoint names are never overwritten while it is kept, so that a
          process may die at any moment.
"""

from collections.abc import Callable
import os
import pathlib
from typing import NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import checkpoint, errors, sharding
from mpqfl_jax.types import Array, PyTree

Ids = Array | np.ndarray

WHERE = ("auto", "device", "host", "disk")
# What `auto` leaves on a device that does not say how much memory it has, the
# share of the memory of one that does, and what it leaves on the host: a
# checkpoint copies it.
DEVICE_BYTES = 2**28
DEVICE_SHARE = 1 / 8
HOST_BYTES = 2**31
# States of a cohort that are on the device at a time.
BLOCK_BYTES = 2**28
# A program on a CPU keeps some 10 KB for every turn of a loop until it ends.
BLOCK_CLIENTS = 4096


class Place(NamedTuple):
  """Where a population's states are kept.

  Attributes:
    name: `device`, `host` or `disk`.
    num_bytes: of the states of all clients together.
    reason: why, for `config.json`.
    block: how many clients' states are on the device at a time.
  """

  name: str
  num_bytes: int
  reason: str
  block: int


def place(
  where: str,
  client_state: PyTree,
  num_clients: int,
  cohort_size: int,
  together: int = 1,
  device_memory: int | None = None,
) -> Place:
  """Resolves `--client_state`.

  Args:
    where: one of `WHERE`.
    client_state: of one client, or its shapes.
    num_clients: size of the population.
    cohort_size: clients in a round. Where they or their states are too many,
      they go through the device in blocks, wherever states are kept, so that
      results do not depend on the place.
    together: how many clients the plan runs side by side on all devices; a
      block is a multiple of it.
    device_memory: bytes of the device, None where it does not say.

  Raises:
    UserError: no such place.
  """
  if where not in WHERE:
    raise errors.unknown_name("--client_state", where, WHERE)
  row = sum(
    leaf.size * np.dtype(leaf.dtype).itemsize
    for leaf in jax.tree.leaves(client_state)
  )
  size = row * num_clients
  clients = min(BLOCK_BYTES // max(row, 1), BLOCK_CLIENTS)
  fit = clients // together * together
  block = min(cohort_size, max(fit, together))
  if where != "auto":
    return Place(where, size, "asked for", block)
  limit = DEVICE_BYTES
  if device_memory is not None:
    limit = int(DEVICE_SHARE * device_memory)
  for name, most in (("device", limit), ("host", HOST_BYTES)):
    if size <= most:
      return Place(
        name, size, f"{size:,} bytes; the {name} takes up to {most:,}", block
      )
  return Place(
    "disk", size, f"{size:,} bytes; the host takes up to {HOST_BYTES:,}", block
  )


class Store(NamedTuple):
  """The states of a population.

  Attributes:
    init: () -> what a checkpoint has to hold, a pytree of arrays.
    open: held -> held, as `init` or a checkpoint gave it; to be called once
      before the others.
    gather: (held, ids[cohort]) -> states[cohort, ...].
    scatter: (held, ids[cohort], states[cohort, ...]) -> held; ids are distinct,
      but for -1, which is nobody. What went in is used up.
    before_save: called before a checkpoint of what is held is written.
    after_save: called when it has been, and older ones have gone.
    remove: called when no checkpoint will be needed again.
  """

  init: Callable[[], PyTree]
  open: Callable[[PyTree], PyTree]
  gather: Callable[[PyTree, Ids], PyTree]
  scatter: Callable[[PyTree, Ids, PyTree], PyTree]
  before_save: Callable[[], None]
  after_save: Callable[[], None]
  remove: Callable[[], None]


def make(
  name: str,
  client_state: PyTree,
  num_clients: int,
  mesh: jax.sharding.Mesh | None = None,
  path: pathlib.Path | None = None,
  keep: int = checkpoint.KEEP,
) -> Store:
  """The store of a given name, see the module's docstring.

  Args:
    name: `device`, `host` or `disk`.
    client_state: of a client that has not taken part yet, arrays.
    num_clients: size of the population.
    mesh: where the arrays are for `device`, whole on each; None for JAX's
      default device.
    path: of the file, for `disk`.
    keep: how many checkpoints stay at a time, for `disk`.
  """
  if name == "device" or not jax.tree.leaves(client_state):
    return _on_device(client_state, num_clients, mesh)
  first = jax.tree.map(np.asarray, jax.device_get(client_state))
  if name == "host":
    return _on_host(first, num_clients)
  assert name == "disk" and path is not None, (name, path)
  return _on_disk(first, num_clients, path, keep)


def _nothing() -> None:
  pass


def _on_device(
  first: PyTree, num_clients: int, mesh: jax.sharding.Mesh | None
) -> Store:
  def init():
    return jax.tree.map(
      lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], num_clients, 0), first
    )

  def gather(held: PyTree, ids: Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[ids], held)

  def scatter(held: PyTree, ids: Array, states: PyTree) -> PyTree:
    place = jnp.where(ids < 0, num_clients, ids)
    return jax.tree.map(
      lambda old, new: old.at[place].set(new, mode="drop"), held, states
    )

  return Store(
    init,
    open=lambda held: held if mesh is None else sharding.put(held, mesh),
    gather=jax.jit(gather),
    scatter=jax.jit(scatter, donate_argnums=0),
    before_save=_nothing,
    after_save=_nothing,
    remove=_nothing,
  )


def _on_host(first: PyTree, num_clients: int) -> Store:
  def init():
    return jax.tree.map(
      lambda leaf: np.repeat(leaf[None], num_clients, 0), first
    )

  def scatter(held, ids, states):
    real = np.asarray(ids) >= 0

    def leaf(old, new):
      old[ids[real]] = new[real]

    jax.tree.map(leaf, held, jax.device_get(states))
    return held

  return Store(
    init,
    open=lambda held: jax.tree.map(np.array, held),
    gather=lambda held, ids: jax.tree.map(lambda leaf: leaf[ids], held),
    scatter=scatter,
    before_save=_nothing,
    after_save=_nothing,
    remove=_nothing,
  )


class Index(NamedTuple):
  """What a checkpoint holds of the rows in a file.

  Attributes:
    slot: [num_clients] int32, the row's place; -1 for a client that has not
      taken part.
    checksum: [num_clients] uint32, CRC-32 of the row.
  """

  slot: np.ndarray
  checksum: np.ndarray


def _on_disk(
  first: PyTree, num_clients: int, path: pathlib.Path, keep: int
) -> Store:
  leaves, treedef = jax.tree.flatten(first)
  shapes = [leaf.shape for leaf in leaves]
  dtypes = [leaf.dtype for leaf in leaves]
  ends = np.cumsum([leaf.nbytes for leaf in leaves])

  def to_rows(states: list[np.ndarray]) -> np.ndarray:
    parts = [
      np.ascontiguousarray(leaf).reshape(len(leaf), -1).view(np.uint8)
      for leaf in states
    ]
    return np.concatenate(parts, axis=1)

  def to_states(rows: np.ndarray) -> PyTree:
    parts = np.split(rows, ends[:-1], axis=1)
    return jax.tree.unflatten(
      treedef,
      [
        np.ascontiguousarray(part).view(dtype).reshape(len(rows), *shape)
        for part, dtype, shape in zip(parts, dtypes, shapes, strict=True)
      ],
    )

  start = to_rows([leaf[None] for leaf in leaves])[0]
  file = RowFile(path, len(start), keep)

  def init():
    return Index(
      np.full(num_clients, -1, np.int32), np.zeros(num_clients, np.uint32)
    )

  def opened(held):
    held = Index(*(np.array(leaf) for leaf in held))
    file.open(held.slot[held.slot >= 0])
    return held

  def gather(held, ids):
    ids = np.asarray(ids)
    rows = np.tile(start, (len(ids), 1))
    known = np.flatnonzero((ids >= 0) & (held.slot[ids] >= 0))
    who = ids[known]
    rows[known] = file.read(held.slot[who], held.checksum[who])
    return to_states(rows)

  def scatter(held, ids, states):
    ids = np.asarray(ids)
    real = ids >= 0
    ids = ids[real]
    rows = to_rows([np.asarray(leaf)[real] for leaf in jax.tree.leaves(states)])
    held.slot[ids], held.checksum[ids] = file.write(held.slot[ids], rows)
    return held

  return Store(
    init, opened, gather, scatter, file.flush, file.saved, file.remove
  )


class RowFile:
  """Rows of equal length in a file; none that a checkpoint names is changed.

  A row is written to a new slot, and its old slot is free as soon as all
  checkpoints that name it have gone: `keep` checkpoints later. A row that has
  been written since the last checkpoint is named by none and is overwritten.
  The file therefore holds a row for each client that has taken part, and one
  for each row written in the time that `keep` checkpoints span.
  """

  def __init__(self, path: pathlib.Path, row_bytes: int, keep: int):
    self._path = path
    self._row_bytes = row_bytes
    self._keep = keep

  def open(self, used: np.ndarray) -> None:
    """Takes the file up where a checkpoint names the slots `used`.

    Other slots may still be named by an older checkpoint.
    """
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._path.touch()
    # Unbuffered, so that what was written is the operating system's at once.
    self._file = self._path.open("r+b", buffering=0)
    if len(used) == 0:
      self._file.truncate(0)
    size = self._path.stat().st_size
    self._top = -(-size // self._row_bytes)
    free = np.ones(self._top, bool)
    free[used[used < self._top]] = False
    self._free: list[int] = []
    # Slots given up since the last checkpoint, since the one before, ...
    self._given_up = [np.flatnonzero(free).tolist()]
    self._written: set[int] = set()  # since the last checkpoint
    self._trusted: set[int] = set()  # written or verified by this process

  def write(
    self, slots: np.ndarray, rows: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Writes rows whose last versions lie in `slots`, -1 for new ones.

    Returns:
      [rows] int32, the new slots; [rows] uint32, the checksums.
    """
    places = []
    for slot in slots.tolist():
      if slot not in self._written:
        if slot >= 0:
          self._given_up[0].append(slot)
        if self._free:
          slot = self._free.pop()
        else:
          slot, self._top = self._top, self._top + 1
      places.append(slot)
    self._written.update(places)
    self._trusted.update(places)
    new = np.array(places, np.int32)
    order = np.argsort(new)
    rows = rows[order]
    for first, last in _runs(new[order]):
      self._file.seek(int(new[order[first]]) * self._row_bytes)
      view = rows[first:last].reshape(-1).data
      while view:
        view = view[self._file.write(view) :]
    checksums = np.empty(len(rows), np.uint32)
    checksums[order] = [zlib.crc32(row.data) for row in rows]
    return new, checksums

  def read(self, slots: np.ndarray, checksums: np.ndarray) -> np.ndarray:
    """The rows in the given slots, [slots, row_bytes] uint8.

    Raises:
      UserError: a row is not what was written there.
    """
    order = np.argsort(slots)
    rows = np.empty((len(slots), self._row_bytes), np.uint8)
    for first, last in _runs(slots[order]):
      self._file.seek(int(slots[order[first]]) * self._row_bytes)
      view = rows[first:last].reshape(-1).data
      while view:
        count = self._file.readinto(view)
        if not count:
          raise self._damaged()
        view = view[count:]
    for row, place in zip(rows, order, strict=True):
      slot = int(slots[place])
      if slot not in self._trusted:
        if zlib.crc32(row.data) != checksums[place]:
          raise self._damaged()
        self._trusted.add(slot)
    out = np.empty_like(rows)
    out[order] = rows
    return out

  def _damaged(self) -> errors.UserError:
    return errors.UserError(
      f"{self._path} is damaged: a client's state is not what was written."
      " Remove the newest checkpoint to go on from the one before, or begin"
      " anew with --overwrite."
    )

  def flush(self) -> None:
    """Makes what was written outlast a power failure."""
    os.fsync(self._file.fileno())

  def saved(self) -> None:
    """Notes that a checkpoint has been saved and the oldest has gone."""
    self._given_up.insert(0, [])
    while len(self._given_up) > self._keep:
      self._free += self._given_up.pop()
    self._written.clear()

  def remove(self) -> None:
    """Deletes the file."""
    self._file.close()
    self._path.unlink()


def _runs(slots: np.ndarray) -> list[tuple[int, int]]:
  """First and one past last index of each run of consecutive slots."""
  if len(slots) == 0:
    return []
  cuts = np.flatnonzero(np.diff(slots) != 1) + 1
  return list(
    zip([0, *cuts.tolist()], [*cuts.tolist(), len(slots)], strict=True)
  )
