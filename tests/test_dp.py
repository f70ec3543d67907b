"""Noise statistics, sensitivity and calibration of noise at the client."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mpqfl_jax import accounting, dp, errors, trees

ONCE = accounting.one_update()
THRICE = ONCE._replace(ledger=accounting.Ledger(9, np.array([1, 3, 0])))
# name -> (mechanism, noise of scale 1, order of the norm, deviation / scale)
MECHANISMS = {
  "gaussian": (dp.gaussian, stats.norm, 2, 1.0),
  "laplace": (dp.laplace, stats.laplace, 1, 2**0.5),
}
each = pytest.mark.parametrize("name", list(MECHANISMS))


def _update():
  return {"a": jnp.full((300, 200), 3.0), "b": jnp.full((500,), -4.0)}


def _norm(tree, order):
  flat = [np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)]
  return np.linalg.norm(np.concatenate(flat), order)


@each
def test_noise_has_the_stated_law_and_is_independent(name):
  mechanism, law, order, ratio = MECHANISMS[name]
  built = mechanism(ONCE, clip=2.0, noise_multiplier=0.5)
  update = _update()
  noised, _ = built.transform.apply(
    jax.random.key(0), update, built.transform.init(update)
  )
  clipped = trees.scale(2.0 / _norm(update, order), update)
  noise = jax.tree.map(lambda a, b: np.asarray(a - b).ravel(), noised, clipped)
  np.testing.assert_allclose(built.noise_stddev, 0.5 * 2.0 * ratio)
  # Kolmogorov-Smirnov: a false alarm once in 1,000 seeds.
  for leaf in jax.tree.leaves(noise):
    assert stats.kstest(leaf / (0.5 * 2.0), law.cdf).pvalue > 1e-3
  assert abs(np.corrcoef(noise["a"][:500], noise["b"])[0, 1]) < 0.2


@each
def test_any_update_is_clipped_to_the_ball(name):
  mechanism, _, order, _ = MECHANISMS[name]
  transform = mechanism(ONCE, clip=2.0, noise_multiplier=1e-12).transform
  for factor in (1e-7, 1e-3, 1.0, 1e6):
    update = trees.scale(factor, _update())
    out, _ = transform.apply(jax.random.key(1), update, transform.init(update))
    want = min(2.0, factor * _norm(_update(), order))
    np.testing.assert_allclose(_norm(out, order), want, rtol=1e-4)


@each
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_what_is_not_finite_is_noise_alone(name, bad):
  """The norm holds whatever training came to: the server learns nothing."""
  mechanism, _, _, _ = MECHANISMS[name]
  transform = mechanism(ONCE, noise_multiplier=0.5).transform
  update = _update()
  spoilt = {"a": update["a"].at[3, 4].set(bad), "b": update["b"]}
  zero = jax.tree.map(jnp.zeros_like, update)
  out, want = (
    transform.apply(jax.random.key(2), u, transform.init(u))[0]
    for u in (spoilt, zero)
  )
  if bad < np.inf and name == "laplace":
    # Its L1 norm is a float32, so that it may be clipped instead.
    assert _norm(trees.subtract(out, want), 1) <= 1 + 1e-5
    return
  jax.tree.map(np.testing.assert_array_equal, out, want)


@each
@pytest.mark.parametrize("epsilon", [0.3, 8.0, 300.0])
def test_noise_for_an_epsilon_spends_it_all_at_the_end(name, epsilon):
  mechanism = MECHANISMS[name][0]
  guarantee = mechanism(THRICE, clip=2.0, epsilon=epsilon).guarantee
  spent = guarantee.epsilon(THRICE.ledger, THRICE.delta)
  assert 0.999 * epsilon <= spent <= epsilon * (1 + 1e-9)
  # Before the end, less; the client that sent most counts.
  early = guarantee.epsilon(accounting.Ledger(1, np.array([1, 0, 0])), 1e-5)
  assert 0 < early < spent
  assert guarantee.epsilon(accounting.Ledger(1, np.zeros(3, int)), 1e-5) == 0
  assert (guarantee.model, guarantee.unit) == ("local", "client")


@each
@pytest.mark.parametrize(
  "given, words",
  [
    ({"clip": 0.0}, "clip=0.0: expected a number above 0"),
    ({"clip": -1.0}, "expected a number above 0"),
    ({"clip": "one"}, "expected a number"),
    ({"clip": float("nan")}, "expected a number above 0"),
    ({"clip": float("inf")}, "expected a finite number"),
    ({"noise_multiplier": 0.0}, "without noise there is no"),
    ({"noise_multiplier": -1.0}, "expected a number above 0"),
    ({"noise_multiplier": float("inf")}, "expected a finite number"),
    ({"epsilon": 0}, "epsilon=0: expected a number above 0"),
    ({"epsilon": "high"}, "expected a number"),
    ({"noise_multiplier": 0, "epsilon": 8}, "contradict each other"),
    ({"noise_multiplier": 1.0, "epsilon": 8}, "contradict each other"),
  ],
)
def test_parameters_without_meaning_are_refused(name, given, words):
  with pytest.raises(errors.UserError, match=words):
    MECHANISMS[name][0](ONCE, **given)
