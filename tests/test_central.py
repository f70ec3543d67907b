"""Noise of a trusted server: sums, sensitivity, the adaptive clip."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from mpqfl_jax import accounting, central, errors, local
from tests import small

TRAINING = local.sgd(
  small.model(), optax.sgd, local.Schedule(batch_size=4, max_examples=10)
)
PROTOCOL = accounting.Protocol(
  accounting.Ledger(3, np.array([3, 1, 2])),
  delta=1e-5,
  cohort_size=4,
  sampling_rate=None,
  sizes=small.SIZES,
  schedule=local.Schedule(4, 10),
)


def _round(built, ids, key=0, **options):
  rounds = small.algorithm(TRAINING, central=built, **options)
  state = rounds.init(jax.random.key(1))
  new, aux = rounds.round(
    state,
    small.examples(),
    small.cohort(ids),
    jnp.full(1, -1),
    jax.random.key(key),
  )
  step = jax.tree.map(jnp.subtract, state[0].params, new[0].params)
  return step, new[0], aux


def _flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_every_client_counts_once_and_at_most_the_clip():
  # Against single clients' updates, clipped and summed in NumPy. With hardly
  # any noise the server's step is their sum over the expected cohort.
  ids = [0, 3, 9]
  clip = 0.05
  built = central.central(PROTOCOL, clip, noise_multiplier=1e-6)
  step, _, _ = _round(built, ids)
  total = 0.0
  for i in ids:
    rounds = small.algorithm(TRAINING)
    state = rounds.init(jax.random.key(1))
    new, _ = rounds.round(
      state,
      small.examples(),
      small.cohort([i]),
      jnp.full(1, -1),
      jax.random.key(0),
    )
    update = _flat(state[0].params) - _flat(new[0].params)
    assert np.linalg.norm(update) > clip
    total = total + update * clip / np.linalg.norm(update)
  np.testing.assert_allclose(_flat(step), total / 4, atol=1e-6)


def test_one_client_moves_the_sum_by_at_most_the_clip():
  built = central.central(PROTOCOL, 0.05, noise_multiplier=0.5)
  with_it, _, _ = _round(built, [0, 3, 9])
  without, _, _ = _round(built, [0, 3])  # the same noise, by the same key
  moved = np.linalg.norm(_flat(with_it) - _flat(without)) * 4
  assert moved <= 0.05 * (1 + 1e-4)
  np.testing.assert_allclose(moved, 0.05, rtol=1e-3)


def test_plans_agree():
  built = central.central(PROTOCOL, 0.05, noise_multiplier=0.1, adaptive=True)
  want, state, _ = _round(built, [0, 3, 9, 5, 6])
  got, other, _ = _round(built, [0, 3, 9, 5, 6], plan="vmap", devices=2)
  np.testing.assert_allclose(_flat(want), _flat(got), atol=1e-6)
  np.testing.assert_allclose(state.clip, other.clip, rtol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_noise_has_the_stated_law(adaptive):
  z, clip = 0.8, 2.0
  built = central.central(
    PROTOCOL,
    clip,
    z,
    adaptive=adaptive,
    count_stddev=None if not adaptive else 3.0,
  )
  zeros = {"a": jnp.zeros(20_000), "b": jnp.zeros((50, 50))}

  def one(key):
    return built.release((zeros, jnp.float32(2)), jnp.float32(clip), key)

  mean, _ = one(jax.random.key(0))
  on_sum = z if not adaptive else (z**-2 - 6.0**-2) ** -0.5
  noise = _flat(mean) * 4 / (on_sum * clip)
  assert stats.kstest(noise, "norm").pvalue > 1e-3
  # Sum and count together are one release of the multiplier asked for:
  # Andrew et al. 2021, theorem 1, from the sum of squared ratios of
  # sensitivity (1/2 for the count) to deviation.
  if adaptive:
    np.testing.assert_allclose(on_sum**-2 + (0.5 / 3.0) ** 2, z**-2)
    _, clips = jax.vmap(
      lambda key: built.release(
        ({"a": jnp.zeros(1)}, jnp.float32(2)), jnp.float32(clip), key
      )
    )(jax.random.split(jax.random.key(1), 20_000))
    share = 0.5 - np.log(np.asarray(clips, float) / clip) / 0.2
    count = share * 4
    assert stats.kstest((count - 2) / 3.0, "norm").pvalue > 1e-3


def test_the_adaptive_clip_finds_the_quantile():
  # Norms are fixed; from far off on either side the clip must come to the
  # quantile. Expected count noise is small against 200 clients.
  norms = np.random.default_rng(0).lognormal(0.0, 1.0, 200)
  protocol = PROTOCOL._replace(cohort_size=200)
  for quantile in (0.2, 0.5, 0.9):
    built = central.central(
      protocol, 100.0, 1.0, adaptive=True, quantile=quantile
    )

    @jax.jit
    def run(start, built=built):
      def step(clip, key):
        fits = jnp.sum(jnp.asarray(norms) <= clip).astype(jnp.float32)
        _, clip = built.release(({"x": jnp.zeros(1)}, fits), clip, key)
        return clip, clip

      keys = jax.random.split(jax.random.key(0), 300)
      return jax.lax.scan(step, start, keys)[1]

    want = np.quantile(norms, quantile)
    for start in (100.0, 0.01):
      late = np.asarray(run(jnp.float32(start)))[-100:]
      np.testing.assert_allclose(np.median(late), want, rtol=0.15)


def test_a_contribution_is_clipped_and_counted():
  built = central.central(PROTOCOL, 1.0, 1.0, adaptive=True, count_stddev=9.0)
  small_one, big = jnp.array([0.3, 0.4]), jnp.array([3.0, 4.0])
  clipped, fits = built.contribution(big, jnp.float32(1))
  np.testing.assert_allclose(clipped, [0.6, 0.8], rtol=1e-6)
  assert fits == 0
  clipped, fits = built.contribution(small_one, jnp.float32(1))
  np.testing.assert_allclose(clipped, small_one)
  assert fits == 1
  spoilt, fits = built.contribution(jnp.array([np.nan, 1.0]), jnp.float32(1))
  assert not spoilt.any() and fits == 0


def test_sampling_amplifies_only_where_it_is_poisson():
  fixed = central.central(PROTOCOL, 1.0, 2.0).guarantee
  assert (fixed.model, fixed.unit) == ("central", "client")
  ledger = PROTOCOL.ledger
  # The client that takes part most does so in every round.
  assert fixed.epsilon(ledger, 1e-5) == accounting.gaussian(2.0, 3, 1e-5)
  coins = PROTOCOL._replace(sampling_rate=0.1)
  sampled = central.central(coins, 1.0, 2.0).guarantee
  assert sampled.epsilon(ledger, 1e-5) == (
    accounting.sampled_gaussian(2.0, 0.1, 3, 1e-5)
  )
  assert sampled.epsilon(ledger, 1e-5) < 0.6 * fixed.epsilon(ledger, 1e-5)


@pytest.mark.parametrize("sampling_rate", [None, 0.1])
def test_noise_for_an_epsilon(sampling_rate):
  protocol = PROTOCOL._replace(sampling_rate=sampling_rate)
  built = central.central(protocol, 1.0, epsilon=2.0)
  spent = built.guarantee.epsilon(protocol.ledger, protocol.delta)
  assert 1.99 < spent <= 2.0 * (1 + 1e-9)


@pytest.mark.parametrize(
  "options, words",
  [
    ({"clip": 0}, "clip=0: expected a number above 0"),
    ({"noise_multiplier": 0.0}, "without noise"),
    ({"noise_multiplier": 0.0, "epsilon": 1.0}, "contradict each other"),
    ({"epsilon": -1.0}, "above 0"),
    ({"adaptive": 1}, "True or False"),
    ({"adaptive": True, "quantile": 1.5}, "quantile"),
    ({"adaptive": True, "rate": 0}, "rate"),
    ({"adaptive": True}, "too little noise on the count"),
    ({"count_stddev": 2.0}, "without adaptive=True"),
  ],
)
def test_mistakes_are_named(options, words):
  with pytest.raises(errors.UserError, match=words):
    central.central(PROTOCOL, **options)
