"""How training examples are divided among clients.

Every partition uses every example exactly once and is a function of the labels
and of a NumPy `Generator` alone. It is stored as one permutation cut at
offsets, because a list of a million arrays is slow to make and to walk.

A population may need more examples than there are: `make` then deals the
training set out again, as often as it takes, so that a million clients share
the 60,000 images of MNIST. Only row numbers are repeated, never an image.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import numpy as np

from mpqfl_jax import errors, specs

# Client ids travel as int32.
_MAX_CLIENTS = 2**31 - 1
# So do places in the order of examples.
_MAX_EXAMPLES = 2**31 - 1


class Partition(NamedTuple):
  """Client k holds the examples `order[offsets[k]:offsets[k + 1]]`.

  Attributes:
    order: [examples held], integer, rows of the training set: a permutation
      of them, unless `make` was asked for more or fewer.
    offsets: [clients + 1], int64, from 0 to the number of examples held.
  """

  order: np.ndarray
  offsets: np.ndarray

  @property
  def num_clients(self) -> int:
    return len(self.offsets) - 1

  @property
  def sizes(self) -> np.ndarray:
    """[clients], int64, how many examples each client holds."""
    return np.diff(self.offsets)

  def client(self, k: int) -> np.ndarray:
    """[size of client k], int64, the rows that client k holds."""
    return self.order[self.offsets[k] : self.offsets[k + 1]]


def iid(
  labels: np.ndarray,
  num_clients: int,
  rng: np.random.Generator,
  size_sigma: float = 0.0,
) -> Partition:
  """Examples dealt at random, whatever their labels.

  Args:
    labels: [examples], integers.
    num_clients: number of clients.
    rng: source of all randomness.
    size_sigma: how unequal the clients' sizes are: the standard deviation of
      the logarithm of their log-normal weights. At 0 sizes differ by at most
      one. A client's size is one plus its share of what is then left over.

  Returns:
    The partition. With more clients than examples some clients are empty, else
    none is.

  Raises:
    UserError: no clients, no examples, or a negative `size_sigma`.

  Reference: IID clients as in McMahan et al. 2017, section 3; log-normal sizes
  as in Acar et al. 2021 (FedDyn), section 4.
  """
  _check(labels, num_clients, size_sigma)
  sizes = _sizes(len(labels), num_clients, rng, size_sigma)
  return Partition(rng.permutation(len(labels)), _offsets(sizes))


def dirichlet(
  labels: np.ndarray,
  num_clients: int,
  rng: np.random.Generator,
  alpha: float = 0.5,
  size_sigma: float = 0.0,
) -> Partition:
  """Each client has a label distribution of its own, q ~ Dirichlet(alpha p).

  p is the label distribution of the whole set. A client first draws one
  example with a label from its q (where that class has run out: with any label
  that is left); every other example goes to a client drawn with probability
  proportional to the client's q at the example's label, times its size weight.
  With many clients a client's labels are therefore independent draws from its
  q. With few clients the classes that nobody favours must still go somewhere,
  which evens the label distributions out a little.

  Args:
    labels: [examples], integers.
    num_clients: number of clients.
    rng: source of all randomness.
    alpha: concentration: towards 0 a client holds a single class, towards
      infinity the partition becomes IID.
    size_sigma: standard deviation of the logarithm of the clients' size
      weights. At 0 sizes still vary, as the counts of random draws do.

  Returns:
    The partition. With more clients than examples some clients are empty, else
    none is.

  Raises:
    UserError: no clients, no examples, `alpha` not positive and finite, or a
      negative `size_sigma`.

  Reference: Hsu, Qi, Brown 2019 (arXiv:1909.06335), section 3.
  """
  _check(labels, num_clients, size_sigma)
  if not (alpha > 0 and math.isfinite(alpha)):
    raise errors.UserError(
      f"dirichlet alpha must be positive and finite, not {alpha}. Small values "
      "(0.1) give clients few classes, large ones (100) nearly all alike."
    )
  n = len(labels)
  _, kinds, counts = np.unique(labels, return_inverse=True, return_counts=True)
  # NumPy rejects zero concentrations: a vanishing alpha is as good as 1e-300.
  concentration = np.maximum(alpha * (counts / n), 1e-300)
  q = rng.dirichlet(concentration, size=num_clients)
  # Rows in a random order, one list a class: what is taken from the front of
  # a list is a draw without replacement.
  shuffled = rng.permutation(n)
  rows = np.split(
    shuffled[np.argsort(kinds[shuffled], kind="stable")],
    np.cumsum(counts)[:-1],
  )
  owner = np.full(n, -1, np.int64)
  if num_clients <= n:
    rows = _first_example(q, rows, owner, rng)
  weights = _size_weights(num_clients, rng, size_sigma)
  for kind, left in enumerate(rows):
    cumulative = np.cumsum(q[:, kind] * weights)
    if not cumulative[-1] > 0:  # no client wants this class
      cumulative = np.cumsum(weights)
    draws = rng.random(len(left)) * cumulative[-1]
    owner[left] = np.searchsorted(cumulative, draws, side="right")
  return _from_owner(owner, num_clients, rng)


def shards(
  labels: np.ndarray,
  num_clients: int,
  rng: np.random.Generator,
  shards_per_client: int = 2,
  size_sigma: float = 0.0,
) -> Partition:
  """The set sorted by label and cut into shards, two to each client.

  Args:
    labels: [examples], integers.
    num_clients: number of clients.
    rng: source of all randomness.
    shards_per_client: shards that each client gets. No shard is empty: where
      the examples do not suffice, there are as many shards as examples and
      clients get fewer.
    size_sigma: standard deviation of the logarithm of the shards' log-normal
      widths. At 0 widths differ by at most one.

  Returns:
    The partition. With more clients than examples some clients are empty, else
    none is.

  Raises:
    UserError: no clients, no examples, no shards, or a negative `size_sigma`.

  Reference: McMahan et al. 2017 (arXiv:1602.05629), section 3.
  """
  _check(labels, num_clients, size_sigma)
  if shards_per_client < 1:
    raise errors.UserError(
      f"shards_per_client must be at least 1, not {shards_per_client}."
    )
  n = len(labels)
  num_shards = min(shards_per_client * num_clients, n)
  widths = _sizes(n, num_shards, rng, size_sigma)
  # Ties in a random order, so that shards of one class are alike.
  shuffled = rng.permutation(n)
  by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
  # Dealing in turn gives every client its first shard before any its second.
  dealt = rng.permutation(num_clients)[np.arange(num_shards) % num_clients]
  owner = np.empty(n, np.int64)
  owner[by_label] = np.repeat(rng.permutation(dealt), widths)
  return _from_owner(owner, num_clients, rng)


PARTITIONS: dict[str, Callable[..., Partition]] = {
  "iid": iid,
  "dirichlet": dirichlet,
  "shards": shards,
}


def make(
  name: str,
  labels: np.ndarray,
  num_clients: int,
  rng: np.random.Generator,
  client_examples: int | None = None,
  **params: float,
) -> Partition:
  """Partitions by name, after sharing out the examples to be divided.

  Where the clients are to hold more examples than there are, the set is dealt
  out again: each row comes up q or q + 1 times in all, those q + 1 times drawn
  at random, and the copies are then divided as if they were different. Two
  copies of a row mostly go to different clients; one client gets both as often
  as chance has it.

  Args:
    name: a key of `PARTITIONS`.
    labels: [examples], integers.
    num_clients: number of clients.
    rng: source of all randomness.
    client_examples: how many examples a client holds, on average where sizes
      are unequal. None divides each example once, and as often as it takes to
      leave no client without one.
    **params: the named partition's own parameters.

  Returns:
    The partition.

  Raises:
    UserError: an unknown name or parameter, or a value out of range.
  """
  if name not in PARTITIONS:
    raise errors.unknown_name("partition", name, PARTITIONS)
  _check(labels, num_clients, 0.0)
  if client_examples is None:
    total = max(len(labels), num_clients)
  else:
    total = num_clients * client_examples
  if not 1 <= total <= _MAX_EXAMPLES:
    raise errors.UserError(
      f"{num_clients} clients of {client_examples} examples are {total} in all."
      f" Expected 1 to {_MAX_EXAMPLES}, as places are int32."
    )
  rows = _rows(len(labels), total, rng)
  part = specs.call(
    f"partition {name}",
    PARTITIONS[name],
    params,
    labels if rows is None else labels[rows],
    num_clients,
    rng,
  )
  return part if rows is None else part._replace(order=rows[part.order])


def _rows(
  have: int, wanted: int, rng: np.random.Generator
) -> np.ndarray | None:
  """[wanted] int32: rows of which none comes up twice more than another.

  None stands for every row once.
  """
  if wanted == have:
    return None
  whole, rest = divmod(wanted, have)
  once = np.arange(have, dtype=np.int32)
  some = np.sort(rng.choice(once, rest, replace=False))
  return np.concatenate([*[once] * whole, some])


def _check(labels: np.ndarray, num_clients: int, size_sigma: float) -> None:
  if not 1 <= num_clients <= _MAX_CLIENTS:
    raise errors.UserError(
      f"the number of clients must be from 1 to {_MAX_CLIENTS} (ids are "
      f"int32), not {num_clients}."
    )
  if len(labels) == 0:
    raise errors.UserError("there are no examples to divide among clients.")
  if not (size_sigma >= 0 and math.isfinite(size_sigma)):
    raise errors.UserError(
      f"size_sigma must be finite and at least 0, not {size_sigma}. 0 gives "
      "clients of equal size, 1 very unequal ones."
    )


def _size_weights(
  count: int, rng: np.random.Generator, sigma: float
) -> np.ndarray:
  """[count], float64, log-normal, the largest scaled to 1."""
  if sigma == 0:
    return np.ones(count)
  z = rng.standard_normal(count)
  return np.exp(sigma * (z - z.max()))


def _sizes(
  total: int, count: int, rng: np.random.Generator, sigma: float
) -> np.ndarray:
  """[count], int64, sizes that sum to `total`, none 0 if there are enough."""
  if sigma == 0:
    return np.diff(np.arange(count + 1, dtype=np.int64) * total // count)
  least = int(count <= total)
  spare = total - least * count
  weights = _size_weights(count, rng, sigma)
  share = spare * (weights / weights.sum())
  sizes = np.floor(share).astype(np.int64)
  # Largest remainders, so that rounding loses and adds no example.
  order = np.argsort(sizes - share, kind="stable")
  sizes[order[: spare - sizes.sum()]] += 1
  return sizes + least


def _offsets(sizes: np.ndarray) -> np.ndarray:
  return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _first_example(
  q: np.ndarray,
  rows: list[np.ndarray],
  owner: np.ndarray,
  rng: np.random.Generator,
) -> list[np.ndarray]:
  """Gives every client one example, by its q; returns the rows left."""
  cumulative = np.cumsum(q, axis=1)
  draws = rng.random(len(q)) * cumulative[:, -1]
  wanted = np.sum(draws[:, None] >= cumulative, axis=1)
  clients = rng.permutation(len(q))
  wanted = wanted[clients]
  unserved, rows_left = [], []
  for kind, supply in enumerate(rows):
    takers = clients[wanted == kind]
    served = min(len(takers), len(supply))
    owner[supply[:served]] = takers[:served]
    unserved.append(takers[served:])
    rows_left.append(supply[served:])
  waiting = np.concatenate(unserved)
  if len(waiting):
    taken = rng.permutation(np.concatenate(rows_left))[: len(waiting)]
    owner[taken] = waiting
    rows_left = [left[owner[left] < 0] for left in rows_left]
  return rows_left


def _from_owner(
  owner: np.ndarray, num_clients: int, rng: np.random.Generator
) -> Partition:
  """Groups rows by their client, in a random order within each."""
  shuffled = rng.permutation(len(owner))
  order = shuffled[np.argsort(owner[shuffled], kind="stable")]
  sizes = np.bincount(owner, minlength=num_clients)
  return Partition(order, _offsets(sizes))
