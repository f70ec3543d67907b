"""How the server combines what it decoded.

The weighted mean is accumulated client by client and needs no memory for the
cohort. The robust aggregates need every update of the round at once: their
memory grows with the cohort.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpqfl_jax import errors, specs, trees
from mpqfl_jax.types import Array, Update


class Aggregator(NamedTuple):
  """A way to combine updates.

  Attributes:
    name: as in `AGGREGATORS`.
    combine: (updates with a leading axis [clients], weight[clients] float32, 0
      for a client that takes no part) -> update; None for the weighted mean,
      which the engine accumulates.
  """

  name: str
  combine: Callable[[Update, Array], Update] | None


def is_finite(update: Update) -> Array:
  """Whether every entry is a finite number, [] bool.

  A client whose training diverged takes no part in the mean and is counted as
  rejected.
  """
  # A sum of floats is one vectorised pass; XLA:CPU writes out the booleans of a
  # conjunction and then reduces them one by one. Sums that are finite prove it;
  # those of finite entries may yet overflow, and zero times these is zero.
  leaves = jax.tree.leaves(update)

  def exactly():
    return sum(jnp.sum(0.0 * leaf) for leaf in leaves) == 0

  total = sum(jnp.sum(leaf) for leaf in leaves)
  return jax.lax.cond(jnp.isfinite(total), lambda: jnp.bool_(True), exactly)


def accumulate(total: Update, update: Update, weight: Array) -> Update:
  """total + weight * update."""
  return jax.tree.map(lambda t, u: t + weight * u, total, update)


def mean(total: Update, weight: Array) -> Update:
  """total / weight; zero where nobody's update arrived."""
  return trees.scale(jnp.where(weight > 0, 1.0 / weight, 0.0), total)


def _column(weight: Array, leaf: Array) -> Array:
  return weight.reshape(-1, *[1] * (leaf.ndim - 1))


def _ranked(leaf: Array, weight: Array) -> Array:
  """Each entry's values in order, those of absent clients last."""
  return jnp.sort(jnp.where(_column(weight, leaf) > 0, leaf, jnp.inf), axis=0)


def _mean() -> Aggregator:
  return Aggregator("mean", None)


def _median() -> Aggregator:
  def combine(updates, weight):
    count = jnp.sum(weight > 0)
    low, high = jnp.maximum(count - 1, 0) // 2, count // 2

    def leaf(u):
      ranked = _ranked(u, weight)
      middle = 0.5 * (ranked[low] + ranked[jnp.minimum(high, len(u) - 1)])
      return jnp.where(count > 0, middle, 0.0)

    return jax.tree.map(leaf, updates)

  return Aggregator("median", combine)


def _trimmed_mean(share: float = 0.1) -> Aggregator:
  if not 0 <= share < 0.5:
    raise errors.UserError(
      f"trimmed_mean(share={share}). Expected the share cut off at each end,"
      " from 0 to below 0.5."
    )

  def combine(updates, weight):
    count = jnp.sum(weight > 0)
    cut = jnp.floor(share * count).astype(jnp.int32)

    def leaf(u):
      rank = _column(jnp.arange(len(u)), u)
      kept = (rank >= cut) & (rank < count - cut)
      total = jnp.sum(jnp.where(kept, _ranked(u, weight), 0.0), axis=0)
      return total / jnp.maximum(count - 2 * cut, 1)

    return jax.tree.map(leaf, updates)

  return Aggregator("trimmed_mean", combine)


def _krum(byzantine: int = 1, best: int = 1) -> Aggregator:
  if byzantine < 0 or best < 1:
    raise errors.UserError(
      f"krum(byzantine={byzantine},best={best}). Expected byzantine from 0 and"
      " best from 1."
    )

  def combine(updates, weight):
    flat = jnp.concatenate(
      [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(updates)], axis=1
    )
    present = weight > 0
    count = jnp.sum(present)
    # The differences themselves, because the expanded square cancels.
    distance = jax.lax.map(lambda row: jnp.sum((flat - row) ** 2, axis=1), flat)
    distance = jnp.where(present[None, :], distance, jnp.inf)
    ranked = jnp.sort(distance, axis=1)
    # The nearest is the update itself, at distance 0.
    near = jnp.maximum(count - byzantine - 2, 1)
    rank = jnp.arange(len(flat))
    counted = (rank >= 1) & (rank <= near) & jnp.isfinite(ranked)
    score = jnp.sum(jnp.where(counted, ranked, 0.0), axis=1)
    order = jnp.argsort(jnp.where(present, score, jnp.inf))
    place = jnp.zeros(len(flat), jnp.int32).at[order].set(rank)
    chosen = (place < best) & present
    share = chosen / jnp.maximum(jnp.sum(chosen), 1)
    return jax.tree.map(lambda u: jnp.tensordot(share, u, 1), updates)

  return Aggregator("krum", combine)


def _geometric_median(
  iterations: int = 8, smoothing: float = 1e-6
) -> Aggregator:
  if iterations < 1 or not smoothing > 0:
    raise errors.UserError(
      f"geometric_median(iterations={iterations},smoothing={smoothing})."
      " Expected iterations from 1 and smoothing above 0."
    )

  def combine(updates, weight):
    share = weight / jnp.maximum(jnp.sum(weight), 1e-12)

    def average(share):
      return jax.tree.map(lambda u: jnp.tensordot(share, u, 1), updates)

    def step(_, centre):
      squares = jax.tree.map(
        lambda u, c: jnp.sum((u - c).reshape(len(u), -1) ** 2, axis=1),
        updates,
        centre,
      )
      distance = jnp.sqrt(sum(jax.tree.leaves(squares)))
      pull = share / jnp.maximum(distance, smoothing)
      return average(pull / jnp.maximum(jnp.sum(pull), 1e-30))

    return jax.lax.fori_loop(0, iterations, step, average(share))

  return Aggregator("geometric_median", combine)


# name -> (constructor, one line with its source)
AGGREGATORS: dict[str, tuple[Callable[..., Aggregator], str]] = {
  "mean": (_mean, "weighted by examples, McMahan et al. 2017"),
  "median": (_median, "of each coordinate, Yin et al. 2018, definition 1"),
  "trimmed_mean": (_trimmed_mean, "Yin et al. 2018, definition 2"),
  "krum": (_krum, "Krum and, with best > 1, multi-Krum, Blanchard et al. 2017"),
  "geometric_median": (
    _geometric_median,
    "smoothed Weiszfeld, Pillutla et al. 2022, algorithm 2",
  ),
}


def make(spec: str) -> Aggregator:
  """Builds an aggregator from `name` or `name(key=value,...)`.

  Raises:
    UserError: no such aggregator, or parameters that it does not take.
  """
  name, options = specs.parse(spec)
  if name not in AGGREGATORS:
    raise errors.unknown_name("aggregator", name, AGGREGATORS)
  return specs.call(f"aggregator {name}", AGGREGATORS[name][0], options)
