"""Quantisers with a proof: their law, against enumeration; what they claim."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mpqfl_jax import accounting, defenses, errors, private_codecs, renyi

ONCE = accounting.Ledger(1, np.ones(1, np.int64))
PARAMS = {"a": jnp.zeros((30, 40)), "b": jnp.zeros(50)}


def _rqm_by_subsets(x, margin, levels, keep):
  """Algorithm 2 of Youn et al. 2023 over all 2^(levels - 2) subsets."""
  values = np.linspace(-1 - margin, 1 + margin, levels)
  pmf = np.zeros(levels)
  for pattern in itertools.product((False, True), repeat=levels - 2):
    kept = np.flatnonzero([True, *pattern, True])
    chance = np.prod([keep if k else 1 - keep for k in pattern])
    left = kept[values[kept] <= x].max()
    right = kept[values[kept] > x].min()
    up = (x - values[left]) / (values[right] - values[left])
    pmf[right] += chance * up
    pmf[left] += chance * (1 - up)
  return pmf


@pytest.mark.parametrize(
  "margin, levels, keep", [(1.0, 8, 0.42), (0.3, 5, 0.6), (2.0, 2, 0.5)]
)
def test_rqm_probabilities_against_enumeration(margin, levels, keep):
  built = private_codecs.randomised_quantisation(margin, levels, keep)
  values = np.linspace(-1 - margin, 1 + margin, levels)
  for x in np.linspace(-1, 1, 23):
    want = _rqm_by_subsets(x, margin, levels, keep)
    ours = renyi.probabilities(built.scalar, np.array([x]))[0]
    np.testing.assert_allclose(ours, want, atol=1e-7)
    np.testing.assert_allclose(ours @ values, x, atol=1e-12)
  np.testing.assert_allclose(
    built.variance,
    _rqm_by_subsets(0.0, margin, levels, keep) @ values**2,
    rtol=1e-5,
  )


LAWS = {
  "binomial": (
    private_codecs.poisson_binomial(0.25, 6),
    lambda x: stats.binom.pmf(np.arange(7), 6, 0.5 + 0.25 * x),
  ),
  "one bit": (
    private_codecs.poisson_binomial(0.4, 1),
    lambda x: stats.binom.pmf(np.arange(2), 1, 0.5 + 0.4 * x),
  ),
  "rqm": (
    private_codecs.randomised_quantisation(1.0, 7, 0.42),
    lambda x: _rqm_by_subsets(x, 1.0, 7, 0.42),
  ),
}


@pytest.mark.parametrize("name", list(LAWS))
@pytest.mark.parametrize("x", [-1.0, -0.31, 0.0, 0.9, 1.0])
def test_codes_have_the_stated_law(name, x):
  mechanism, law = LAWS[name]
  draws = 40_000
  codes = jax.jit(mechanism.draw)(
    jax.random.key(3), jnp.full(draws, x, jnp.float32)
  )
  count = np.bincount(codes, minlength=mechanism.levels)
  # Chi-squared: a false alarm once in 10,000 seeds.
  assert stats.chisquare(count, draws * law(x)).pvalue > 1e-4
  value = np.asarray(mechanism.value(codes), np.float64)
  deviation = value.std() / np.sqrt(draws)
  assert abs(value.mean() - x) < 4 * deviation
  if x == 0:
    np.testing.assert_allclose(value.var(), mechanism.variance, rtol=0.05)


def test_entries_are_drawn_independently():
  mechanism = LAWS["binomial"][0]
  codes = np.asarray(
    mechanism.draw(jax.random.key(0), jnp.zeros(40_000)), float
  )
  for lag in (1, 2, 100):
    assert abs(np.corrcoef(codes[lag:], codes[:-lag])[0, 1]) < 0.02


@pytest.mark.parametrize("spec", ["dp_pbm", "dp_rqm", "dp_pbm(bound=0.05)"])
def test_an_update_is_clipped_clamped_and_decoded_without_bias(spec):
  defense = defenses.make(spec, PARAMS)
  big = {"a": jnp.full((30, 40), 0.5), "b": jnp.full(50, -3.0)}

  @jax.jit
  def mean(keys):
    def one(key):
      update, _ = defense.transform.apply(key, big, defense.transform.init(big))
      payload, _ = defense.codec.encode(key, update, ((), ()))
      return defense.codec.decode(payload)

    return jax.tree.map(lambda x: x.mean(0), jax.vmap(one)(keys))

  found = mean(jax.random.split(jax.random.key(0), 500))
  norm = np.sqrt(1200 * 0.25 + 50 * 9)
  bound = 0.05 if "bound" in spec else 1.0
  for name, value in (("a", 0.5), ("b", -3.0)):
    want = np.clip(value / norm, -bound, bound)
    deviation = bound / np.sqrt(500 * found[name].size)
    assert abs(float(found[name].mean()) - want) < 4 * deviation


def test_the_likelihood_for_attackers_is_right_to_second_order():
  # The logarithm of the exact probability of each code, against the Gaussian
  # that `bins` states.
  mechanism = private_codecs.poisson_binomial(0.2, 5)
  x = 0.05
  codes = np.arange(6)
  value = np.asarray(mechanism.value(codes), np.float64)
  exact = stats.binom.logpmf(codes, 5, 0.5 + 0.2 * x) - stats.binom.logpmf(
    codes, 5, 0.5
  )
  gaussian = (value**2 - (value - x) ** 2) / (2 * mechanism.variance)
  assert np.abs(exact - gaussian).max() < 0.02 * np.abs(exact).max()


def test_epsilon_grows_with_rounds_and_is_of_the_worst_client():
  defense = defenses.make("dp_pbm(theta=0.1,trials=1)", PARAMS)
  one, four = (
    defense.epsilon(accounting.Ledger(9, np.array([0, n])), 1e-5)
    for n in (1, 4)
  )
  assert 0 < one < four < 4 * one
  assert defense.epsilon(accounting.Ledger(9, np.zeros(2, int)), 1e-5) == 0.0
  assert (defense.guarantee.model, defense.guarantee.unit) == (
    "local",
    "client",
  )


def test_epsilon_covers_an_exact_pair_and_the_gaussian_limit():
  # One trial an entry: the exact delta of the pair that differs in one entry
  # from end to end, at the epsilon that is reported.
  theta, delta = 0.15, 1e-5
  defense = defenses.make(f"dp_pbm(theta={theta},trials=40)", PARAMS)
  epsilon = defense.epsilon(ONCE, delta)
  k = np.arange(41)
  p = stats.binom.pmf(k, 40, 0.5 + theta)
  q = stats.binom.pmf(k, 40, 0.5 - theta)
  assert np.maximum(p - np.exp(epsilon) * q, 0).sum() <= delta
  # The Gaussian mechanism of the same variance proves about as much.
  stddev = np.sqrt(private_codecs.poisson_binomial(theta, 40).variance)
  assert 0.95 < epsilon / accounting.gaussian(stddev / 2, 1, delta) < 1.25


@pytest.mark.parametrize(
  "spec",
  [
    "dp_pbm(epsilon=4,trials=1)",
    pytest.param("dp_rqm(epsilon=4,levels=4)", marks=pytest.mark.slow),
    pytest.param("dp_pbm(epsilon=50,bound=0.2)", marks=pytest.mark.slow),
  ],
)
def test_noise_for_an_epsilon(spec):
  ledger = accounting.Ledger(5, np.array([3, 1]))
  protocol = accounting.one_update()._replace(ledger=ledger)
  defense = defenses.make(spec, PARAMS, protocol)
  target = 50 if "=50" in spec else 4
  spent = defense.epsilon(ledger, protocol.delta)
  assert 0.999 * target <= spent <= target * (1 + 1e-9)


@pytest.mark.parametrize(
  "spec, words",
  [
    ("dp_pbm(theta=0.5)", "below 0.5"),
    ("dp_pbm(theta=0)", "above 0"),
    ("dp_pbm(trials=0)", "trials=0: expected 1 to"),
    ("dp_pbm(bound=2)", "bound=2 is above clip=1.0"),
    ("dp_pbm(clip=0)", "clip=0: expected a number above 0"),
    ("dp_pbm(theta=0.1,epsilon=8)", "contradict each other"),
    ("dp_pbm(epsilon=0)", "epsilon=0: expected a number above 0"),
    ("dp_pbm(noise_multiplier=1)", "unknown parameter"),
    ("dp_rqm(keep=1)", "nothing is private"),
    ("dp_rqm(keep=0)", "above 0"),
    ("dp_rqm(levels=1)", "levels=1: expected 2 to 256"),
    ("dp_rqm(margin=0)", "margin=0: expected a number above 0"),
    ("dp_rqm(margin=1e999)", "margin=inf"),
    ("dp_rqm(margin=1,epsilon=8)", "contradict each other"),
  ],
)
def test_mistakes_are_named(spec, words):
  with pytest.raises(errors.UserError, match=words):
    defenses.make(spec, PARAMS)


def _file(tmp_path, *rules):
  path = tmp_path / "mixed.toml"
  path.write_text("".join(f"[[rule]]\n{rule}\n" for rule in rules))
  return path


def test_a_policy_of_one_rule_proves_what_the_mechanism_proves(tmp_path):
  path = _file(tmp_path, 'path = "*"\nprecision = "pbm"\ntheta=0.1\ntrials=1')
  mixed = defenses.make(f"dp_policy(file={path})", PARAMS)
  plain = defenses.make("dp_pbm(theta=0.1,trials=1)", PARAMS)
  assert mixed.epsilon(ONCE, 1e-5) == plain.epsilon(ONCE, 1e-5)
  assert mixed.clips == plain.clips and mixed.noise_in_codec


def test_each_leaf_is_sent_by_its_rule(tmp_path):
  path = _file(
    tmp_path,
    'path = "a"\nprecision = "pbm"\ntheta = 0.05\nbound = 0.5',
    'path = "b"\nprecision = "withheld"',
  )
  defense = defenses.make(f"dp_policy(file={path},clip=3)", PARAMS)
  update = {"a": jnp.full((30, 40), 0.04), "b": jnp.full(50, 0.1)}

  def sent(key):
    payload, _ = defense.codec.encode(key, update, defense.codec.init(update))
    return defense.codec.decode(payload)

  found = jax.vmap(sent)(jax.random.split(jax.random.key(0), 200))
  assert not np.any(found["b"])
  variance = 0.5**2 * private_codecs.poisson_binomial(0.05).variance
  deviation = np.sqrt(variance / found["a"].size)
  # Unbiased within four deviations; the spread is the stated one.
  assert abs(float(found["a"].mean()) - 0.04) < 4 * deviation
  assert np.var(found["a"]) == pytest.approx(variance, rel=0.03)
  bins = defense.codec.bins(
    defense.codec.encode(jax.random.key(1), update, defense.codec.init(update))[
      0
    ]
  )
  np.testing.assert_allclose(bins.variance["a"], variance, rtol=1e-5)
  assert np.all(np.isinf(bins.variance["b"]))
  # What is not sent costs nothing: only the first leaf's entries count.
  groups = [renyi.Group(private_codecs.poisson_binomial(0.05).scalar, 1200, 6)]
  order = accounting.ORDERS[9:10]
  assert defense.epsilon(ONCE, 1e-5) <= accounting.from_divergence(
    renyi.worst_in_ball(groups, order), order, 1e-5
  )


def test_more_noise_on_one_layer_lowers_epsilon_only_as_far_as_the_other(
  tmp_path,
):
  def spent(theta_a, theta_b):
    path = _file(
      tmp_path,
      f'path = "a"\nprecision = "pbm"\ntheta = {theta_a}\ntrials = 1',
      f'path = "b"\nprecision = "pbm"\ntheta = {theta_b}\ntrials = 1',
    )
    return defenses.make(f"dp_policy(file={path})", PARAMS).epsilon(ONCE, 1e-5)

  both, one, none = spent(0.05, 0.05), spent(0.05, 0.2), spent(0.2, 0.2)
  # Bounds are as close as their grids of prices.
  assert both < one <= none * 1.005
  # An update may lie in the finer layer as a whole.
  alone = {"b": PARAMS["b"]}
  plain = defenses.make("dp_pbm(theta=0.2,trials=1)", alone)
  assert one >= plain.epsilon(ONCE, 1e-5) * 0.995


def test_a_policys_noise_for_an_epsilon(tmp_path):
  path = _file(
    tmp_path,
    'path = "a"\nprecision = "pbm"\ntheta = 0.2\ntrials = 1',
    'path = "b"\nprecision = "pbm"\ntheta = 0.4\ntrials = 1',
  )
  ledger = accounting.Ledger(5, np.array([3, 1]))
  protocol = accounting.one_update()._replace(ledger=ledger)
  spec = f"dp_policy(file={path},epsilon=4)"
  defense = defenses.make(spec, PARAMS, protocol)
  spent = defense.epsilon(ledger, protocol.delta)
  assert 0.999 * 4 <= spent <= 4 * (1 + 1e-9)


@pytest.mark.parametrize(
  "rule, words",
  [
    ('path = "*"\nprecision = "int4"', "proves nothing there. Expected pbm"),
    ('path = "*"\nprecision = "pbm"\nbound = 2', "bound=2 is above clip=1.0"),
    ('path = "*"\nprecision = "pbm"\nbound = 0', "bound"),
    ('path = "*"\nprecision = "pbm"\ntheat = 0.1', "Did you mean 'theta'"),
    ('path = "*"\nprecision = "withheld"\ntheta = 1', "without options"),
    ('path = "a"\nprecision = "pbm"', "no rule matches 'b'"),
  ],
)
def test_a_policy_that_proves_nothing_is_refused(rule, words, tmp_path):
  path = _file(tmp_path, rule)
  with pytest.raises(errors.UserError, match=words):
    defenses.make(f"dp_policy(file={path})", PARAMS)
  with pytest.raises(errors.UserError, match="needs file"):
    defenses.make("dp_policy", PARAMS)
