"""Epsilon against closed forms, published values and numerical integration."""

import math

import dp_accounting
import numpy as np
import pytest
from scipy import integrate, optimize, stats

from mpqfl_jax import accounting, errors

DELTA = 1e-5


@pytest.mark.parametrize("multiplier, releases", [(2.0, 1), (0.3, 1), (10, 9)])
def test_gaussian_is_exact(multiplier, releases):
  # Balle and Wang 2018, theorem 8: the exact delta of a Gaussian mechanism;
  # k releases of multiplier m are one of m / sqrt(k).
  sigma = multiplier / math.sqrt(releases)

  def exact_delta(epsilon):
    a, b = 1 / (2 * sigma) - epsilon * sigma, -1 / (2 * sigma) - epsilon * sigma
    return stats.norm.cdf(a) - math.exp(epsilon + stats.norm.logcdf(b))

  ours = accounting.gaussian(multiplier, releases, DELTA)
  np.testing.assert_allclose(exact_delta(ours), DELTA, rtol=1e-6)


def test_gaussian_beats_the_textbook_by_what_is_published():
  # Dwork and Roth 2014, theorem A.1: sigma = sqrt(2 ln(1.25 / delta)) / epsilon
  # suffices for epsilon < 1. The exact mechanism needs less.
  sigma = math.sqrt(2 * math.log(1.25 / DELTA)) / 0.5
  assert accounting.gaussian(sigma, 1, DELTA) < 0.5
  assert accounting.gaussian_noise_multiplier(0.5, 1, DELTA) < sigma


@pytest.mark.parametrize("multiplier", [0.5, 4.0])
def test_laplace_once_is_its_pure_epsilon_or_less(multiplier):
  epsilon = accounting.laplace(multiplier, 1, DELTA)
  assert epsilon <= 1 / multiplier
  # The exact delta at the reported epsilon, integrated numerically; the kink
  # of the densities is at 0 and 1.
  p = stats.laplace(0, multiplier).pdf
  q = stats.laplace(1, multiplier).pdf
  parts = [
    integrate.quad(lambda x: max(p(x) - math.exp(epsilon) * q(x), 0.0), a, b)[0]
    for a, b in [(-60, 0), (0, 0.5), (0.5, 1), (1, 60)]
  ]
  assert sum(parts) <= DELTA * (1 + 1e-6)


def test_many_laplace_releases_cost_less_than_their_sum():
  # Mironov 2017, table II and proposition 6; against the accountant of privacy
  # loss distributions, which is tight: the Renyi bound lies above, not far.
  multiplier, releases = 20.0, 200
  ours = accounting.laplace(multiplier, releases, DELTA)
  accountant = dp_accounting.pld.PLDAccountant()
  accountant.compose(dp_accounting.LaplaceDpEvent(multiplier), releases)
  tight = accountant.get_epsilon(DELTA)
  assert tight <= ours <= 1.2 * tight < releases / multiplier


def test_poisson_sampling_agrees_with_published_values():
  # Abadi et al. 2016, section 5.2 (figure 2): q = 0.01, sigma = 4, 10,000
  # steps and delta = 1e-5 give 1.26 by the moments accountant. TF Privacy's
  # tutorial: 60,000 examples, batches of 250, noise multiplier 1.3, 15 epochs
  # give 1.18. Both are upper bounds that a tight accountant must undercut, by
  # no more than Renyi divergence loses.
  ours = accounting.sampled_gaussian(4.0, 0.01, 10_000, DELTA)
  assert 0.7 * 1.26 < ours < 1.26
  steps = 15 * 60_000 // 250
  ours = accounting.sampled_gaussian(1.3, 250 / 60_000, steps, DELTA)
  assert 0.7 * 1.18 < ours < 1.18


