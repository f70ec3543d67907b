"""Thresholds, index coding and sparse codecs."""

import math

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import counter, precision, sparsify, wire
from mpqfl_jax.errors import UserError

hypothesis.settings.register_profile(
  "sparse", deadline=None, max_examples=100, derandomize=True
)
hypothesis.settings.load_profile("sparse")


def distributions(n):
  rng = np.random.default_rng(n)
  yield rng.standard_normal(n)
  yield rng.standard_t(1, n)
  yield np.exp(rng.uniform(-60, 60, n))
  yield rng.integers(-3, 4, n).astype(float)
  yield np.where(rng.uniform(size=n) < 0.9, 0.0, rng.standard_normal(n))
  yield np.full(n, -1.5)
  yield np.zeros(n)
  yield np.arange(n).astype(float)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_threshold_is_the_kth_largest(n):
  find = {
    k: jax.jit(lambda x, k=k: sparsify.magnitude_threshold(x, k))
    for k in {1, max(1, n // 100), max(1, n // 2), n}
  }
  for x in distributions(n):
    x = x.astype(np.float32)
    for k, threshold in find.items():
      pattern = threshold(jnp.asarray(x))
      kept = np.abs(x).view(np.int32) >= np.int32(pattern)
      smallest = np.sort(np.abs(x))[n - k]
      np.testing.assert_array_equal(kept, np.abs(x) >= smallest)


def test_threshold_of_a_large_leaf():
  x = np.random.default_rng(0).standard_normal((1024, 1040)).astype(np.float32)
  for k in (1, 10_000, x.size):
    pattern = jax.jit(lambda x, k=k: sparsify.magnitude_threshold(x, k))(x)
    kept = np.abs(x).view(np.int32) >= np.int32(pattern)
    np.testing.assert_array_equal(
      kept, np.abs(x) >= np.sort(np.abs(x), None)[-k]
    )


@hypothesis.given(st.data())
def test_indices_roundtrip_at_the_length_that_is_counted(data):
  entries = data.draw(st.integers(1, 30_000))
  count = data.draw(st.integers(0, entries))
  seed = data.draw(st.integers(0, 2**32 - 1))
  rng = np.random.default_rng(seed)
  index = np.sort(rng.choice(entries, count, replace=False))
  coding, written = sparsify.write_indices(index, entries)
  assert len(written) == int(sparsify.index_bytes(count, entries)[1])
  device = sparsify.index_bytes(jnp.int32(count), entries)
  assert [int(part) for part in device] == [coding, len(written)]
  reader = wire.Reader(memoryview(written))
  parts = [*sparsify.read_indices(reader, coding, count, entries)]
  read = np.concatenate([[], *parts])
  np.testing.assert_array_equal(read, index)
  reader.finish()


def test_index_bytes_of_huge_leaves():
  for count in (90_000_000, 1, 99_999_999):
    coding, size = sparsify.index_bytes(jnp.int32(count), 100_000_000)
    choices = {
      r: -(-count * r // 8) - (-(count + ((10**8 - 1) >> r)) // 8)
      for r in range(27)
    }
    best = min(
      [sparsify.BITMAP, *choices], key=lambda r: choices.get(r, 12_500_000)
    )
    assert int(coding) == best
    assert int(size) == choices.get(best, 12_500_000)
  with pytest.raises(UserError, match="2 GiB"):
    shape = jax.ShapeDtypeStruct((600_000_000,), jnp.float32)
    precision.make("topk", {"a": shape})


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.1, 0.3])
def test_indices_come_close_to_their_entropy(ratio):
  entries = 200_000
  count = int(ratio * entries)
  bits = 8 * int(sparsify.index_bytes(count, entries)[1]) / count
  entropy = (
    -(ratio * math.log2(ratio) + (1 - ratio) * math.log2(1 - ratio)) / ratio
  )
  assert entropy <= bits <= entropy + 0.65


def test_prune_by_hand():
  x = np.array([[0.1, -5.0, 0.3, 4.0], [-0.2, 1.0, 0.0, -2.0]], np.float32)
  leaf = precision.leaf_codec("prune", x.shape, {"ratio": 0.5})
  payload, _ = leaf.encode(None, jnp.asarray(x), ())
  expected = [[0.0, -5.0, 0.0, 4.0], [0.0, 1.0, 0.0, -2.0]]
  np.testing.assert_array_equal(leaf.decode(payload), expected)
  lower, upper, _ = leaf.bins(payload)
  assert lower[0, 0] == -1.0 and upper[0, 0] == 1.0
  assert lower[0, 1] == upper[0, 1] == -5.0
  # Tag, count, coding, one byte of bitmap, four values.
  assert leaf.num_bytes(payload) == 1 + 4 + 1 + 1 + 4 * 4


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 0.99])
def test_prune_zeroes_the_smallest(ratio):
  x = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
  leaf = precision.leaf_codec("prune", x.shape, {"ratio": ratio})
  got = np.asarray(leaf.decode(leaf.encode(None, jnp.asarray(x), ())[0]))
  dropped = int(ratio * x.size)
  assert (got == 0).sum() == dropped
  order = np.argsort(np.abs(x))
  assert not got[order[:dropped]].any()
  np.testing.assert_array_equal(got[order[dropped:]], x[order[dropped:]])


