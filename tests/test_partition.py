"""Partitions: each example once, and the statistics that the papers give."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import stats

from mpqfl_jax import errors, partition

# Every statistical test draws from fixed seeds; its stated false-alarm rate is
# what a fresh seed would risk.
FALSE_ALARM = 1e-6

PRIOR = np.array([0.25, 0.15, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05])

CASES = [
  ("iid", {}),
  ("iid", {"size_sigma": 1.0}),
  ("dirichlet", {"alpha": 0.1}),
  ("dirichlet", {"alpha": 1e-9}),
  ("dirichlet", {"alpha": 100.0, "size_sigma": 1.0}),
  ("shards", {}),
  ("shards", {"shards_per_client": 5, "size_sigma": 0.5}),
]


def counts(part: partition.Partition, labels: np.ndarray) -> np.ndarray:
  """[clients, classes] examples."""
  table = np.zeros((part.num_clients, labels.max() + 1), int)
  owner = np.repeat(np.arange(part.num_clients), part.sizes)
  np.add.at(table, (owner, labels[part.order]), 1)
  return table


@pytest.mark.parametrize(("name", "params"), CASES)
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  labels=st.lists(st.integers(-3, 20), min_size=1, max_size=80),
  num_clients=st.integers(1, 120),
  seed=st.integers(0, 2**32 - 1),
)
def test_every_example_is_used_once_or_as_often_as_it_takes(
  name, params, labels, num_clients, seed
):
  labels = np.array(labels)
  part = partition.make(
    name, labels, num_clients, np.random.default_rng(seed), **params
  )
  held = max(len(labels), num_clients)
  uses = np.bincount(part.order, minlength=len(labels))
  assert len(uses) == len(labels) and uses.sum() == held
  assert uses.min() >= 1 and np.ptp(uses) <= 1
  assert part.offsets.dtype == np.int64
  assert part.offsets.shape == (num_clients + 1,)
  assert part.offsets[0] == 0
  assert part.offsets[-1] == held
  assert (part.sizes >= 1).all()


@pytest.mark.parametrize(("name", "params"), CASES)
def test_only_the_generator_decides(name, params):
  labels = np.random.default_rng(0).integers(0, 10, 500)

  def make(seed):
    return partition.make(
      name, labels, 30, np.random.default_rng(seed), **params
    )

  first, again, other = make(1), make(1), make(2)
  np.testing.assert_array_equal(first.order, again.order)
  np.testing.assert_array_equal(first.offsets, again.offsets)
  assert not np.array_equal(first.order, other.order)


@pytest.mark.parametrize(("name", "params"), CASES)
def test_client_holds_its_slice(name, params):
  labels = np.random.default_rng(0).integers(0, 10, 500)
  part = partition.make(name, labels, 30, np.random.default_rng(0), **params)
  held = [part.client(k) for k in range(30)]
  np.testing.assert_array_equal([len(rows) for rows in held], part.sizes)
  np.testing.assert_array_equal(np.concatenate(held), part.order)


@pytest.mark.parametrize(("name", "params"), CASES)
@pytest.mark.parametrize(
  ("num_examples", "num_clients"),
  [(60_000, 100_000), (300_000, 100_000), (60_000, 1_000_000)],
)
def test_very_many_clients(name, params, num_examples, num_clients):
  labels = np.random.default_rng(0).integers(0, 10, num_examples)
  part = partition.make(
    name, labels, num_clients, np.random.default_rng(0), **params
  )
  assert part.num_clients == num_clients
  assert part.sizes.sum() == max(num_examples, num_clients)
  assert part.sizes.min() >= 1
  divided = partition.PARTITIONS[name](
    labels, num_clients, np.random.default_rng(0), **params
  )
  assert divided.sizes.sum() == num_examples
  empty = np.count_nonzero(divided.sizes == 0)
  assert (empty > 0) == (num_clients > num_examples)


def test_iid_sizes_differ_by_at_most_one():
  labels = np.zeros(1003, int)
  for num_clients in (1, 7, 100, 1003, 2000):
    sizes = partition.iid(labels, num_clients, np.random.default_rng(0)).sizes
    assert sizes.max() - sizes.min() <= 1


def test_iid_labels_are_independent_of_clients():
  labels = np.repeat(np.arange(10), (PRIOR * 60_000).astype(int))
  part = partition.iid(labels, 100, np.random.default_rng(0))
  p = stats.chi2_contingency(counts(part, labels)).pvalue
  assert FALSE_ALARM / 2 < p < 1 - FALSE_ALARM / 2
  # The same test sees what is not IID.
  skewed = partition.dirichlet(labels, 100, np.random.default_rng(0), 100.0)
  assert stats.chi2_contingency(counts(skewed, labels)).pvalue < FALSE_ALARM


@pytest.mark.parametrize("name", ["iid", "dirichlet"])
def test_log_normal_sizes(name):
  """Logarithms of sizes are normal with the deviation asked for.

  Kolmogorov-Smirnov against N(m, sigma), m = log(mean size) - sigma^2 / 2 as
  the log-normal mean is exp(m + sigma^2 / 2). m is fixed by the sum of all
  sizes instead of being known, which only makes the test more lenient.
  """
  sigma, num_clients, mean_size = 0.5, 1000, 1000
  labels = np.tile(np.arange(10), num_clients * mean_size // 10)
  # A vast alpha leaves the weights as all that makes the sizes unequal.
  params = {"alpha": 1e6} if name == "dirichlet" else {}
  sizes = partition.make(
    name,
    labels,
    num_clients,
    np.random.default_rng(0),
    size_sigma=sigma,
    **params,
  ).sizes
  expected = stats.norm(np.log(mean_size) - sigma**2 / 2, sigma)
  assert stats.kstest(np.log(sizes), expected.cdf).pvalue > FALSE_ALARM
  wrong = stats.norm(np.log(mean_size) - sigma**2 / 2, 1.5 * sigma)
  assert stats.kstest(np.log(sizes), wrong.cdf).pvalue < FALSE_ALARM


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_chance_that_two_of_a_client_share_a_label(alpha):
  """Against the closed form (1 + alpha sum p^2) / (1 + alpha).

  For q ~ Dirichlet(alpha p), E[q_c^2] = p_c (alpha p_c + 1) / (alpha + 1), and
  two draws from q agree with probability sum q_c^2. The mean over 2,000 clients
  of the unbiased estimate is normal; |z| < 5 fails one seed in 1.7 million.
  """
  num_clients = 2000
  labels = np.repeat(np.arange(10), (PRIOR * 60_000).astype(int))
  part = partition.dirichlet(
    labels, num_clients, np.random.default_rng(0), alpha
  )
  table = counts(part, labels)
  size = part.sizes
  table, size = table[size > 1], size[size > 1]
  agree = np.sum(table * (table - 1), axis=1) / (size * (size - 1))
  error = agree.std() / np.sqrt(len(agree))

  def z(a):
    return (agree.mean() - (1 + a * np.sum(PRIOR**2)) / (1 + a)) / error

  assert abs(z(alpha)) < 5
  assert abs(z(1.5 * alpha)) > 5
  assert abs(z(alpha / 1.5)) > 5


def test_dirichlet_sizes_have_the_mean_that_they_must():
  labels = np.repeat(np.arange(10), 600)
  part = partition.dirichlet(labels, 50, np.random.default_rng(0), 0.3)
  assert part.sizes.mean() == 120
  assert part.sizes.std() > 0


def test_dirichlet_with_vanishing_alpha_gives_a_client_one_class():
  """About 50 of 500 clients want each class, and 1,000 examples serve them."""
  labels = np.repeat(np.arange(10), 1000)
  part = partition.dirichlet(labels, 500, np.random.default_rng(0), 1e-9)
  assert (np.count_nonzero(counts(part, labels), axis=1) == 1).all()


def test_dirichlet_with_vast_alpha_is_iid():
  labels = np.repeat(np.arange(10), (PRIOR * 60_000).astype(int))
  part = partition.dirichlet(labels, 100, np.random.default_rng(0), 1e9)
  p = stats.chi2_contingency(counts(part, labels)).pvalue
  assert FALSE_ALARM / 2 < p < 1 - FALSE_ALARM / 2


def test_shards_of_a_balanced_set_are_two_labels_a_client():
  """McMahan et al.'s case: 200 shards of 300, none across two digits."""
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 6000))
  part = partition.shards(labels, 100, np.random.default_rng(0))
  assert (part.sizes == 600).all()
  table = counts(part, labels)
  assert set(np.unique(table)) <= {0, 300, 600}
  assert (np.count_nonzero(table, axis=1) <= 2).all()


