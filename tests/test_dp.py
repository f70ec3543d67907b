"""Noise statistics, sensitivity and accounting of the DP mechanisms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from mpqfl_jax import dp, errors, trees


def _update():
  return {"a": jnp.full((300, 200), 3.0), "b": jnp.full((500,), -4.0)}


def test_noise_has_the_stated_deviation_and_is_independent():
  transform = dp.gaussian(clip=2.0, noise_multiplier=0.5)
  update = _update()
  noised, _ = transform.apply(jax.random.key(0), update, transform.init(update))
  clipped = trees.scale(2.0 / trees.norm(update), update)
  noise = jax.tree.map(lambda a, b: np.asarray(a - b).ravel(), noised, clipped)
  # Kolmogorov-Smirnov against N(0, 1): false alarm once in 1,000 seeds.
  for leaf in jax.tree.leaves(noise):
    assert stats.kstest(leaf / (0.5 * 2.0), "norm").pvalue > 1e-3
  assert abs(np.corrcoef(noise["a"][:500], noise["b"])[0, 1]) < 0.2


def test_any_update_is_clipped_to_the_ball():
  transform = dp.gaussian(clip=2.0, noise_multiplier=1e-9)
  for factor in (1e-3, 1.0, 1e6):
    update = trees.scale(factor, _update())
    out, _ = transform.apply(jax.random.key(1), update, transform.init(update))
    want = min(2.0, factor * float(trees.norm(_update())))
    np.testing.assert_allclose(trees.norm(out), want, rtol=1e-5)


@pytest.mark.parametrize("multiplier, releases", [(4.0, 1), (20.0, 9)])
def test_epsilon_covers_the_exact_gaussian_mechanism(multiplier, releases):
  # Balle and Wang 2018, theorem 8: the exact delta of a Gaussian mechanism;
  # k releases of multiplier m are one of m / sqrt(k). The Renyi bound must lie
  # above the exact value, and not far.
  delta = 1e-5
  sigma = multiplier / dp.REPLACE_SENSITIVITY / math.sqrt(releases)

  def exact_delta(epsilon):
    a, b = 1 / (2 * sigma) - epsilon * sigma, -1 / (2 * sigma) - epsilon * sigma
    return stats.norm.cdf(a) - math.exp(epsilon) * stats.norm.cdf(b)

  exact = optimize.brentq(lambda e: exact_delta(e) - delta, 1e-3, 50)
  ours = dp.gaussian_epsilon(multiplier, releases, delta)
  assert exact <= ours <= 1.25 * exact


def test_no_release_costs_nothing():
  assert dp.gaussian_epsilon(1.0, 0, 1e-5) == 0.0


@pytest.mark.parametrize("clip, noise", [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_parameters_without_meaning_are_refused(clip, noise):
  with pytest.raises(errors.UserError, match="Expected"):
    dp.gaussian(clip=clip, noise_multiplier=noise)