def test_topk_error_bound():
  # |x - topk(x)|^2 <= (1 - k / d) |x|^2 (Stich et al. 2018, lemma A.1).
  for x in distributions(1000):
    x = x.astype(np.float32)
    leaf = precision.leaf_codec("topk", x.shape, {"ratio": 0.1})
    got = np.asarray(leaf.decode(leaf.encode(None, jnp.asarray(x), ())[0]))
    lost = ((x.astype(np.float64) - got) ** 2).sum()
    assert lost <= 0.9 * (x.astype(np.float64) ** 2).sum() * (1 + 1e-6)


def test_randomk_rate_and_variance():
  x = np.linspace(0.5, 1.5, 1000).astype(np.float32)
  ratio = 0.25
  leaf = precision.leaf_codec("randomk", x.shape, {"ratio": ratio})
  seeds = counter.seeds(jax.random.key(0), 400)
  run = jax.jit(
    jax.vmap(lambda seed: leaf.decode(leaf.encode(seed, jnp.asarray(x), ())[0]))
  )
  got = np.asarray(run(seeds), np.float64)
  # 400,000 draws: six standard deviations are 0.0041.
  assert abs((got != 0).mean() - ratio) < 0.0041
  # E (Q(x) - x)^2 = (1 / ratio - 1) x^2.
  np.testing.assert_allclose(
    ((got - x) ** 2).mean(), 3 * (x.astype(np.float64) ** 2).mean(), rtol=0.02
  )


def test_randomk_knows_what_it_saturated():
  x = np.array([1.0, 3e38, -3e38, 5e37], np.float32)
  leaf = precision.leaf_codec("randomk", x.shape, {"ratio": 0.5})
  for seed in counter.seeds(jax.random.key(1), 8):
    payload, _ = leaf.encode(seed, jnp.asarray(x), ())
    lower, upper, _ = leaf.bins(payload)
    # 2^126 is as far as any codec goes.
    assert (lower <= x).all() and (x <= upper).all()
    assert np.isfinite(leaf.decode(payload)).all()


@pytest.mark.parametrize(
  "entries, kept", [(5000, 3), (30_000, 300), (20_000, 9_000)]
)
def test_sparse_record_is_checked(entries, kept):
  """Few entries and many, which are read in pieces."""
  x = np.zeros(entries, np.float32)
  x[:: entries // kept] = -2.0
  x[-1] = 3.0
  leaf = precision.leaf_codec("topk", x.shape, {"ratio": 1.0})
  payload, _ = leaf.encode(None, jnp.asarray(x), ())
  record = b"".join(bytes(part) for part in leaf.pack(payload))
  leaf.unpack(wire.Reader(memoryview(record)))
  # Of the values, few are enough.
  ahead = len(record) - 4 * np.count_nonzero(x) + 4
  rng = np.random.default_rng(0)
  refused = 0
  for _ in range(2000):
    broken = bytearray(record)
    for _ in range(rng.integers(1, 4)):
      broken[rng.integers(ahead)] = rng.integers(256)
    reader = wire.Reader(memoryview(bytes(broken)))
    try:
      read = leaf.unpack(reader)
      reader.finish()
    except wire.WireError:
      refused += 1
      continue
    # What is let through is what some client may have sent.
    again = b"".join(bytes(part) for part in leaf.pack(read))
    assert again == bytes(broken)
  assert refused > 500