def test_shards_across_a_boundary_add_a_label():
  """A shard that lies across two classes holds both: nine shards at most."""
  sizes = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
  labels = np.repeat(np.arange(10), sizes)
  part = partition.shards(labels, 100, np.random.default_rng(0))
  held = np.count_nonzero(counts(part, labels), axis=1)
  assert held.max() <= 4
  assert np.maximum(held - 2, 0).sum() <= 9
  # A client's two shards agree with probability 1 in 10.
  assert np.count_nonzero(held <= 2) >= 91


def test_shards_take_any_number_of_clients():
  labels = np.arange(10)
  for num_clients in (1, 3, 7, 10):
    part = partition.shards(labels, num_clients, np.random.default_rng(0))
    assert part.sizes.min() >= 1


@pytest.mark.parametrize(
  ("name", "num_clients", "params", "message"),
  [
    ("irichlet", 3, {}, "Did you mean 'dirichlet'"),
    ("iid", 3, {"alpha": 1.0}, "parameter of partition iid 'alpha'"),
    ("dirichlet", 3, {"alhpa": 1.0}, "Did you mean 'alpha'"),
    ("dirichlet", 3, {"alpha": 0.0}, "alpha must be positive"),
    ("dirichlet", 3, {"alpha": -1.0}, "alpha must be positive"),
    ("dirichlet", 3, {"alpha": float("nan")}, "alpha must be positive"),
    ("dirichlet", 3, {"alpha": float("inf")}, "alpha must be positive"),
    ("shards", 3, {"shards_per_client": 0}, "at least 1, not 0"),
    ("iid", 3, {"size_sigma": -1.0}, "size_sigma"),
    ("iid", 0, {}, "number of clients"),
    ("shards", -2, {}, "number of clients"),
    ("dirichlet", 2**31, {}, "number of clients"),
  ],
)
def test_a_mistake_is_one_clear_line(name, num_clients, params, message):
  labels = np.arange(10) % 3
  with pytest.raises(errors.UserError, match=message) as mistake:
    partition.make(
      name, labels, num_clients, np.random.default_rng(0), **params
    )
  assert "\n" not in str(mistake.value)


