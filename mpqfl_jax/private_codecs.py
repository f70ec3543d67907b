"""Quantisers with a proof: what they send of an entry is itself private.

Each is a scalar mechanism over [-bound, bound] whose codes are the message: no
scale, no seed, nothing else of the update crosses the wire. An update whose L2
norm is clipped first may be sent with `bound` equal to the clip, so that no
entry is ever clamped and decoding is unbiased.

Draws are Threefry's, not the counter hash that other quantisers round by: the
server sees the codes, and must not be able to go back from them to the draws.
Probabilities have 24 bits.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import (
  accounting,
  bitpack,
  choice,
  codecs,
  numerics,
  policy,
  quantize,
  renyi,
  specs,
  wire,
)
from mpqfl_jax.errors import UserError
from mpqfl_jax.types import Array, Codec, Params

# Draws are integers below this: float32 holds them exactly.
_DRAWS = 2**24


class Mechanism(NamedTuple):
  """A private quantiser of one entry.

  Attributes:
    name: the rule in words; part of the fingerprint that both sides compare.
    tag: the rule's byte on the wire.
    levels: codes are unsigned integers below this.
    draw: (key, x in [-1, 1]) -> codes, int32.
    value: codes -> x, float32, unbiased.
    variance: of the value at x = 0.
    scalar: the law of the codes, for accounting.
  """

  name: str
  tag: int
  levels: int
  draw: Callable[[Array, Array], Array]
  value: Callable[[Array], Array]
  variance: float
  scalar: renyi.Scalar


def poisson_binomial(theta: float = 0.25, trials: int = 16) -> Mechanism:
  """The code is Binomial(trials, 1/2 + theta * x).

  Source: Chen, Ozgur and Kairouz, "The Poisson Binomial Mechanism for Unbiased
  Federated Learning with Secure Aggregation" (ICML 2022), algorithm 1.

  Args:
    theta: in (0, 1/2); the paper takes up to 1/4.
    trials: m of the paper; codes are 0 to m.

  Raises:
    UserError: a parameter out of range.
  """
  numerics.require_positive("theta", theta)
  if theta >= 0.5:
    raise UserError(
      f"theta={theta}: expected a number below 0.5; at 0.5 an entry at the"
      " bound is sent without noise."
    )
  numerics.require_range("trials", trials, 1, 4095)
  scale = 1 / (trials * theta)

  def draw(key, x):
    chance = _threshold(0.5 + theta * x)

    def trial(i, count):
      hit = _integers(jax.random.fold_in(key, i), x.shape) < chance
      return count + hit.astype(jnp.int32)

    return jax.lax.fori_loop(0, trials, trial, jnp.zeros(x.shape, jnp.int32))

  # A probability of 24 bits may lie this much outside of 1/2 +- theta.
  edge = min(theta + 2 / _DRAWS, 0.5 - 1 / _DRAWS)
  return Mechanism(
    f"poisson binomial theta={theta:.9g} trials={trials}",
    0x0E,
    trials + 1,
    draw,
    lambda codes: (codes.astype(jnp.float32) - trials / 2) * scale,
    0.25 * scale / theta,
    renyi.Scalar(
      np.array([-1.0, 1.0]),
      np.array([[0.5 + edge, 0.5 - edge], [0.5 - edge, 0.5 + edge]]),
      copies=trials,
    ),
  )


def randomised_quantisation(
  margin: float = 1.0, levels: int = 16, keep: float = 0.42
) -> Mechanism:
  """Rounds at random between the nearest of randomly kept levels.

  Levels lie evenly in [-1 - margin, 1 + margin]. The two outer ones are always
  kept, each inner one with probability `keep`.

  Source: Youn, Hu, Ziani and Abernethy, "Randomized Quantization is All You
  Need for Differential Privacy in Federated Learning" (2023), algorithm 2.

  Args:
    margin: Delta / c of the paper.
    levels: m of the paper.
    keep: q of the paper.

  Raises:
    UserError: a parameter out of range.
  """
  numerics.require_positive("margin", margin)
  if margin == float("inf"):
    raise UserError("margin=inf: expected a finite number.")
  numerics.require_range("levels", levels, 2, 256)
  numerics.require_positive("keep", keep)
  if keep >= 1:
    raise UserError(
      f"keep={keep}: expected a number below 1; with every level kept the code"
      " bounds the entry and nothing is private."
    )
  # As the draws have it.
  keep = max(1, round(keep * _DRAWS)) / _DRAWS
  top = 1.0 + margin
  step = 2 * top / (levels - 1)
  below = jnp.int32(round(keep * _DRAWS))

  def draw(key, x):
    place = (x + top) / step
    cell = jnp.clip(jnp.floor(place), 0, levels - 2).astype(jnp.int32)

    def level(i, ends):
      left, right = ends
      kept = _integers(jax.random.fold_in(key, i), x.shape) < below
      left = jnp.where(kept & (i <= cell), jnp.maximum(left, i), left)
      right = jnp.where(kept & (i > cell), jnp.minimum(right, i), right)
      return left, right

    ends = jnp.zeros_like(cell), jnp.full_like(cell, levels - 1)
    left, right = jax.lax.fori_loop(1, levels - 1, level, ends)
    share = (place - left) / (right - left)
    up = _integers(jax.random.fold_in(key, 0), x.shape) < _threshold(share)
    return jnp.where(up, right, left)

  values = np.linspace(-top, top, levels)
  inner = values[(values > -1) & (values < 1)]
  nodes = np.concatenate([[-1.0], inner, [1.0]])
  pmf = quantisation_pmf(nodes, values, keep)
  law = renyi.Scalar(nodes, pmf)
  variance = float(renyi.probabilities(law, np.zeros(1))[0] @ values**2)
  return Mechanism(
    f"randomised quantisation margin={margin:.9g} levels={levels}"
    f" keep={keep:.9g}",
    0x0F,
    levels,
    draw,
    lambda codes: codes.astype(jnp.float32) * step - top,
    variance,
    law,
  )


def quantisation_pmf(
  x: np.ndarray, values: np.ndarray, keep: float
) -> np.ndarray:
  """Output probabilities of randomised quantisation.

  The level left of x is i with the probability that i is kept and those between
  are not; likewise on the right; then x is rounded without bias. Affine in x
  between levels, and continuous.

  Source: Youn et al. 2023, lemma 5.1, in other words.

  Args:
    x: [n], within the levels.
    values: [levels], increasing.
    keep: probability of each inner level to be kept.

  Returns:
    [n, levels] float64.
  """
  count = len(values)
  weight = np.full(count, keep)
  weight[[0, -1]] = 1.0
  out = np.zeros((len(x), count))
  for row, at in zip(out, x, strict=True):
    cell = min(int(np.searchsorted(values, at, side="right")) - 1, count - 2)
    for left in range(cell + 1):
      near = weight[left] * (1 - keep) ** (cell - left)
      for right in range(cell + 1, count):
        both = near * weight[right] * (1 - keep) ** (right - cell - 1)
        share = (at - values[left]) / (values[right] - values[left])
        row[right] += both * share
        row[left] += both * (1 - share)
  return out


class Part(NamedTuple):
  """How a leaf is sent.

  Attributes:
    mechanism: the quantiser.
    bound: entries are clamped to [-bound, bound]; public.
  """

  mechanism: Mechanism
  bound: float


def check_bound(bound: float, clip: float) -> None:
  """Raises UserError unless a bound is positive and within the clip."""
  numerics.require_positive("bound", bound)
  if bound > clip:
    raise UserError(
      f"bound={bound} is above clip={clip}, which no entry exceeds. Expected a"
      " bound up to the clip."
    )


# What a rule of a private policy may name: name -> (noise, options) ->
# mechanism; at noise 0 the options are as the rule has them.
RULES: dict[str, Callable[..., Mechanism]] = {
  "pbm": lambda noise, theta=0.25, trials=16: poisson_binomial(
    theta / (1 + noise), trials
  ),
  "rqm": lambda noise, margin=1.0, levels=16, keep=0.42: (
    randomised_quantisation(margin * (1 + noise), levels, keep)
  ),
}
WITHHELD = "withheld"


def part(
  name: str, rule: policy.QuantRule, clip: float, noise: float = 0.0
) -> Part | None:
  """How a rule of a private policy has a leaf sent, None where it is not.

  Args:
    name: of the policy.
    rule: names one of `RULES` or `WITHHELD`.
    clip: largest L2 norm of the update.
    noise: from 0, more than the rule asks for.

  Raises:
    UserError: a precision that proves nothing, or options that it does not
      take.
  """
  options = dict(rule.options)
  if rule.precision == WITHHELD and not options:
    return None
  if rule.precision not in RULES:
    raise UserError(
      f"policy {name}, path {rule.path!r}: {rule.precision} proves nothing"
      f" there. Expected {', '.join(RULES)}, or {WITHHELD} without options."
    )
  bound = options.pop("bound", clip)
  check_bound(bound, clip)
  mechanism = specs.call(
    f"policy {name}, path {rule.path!r}: {rule.precision}",
    RULES[rule.precision],
    options,
    noise,
  )
  return Part(mechanism, float(bound))


def codec(params: Params, parts: Sequence[Part | None]) -> Codec:
  """The codec that sends every entry by a private quantiser.

  Args:
    params: parameters, or their shapes.
    parts: of each leaf, in the order of `jax.tree.leaves`; None for one that is
      not sent.

  Returns:
    The codec.
  """
  leaves = [
    choice.withheld(tuple(leaf.shape))
    if part is None
    else _leaf(tuple(leaf.shape), part.mechanism, part.bound)
    for leaf, part in zip(jax.tree.leaves(params), parts, strict=True)
  ]
  return codecs.per_leaf("private", params, leaves)


def guarantee(
  params: Params, parts: Sequence[Part | None], clip: float
) -> accounting.Guarantee:
  """What the codes of clipped updates prove against the server.

  Every entry is a release of its own: in the local model all of them compose,
  and so do the rounds that a client takes part in. (That a sum over clients, of
  which the server sees nothing else, hides each of them better needs secure
  aggregation, which is not claimed.)

  Args:
    params: parameters, or their shapes.
    parts: as for `codec`.
    clip: largest L2 norm of the whole update.
  """
  entries: dict[tuple[str, float], int] = {}
  chosen: dict[tuple[str, float], Part] = {}
  for leaf, part in zip(jax.tree.leaves(params), parts, strict=True):
    if part is not None:
      key = part.mechanism.name, part.bound
      entries[key] = entries.get(key, 0) + leaf.size
      chosen[key] = part
  groups = [
    renyi.Group(part.mechanism.scalar, entries[key], clip / part.bound)
    for key, part in chosen.items()
  ]

  @functools.cache
  def rough() -> np.ndarray:
    return renyi.worst_in_ball(groups, _ORDERS, ratio=1.08)

  @functools.cache
  def fine(index: int) -> float:
    order = _ORDERS[index : index + 1]
    return float(renyi.worst_in_ball(groups, order)[0])

  def epsilon(ledger: accounting.Ledger, delta: float) -> float:
    releases = accounting.most_releases(ledger)
    if releases == 0:
      return 0.0

    def spent(index, divergence):
      order = _ORDERS[index : index + 1]
      whole = np.atleast_1d(releases * divergence)
      return accounting.from_divergence(whole, order, delta)

    # Any order gives a bound: only the most promising are looked at closely.
    costs = [spent(i, divergence) for i, divergence in enumerate(rough())]
    return min(spent(i, fine(int(i))) for i in np.argsort(costs)[:4])

  return accounting.Guarantee("local", "client", epsilon)


# Neighbours differ by a tenth; between them epsilon hardly changes.
_ORDERS = accounting.ORDERS[::3]


def _leaf(
  shape: codecs.Shape, mechanism: Mechanism, bound: float
) -> codecs.LeafCodec:
  count = math.prod(shape)
  if count == 0:
    return codecs.empty(shape)
  levels = mechanism.levels
  size = bitpack.packed_size(count, levels)

  def check(packed: np.ndarray) -> bool:
    codes = bitpack.unpack(packed, count, levels, np)
    clean = bitpack.padding_is_zero(packed, count, levels)
    return clean and bool((codes < levels).all())

  def encode(seed, x, state):
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    unit = jnp.clip(quantize.finite(x).reshape(-1) / bound, -1.0, 1.0)
    codes = mechanism.draw(key, unit)
    codes = codes.astype(jnp.uint8 if levels <= 256 else jnp.uint16)
    return {"codes": bitpack.pack(codes, levels)}, state

  def decode(payload):
    codes = bitpack.unpack(payload["codes"], count, levels)
    return (bound * mechanism.value(codes)).reshape(shape)

  def bins(payload):
    # No code excludes any entry. The Gaussian of this variance around the
    # decoded value is the codes' likelihood to second order in the entry for
    # the binomial, and has its slope in the mean for either.
    far = jnp.full(shape, jnp.inf, jnp.float32)
    variance = jnp.full(shape, bound**2 * mechanism.variance, jnp.float32)
    return -far, far, variance

  return codecs.fixed(
    f"{mechanism.name} bound={bound:.9g}",
    mechanism.tag,
    # Drawn at random, but within no certain interval, see `types.Bins`.
    stochastic=False,
    fields=[wire.Field("codes", bitpack.packed_type(levels), (size,), check)],
    encode=encode,
    decode=decode,
    bins=bins,
  )


def _integers(key: Array, shape: tuple[int, ...]) -> Array:
  """Uniform integers below 2^24."""
  return (jax.random.bits(key, shape, jnp.uint32) >> 8).astype(jnp.int32)


def _threshold(probability: Array) -> Array:
  """How many of the 2^24 integers make up a probability."""
  return jnp.round(probability * _DRAWS).astype(jnp.int32)
