"""Allocations against exact solvers, and the policies built on them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from mpqfl_jax import budget, choice, counter, precision, trees
from mpqfl_jax.errors import UserError

PARAMS = {
  "conv1": {"bias": jnp.zeros(6), "kernel": jnp.zeros((5, 5, 1, 6))},
  "conv2": {"kernel": jnp.zeros((5, 5, 6, 12))},
  "dense1": {"kernel": jnp.zeros((300, 10))},
}


def instance(rng, leaves, options):
  """A knapsack like those of updates: bits cost linearly, errors fall by 4."""
  sizes = np.exp(rng.uniform(1, 10, leaves))
  energy = np.exp(rng.uniform(-8, 8, leaves))
  bits = np.sort(rng.uniform(0, 16, (leaves, options)), 1)
  bits[:, 0] = 0
  cost = np.ceil(sizes[:, None] * bits / 8).astype(np.int32) + 1
  noise = rng.uniform(0.5, 2.0, bits.shape)
  value = (energy[:, None] * 4.0**-bits * noise).astype(np.float32)
  limit = int(rng.uniform(cost.min(1).sum(), cost.max(1).sum()))
  return value, cost, limit


def exact(value, cost, limit, known):
  """The optimum by HiGHS, a branch-and-bound solver; `known` bounds it."""
  leaves, options = value.shape
  one = np.kron(np.eye(leaves), np.ones(options))
  result = optimize.milp(
    np.minimum(value / known, 2.0).reshape(-1).astype(np.float64),
    integrality=np.ones(value.size),
    # What alone is worse than a known choice is out, as are huge numbers.
    bounds=optimize.Bounds(0, (value <= 1.001 * known).reshape(-1).astype(int)),
    constraints=[
      optimize.LinearConstraint(one, 1, 1),
      optimize.LinearConstraint(cost.reshape(1, -1).astype(float), 0, limit),
    ],
    options={"mip_rel_gap": 0},
  )
  if not result.success:  # no choice is as good as `known`
    return np.inf
  return result.fun * known


def test_cheapest_against_the_exact_optimum():
  rng = np.random.default_rng(0)
  solve = jax.jit(budget.cheapest)
  gaps, proven = [], []
  for _ in range(40):
    value, cost, limit = instance(rng, 10, 8)
    found = solve(value, cost, limit)
    picked = np.asarray(found.picked)
    assert np.take_along_axis(cost, picked[:, None], 1).sum() <= limit
    total = np.take_along_axis(value, picked[:, None], 1).sum()
    np.testing.assert_allclose(found.value, total, rtol=1e-5)
    best = exact(value, cost, limit, total)
    # The certificate holds: no choice is better than the bound.
    assert found.bound <= best * (1 + 1e-6)
    assert best <= total * (1 + 1e-4)
    gaps.append(total / best - 1)
    proven.append(total / float(found.bound) - 1)
    # The promise: as good as the optimum of a budget less a cell a leaf.
    cell = -(-(limit - cost.min(1).sum()) // 4096)
    tighter = limit - 10 * int(cell)
    if tighter >= cost.min(1).sum():
      assert total <= exact(value, cost, tighter, 1.5 * total) * (1 + 1e-4)
  assert np.median(gaps) < 1e-3
  assert np.quantile(proven, 0.75) < 0.01


def test_small_budgets_are_solved_exactly():
  rng = np.random.default_rng(4)
  solve = jax.jit(budget.cheapest)
  for _ in range(20):
    value, cost, _ = instance(rng, 6, 6)
    cost = 1 + cost % 500
    limit = int(rng.integers(cost.min(1).sum(), cost.max(1).sum()))
    found = solve(value, cost, limit)
    total = float(found.value)
    np.testing.assert_allclose(
      total, exact(value, cost, limit, total), rtol=1e-4
    )
    # And proven to be.
    np.testing.assert_allclose(found.bound, total, rtol=1e-5)


def test_least_leakage_against_all_choices():
  rng = np.random.default_rng(1)
  solve = jax.jit(budget.least_leakage)
  ratios, gaps, infeasible = [], [], 0
  for _ in range(40):
    error, cost, limit = instance(rng, 4, 5)
    energy = error.max(1)
    leakage = np.maximum(energy[:, None] / error - 1, 0).astype(np.float32)
    allowed = np.float32(rng.uniform(0.001, 0.3) * energy.sum())
    found = solve(leakage, cost, limit, error, allowed)
    picked = np.asarray(found.picked)
    spent = np.take_along_axis(cost, picked[:, None], 1).sum()
    lost = np.take_along_axis(error, picked[:, None], 1).sum()
    assert spent <= limit
    best = np.inf
    for way in itertools.product(range(5), repeat=4):
      at = np.array(way)[:, None]
      if np.take_along_axis(cost, at, 1).sum() > limit:
        continue
      if np.take_along_axis(error, at, 1).sum() <= allowed:
        best = min(best, np.take_along_axis(leakage, at, 1).sum())
    if lost > allowed * (1 + 1e-5):
      infeasible += 1
      assert found.bound == np.inf and best == np.inf
      continue
    assert found.bound <= best * (1 + 1e-6)
    ratios.append(float(found.value) / max(best, 1e-6))
    gaps.append(1 - float(found.bound) / max(float(found.value), 1e-6))
  assert np.median(ratios) < 1.001
  assert np.quantile(gaps, 0.75) < 1e-3
  assert infeasible < 20


def test_bounds_where_sums_cancel():
  # Only one leaf may take what costs more, and then the first.
  value = np.array([[0.1, 0], [0.2, 0], [0.3, 0], [0.4, 0]], np.float32)
  cost = np.array([[3_000_001, 9_000_000]] * 4, np.int32)
  found = jax.jit(budget.cheapest)(value, cost, 12_000_004)
  np.testing.assert_allclose(found.value, 1.0, rtol=1e-6)
  assert found.bound <= 1.0


@pytest.mark.parametrize("max_error", [0.2, 0.1, 0.01, 0.001])
def test_a_guarded_leaf_alone_is_proven_optimal(max_error):
  params = {"a": jnp.zeros(3000)}
  update = {"a": jax.random.normal(jax.random.key(0), (3000,))}
  codec = precision.make("guarded", params, bytes=200_000, max_error=max_error)
  assert float(codec.proof.gap(update)) < 1e-6


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
@pytest.mark.parametrize("stochastic", [False, True])
def test_expected_errors_are_those_of_the_codec(stochastic, size):
  # Float16's steps end below 1e-5 or so, and its range at 65,504.
  x = np.random.default_rng(2).standard_normal(700) * size
  x = jnp.asarray(x, jnp.float32)
  rounding = "stochastic" if stochastic else "nearest"
  menu = choice.menu(budget.OPTIONS, rounding)
  leaf = choice.leaf(x.shape, menu)
  unit = jnp.max(jnp.abs(x))
  errors = budget.expected_errors(menu, x, unit)
  seeds = counter.seeds(jax.random.key(0), 300 if stochastic else 1)

  @jax.jit
  def measured(option):
    def one(seed):
      payload = choice.encode_as(menu, option, seed, x)
      return jnp.sum(((leaf.decode(payload) - x) / unit) ** 2)

    return jnp.mean(jax.vmap(one)(seeds))

  for i in range(len(menu.options)):
    np.testing.assert_allclose(
      errors[i], measured(jnp.int32(i)), rtol=0.05 if stochastic else 1e-3
    )


@pytest.mark.parametrize("size", [37, 40, 48, 100, 32_768, 33_333])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_choice_of_an_integer_equals_its_own_codec(rounding, size):
  # One program for all options gives what the program of each gives.
  x = jnp.asarray(np.random.default_rng(3).standard_normal(size), jnp.float32)
  menu = choice.menu(budget.OPTIONS, rounding)
  chosen = choice.leaf(x.shape, menu)
  seed = jnp.array([1, 2], jnp.uint32)
  encode = jax.jit(lambda option: choice.encode_as(menu, option, seed, x))
  for i, option in enumerate(menu.options):
    if option.precision == "none":
      continue
    options = {"mode": option.mode} if option.mode else {}
    own = precision.leaf_codec(
      option.precision, x.shape, {**options, "rounding": rounding}
    )
    payload, _ = own.encode(seed, x, own.init())
    record = b"".join(map(bytes, own.pack(payload)))
    assert b"".join(map(bytes, chosen.pack(encode(jnp.int32(i))))) == record
  assert encode._cache_size() == 1


def an_update(seed=0):
  rng = np.random.default_rng(seed)
  sizes = iter([0.01, 0.1, 0.03, 1.0])
  return jax.tree.map(
    lambda x: jnp.asarray(
      next(sizes) * rng.standard_normal(x.shape), jnp.float32
    ),
    PARAMS,
  )


def sent(codec, update):
  payload, _ = jax.jit(codec.encode)(
    jax.random.key(0), update, codec.init(PARAMS)
  )
  lost = trees.squared_norm(trees.subtract(codec.decode(payload), update))
  return codec.pack(payload), float(lost / trees.squared_norm(update)), payload


def test_budget_is_kept_and_spent_well():
  update = an_update()
  previous = 1.1
  for bytes_ in (60, 3000):
    codec = precision.make("budget", PARAMS, bytes=bytes_)
    message, error, _ = sent(codec, update)
    assert len(message) <= bytes_
    assert error <= previous
    previous = error
  # Never worse than the same width everywhere at the same bytes.
  message, error, _ = sent(precision.make("int4", PARAMS), update)
  codec = precision.make("budget", PARAMS, bytes=len(message))
  assert sent(codec, update)[1] < 0.9 * error


def test_guarded_coarsens_what_leaks_for_little_energy():
  update = an_update()
  codec = precision.make("guarded", PARAMS, bytes=20000, max_error=0.02)
  message, error, payload = sent(codec, update)
  assert len(message) <= 20000
  assert error <= 0.02 * (1 + 1e-4)
  rules = {record.path: record.rule for record in codec.records(payload)}
  # 98% of the energy is in dense1: the convolutions are not worth a bit.
  assert rules["conv1/kernel"].startswith("none")
  assert rules["conv2/kernel"].startswith("none")
  assert not rules["dense1/kernel"].startswith("none")


@pytest.mark.parametrize(
  ("name", "options", "line"),
  [
    ("budget", {"bytes": 3000}, "expected squared error: the least possible"),
    ("budget", {"bytes": 7000}, "expected squared error: within "),
    ("guarded", {"bytes": 2500}, "predicted leakage: the least possible"),
    ("guarded", {"bytes": 100}, "no choice was found that keeps"),
  ],
)
def test_a_table_says_how_good_a_choice_provably_is(name, options, line):
  codec = precision.make(name, PARAMS, **options)
  table = precision.table(codec, an_update(), jax.random.key(0))
  assert table.splitlines()[-1].startswith(line)


def test_nothing_to_choose_for():
  for name in ("budget", "guarded"):
    codec = precision.make(name, {"a": jnp.zeros((0, 3))}, bytes=20)
    payload, _ = codec.encode(
      jax.random.key(0), {"a": jnp.zeros((0, 3))}, ((),)
    )
    assert len(codec.pack(payload)) == 13
    codec = precision.make(name, PARAMS, bytes=3000)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    assert float(codec.proof.gap(zeros)) == 0
  with pytest.raises(UserError, match="no arrays"):
    precision.make("int8", {})


def test_guarded_takes_another_estimator():
  # One that only minds the last layer gets it as coarse as the error allows.
  def last_layer(energy, error):
    weight = jnp.array([0.0, 0.0, 0.0, 1.0])[:, None]
    return weight * budget.snr_leakage(energy, error)

  codec = budget.guarded(PARAMS, 20000, 0.05, leakage=last_layer)
  _, error, payload = sent(codec, an_update())
  assert error <= 0.05 * (1 + 1e-4)
  spread = budget.guarded(PARAMS, 20000, 0.05)
  _, _, other = sent(spread, an_update())
  size = {r.path: r.num_bytes for r in codec.records(payload)}
  plain = {r.path: r.num_bytes for r in spread.records(other)}
  assert size["dense1/kernel"] <= plain["dense1/kernel"]


def test_too_small_a_budget():
  with pytest.raises(UserError, match="expected 16 to"):
    precision.make("budget", PARAMS, bytes=10)
  with pytest.raises(UserError, match="bytes is missing"):
    precision.make("budget", PARAMS)
  with pytest.raises(UserError, match="max_error"):
    precision.make("guarded", PARAMS, bytes=1000, max_error=0)
