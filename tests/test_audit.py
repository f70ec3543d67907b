"""The audit's bound holds, is not vacuous, and catches what is broken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from benchmarks import audit as benchmark
from mpqfl_jax import accounting, audit, defenses, errors

DELTA = 1e-2


def _gaussians(mu, runs, seed):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(runs), mu + rng.standard_normal(runs)


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_the_bound_is_below_the_true_epsilon_and_near(mu):
  # A Gaussian mechanism whose exact epsilon is known; the bound is wrong with
  # probability 0.001, so that 20 audits must all hold. So many runs show rates
  # down to about a thousandth, that is epsilon up to about 6.
  true = accounting.gaussian(1 / mu, 1, DELTA)
  found = [
    audit.lower_bound(*_gaussians(mu, 20_000, seed), DELTA).epsilon
    for seed in range(20)
  ]
  assert max(found) <= true
  assert np.median(found) > min(0.55 * true, 5.0)


def test_a_pure_mechanism_is_bounded_from_both_sides():
  # Randomised response tells the truth with probability e^eps / (1 + e^eps).
  rng = np.random.default_rng(0)
  truth = np.exp(1.2) / (1 + np.exp(1.2))
  absent = (rng.random(40_000) > truth).astype(float)
  present = (rng.random(40_000) < truth).astype(float)
  bound = audit.lower_bound(absent, present, delta=0.0)
  assert 1.1 < bound.epsilon < 1.2
  # Which output is meant by "present" does not matter.
  swapped = audit.lower_bound(present, absent, delta=0.0)
  assert 1.1 < swapped.epsilon < 1.2


def test_what_cannot_be_told_apart_bounds_nothing():
  assert audit.lower_bound(*_gaussians(0.0, 5_000, 0), DELTA).epsilon < 0.1
  same = np.zeros(1000)
  assert audit.lower_bound(same, same, DELTA).epsilon == 0.0


def test_certain_detection_is_limited_by_the_runs_alone():
  absent, present = np.zeros(2000), np.ones(2000)
  bound = audit.lower_bound(absent, present, 0.0, confidence=0.999)
  # Clopper and Pearson: none in 1,000 is at most 1 - 0.0005^(1/1000).
  want = np.log((5e-4 ** (1 / 1000)) / (1 - 5e-4 ** (1 / 1000)))
  np.testing.assert_allclose(bound.epsilon, want, rtol=1e-6)


def test_scores_differ_by_the_canary_alone():
  defense = defenses.make("dp_gaussian(noise_multiplier=4)", jnp.zeros(8))
  canary = jnp.zeros(8).at[2].set(3.0)
  absent, present = audit.scores(
    audit.of_update(defense, canary), 3000, jax.random.key(0)
  )
  # Clipped to 1, seen along a canary of length 3, in noise of deviation 4.
  for values, mean in ((absent, -3.0), (present, 3.0)):
    z = (values - mean) / (3 * 4.0)
    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_noise_for_half_the_claim_is_caught():
  honest, broken = next(iter(benchmark.CASES.items()))
  epsilon = benchmark.claimed(honest, DELTA)
  kept = benchmark.measured(honest, 8_000, DELTA, 0.999)
  caught = benchmark.measured(broken, 8_000, DELTA, 0.999)
  assert kept.epsilon <= epsilon < caught.epsilon


@pytest.mark.slow
@pytest.mark.parametrize("leaf", ["fine", "noisy"])
def test_layers_of_unlike_noise_keep_to_one_epsilon(leaf, tmp_path):
  # The canary lies in one layer or in the other; the claim is of both.
  def policy(name, theta):
    path = tmp_path / f"{name}.toml"
    path.write_text(
      '[[rule]]\npath = "fine"\nprecision = "pbm"\n'
      f"theta = {theta}\ntrials = 4\n"
      '[[rule]]\npath = "noisy"\nprecision = "pbm"\n'
      f"theta = {theta / 4}\ntrials = 4\n"
    )
    return f"dp_policy(file={path})"

  params = {"fine": jnp.zeros(8), "noisy": jnp.zeros(8)}
  canary = {**params, leaf: jnp.zeros(8).at[0].set(10.0)}

  def proven(spec):
    defense = defenses.make(spec, params)
    found = audit.scores(
      audit.of_update(defense, canary), 40_000, jax.random.key(0)
    )
    return audit.lower_bound(*found, DELTA).epsilon

  once = accounting.one_update().ledger
  claim = defenses.make(policy("honest", 0.125), params).epsilon(once, DELTA)
  assert proven(policy("honest", 0.125)) <= claim
  if leaf == "fine":
    assert proven(policy("honest", 0.125)) > 0.3 * claim
    assert proven(policy("broken", 0.25)) > claim


@pytest.mark.slow
@pytest.mark.parametrize("honest", list(benchmark.CASES))
def test_every_mechanism_keeps_to_its_epsilon(honest):
  epsilon = benchmark.claimed(honest, DELTA)
  kept = benchmark.measured(honest, 40_000, DELTA, 0.999)
  caught = benchmark.measured(benchmark.CASES[honest], 40_000, DELTA, 0.999)
  assert 0.3 * epsilon < kept.epsilon <= epsilon < caught.epsilon


def test_what_claims_nothing_is_refused():
  with pytest.raises(errors.UserError, match="claims no epsilon"):
    benchmark.claimed("int8", DELTA)
