"""Precision and mode of every leaf, chosen by what they cost.

Both policies tabulate, for this very update, the bytes and the squared error of
every leaf in every option, and pick one option a leaf. `budget` minimises the
error under a bound on the bytes. Clients' errors add up (weighted) in the
aggregated update, so that each client's own minimum is the minimum of the sum.
`guarded` minimises predicted leakage under bounds on bytes and error.

Picking is a multiple-choice knapsack. Lagrange multipliers price the bounds:
for given prices every leaf's best option is independent of the others'
(Everett, "Generalized Lagrange Multiplier Method", 1963), and the priced
minimum less the price of the bounds is a lower bound of the optimum, which
proves a gap. Dynamic programming over one bound in cells gives a choice, with
what an option takes rounded up, and another lower bound, with that rounded
down. What is left of the budget is then spent leaf by leaf.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import choice, codecs, counter, numerics, quantize, wire
from mpqfl_jax.types import Array, Codec, Params, Proof, Update

OPTIONS = (
  choice.Option("none"),
  *(
    choice.Option(f"int{bits}", mode)
    for bits in (2, 3, 4, 5, 6, 8)
    for mode in numerics.MODES
  ),
  choice.Option("float16"),
)

# (energy[leaves], error[leaves, options]) -> predicted leakage, added up over
# leaves: the squared norm of each leaf and the squared error of each option.
Leakage = Callable[[Array, Array], Array]

_STEPS = 48
_OUTER_STEPS = 32
_CELLS = 4096


class Allocation(NamedTuple):
  """A choice, and how good it provably is.

  Attributes:
    picked: [leaves] int32, option of each leaf.
    value: [] float32, the objective.
    bound: [] float32, no choice within the bounds has a lower objective;
      infinite where none was found that is within them.
  """

  picked: Array
  value: Array
  bound: Array


def cheapest(value: Array, cost: Array, budget: Array | int) -> Allocation:
  """Minimises the sum of `value` with the sum of `cost` at most `budget`.

  The better of two solutions: by price, and by dynamic programming over the
  budget in cells of a byte, which is exact, or of a 4096th of the budget, which
  is exact for a budget that is smaller by a cell a leaf.

  Args:
    value: [leaves, options] float32, not negative.
    cost: [leaves, options] int32; some choice must fit the budget.
    budget: [] int32.

  Returns:
    The allocation, within the budget.
  """
  by_price = _by_price(value, cost, budget)
  # Only what exceeds the cheapest option is rounded to cells.
  least = jnp.min(cost, 1, keepdims=True)
  spare = jnp.maximum(budget - jnp.sum(least), 0)
  cell = jnp.maximum(-(-spare // _CELLS), 1)
  extra = cost - least
  by_cells, _ = _by_cells(value, -(-extra // cell), spare // cell)
  picked = _improve(by_cells, value, [(cost, budget)])
  better = _total(value, picked) < by_price.value
  picked = jnp.where(better, picked, by_price.picked)
  # What fits the budget fits it when all is rounded down.
  _, bound = _by_cells(value, extra // cell, spare // cell)
  bound = jnp.maximum(bound, by_price.bound)
  return Allocation(picked, _total(value, picked), bound)


def _by_cells(
  value: Array, extra: Array, cells: Array | int
) -> tuple[Array, Array]:
  """Minimises the sum of `value` by dynamic programming, exactly.

  Args:
    value: [leaves, options] float32.
    extra: [leaves, options] int32, cells that each option takes.
    cells: [] int32, how many there are, at most `_CELLS`.

  Returns:
    The option of each leaf, [leaves] int32, and their sum, [] float32; infinite
    where no choice fits.
  """
  room = jnp.arange(_CELLS + 1)

  def add_leaf(best, leaf):
    value, extra = leaf
    left = room[None] - extra[:, None]
    total = best[jnp.maximum(left, 0)] + value[:, None]
    total = jnp.where(left >= 0, total, jnp.inf)
    return jnp.min(total, 0), jnp.argmin(total, 0).astype(jnp.uint8)

  def take_leaf(left, leaf):
    options, extra = leaf
    option = options[left].astype(jnp.int32)
    return left - extra[option], option

  start = jnp.zeros(_CELLS + 1, jnp.float32)
  best, options = jax.lax.scan(add_leaf, start, (value, extra))
  _, picked = jax.lax.scan(
    take_leaf, jnp.int32(cells), (options, extra), reverse=True
  )
  return picked, best[cells]


def _by_price(value: Array, cost: Array, budget: Array | int) -> Allocation:
  """Picks by the price of the budget, and bounds the optimum from below."""
  # A price of 2^20 times the largest value makes any saving pay, one of 2^-80
  # times it none.
  unit = jnp.maximum(jnp.max(value), 1e-30)

  def priced(power):
    price = jnp.exp2(power) * unit
    total = value + price * cost
    index = jnp.argmin(total, 1)
    spent, limit = jnp.sum(jnp.min(total, 1)), price * budget
    return index, spent - limit - _rounding(spent + limit, value)

  def halve(_, bracket):
    low, high, bound = bracket
    middle = (low + high) / 2
    index, dual = priced(middle)
    fits = _total(cost, index) <= budget
    return (
      jnp.where(fits, low, middle),
      jnp.where(fits, middle, high),
      jnp.maximum(bound, dual),
    )

  free = jnp.sum(jnp.min(value, 1))
  start = (jnp.float32(-80), jnp.float32(20), free)
  _, high, bound = jax.lax.fori_loop(0, _STEPS, halve, start)
  index, _ = priced(high)
  # Where ties keep even the highest price from fitting, the cheapest does.
  index = jnp.where(_total(cost, index) <= budget, index, jnp.argmin(cost, 1))
  index = _improve(index, value, [(cost, budget)])
  return Allocation(index.astype(jnp.int32), _total(value, index), bound)


def least_leakage(
  leakage: Array,
  cost: Array,
  budget: Array | int,
  error: Array,
  max_error: Array | float,
) -> Allocation:
  """Minimises the sum of `leakage` under bounds on cost and on error.

  Args:
    leakage: [leaves, options] float32, not negative.
    cost: [leaves, options] int32.
    budget: [] int32.
    error: [leaves, options] float32, not negative.
    max_error: [] float32.

  Returns:
    The allocation. It always fits the budget; where no choice is found that
    keeps the error bound, too, it is the one of least error, as `cheapest` has
    it (and the bound is infinite).
  """
  unit = jnp.max(leakage) / jnp.maximum(jnp.max(error), 1e-30)

  def halve(_, bracket):
    low, high, bound, best = bracket
    middle = (low + high) / 2
    price = jnp.exp2(middle) * unit
    found = _by_price(leakage + price * error, cost, budget)
    fits = _total(error, found.picked) <= max_error
    paid = price * max_error
    dual = found.bound - paid - _rounding(jnp.abs(found.bound) + paid, error)
    return (
      jnp.where(fits, low, middle),
      jnp.where(fits, middle, high),
      jnp.maximum(bound, dual),
      jnp.where(fits, found.picked, best),
    )

  finest = cheapest(error, cost, budget)
  start = (jnp.float32(-40), jnp.float32(40), jnp.float32(0), finest.picked)
  _, _, bound, index = jax.lax.fori_loop(0, _OUTER_STEPS, halve, start)
  # As if there were no bound on the cost, where it often does not matter.
  cell = jnp.maximum(max_error, 1e-30) / _CELLS
  taken = jnp.clip(error / cell, 0, _CELLS + 2)
  up = jnp.ceil(taken).astype(jnp.int32)
  # Less what float32 may have rounded up.
  down = jnp.floor(taken * np.float32(1 - 2.0**-20)).astype(jnp.int32)
  by_cells, _ = _by_cells(leakage, up, _CELLS)
  _, loose = _by_cells(leakage, down, _CELLS)
  bounds = [(cost, budget), (error, max_error)]
  found = jnp.stack(
    [finest.picked, *(_improve(i, leakage, bounds) for i in (index, by_cells))]
  )
  fits = jax.vmap(
    lambda i: (_total(cost, i) <= budget) & (_total(error, i) <= max_error)
  )(found)
  values = jax.vmap(lambda i: _total(leakage, i))(found)
  # The first where none fits, of least error.
  best = jnp.argmin(jnp.where(fits, values, jnp.inf))
  bound = jnp.where(jnp.any(fits), jnp.maximum(bound, loose), jnp.inf)
  return Allocation(found[best].astype(jnp.int32), values[best], bound)


def snr_leakage(energy: Array, error: Array) -> Array:
  """Predicted leakage of a leaf: its signal-to-noise ratio.

  In a linearised model of the attack, the precision with which the image is
  known is the sum over layers of J' J / variance, for a Jacobian J about as
  large as the layer's gradient: ratios, not decibels, add up, and one layer
  that is sent finely decides the sum.

  Args:
    energy: [leaves] float32, squared norm of each leaf.
    error: [leaves, options] float32, squared error of each option.

  Returns:
    [leaves, options] float32, 0 for what is withheld.
  """
  lost = jnp.maximum(error, 1e-12 * energy[:, None])
  ratio = energy[:, None] / jnp.maximum(lost, 1e-37) - 1
  return jnp.maximum(ratio, 0)


def expected_errors(menu: choice.Menu, x: Array, unit: Array) -> Array:
  """Expected squared error of a leaf in each option, [options] float32.

  Args:
    menu: the options.
    x: the leaf, finite.
    unit: [] float32, what errors are measured in: of the order of the largest
      magnitude, so that squares stay within float32.

  Returns:
    Sums over entries, in units squared: of the squared rounding error, or of
    its expectation scale^2 f (1 - f) with f the fraction between two grid
    points; of float16 also what it saturates.
  """
  exact = x.reshape(-1)
  x = exact / unit
  extremes = jnp.stack([jnp.min(x), jnp.max(x)])
  stochastic = menu.rounding == "stochastic"

  def lost(scaled, step):
    fraction = scaled - jnp.floor(scaled)
    far = jnp.minimum(fraction, 1 - fraction)
    if stochastic:
      far = jnp.sqrt(fraction * (1 - fraction))
    return (far * step) ** 2

  def on_grid(option):
    affine, low, levels = option
    high = low + levels - 1
    wide = quantize.affine_grid(extremes, None, low, high, stochastic).scale
    even = quantize.symmetric_grid(extremes, None, high).scale
    step = jnp.where(affine, wide, even)
    return jnp.sum(lost(x / step, step))

  # Float16's steps and its end stay where they are, whatever the unit.
  half = quantize.FLOAT_FORMATS["float16"]
  step, reciprocal = quantize.float_step(exact, half)
  rounded = lost(exact * reciprocal, step / unit)
  beyond = (jnp.abs(exact) - half.largest) / unit
  of_float = jnp.sum(jnp.where(beyond > 0, beyond**2, rounded))
  # A loop, not a program for each width.
  on_grids = jax.lax.map(
    on_grid,
    (
      jnp.asarray(menu.kind == choice.AFFINE),
      jnp.asarray(menu.low, jnp.float32),
      jnp.asarray(np.maximum(menu.levels, 2), jnp.float32),
    ),
  )
  return jnp.select(
    [menu.kind == choice.WITHHELD, menu.kind == choice.FLOAT],
    [jnp.sum(x * x), of_float],
    on_grids,
  )


def budget(params: Params, bytes: int, rounding: str = "nearest") -> Codec:
  """Least squared error of the update in so many bytes a client.

  Args:
    params: parameters, or their shapes.
    bytes: the longest message, everything included.
    rounding: `nearest` or `stochastic`.

  Returns:
    The codec.

  Raises:
    UserError: not even an empty update fits into the bytes.
  """

  def choose(energy, error, cost, limit):
    return cheapest(error, cost, limit)

  what = "expected squared error"
  return _allocated("budget", params, bytes, rounding, choose, what)


def guarded(
  params: Params,
  bytes: int,
  max_error: float = 0.1,
  rounding: str = "nearest",
  leakage: Leakage = snr_leakage,
) -> Codec:
  """Least predicted leakage in so many bytes at so much error.

  Args:
    params: parameters, or their shapes.
    bytes: the longest message, everything included.
    max_error: bound of the squared error over the update's squared norm. It is
      given up where the bytes do not allow it.
    rounding: `nearest` or `stochastic`.
    leakage: predicts the leakage of every leaf in every option.

  Returns:
    The codec.

  Raises:
    UserError: not even an empty update fits into the bytes.
  """
  numerics.require_share("max_error", max_error)

  def choose(energy, error, cost, limit):
    allowed = max_error * jnp.sum(energy)
    return least_leakage(leakage(energy, error), cost, limit, error, allowed)

  name = f"guarded max_error={max_error:g}"
  what = "predicted leakage"
  return _allocated(name, params, bytes, rounding, choose, what)


def _allocated(
  name: str,
  params: Params,
  bytes: int,
  rounding: str,
  choose: Callable[[Array, Array, Array, int], Allocation],
  objective: str,
) -> Codec:
  menu = choice.menu(OPTIONS, rounding)
  shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(params)]
  leaves = [choice.leaf(shape, menu) for shape in shapes]
  full = [i for i, shape in enumerate(shapes) if 0 not in shape]
  costs = [choice.record_bytes(menu, math.prod(shapes[i])) for i in full]
  fixed = wire.OVERHEAD + len(shapes) - len(full)
  least = fixed + sum(int(cost.min()) for cost in costs)
  numerics.require_range("bytes", bytes, least, 2**31 - 1)
  base = codecs.per_leaf(name, params, leaves)
  if not full:
    return base
  cost = np.stack(costs)

  def allocate(arrays: list[Array]) -> Allocation:
    # Relative to the largest entry: squares stay within float32.
    peaks = [jnp.max(jnp.abs(arrays[i])) for i in full]
    peak = jnp.maximum(jnp.max(jnp.stack(peaks)), quantize.SMALLEST)
    error = jnp.stack([expected_errors(menu, arrays[i], peak) for i in full])
    energy = jnp.stack([jnp.sum((arrays[i] / peak) ** 2) for i in full])
    return choose(energy, error, jnp.asarray(cost), bytes - fixed)

  def encode(key, update, state):
    arrays = _finite_leaves(update)
    picked = allocate(arrays).picked
    seeds = counter.seeds(key, len(leaves))
    payload: list[dict] = [{} for _ in leaves]
    for i, option in zip(full, picked, strict=True):
      payload[i] = choice.encode_as(menu, option, seeds[i], arrays[i])
    return tuple(payload), state

  def gap(update):
    _, value, bound = allocate(_finite_leaves(update))
    over = jnp.maximum(value - bound, 0) / jnp.maximum(value, 1e-30)
    return jnp.where(bound < jnp.inf, over, jnp.inf)

  return base._replace(encode=encode, proof=Proof(objective, gap))


def _finite_leaves(update: Update) -> list[Array]:
  return [quantize.finite(x) for x in jax.tree.leaves(update)]


def _rounding(size: Array, table: Array) -> Array:
  """What float32 may add to sums over leaves of numbers as large as `size`."""
  return size * np.float32(len(table) * 2.0**-23)


def _total(table: Array, index: Array) -> Array:
  return jnp.sum(jnp.take_along_axis(table, index[:, None], 1))


def _improve(
  index: Array, value: Array, bounds: list[tuple[Array, Array | float]]
) -> Array:
  """Takes the best change of one leaf within the bounds, until none helps."""

  def step(state):
    index, _ = state
    at = index[:, None]
    gain = jnp.take_along_axis(value, at, 1) - value
    for cost, budget in bounds:
      slack = budget - _total(cost, index)
      extra = cost - jnp.take_along_axis(cost, at, 1)
      gain = jnp.where(extra <= slack, gain, 0)
    leaf, option = jnp.unravel_index(jnp.argmax(gain), gain.shape)
    helps = gain[leaf, option] > 0
    return jnp.where(helps, index.at[leaf].set(option), index), helps

  return jax.lax.while_loop(lambda s: s[1], step, (index, jnp.bool_(True)))[0]
