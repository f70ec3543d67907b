"""DP-SGD on the client: clipping, noise, batches, accounting."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from mpqfl_jax import accounting, dp_sgd, errors, local, models
from tests import small

MODEL = small.model()
EXAMPLES = small.examples()
PARAMS = MODEL.init(jax.random.key(0))


def _protocol(sizes, batch_size=4, participations=None, **schedule):
  sizes = np.asarray(sizes)
  if participations is None:
    participations = np.ones(len(sizes), np.int64)
  return accounting.Protocol(
    accounting.Ledger(5, np.asarray(participations)),
    delta=1e-5,
    cohort_size=1,
    sampling_rate=None,
    sizes=sizes,
    schedule=local.Schedule(batch_size, int(sizes.max()), **schedule),
  )


def _private(clip=0.3, z=1.0, microbatch=3, **options):
  return dp_sgd.settings(
    _protocol([10]), clip, z, microbatch=microbatch, **options
  )


def _per_example(rows):
  def loss(params, row):
    x = local.images(EXAMPLES, row[None])
    return models.cross_entropy(MODEL, params, x, EXAMPLES.y[row][None])[0]

  return jax.vmap(jax.grad(loss), (None, 0))(PARAMS, rows)


def _flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("microbatch", [1, 3, 8])
def test_gradient_is_that_of_optax(microbatch):
  """Without noise that counts, against optax's own transform."""
  rows = jnp.array([3, 8, 1, 0, 4, 0, 0, 0])
  mask = jnp.array([1.0, 1, 1, 1, 1, 0, 0, 0])
  gradient = dp_sgd.private_gradient(
    MODEL, _private(z=1e-9, microbatch=microbatch)
  )
  loss, ours = jax.jit(gradient)(
    PARAMS, EXAMPLES, rows, mask, jnp.float32(5), jax.random.key(0)
  )
  theirs = optax.contrib.differentially_private_aggregate(0.3, 0.0, key=0)
  want, _ = theirs.update(_per_example(rows[:5]), theirs.init(PARAMS))
  np.testing.assert_allclose(_flat(ours), _flat(want), atol=1e-6)
  _, plain = local.mean_gradient(MODEL)(
    PARAMS, EXAMPLES, rows, mask, jnp.float32(5), jax.random.key(0)
  )
  assert np.linalg.norm(_flat(plain)) > np.linalg.norm(_flat(ours))
  mean, _ = local.mean_gradient(MODEL)(
    PARAMS, EXAMPLES, rows, mask, jnp.float32(5), jax.random.key(0)
  )
  np.testing.assert_allclose(loss, mean, rtol=1e-5)


def test_one_example_moves_the_sum_by_at_most_the_clip():
  gradient = jax.jit(dp_sgd.private_gradient(MODEL, _private(clip=0.2)))
  rows = jnp.arange(8)
  key, count = jax.random.key(0), jnp.float32(4)
  _, all_ = gradient(PARAMS, EXAMPLES, rows, jnp.ones(8), count, key)
  for i in range(8):
    order = jnp.concatenate([jnp.delete(rows, i), rows[i : i + 1]])
    mask = jnp.ones(8).at[7].set(0)
    _, without = gradient(PARAMS, EXAMPLES, order, mask, count, key)
    moved = 4 * np.linalg.norm(_flat(all_) - _flat(without))
    assert moved <= 0.2 * (1 + 1e-4)


def test_noise_has_the_stated_law():
  gradient = dp_sgd.private_gradient(MODEL, _private(clip=0.3, z=0.7))
  nobody = jnp.zeros(4)

  def one(key):
    return gradient(
      PARAMS, EXAMPLES, jnp.arange(4), nobody, jnp.float32(4), key
    )[1]

  drawn = jax.vmap(one)(jax.random.split(jax.random.key(5), 400))
  noise = _flat(drawn) * 4 / (0.3 * 0.7)
  assert stats.kstest(noise, "norm").pvalue > 1e-3


def test_local_training_takes_these_steps():
  """Two fixed batches by hand: same batches, same noise keys."""
  schedule = local.Schedule(batch_size=4, max_examples=7)
  private = _private(z=1e-9)
  train = local.sgd(
    MODEL,
    optax.sgd,
    schedule,
    gradient=dp_sgd.private_gradient(MODEL, private),
  )
  offset, size = jnp.int32(6), jnp.int32(7)
  key, rate = jax.random.key(4), jnp.float32(0.5)
  got = train(PARAMS, EXAMPLES, offset, size, key, rate)
  rows, mask = schedule.rows(key, offset, size, EXAMPLES.order, 2)
  params = PARAMS
  for r, m in zip(rows, mask, strict=True):
    kept = r[np.asarray(m) > 0]

    def loss(p, row):
      x = local.images(EXAMPLES, row[None])
      return models.cross_entropy(MODEL, p, x, EXAMPLES.y[row][None])[0]

    grads = jax.vmap(jax.grad(loss), (None, 0))(params, kept)
    flat = np.stack(
      [_flat(jax.tree.map(lambda g: g[i], grads)) for i in range(len(kept))]
    )
    factor = np.minimum(1, 0.3 / np.linalg.norm(flat, axis=1))
    mean = (factor[:, None] * flat).sum(0) / len(kept)
    leaves = jax.tree.leaves(params)
    parts = np.split(mean, np.cumsum([x.size for x in leaves])[:-1])
    step = jax.tree.unflatten(
      jax.tree.structure(params),
      [p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)],
    )
    params = jax.tree.map(lambda p, s: p - 0.5 * s, params, step)
  want = jax.tree.map(jnp.subtract, PARAMS, params)
  np.testing.assert_allclose(_flat(got.update), _flat(want), atol=1e-6)


