"""L-BFGS in the compact representation, made for long histories of one vector.

The textbook two-loop recursion touches the history 2m times in sequence, which
costs more than the gradients of a small network. The compact form (Byrd,
Nocedal and Schnabel 1994, theorem 2.3) needs the same inner products as two
matrix-vector products and one triangular solve each way, and batches under
`vmap` by itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpqfl_jax.types import Array


class State(NamedTuple):
  """Iterate, its value and gradient, and the curvature pairs.

  Attributes:
    x: [n] float32.
    value: [] float32, objective at `x`.
    gradient: [n] float32 at `x`.
    s, y: [m, n], steps and gradient differences, in a ring of m slots.
    sy, yy: [m, m], inner products of the rows of `s` with `y` and of `y` with
      itself, oldest pair first, newest last.
    slot: [] int32, the slot of the ring that the next pair goes to.
    filled: [] int32, how many of the newest pairs are in use.
    failures: [] int32, line searches in a row that found no decrease.
  """

  x: Array
  value: Array
  gradient: Array
  s: Array
  y: Array
  sy: Array
  yy: Array
  slot: Array
  filled: Array
  failures: Array


def init(x: Array, history: int) -> State:
  """State before the first step, which only evaluates the objective at `x`.

  So a program that starts a search does not contain the objective.

  Args:
    x: [n] float32, the starting point.
    history: number of curvature pairs kept.
  """
  zeros = jnp.zeros((history, x.size), x.dtype)
  small = jnp.zeros((history, history), x.dtype)
  zero, infinity = jnp.int32(0), jnp.full((), jnp.inf, x.dtype)
  return State(
    x, infinity, jnp.zeros_like(x), zeros, zeros, small, small, zero, zero, zero
  )


def _direction(state: State) -> Array:
  """Minus the inverse Hessian estimate times the gradient, [n]."""
  m = state.s.shape[0]
  order = (state.slot + jnp.arange(m)) % m  # oldest pair first
  used = jnp.arange(m) >= m - state.filled
  curvature = jnp.diagonal(state.sy)
  gamma = jnp.where(used[-1], curvature[-1] / state.yy[-1, -1], 1.0)
  # An unused slot is an identity row, so that it changes nothing.
  upper = jnp.triu(state.sy) * used[:, None] + jnp.diag(1.0 - used)
  p = jnp.where(used, (state.s @ state.gradient)[order], 0.0)
  q = jnp.where(used, (state.y @ state.gradient)[order], 0.0)
  u = jax.scipy.linalg.solve_triangular(upper, p)
  middle = jnp.where(used, curvature * u + gamma * (state.yy @ u - q), 0.0)
  v = jax.scipy.linalg.solve_triangular(upper, middle, trans=1)
  ring = (jnp.arange(m) - state.slot) % m
  return -(
    gamma * state.gradient + v[ring] @ state.s - gamma * (u[ring] @ state.y)
  )


class _Search(NamedTuple):
  step: Array
  low: Array
  high: Array
  value: Array
  gradient: Array
  trials: Array
  done: Array


def _line_search(
  fn, x, value, gradient, direction, first, c1=1e-4, c2=0.9, limit=20
) -> _Search:
  """Step length with the weak Wolfe conditions, by bracketing.

  Lewis and Overton 2013, algorithm 2.6, with the minimiser of the parabola
  through the start in place of the bracket's middle, where the bracket still
  begins at the start and the minimiser lies well inside.
  """
  slope = jnp.vdot(gradient, direction)
  value_and_grad = jax.value_and_grad(fn)

  def cond(s: _Search):
    return ~s.done & (s.trials < limit)

  def body(s: _Search):
    new_value, new_gradient = value_and_grad(x + s.step * direction)
    new_slope = jnp.vdot(new_gradient, direction)
    good = jnp.isfinite(new_value) & jnp.all(jnp.isfinite(new_gradient))
    too_long = ~good | (new_value > value + c1 * s.step * slope)
    too_short = ~too_long & (new_slope < c2 * slope)
    low = jnp.where(too_short, s.step, s.low)
    high = jnp.where(too_long, s.step, s.high)
    # The parabola has f(0), f'(0) and f(step).
    fit = -slope * s.step**2 / (2 * (new_value - value - slope * s.step))
    middle = 0.5 * (low + high)
    inside = (fit > low + 0.1 * (high - low)) & (
      fit < high - 0.1 * (high - low)
    )
    bracketed = jnp.where(inside & too_long & (s.low == 0), fit, middle)
    step = jnp.where(jnp.isfinite(high), bracketed, 2.0 * low)
    done = ~too_long & ~too_short
    return _Search(
      step=jnp.where(done, s.step, step),
      low=low,
      high=high,
      value=jnp.where(too_long, s.value, new_value),
      gradient=jnp.where(too_long, s.gradient, new_gradient),
      trials=s.trials + 1,
      done=done,
    )

  zero = jnp.zeros_like(value)
  start = _Search(
    step=first,
    low=zero,
    high=zero + jnp.inf,
    value=value,
    gradient=gradient,
    trials=jnp.int32(0),
    done=~(slope < 0) & jnp.isfinite(value),
  )
  end = jax.lax.while_loop(cond, body, start)
  # Out of trials: the best decrease found is at `low`, whose value and gradient
  # were kept; 0 where there was none.
  return end._replace(step=jnp.where(end.done, end.step, end.low))


def step(fn: Callable[[Array], Array], state: State) -> State:
  """One iteration: direction, line search, new curvature pair.

  Args:
    fn: objective, [n] -> [].
    state: where it stands.
  """
  m = state.s.shape[0]
  direction = _direction(state)
  slope = jnp.vdot(direction, state.gradient)
  steepest = ~(slope < 0) | (state.filled == 0)
  direction = jnp.where(steepest, -state.gradient, direction)
  size = jnp.linalg.norm(state.gradient)
  first = jnp.where(steepest, jnp.minimum(1.0, 1.0 / size), 1.0)
  search = _line_search(
    fn, state.x, state.value, state.gradient, direction, first
  )
  ds = search.step * direction
  dy = search.gradient - state.gradient
  failed = (search.step == 0) | (slope == 0) & jnp.isfinite(state.value)
  keep = jnp.vdot(ds, dy) > 1e-10 * jnp.vdot(dy, dy)

  # A pair without curvature is written over by the next one. It has displaced
  # the oldest pair where the ring was full.
  s, y = state.s.at[state.slot].set(ds), state.y.at[state.slot].set(dy)
  slot = jnp.where(keep, (state.slot + 1) % m, state.slot)
  order = (state.slot + 1 + jnp.arange(m)) % m
  y_ds, y_dy, s_dy = (y @ ds)[order], (y @ dy)[order], (s @ dy)[order]
  sy = jnp.pad(state.sy[1:, 1:], ((0, 1), (0, 1))).at[-1].set(y_ds)
  yy = jnp.pad(state.yy[1:, 1:], ((0, 1), (0, 1))).at[-1].set(y_dy)
  sy, yy = sy.at[:, -1].set(s_dy), yy.at[:, -1].set(y_dy)
  filled = jnp.where(
    keep, jnp.minimum(state.filled + 1, m), jnp.minimum(state.filled, m - 1)
  )
  return State(
    x=state.x + ds,
    value=search.value,
    gradient=search.gradient,
    s=s,
    y=y,
    sy=jnp.where(keep, sy, state.sy),
    yy=jnp.where(keep, yy, state.yy),
    slot=slot,
    # After a failure the history is dropped: the next step is steepest descent.
    filled=jnp.where(failed, 0, filled),
    failures=jnp.where(failed, state.failures + 1, 0),
  )
