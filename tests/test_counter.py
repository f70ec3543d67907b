"""Quality of the rounding bits: each test's false-alarm rate is 1e-6."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mpqfl_jax import counter

ALPHA = 1e-6
SEEDS = np.array([[0, 0], [0, 1], [1, 0], [123456789, 987654321]], np.uint32)


def numbers(seed, count=1 << 18):
  return np.asarray(counter.bits(jnp.asarray(seed), (count,)))


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_uniform(seed):
  u = np.asarray(counter.uniform(jnp.asarray(seed), (1 << 18,)))
  assert u.min() == 2.0**-15 and u.max() == 1 - 2.0**-15
  assert stats.kstest(u, "uniform").pvalue > ALPHA
  counts = np.bincount((u * 4096).astype(int), minlength=4096)
  assert stats.chisquare(counts).pvalue > ALPHA


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_every_bit_is_fair_and_free_of_its_neighbours(seed):
  x = numbers(seed)
  bits = (x[:, None] >> np.arange(32, dtype=np.uint32)) & 1
  count = len(x)
  limit = stats.norm.isf(ALPHA / 2 / (32 * 40)) * np.sqrt(count) / 2
  assert np.abs(bits.sum(0) - count / 2).max() < limit
  for lag in (1, 2, 3, 12, 32, 64, 512, 4096):
    differs = (bits[lag:] ^ bits[:-lag]).sum(0)
    assert np.abs(differs - (count - lag) / 2).max() < limit


def test_halves_are_uniform_and_independent():
  rows = np.asarray(counter.uniform_halves(jnp.asarray(SEEDS[3]), 1 << 19))
  assert rows.shape == (2, 1 << 18)
  assert rows.min() == 2.0**-15 and rows.max() == 1 - 2.0**-15
  for row in rows:
    assert stats.kstest(row, "uniform").pvalue > ALPHA
  cells = (rows * 64).astype(int)
  counts = np.bincount(cells[0] * 64 + cells[1], minlength=4096)
  assert stats.chisquare(counts).pvalue > ALPHA
  # Nor does one row follow the other a few entries on.
  for lag in (1, 2, 3, 64):
    z = np.corrcoef(rows[0, lag:], rows[1, :-lag])[0, 1] * np.sqrt(1 << 18)
    assert abs(z) < stats.norm.isf(ALPHA / 2)


def test_a_draw_never_moves_a_whole_number():
  u = np.asarray(counter.uniform(jnp.asarray(SEEDS[1]), (1 << 18,)))
  for whole in (-255, -1, 0, 1, 127, 255):
    assert (np.floor(np.float32(whole) + u) == whole).all()


def test_pairs_fill_the_square():
  u = numbers(SEEDS[3]) >> 26
  for lag in (1, 5, 64):
    pairs = u[:-lag].astype(int) * 64 + u[lag:]
    # Overlapping pairs of one stream: every other one is independent.
    counts = np.bincount(pairs[:: 2 * lag][: 1 << 16], minlength=4096)
    if counts.sum() >= 4096 * 5:
      assert stats.chisquare(counts).pvalue > ALPHA


@pytest.mark.parametrize("other", [[1, 0], [0, 1], [2, 0], [1 << 31, 0]])
def test_streams_of_close_seeds_are_independent(other):
  a = numbers(np.array([0, 0], np.uint32))
  b = numbers(np.array(other, np.uint32))
  differs = np.bitwise_count(a ^ b).sum()
  bits = 32 * a.size
  limit = stats.norm.isf(ALPHA / 2) * np.sqrt(bits) / 2
  assert abs(int(differs) - bits / 2) < limit
  # Nor is one a shift of the other, as streams of one counter may be.
  assert not np.isin(a[:1000], b).sum() > 5


def test_a_flipped_seed_bit_flips_half_the_output():
  x = numbers(SEEDS[3], 4096)
  for word in range(2):
    for bit in range(32):
      seed = SEEDS[3].copy()
      seed[word] ^= np.uint32(1 << bit)
      flipped = np.bitwise_count(x ^ numbers(seed, 4096)).mean()
      # 4096 * 32 fair bits: six deviations of the mean are 0.27.
      assert abs(flipped - 16) < 0.27


def test_entries_do_not_depend_on_the_shape():
  seed = jnp.asarray(SEEDS[1])
  flat = counter.bits(seed, (60,))
  np.testing.assert_array_equal(counter.bits(seed, (3, 4, 5)).reshape(-1), flat)
  np.testing.assert_array_equal(counter.bits(seed, (10,)), flat[:10])


def test_seeds_differ():
  seeds = np.asarray(counter.seeds(jax.random.key(0), 1000))
  assert len({tuple(seed) for seed in seeds}) == 1000
