"""Aggregates against NumPy, SciPy and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from mpqfl_jax import aggregate, errors


def _updates(clients=7, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "a": rng.normal(size=(clients, 3, 2)).astype(np.float32),
    "b": rng.normal(size=(clients,)).astype(np.float32),
  }


def _flat(tree):
  return np.concatenate(
    [np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(tree)], 1
  ).astype(np.float64)


def _combine(spec, updates, weight):
  return jax.jit(aggregate.make(spec).combine)(
    updates, jnp.asarray(weight, jnp.float32)
  )


def _result(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


WEIGHTS = [
  np.array([3.0, 1, 2, 5, 1, 4, 2]),
  np.array([3.0, 0, 2, 5, 0, 0, 2]),
  np.array([0.0, 0, 2, 5, 0, 4, 0]),
]
ROBUST = [name for name in aggregate.AGGREGATORS if name != "mean"]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_median_equals_numpy(weight):
  got = _combine("median", _updates(), weight)
  want = np.median(_flat(_updates())[weight > 0], axis=0)
  np.testing.assert_allclose(_result(got), want, atol=1e-6)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.35])
def test_trimmed_mean_equals_scipy(weight, share):
  got = _combine(f"trimmed_mean(share={share})", _updates(), weight)
  want = stats.trim_mean(_flat(_updates())[weight > 0], share, axis=0)
  np.testing.assert_allclose(_result(got), want, atol=1e-6)


@pytest.mark.parametrize("weight", WEIGHTS[:2])
@pytest.mark.parametrize("byzantine, best", [(0, 1), (1, 1), (1, 3)])
def test_krum_equals_brute_force(weight, byzantine, best):
  got = _combine(f"krum(byzantine={byzantine},best={best})", _updates(), weight)
  rows = _flat(_updates())[weight > 0]
  n = len(rows)
  # Blanchard et al. 2017, section 4: the sum over the n - f - 2 closest.
  scores = [
    min(
      sum(np.sum((rows[i] - rows[j]) ** 2) for j in chosen)
      for chosen in itertools.combinations(
        [j for j in range(n) if j != i], max(n - byzantine - 2, 1)
      )
    )
    for i in range(n)
  ]
  want = rows[np.argsort(scores)[: min(best, n)]].mean(0)
  np.testing.assert_allclose(_result(got), want, atol=1e-6)


@pytest.mark.parametrize("weight", WEIGHTS[:2])
def test_geometric_median_minimises_the_weighted_distance(weight):
  got = _combine("geometric_median(iterations=200)", _updates(), weight)
  rows = _flat(_updates())

  def cost(z):
    return np.sum(weight * np.linalg.norm(rows - z, axis=1))

  best = optimize.minimize(
    cost, _result(got), method="Nelder-Mead", options={"maxiter": 4000}
  )
  assert cost(_result(got)) <= best.fun * (1 + 1e-5)


@pytest.mark.parametrize("name", ROBUST)
def test_a_gross_liar_has_no_say(name):
  updates = _updates()
  far = jax.tree.map(np.copy, updates)
  for leaf in far.values():
    leaf[2] = 1e6
  got = _combine(name, far, np.ones(7))
  assert np.abs(_result(got)).max() < (
    2e6 / 7 if name == "trimmed_mean" else 10
  )
  # Seven updates: a tenth of them is nobody, a share of 0.2 is one a side.
  if name == "trimmed_mean":
    got = _combine("trimmed_mean(share=0.2)", far, np.ones(7))
    assert np.abs(_result(got)).max() < 10


@pytest.mark.parametrize("name", ROBUST)
def test_nobody_gives_zero_and_one_gives_himself(name):
  updates = _updates()
  got = _combine(name, updates, np.zeros(7))
  np.testing.assert_array_equal(_result(got), 0)
  alone = np.zeros(7)
  alone[4] = 2
  got = _combine(name, updates, alone)
  np.testing.assert_allclose(_result(got), _flat(updates)[4], atol=1e-6)


@pytest.mark.parametrize("name", ROBUST)
def test_order_and_padding_change_nothing(name):
  updates = _updates()
  weight = np.array([1.0, 2, 3, 1, 2, 3, 1])
  order = np.array([3, 1, 6, 0, 2, 5, 4])
  base = _result(_combine(name, updates, weight))
  turned = jax.tree.map(lambda u: u[order], updates)
  np.testing.assert_allclose(
    _result(_combine(name, turned, weight[order])), base, atol=1e-5
  )
  longer = jax.tree.map(
    lambda u: np.concatenate([u, np.full_like(u[:2], 9.0)]), updates
  )
  padded = np.concatenate([weight, [0, 0]])
  np.testing.assert_allclose(
    _result(_combine(name, longer, padded)), base, atol=1e-5
  )


@pytest.mark.parametrize(
  "spec",
  [
    "medan",
    "trimmed_mean(share=0.5)",
    "krum(byzantine=-1)",
    "krum(worst=1)",
    "geometric_median(iterations=0)",
  ],
)
def test_mistakes_say_what_was_expected(spec):
  with pytest.raises(errors.UserError, match="Expected"):
    aggregate.make(spec)
