"""Renyi divergence of what one client may send, over the worst two updates.

A quantised mechanism sends every entry of an update by one scalar mechanism
whose output probabilities are piecewise affine in its input. The client's whole
message is a product of them, so that the divergence between two updates is the
sum over entries, and what is wanted is its largest value over all pairs of
updates in the ball of the clipping norm whose entries lie in [-1, 1] (units of
the mechanism's bound).

Renyi divergence is jointly quasi-convex in its two distributions (van Erven
and Harremoes 2014, theorem 13): over a cell on which both are affine in their
inputs it is largest at a corner. That makes the maximum over the box exact.
Over the ball, with n entries and radius r, weak duality gives for every price
l >= 0

  max sum f(x_i, y_i) <= 2 l r^2 + n max_(x, y) [f(x, y) - l (x^2 + y^2)]

and the inner maximum is bounded on each cell of a grid by the corner's f and
the cell's least x^2 + y^2. Groups of entries that are randomised in different
ways add their terms under one price. The result is an upper bound whatever the
grid; grid and prices only decide how much of it is slack (a few per cent).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Half width of the square around zero that is bounded by its slope.
_CENTRE = 0.005
_PRICES = 200


class Scalar(NamedTuple):
  """How one entry is randomised.

  Attributes:
    nodes: [n] float64 from -1 to 1, increasing: inputs in units of the bound
      between which the output probabilities are affine.
    pmf: [n, outputs] float64, output probabilities at the nodes, all above 0.
    copies: how many independent draws of these an entry sends.
  """

  nodes: np.ndarray
  pmf: np.ndarray
  copies: int = 1


class Group(NamedTuple):
  """Entries of an update that are randomised alike.

  Attributes:
    scalar: how one is.
    entries: how many there are.
    radius: largest L2 norm of the whole update, in units of these entries'
      bound; entries beyond [-1, 1] are clamped, which lowers the norm.
  """

  scalar: Scalar
  entries: int
  radius: float


def probabilities(scalar: Scalar, x: np.ndarray) -> np.ndarray:
  """Output probabilities at inputs x[m] in [-1, 1], [m, outputs]."""
  columns = [np.interp(x, scalar.nodes, column) for column in scalar.pmf.T]
  return np.stack(columns, 1)


def divergences(p: np.ndarray, q: np.ndarray, orders: np.ndarray) -> np.ndarray:
  """Renyi divergence of every row of p from every row of q.

  Source: van Erven and Harremoes 2014, equation 1.

  Args:
    p: [n, outputs], positive.
    q: [m, outputs], positive.
    orders: [k], above 1.

  Returns:
    [k, n, m]; infinite at orders that double precision does not hold.
  """
  log_p, log_q = np.log(p), np.log(q)
  spread = max(np.ptp(log_p), np.ptp(log_q))
  out = np.full((len(orders), len(p), len(q)), np.inf)
  for i, alpha in enumerate(orders):
    if alpha * spread > 300:
      continue
    # One product of matrices; the shifts keep every factor in range.
    shift_p, shift_q = log_p.mean(), log_q.mean()
    a = np.exp(alpha * (log_p - shift_p))
    b = np.exp((1 - alpha) * (log_q - shift_q))
    total = np.log(a @ b.T) + alpha * shift_p + (1 - alpha) * shift_q
    out[i] = np.maximum(total / (alpha - 1), 0.0)
  return out


def worst_in_box(
  scalar: Scalar, orders: np.ndarray, entries: int
) -> np.ndarray:
  """The largest divergence of two messages, all entries free in [-1, 1].

  Args:
    scalar: how one entry is randomised.
    orders: [k], above 1.
    entries: how many there are.

  Returns:
    [k]; exact.
  """
  one = divergences(scalar.pmf, scalar.pmf, orders).max((1, 2))
  return entries * scalar.copies * one


def worst_in_ball(
  groups: Sequence[Group], orders: np.ndarray, ratio: float = 1.015
) -> np.ndarray:
  """The largest divergence of two messages of updates in a ball.

  One price serves all groups: the ball is of the whole update.

  Args:
    groups: entries, and how they are randomised.
    orders: [k], above 1.
    ratio: of neighbouring points of the grid; the slack is about its square.

  Returns:
    [k]; an upper bound, see the module's docstring.
  """
  grids = [_grid(group.scalar, ratio) for group in groups]
  # What a unit of the squared norm, in clips, is in a group's own units.
  units = [group.scalar.copies * group.radius**2 for group in groups]
  counts = [group.scalar.copies * group.entries for group in groups]
  out = np.full(len(orders), np.inf)
  for i, alpha in enumerate(orders):
    fronts = [
      _front(group.scalar, grid, alpha)
      for group, grid in zip(groups, grids, strict=True)
    ]
    most = sum(n * f.most for n, f in zip(counts, fronts, strict=True))
    if not np.isfinite(most):
      continue
    dearest = [u * f.dearest for u, f in zip(units, fronts, strict=True)]
    prices = np.geomspace(1e-3 * min(dearest), max(dearest), _PRICES)
    bound = 2 * prices
    for n, unit, front in zip(counts, units, fronts, strict=True):
      own = prices / unit
      gain = np.max(front.values - own[:, None] * front.norms, 1, initial=0.0)
      gain = np.maximum(gain, 2 * _CENTRE**2 * (front.curve - own))
      bound = bound + n * gain
    out[i] = min(most, float(bound.min()))
  return out


class _Grid(NamedTuple):
  """Cells of pairs (x, y), those of a small norm first.

  Attributes:
    rows: [points, outputs], output probabilities.
    order: [cells], flat indices; those of the central square are not there.
    norms: [cells], least x^2 + y^2.
  """

  rows: np.ndarray
  order: np.ndarray
  norms: np.ndarray


def _grid(scalar: Scalar, ratio: float) -> _Grid:
  outer = np.geomspace(
    _CENTRE, 1.0, 2 + int(np.log(1 / _CENTRE) / np.log(ratio))
  )
  inner = np.linspace(0.0, _CENTRE, 1 + round(1 / (ratio - 1)))[:-1]
  half = np.concatenate([inner, outer])
  grid = np.unique(np.concatenate([-half, half, scalar.nodes]))
  low = np.minimum(np.abs(grid[1:]), np.abs(grid[:-1]))
  least = low[:, None] ** 2 + low[None, :] ** 2
  # Cells inside the central square have no useful least norm.
  reach = np.maximum(np.abs(grid[1:]), np.abs(grid[:-1]))
  central = np.maximum(reach[:, None], reach[None, :]) <= _CENTRE * (1 + 1e-9)
  order = np.argsort(np.where(central, np.inf, least), axis=None)
  order = order[: np.count_nonzero(~central)]
  return _Grid(probabilities(scalar, grid), order, least.reshape(-1)[order])


class _Front(NamedTuple):
  """The divergence f of one entry, by its norm, at one order.

  Attributes:
    most: over the whole box.
    values, norms: of cells whose f is above that of every cell of a smaller
      norm; no other can decide.
    curve: f is at most this times x^2 + y^2 in the central square.
    dearest: price above which no entry is worth its norm.
  """

  most: float
  values: np.ndarray
  norms: np.ndarray
  curve: float
  dearest: float


def _front(scalar: Scalar, grid: _Grid, alpha: float) -> _Front:
  table = divergences(grid.rows, grid.rows, np.array([alpha]))[0]
  corner = np.maximum.reduce(
    [table[:-1, :-1], table[1:, :-1], table[:-1, 1:], table[1:, 1:]]
  )
  most = float(corner.max())
  if not np.isfinite(most):  # an order that double precision does not hold
    nothing = np.ones(1)
    return _Front(most, nothing, nothing, 0.0, 0.0)
  values = corner.reshape(-1)[grid.order]
  front = np.flatnonzero(np.diff(np.maximum.accumulate(values), prepend=-1))
  values, norms = values[front], grid.norms[front]
  slope, change = _steepest(scalar)
  curve = alpha * slope * change ** abs(alpha - 2)
  dearest = max(curve, float((values / norms).max()))
  return _Front(most, values, norms, curve, dearest)


def _steepest(scalar: Scalar) -> tuple[float, float]:
  """Bounds for the central square, |x| and |y| at most `_CENTRE`.

  For order a and P, Q there: with t = P / Q in [1 / change, change], Taylor's
  theorem gives E_Q t^a <= 1 + a (a - 1) / 2 * chi^2(P | Q) * change^|a - 2|,
  and chi^2 <= slope * (x - y)^2 <= 2 * slope * (x^2 + y^2), so that

    f = log(E_Q t^a) / (a - 1) <= a * slope * change^|a - 2| * (x^2 + y^2).

  Returns:
    (slope, change).
  """
  inside = np.abs(scalar.nodes) < _CENTRE
  points = np.concatenate([[-_CENTRE], scalar.nodes[inside], [_CENTRE]])
  rows = probabilities(scalar, points)
  steep = np.abs(np.diff(rows, axis=0)) / np.diff(points)[:, None]
  least = rows.min(0)
  slope = float(np.sum(steep.max(0) ** 2 / least))
  change = float((rows.max(0) / least).max())
  return slope, change
