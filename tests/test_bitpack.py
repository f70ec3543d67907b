"""Packing codes of any width: inverse, exact sizes, device equals host."""

import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import bitpack

hypothesis.settings.register_profile(
  "bits", deadline=None, max_examples=200, derandomize=True
)
hypothesis.settings.load_profile("bits")
LEVELS = [2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 100, 128, 255, 256, 257, 601]
LEVELS += [1024, 32768, 40000, 65536]


def codes_of(count, levels, seed=0):
  dtype = np.uint8 if levels <= 256 else np.uint16
  return np.random.default_rng(seed).integers(0, levels, count).astype(dtype)


@hypothesis.given(
  st.integers(0, 300), st.sampled_from(LEVELS), st.integers(0, 2**32 - 1)
)
def test_roundtrip_on_the_host(count, levels, seed):
  codes = codes_of(count, levels, seed)
  packed = bitpack.pack(codes, levels, np)
  assert packed.shape == (bitpack.packed_size(count, levels),)
  assert packed.dtype == bitpack.packed_type(levels)
  np.testing.assert_array_equal(
    bitpack.unpack(packed, count, levels, np), codes
  )
  assert bitpack.padding_is_zero(packed, count, levels)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("count", [1, 40, 1001])
def test_device_equals_host(levels, count):
  codes = codes_of(count, levels)
  packed = bitpack.pack(jnp.asarray(codes), levels)
  np.testing.assert_array_equal(packed, bitpack.pack(codes, levels, np))
  np.testing.assert_array_equal(bitpack.unpack(packed, count, levels), codes)
  flat = bitpack.unpack(packed, count, levels, is_flat=True)
  np.testing.assert_array_equal(flat, codes)


@pytest.mark.parametrize("levels", [2, 3, 4, 13, 16, 200, 256])
def test_looking_up(levels):
  """Whatever the bytes hold, those of codes beyond the last as well."""
  table = np.random.default_rng(1).standard_normal(levels).astype(np.float32)
  packed = np.arange(256, dtype=np.uint8)
  count = 256 * 8 // bitpack.width_of(levels)
  codes = bitpack.unpack(packed, count, levels, np)
  found = bitpack.look_up(jnp.asarray(packed), len(codes), levels, table)
  np.testing.assert_array_equal(found, table[np.minimum(codes, levels - 1)])


def test_looking_up_needs_whole_bytes():
  with pytest.raises(ValueError, match="several bytes"):
    bitpack.look_up(jnp.zeros(3, jnp.uint8), 8, 8, np.zeros(8, np.float32))


def test_layout_by_hand():
  codes = np.array([1, 2, 3, 4, 5, 6], np.uint8)
  # Two runs of three: 1 2 3 in the low halves, 4 5 6 in the high ones.
  assert bitpack.pack(codes, 16, np).tolist() == [0x41, 0x52, 0x63]
  signs = np.array([1, 0, 1, 1, 0, 0, 0, 1], np.uint8)
  assert bitpack.pack(signs, 2, np).tolist() == [0b10001101]
  trits = np.array([2, 0, 1, 2, 2], np.uint8)
  assert bitpack.pack(trits, 3, np).tolist() == [2 + 9 + 2 * 27 + 2 * 81]
  # Eight codes of three bits fill three bytes, the first in the lowest bits.
  octal = np.array([1, 2, 3, 4, 5, 6, 7, 0], np.uint8)
  word = sum(int(code) << 3 * i for i, code in enumerate(octal))
  assert bitpack.pack(octal, 8, np).tolist() == list(word.to_bytes(3, "little"))


def test_bits_a_code():
  for levels, bits in [(2, 1), (3, 1.6), (4, 2), (8, 3), (16, 4), (32, 5)]:
    assert 8 * bitpack.packed_size(8000, levels) == bits * 8000
  assert bitpack.packed_size(8000, 601) * 8 == 8000 * (8 + 1.6)
  assert bitpack.packed_size(0, 16) == 0


@pytest.mark.parametrize("levels", LEVELS)
def test_padding_is_looked_at(levels):
  for count in (1, 3, 9, 101):
    packed = bitpack.pack(codes_of(count, levels), levels, np)
    for byte in range(packed.size):
      for bit in range(8 * packed.itemsize):
        broken = packed.copy()
        broken[byte] ^= packed.dtype.type(1 << bit)
        # A flip shows in the codes, in the padding, or as a base-3 digit
        # beyond the last.
        codes = bitpack.unpack(broken, count, levels, np)
        same = np.array_equal(codes, bitpack.unpack(packed, count, levels, np))
        assert not same or not bitpack.padding_is_zero(broken, count, levels)


@pytest.mark.parametrize("levels", LEVELS)
def test_rows_pack_like_what_they_are_rows_of(levels):
  rows, multiple = bitpack.rows_of(levels)
  codes = codes_of(3 * multiple * 4, levels)
  cut = codes.reshape(rows, -1, 4)
  # In any other shape as well.
  other = codes.reshape(-1, 4)
  want = bitpack.pack(codes, levels, np)
  np.testing.assert_array_equal(bitpack.pack(cut, levels, np), want)
  np.testing.assert_array_equal(bitpack.pack(jnp.asarray(cut), levels), want)
  np.testing.assert_array_equal(bitpack.pack(other, levels, np), want)


def test_what_fills_a_byte():
  fills = [n for n in range(2, 300) if bitpack.fills_byte(n)]
  assert fills == [2, 3, 4, *range(9, 17), *range(129, 257)]
