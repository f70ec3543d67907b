"""A lower bound on epsilon, from many runs with and without a canary.

A mechanism is run on two inputs that it must make hard to tell apart, and a
score of its output, about the likelihood ratio, is thresholded. The rates of
the two kinds of error, with Clopper-Pearson intervals, bound epsilon from below
whatever the mechanism does: a bound above the epsilon that is claimed proves
the claim wrong. A bound below proves nothing; it only shows that this attack
does not.
"""

from collections.abc import Callable
import itertools
import math
from typing import NamedTuple

import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np
from scipy import stats

from mpqfl_jax import central, defenses, dp_sgd, trees
from mpqfl_jax.types import Array, Examples, Key, Model, Update

# (key, whether the canary is there) -> score, [] float32.
Score = Callable[[Key, bool], Array]

_CHUNK = 2000
_THRESHOLDS = 200


class Bound(NamedTuple):
  """What an audit found.

  Attributes:
    epsilon: the lower bound, at least 0.
    threshold: of the score.
    above: whether the bound is from outputs above the threshold or below it.
    with_canary: whether those are likelier with the canary or without it.
  """

  epsilon: float
  threshold: float
  above: bool
  with_canary: bool


def scores(score: Score, runs: int, key: Key) -> tuple[np.ndarray, np.ndarray]:
  """Scores of independent runs without and with the canary, [runs] each."""
  out = []
  for present in (False, True):
    run = jax.jit(jax.vmap(lambda k, p=present: score(k, p)))
    keys = jax.random.split(jax.random.fold_in(key, present), runs)
    parts = [run(keys[i : i + _CHUNK]) for i in range(0, runs, _CHUNK)]
    out.append(np.concatenate([np.asarray(part) for part in parts]))
  return out[0], out[1]


def lower_bound(
  absent: np.ndarray,
  present: np.ndarray,
  delta: float,
  confidence: float = 0.999,
) -> Bound:
  """A bound that is below the true epsilon with the given confidence.

  For every set S of outputs, P(S | present) <= e^epsilon P(S | absent) + delta,
  and the other way round. The threshold, and which way, are chosen on the first
  half of the runs; the second half, which had no part in it, gives the bound.

  Source: Jagielski, Ullman and Oprea 2020, algorithm 1; Nasr et al. 2021,
  section III; Clopper and Pearson 1934.

  Args:
    absent: [runs] scores without the canary.
    present: [runs] scores with it.
    delta: of the (epsilon, delta).
    confidence: that the bound holds.
  """
  halves = [np.array_split(s, 2) for s in (absent, present)]
  (first_absent, second_absent), (first_present, second_present) = halves
  pooled = np.concatenate([first_absent, first_present])
  quantiles = np.linspace(0, 1, _THRESHOLDS + 2)[1:-1]
  best = Bound(-math.inf, 0.0, True, True)
  for threshold in np.unique(np.quantile(pooled, quantiles)):
    for above, with_canary in itertools.product((True, False), repeat=2):
      place = float(threshold), above, with_canary
      found = _at(first_absent, first_present, *place, delta, confidence)
      if found > best.epsilon:
        best = Bound(found, *place)
  place = best.threshold, best.above, best.with_canary
  epsilon = _at(second_absent, second_present, *place, delta, confidence)
  return best._replace(epsilon=max(0.0, epsilon))


def _at(
  absent: np.ndarray,
  present: np.ndarray,
  threshold: float,
  above: bool,
  with_canary: bool,
  delta: float,
  confidence: float,
) -> float:
  """The bound from one set of outputs."""
  likely, rare = (present, absent) if with_canary else (absent, present)
  hits, false = (
    int(np.count_nonzero(s > threshold if above else s <= threshold))
    for s in (likely, rare)
  )
  if hits <= delta * len(likely) or false == len(rare):
    return -math.inf
  miss = (1 - confidence) / 2
  least = float(stats.beta.ppf(miss, hits, len(likely) - hits + 1))
  most = float(stats.beta.ppf(1 - miss, false + 1, len(rare) - false))
  return math.log((least - delta) / most) if least > delta else -math.inf


def of_update(defense: defenses.Defense, canary: Update) -> Score:
  """Scores what a client sends: the canary, or its opposite.

  In the local model any two updates must be hard to tell apart; opposite ones
  are as far apart as clipping lets them be.

  Args:
    defense: of the client.
    canary: an update.
  """
  state = defense.transform.init(canary), defense.codec.init(canary)

  def score(key, present):
    noise, rounding = jax.random.split(key)
    update = trees.scale(1.0 if present else -1.0, canary)
    update, _ = defense.transform.apply(noise, update, state[0])
    payload, _ = defense.codec.encode(rounding, update, state[1])
    return trees.vdot(defense.codec.decode(payload), canary)

  return score


def of_release(
  built: central.Central, canary: Update, sampling_rate: float | None
) -> Score:
  """Scores what a trusted server publishes, with one client or without it.

  Args:
    built: of the server.
    canary: that client's update.
    sampling_rate: of the coin by which it takes part; None where it does.
  """
  rate = 1.0 if sampling_rate is None else sampling_rate
  clip = jnp.float32(built.clip)

  def score(key, present):
    coin, noise = jax.random.split(key)
    sums = built.contribution(canary, clip)
    there = jax.random.bernoulli(coin, rate) & present
    mean, _ = built.release(
      trees.scale(there.astype(jnp.float32), sums), clip, noise
    )
    return trees.vdot(mean, canary)

  return score


def of_gradient(
  model: Model,
  examples: Examples,
  private: dp_sgd.Settings,
  sampling_rate: float | None,
) -> Score:
  """Scores one step of DP-SGD, with the last of a client's examples or not.

  Args:
    model: the classifier, at its initial weights.
    examples: the client's; the last is the canary.
    private: clip and noise.
    sampling_rate: of the coins of a Poisson batch; None for a batch of all.
  """
  gradient = dp_sgd.private_gradient(model, private)
  params = model.init(jax.random.key(0))
  count = len(examples.y)
  rows = jnp.arange(count)
  rate = 1.0 if sampling_rate is None else sampling_rate
  expected = jnp.float32(rate * count)
  silent = private._replace(noise_multiplier=1e-12)
  # Its own clipped gradient is the direction that gives it away.
  only_last = jnp.roll(rows, 1)
  mask = (jnp.arange(count) == 0).astype(jnp.float32)
  _, direction = dp_sgd.private_gradient(model, silent)(
    params, examples, only_last, mask, expected, jax.random.key(0)
  )
  flat, _ = flatten_util.ravel_pytree(direction)
  direction = trees.scale(1 / jnp.linalg.norm(flat), direction)

  def score(key, present):
    coins, noise = jax.random.split(key)
    drawn = jax.random.bernoulli(coins, rate, (count,))
    drawn = drawn.at[-1].set(drawn[-1] & present)
    first = jnp.argsort(~drawn)
    _, grad = gradient(
      params,
      examples,
      rows[first],
      drawn[first].astype(jnp.float32),
      expected,
      noise,
    )
    return trees.vdot(grad, direction)

  return score