def test_no_examples_is_a_mistake():
  with pytest.raises(errors.UserError, match="no examples"):
    partition.iid(np.array([], int), 3, np.random.default_rng(0))


@pytest.mark.parametrize("name", list(partition.PARTITIONS))
@pytest.mark.parametrize("clients, each", [(700, None), (50, 9), (2000, 2)])
def test_clients_share_examples_where_there_are_too_few(name, clients, each):
  labels = np.arange(300) % 7
  part = partition.make(
    name, labels, clients, np.random.default_rng(3), client_examples=each
  )
  total = clients * (each or 1)
  assert len(part.order) == part.offsets[-1] == total
  assert part.sizes.min() >= 1
  uses = np.bincount(part.order, minlength=300)
  assert set(uses) <= {total // 300, total // 300 + 1}
  if name == "iid":
    assert set(part.sizes) == {each or 1}
  if name == "shards" and each:
    # Two shards of one label, or of two where a shard crosses a border.
    kinds = [len(set(labels[part.client(k)])) for k in range(clients)]
    assert max(kinds) <= 4 and np.mean(kinds) < 2.5


def test_fewer_examples_than_there_are():
  labels = np.arange(300) % 7
  part = partition.make(
    "iid", labels, 10, np.random.default_rng(0), client_examples=4
  )
  assert len(set(part.order)) == 40 and set(part.sizes) == {4}


def test_dividing_once_draws_as_before():
  labels = np.arange(300) % 7
  made = partition.make("iid", labels, 10, np.random.default_rng(0))
  direct = partition.iid(labels, 10, np.random.default_rng(0))
  np.testing.assert_array_equal(made.order, direct.order)


def test_more_places_than_int32_holds():
  with pytest.raises(errors.UserError, match="int32"):
    partition.make(
      "iid",
      np.zeros(9, int),
      10**6,
      np.random.default_rng(0),
      client_examples=3000,
    )