def test_poisson_batches_are_coins():
  schedule = local.Schedule(4, 12, steps=3000, poisson=True)
  order = jnp.arange(100, dtype=jnp.int32)
  size = jnp.int32(10)

  def step(carry, number, rows, mask):
    counts, sizes = carry
    counts = counts.at[rows].add(mask)
    # Those drawn stand first, and none is drawn twice.
    sorted_ok = jnp.all(mask[1:] <= mask[:-1])
    return counts, sizes.at[number].set(jnp.where(sorted_ok, mask.sum(), -1))

  counts, sizes = schedule.fold(
    step,
    (jnp.zeros(100), jnp.zeros(3000)),
    jax.random.key(0),
    jnp.int32(20),
    size,
    order,
  )
  assert counts[:20].sum() == 0 and counts[30:].sum() == 0
  # Each of the ten with probability 0.4, independently.
  deviation = np.sqrt(3000 * 0.4 * 0.6)
  assert np.abs(counts[20:30] - 1200).max() < 4.5 * deviation
  seen = np.bincount(np.asarray(sizes, int), minlength=11)
  want = 3000 * stats.binom.pmf(np.arange(11), 10, 0.4)
  common = want > 5
  assert (
    stats.chisquare(
      [*seen[common], seen[~common].sum()], [*want[common], want[~common].sum()]
    ).pvalue
    > 1e-4
  )


def test_a_small_client_takes_all_its_examples_in_every_poisson_step():
  schedule = local.Schedule(8, 12, steps=5, poisson=True)
  total = schedule.fold(
    lambda carry, _, rows, mask: carry + mask.sum(),
    jnp.float32(0),
    jax.random.key(0),
    jnp.int32(0),
    jnp.int32(3),
    jnp.arange(12, dtype=jnp.int32),
  )
  assert total == 15 and schedule.expected(jnp.int32(3)) == 3


def test_fixed_batches_are_one_release_an_epoch():
  protocol = _protocol([9, 4], participations=[2, 5], epochs=3)
  private = dp_sgd.settings(protocol, noise_multiplier=1.5)
  assert (private.guarantee.model, private.guarantee.unit) == (
    "local",
    "example",
  )
  assert private.guarantee.epsilon(protocol.ledger, 1e-5) == (
    accounting.gaussian(1.5, 5 * 3, 1e-5)
  )
  # Four steps of batches of 4: the client of 9 is in its second epoch, the one
  # of 4 in its fourth.
  protocol = _protocol([9, 4], participations=[2, 1], steps=4)
  private = dp_sgd.settings(protocol, noise_multiplier=1.5)
  assert private.guarantee.epsilon(protocol.ledger, 1e-5) == (
    accounting.gaussian(1.5, 4, 1e-5)
  )


def test_poisson_batches_are_accounted_for_by_the_worst_client():
  sizes, times = [40, 8, 20], [3, 1, 4]
  protocol = _protocol(sizes, participations=times, epochs=2)
  private = dp_sgd.settings(protocol, noise_multiplier=1.2, batches="poisson")
  ours = private.guarantee.epsilon(protocol.ledger, 1e-5)
  worst = 0.0
  for size, often in zip(sizes, times, strict=True):
    accountant = dp_accounting.pld.PLDAccountant(
      dp_accounting.NeighboringRelation.REPLACE_SPECIAL, 1e-3
    )
    accountant.compose(
      dp_accounting.PoissonSampledDpEvent(
        4 / size, dp_accounting.GaussianDpEvent(1.2)
      ),
      often * 2 * -(-size // 4),
    )
    worst = max(worst, accountant.get_epsilon(1e-5))
  np.testing.assert_allclose(ours, worst, rtol=1e-3)
  # Unsampled, the same noise proves far less.
  steps = accounting.gaussian(1.2, 4 * 2 * 5, 1e-5)
  assert ours < 0.8 * steps


@pytest.mark.parametrize("batches", dp_sgd.BATCHES)
def test_noise_for_an_epsilon(batches):
  protocol = _protocol([9, 4], participations=[2, 5], epochs=3)
  private = dp_sgd.settings(protocol, epsilon=3.0, batches=batches)
  spent = private.guarantee.epsilon(protocol.ledger, 1e-5)
  assert 2.99 < spent <= 3.0 * (1 + 1e-9)
  nobody = accounting.Ledger(0, np.zeros(2, np.int64))
  assert private.guarantee.epsilon(nobody, 1e-5) == 0.0


@pytest.mark.parametrize(
  "options, words",
  [
    ({"clip": 0}, "clip=0: expected a number above 0"),
    ({"noise_multiplier": 0}, "without noise"),
    ({"noise_multiplier": 0, "epsilon": 2}, "contradict each other"),
    ({"batches": "shuffled"}, "expected one of fixed, poisson"),
    ({"microbatch": 0}, "microbatch=0: expected 1"),
  ],
)
def test_mistakes_are_named(options, words):
  with pytest.raises(errors.UserError, match=words):
    dp_sgd.settings(_protocol([4]), **options)
