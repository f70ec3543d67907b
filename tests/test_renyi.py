"""Renyi divergence over the worst pair of updates."""

import numpy as np
import pytest
from scipy import optimize, stats

from mpqfl_jax import private_codecs, renyi

ORDERS = np.array([1.3, 2.0, 4.5, 16.0])


def _binomial(theta, trials=1):
  return private_codecs.poisson_binomial(theta, trials).scalar


def _rqm(levels=5):
  return private_codecs.randomised_quantisation(0.7, levels, 0.4).scalar


def _divergence(p, q, alpha):
  return np.log(np.sum(p**alpha * q ** (1 - alpha))) / (alpha - 1)


def test_divergence_is_its_definition():
  rng = np.random.default_rng(0)
  p, q = rng.dirichlet(np.ones(6), 3), rng.dirichlet(np.ones(6), 2)
  found = renyi.divergences(p, q, ORDERS)
  for i, alpha in enumerate(ORDERS):
    for j in range(3):
      for k in range(2):
        np.testing.assert_allclose(
          found[i, j, k], _divergence(p[j], q[k], alpha), rtol=1e-9
        )
  # What double precision does not hold is not guessed.
  far = np.array([[1e-30, 1 - 1e-30]])
  assert renyi.divergences(far, far[:, ::-1], np.array([400.0]))[0, 0, 0] == (
    np.inf
  )


@pytest.mark.parametrize("theta, trials", [(0.25, 16), (0.1, 3)])
def test_binomial_divergence_against_all_of_its_outcomes(theta, trials):
  # Trials are independent: the divergence of the sums, over SciPy's binomial
  # probabilities, is `trials` times that of one.
  k = np.arange(trials + 1)
  p = stats.binom.pmf(k, trials, 0.5 + theta)
  q = stats.binom.pmf(k, trials, 0.5 - theta)
  ours = renyi.worst_in_box(_binomial(theta, trials), ORDERS, entries=7)
  want = [7 * _divergence(p, q, alpha) for alpha in ORDERS]
  np.testing.assert_allclose(ours, want, rtol=1e-5)


@pytest.mark.parametrize("scalar", [_binomial(0.3), _rqm(5), _rqm(6)])
def test_no_pair_in_the_box_is_worse_than_the_corners(scalar):
  x = np.linspace(-1, 1, 401)
  rows = renyi.probabilities(scalar, x)
  np.testing.assert_allclose(rows.sum(1), 1.0, rtol=1e-12)
  table = renyi.divergences(rows, rows, ORDERS).max((1, 2))
  worst = renyi.worst_in_box(scalar, ORDERS, 1)
  assert np.all(table <= worst * (1 + 1e-12))
  np.testing.assert_allclose(worst, table, rtol=1e-9)


@pytest.mark.parametrize("scalar", [_binomial(0.3), _rqm(5)])
@pytest.mark.parametrize("radius", [0.6, 1.0, 1.3])
def test_the_bound_over_the_ball_holds_and_is_close(scalar, radius):
  """Against a direct search over pairs of updates of two entries."""
  alpha = 4.5
  bound = renyi.worst_in_ball(
    [renyi.Group(scalar, 2, radius)], np.array([alpha])
  )[0]

  def clipped(v):
    v = v * min(1.0, radius / max(np.linalg.norm(v), 1e-12))
    return np.clip(v, -1, 1)

  def total(v):
    p = renyi.probabilities(scalar, clipped(v[:2]))
    q = renyi.probabilities(scalar, clipped(v[2:]))
    return sum(_divergence(a, b, alpha) for a, b in zip(p, q, strict=True))

  found = optimize.differential_evolution(
    lambda v: -total(v), [(-1.3, 1.3)] * 4, seed=1, maxiter=40, tol=1e-9
  )
  best = -found.fun * scalar.copies
  assert best <= bound * (1 + 1e-9)
  assert bound <= 1.15 * best


def test_many_entries_cost_no_more_than_the_norm_allows():
  # With n entries the bound tends to the largest quotient of divergence and
  # squared norm, times 2 r^2, and no longer grows; in a box it does.
  scalar = _binomial(0.05)
  few, many = (
    renyi.worst_in_ball([renyi.Group(scalar, n, 1.0)], ORDERS)
    for n in (10**4, 10**7)
  )
  np.testing.assert_allclose(few, many, rtol=0.02)
  box = renyi.worst_in_box(scalar, ORDERS, 10**4)
  assert np.all(many < box / 1000)
  # Small entries, whose divergence is order / 2 * chi^2 = order * 2 * theta^2
  # * (x - y)^2, are the worst; two opposite updates are 2 apart.
  limit = ORDERS * 8 * 0.05**2
  assert np.all(limit <= many) and np.all(many <= 1.05 * limit)
  # That is the Gaussian mechanism of the same variance, 1 / (4 theta^2).
  one = renyi.worst_in_box(scalar, ORDERS, 1)
  assert np.all(one <= many)


def test_a_large_ball_is_the_box():
  for scalar in (_binomial(0.25, 4), _rqm(6)):
    ball = renyi.worst_in_ball([renyi.Group(scalar, 9, 100.0)], ORDERS)
    np.testing.assert_allclose(
      ball, renyi.worst_in_box(scalar, ORDERS, 9), rtol=1e-9
    )


def test_groups_that_are_alike_are_one_group():
  scalar = _binomial(0.2, 3)
  whole = renyi.worst_in_ball([renyi.Group(scalar, 900, 2.0)], ORDERS)
  halves = [renyi.Group(scalar, n, 2.0) for n in (300, 600)]
  np.testing.assert_allclose(
    renyi.worst_in_ball(halves, ORDERS), whole, rtol=1e-9
  )


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (1.0, 0.4), (0.3, 0.8)])
def test_the_bound_over_groups_holds_and_is_close(bounds):
  """Two entries, each with a quantiser and a bound of its own."""
  alpha, scalars = 3.5, (_binomial(0.35, 2), _rqm(5))
  groups = [
    renyi.Group(scalar, 1, 1.0 / bound)
    for scalar, bound in zip(scalars, bounds, strict=True)
  ]
  bound = renyi.worst_in_ball(groups, np.array([alpha]))[0]

  def rows(v):
    v = v * min(1.0, 1.0 / max(np.linalg.norm(v), 1e-12))
    return [
      renyi.probabilities(scalar, np.clip(x[None] / b, -1, 1))[0]
      for scalar, x, b in zip(scalars, v, bounds, strict=True)
    ]

  def total(v):
    return sum(
      scalar.copies * _divergence(p, q, alpha)
      for scalar, p, q in zip(scalars, rows(v[:2]), rows(v[2:]), strict=True)
    )

  found = optimize.differential_evolution(
    lambda v: -total(v), [(-1.1, 1.1)] * 4, seed=1, maxiter=60, tol=1e-9
  )
  assert -found.fun <= bound * (1 + 1e-9)
  assert bound <= 1.2 * -found.fun


def test_a_group_of_its_own_that_hides_less_decides():
  loose, tight = _binomial(0.4), _binomial(0.02)
  both = renyi.worst_in_ball(
    [renyi.Group(tight, 10_000, 1.0), renyi.Group(loose, 50, 1.0)], ORDERS
  )
  one = renyi.worst_in_ball([renyi.Group(loose, 50, 1.0)], ORDERS)
  # An update may lie in the loose group as a whole.
  assert np.all(both >= one * (1 - 1e-9))
  assert np.all(both <= 1.1 * one)