def test_one_poisson_sample_is_exact():
  # One release: delta(epsilon) of the mixture (1 - q) N(0) + q N(1) against
  # N(0), both ways, integrated.
  sigma, q = 0.8, 0.3
  epsilon = accounting.sampled_gaussian(sigma, q, 1, DELTA)
  x = np.linspace(-10, 12, 400_001)
  zero = stats.norm.pdf(x, 0, sigma)
  mixed = (1 - q) * zero + q * stats.norm.pdf(x, 1, sigma)
  deltas = [
    integrate.trapezoid(np.maximum(a - np.exp(epsilon) * b, 0), x)
    for a, b in [(mixed, zero), (zero, mixed)]
  ]
  np.testing.assert_allclose(max(deltas), DELTA, rtol=5e-3)


def test_sampling_at_rate_one_is_no_sampling():
  assert accounting.sampled_gaussian(3.0, 1.0, 4, DELTA) == (
    accounting.gaussian(3.0, 4, DELTA)
  )
  close = accounting.sampled_gaussian(3.0, 1 - 1e-9, 4, DELTA)
  np.testing.assert_allclose(
    close, accounting.gaussian(3.0, 4, DELTA), rtol=1e-3
  )


def test_weak_noise_is_accounted_for():
  # Sampling at most helps: the unsampled mechanism is a bound, and with a rate
  # near 1 no worse.
  for z in (0.1, 0.02):
    whole = accounting.gaussian(z, 10, DELTA)
    assert 0.5 * whole < accounting.sampled_gaussian(z, 0.9, 10, DELTA)
    assert accounting.sampled_gaussian(z, 0.5, 10, DELTA) < whole * 1.001


@pytest.mark.parametrize(
  "epsilon", [0.5, pytest.param(8.0, marks=pytest.mark.slow)]
)
def test_calibration_agrees_with_dp_accounting(epsilon):
  q, steps = 0.05, 20
  ours = accounting.sampled_gaussian_noise_multiplier(epsilon, q, steps, DELTA)
  theirs = dp_accounting.calibrate_dp_mechanism(
    dp_accounting.pld.PLDAccountant,
    lambda z: dp_accounting.SelfComposedDpEvent(
      dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z)),
      steps,
    ),
    epsilon,
    DELTA,
    dp_accounting.LowerEndpointAndGuess(0.3, 2.0),
    tol=1e-3,
  )
  np.testing.assert_allclose(ours, theirs, rtol=3e-3)
  ours = accounting.gaussian_noise_multiplier(epsilon, steps, DELTA)
  np.testing.assert_allclose(
    accounting.gaussian(ours, steps, DELTA), epsilon, rtol=1e-6
  )


def test_least_finds_the_root_from_above():
  for target in (1e-3, 1.0, 50.0):
    found = accounting.least(lambda z: 3.0 / z, target)
    assert 3.0 / found <= target
    np.testing.assert_allclose(found, 3.0 / target, rtol=1e-4)
  with pytest.raises(errors.UserError, match="cannot be reached"):
    accounting.least(lambda z: 1.0 + 1 / z, 0.5)


def test_divergences_convert_as_published():
  # Canonne, Kamath and Steinke 2020, proposition 12, minimised by SciPy for a
  # Gaussian mechanism, alpha / (2 sigma^2).
  sigma = 2.0

  def at(alpha):
    return (
      alpha / (2 * sigma**2)
      + math.log1p(-1 / alpha)
      - math.log(DELTA * alpha) / (alpha - 1)
    )

  best = optimize.minimize_scalar(at, bounds=(1.01, 200), method="bounded").fun
  ours = accounting.from_divergence(
    accounting.ORDERS / (2 * sigma**2), accounting.ORDERS, DELTA
  )
  assert best <= ours <= best * 1.01
  unknown = np.full(len(accounting.ORDERS), np.inf)
  assert accounting.from_divergence(unknown, accounting.ORDERS, DELTA) == np.inf


def test_nothing_released_costs_nothing():
  assert accounting.gaussian(1.0, 0, DELTA) == 0.0
  assert accounting.laplace(1.0, 0, DELTA) == 0.0
  assert accounting.sampled_gaussian(1.0, 0.1, 0, DELTA) == 0.0
  nobody = accounting.Ledger(0, np.zeros(0, np.int64))
  assert accounting.most_releases(nobody) == 0
