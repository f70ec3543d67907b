"""qwix as an oracle of numerics, for what it gets right, and where it differs.

qwix (google/qwix) quantises weights and activations; its codes are what ours
must be once both use the same scale. Codes may differ by one where a value lies
halfway between two of them: scales computed in another order differ by a bit of
float32. Where qwix does something else, a test says what.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from qwix._src.core import qarray

from mpqfl_jax import bitpack, numerics, precision

SHAPE = (48, 20, 16)
SEED = jnp.array([3, 4], jnp.uint32)


def values(seed=0, scale=0.01, shape=SHAPE):
  return scale * jax.random.laplace(jax.random.key(seed), shape)


def ours(x, name, levels, low=0, **options):
  """Codes like `x`, less `low` as qwix has them, and the payload."""
  leaf = precision.leaf_codec(name, x.shape, options)
  payload, _ = leaf.encode(SEED, x, leaf.init())
  codes = bitpack.unpack(np.asarray(payload["codes"]), x.size, levels, np)
  return codes.reshape(x.shape).astype(np.int32) + low, payload, leaf


def assert_codes(mine, theirs, position):
  """Equal, or one apart where `position` is halfway between two codes."""
  apart = np.abs(mine - np.asarray(theirs, np.int32))
  assert apart.max() <= 1
  halfway = np.abs(position - np.floor(position) - 0.5)
  assert halfway[apart > 0].max(initial=0) < 1e-4
  assert (apart > 0).mean() < 1e-3


GRANULARITIES = [
  ("tensor", {}),
  ("channel", {"channelwise_axes": [2]}),
]


@pytest.mark.parametrize(("granularity", "axes"), GRANULARITIES)
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric(bits, granularity, axes):
  x, high = values(), 2 ** (bits - 1) - 1
  # qwix's scale is the largest magnitude over high + 1/2, ours over high.
  stretch = (high + 0.5) / high
  theirs = qwix.quantize(
    x, f"int{bits}", calibration_method=f"absmax,{stretch!r}", **axes
  )
  codes, payload, leaf = ours(
    x, f"int{bits}", 2 * high + 1, -high, granularity=granularity
  )
  scale = np.ravel(theirs.scale)
  np.testing.assert_allclose(payload["scale"], scale, rtol=3e-7)
  assert_codes(codes, theirs.qvalue, np.asarray(x / theirs.scale))
  same = codes == np.asarray(theirs.qvalue, np.int32)
  np.testing.assert_allclose(
    np.asarray(leaf.decode(payload))[same],
    np.asarray(qwix.dequantize(theirs))[same],
    rtol=3e-7,
  )


@pytest.mark.parametrize(("granularity", "axes"), GRANULARITIES)
@pytest.mark.parametrize("bits", [4, 8])
def test_affine(bits, granularity, axes):
  x = values() + 0.01
  theirs = qwix.quantize(x, f"int{bits}", calibration_method="minmax", **axes)
  low = -(2 ** (bits - 1))
  codes, payload, _ = ours(
    x, f"int{bits}", 2**bits, low, mode="affine", granularity=granularity
  )
  scale, zero = np.ravel(theirs.scale), np.ravel(theirs.zero_point)
  np.testing.assert_allclose(payload["scale"], scale, rtol=3e-7)
  np.testing.assert_array_equal(
    np.asarray(payload["zero_point"], np.int32) + low, np.int32(zero)
  )
  assert_codes(codes, theirs.qvalue, np.asarray(x / theirs.scale))


def test_nf4_in_groups():
  x = values(shape=(6400,))
  theirs = qwix.quantize(x, "nf4", tiled_axes={0: 64})
  codes, payload, leaf = ours(x, "nf4", 16, granularity=64)
  np.testing.assert_array_equal(payload["scale"], np.ravel(theirs.scale))
  np.testing.assert_array_equal(codes, np.asarray(theirs.qvalue, np.int32))
  np.testing.assert_allclose(
    leaf.decode(payload), qwix.dequantize(theirs), rtol=3e-7
  )


@pytest.mark.parametrize(("granularity", "axes"), GRANULARITIES)
@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_float8(name, granularity, axes):
  dtype = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}[name]
  x = values()
  theirs = qwix.quantize(x, dtype, **axes)
  codes, payload, _ = ours(
    x, "float8", 256, format=name, granularity=granularity
  )
  scale = np.ravel(theirs.scale)
  np.testing.assert_allclose(payload["scale"], scale, rtol=3e-7)
  mine = codes.astype(np.uint8).view(np.dtype(dtype)).astype(np.float32)
  theirs_value = np.asarray(theirs.qvalue, np.float32)
  # A code apart is a relative step of 2^-3 or 2^-2; ties only.
  apart = mine != theirs_value
  assert apart.mean() < 1e-3
  step = 2.0 ** -(3 if name == "e4m3" else 2)
  np.testing.assert_allclose(mine, theirs_value, rtol=step)


def noise(seed):
  key = jax.random.key(seed)
  return lambda shape: jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)


def rounded(x, qtype, seed=None, **options):
  """What qwix decodes, rounded at random where there is a seed."""
  noise_fn = None if seed is None else noise(seed)
  how = qarray.HowToQuantize(qtype=qtype, noise_fn=noise_fn, **options)
  return np.asarray(qarray.dequantize(qarray.quantize(x, how)))


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_qwix_ignores_noise_at_odd_widths_and_we_do_not(bits):
  # A value a third of a step above a code, and one that sets the range.
  high = 2 ** (bits - 1) - 1
  x = jnp.concatenate([jnp.ones(1), jnp.full(9999, 1 / (3 * high))])
  nearest = rounded(x, f"int{bits}")
  np.testing.assert_array_equal(rounded(x, f"int{bits}", seed=0), nearest)
  assert abs(nearest[1:].mean() - 1 / (3 * high)) > 0.2 / high
  leaf = precision.leaf_codec(f"int{bits}", x.shape, {"rounding": "stochastic"})
  mine = np.asarray(leaf.decode(leaf.encode(SEED, x, leaf.init())[0]))
  # Five standard errors of a coin of probability 1/3.
  tolerance = 5 * np.sqrt(2 / 9 / 9999) / high
  assert abs(mine[1:].mean() - 1 / (3 * high)) < tolerance


def test_qwix_rounds_the_ends_of_an_affine_range_with_a_bias():
  # In steps, the range is -127.4 to 127.6, its exact zero point -0.6: rounded
  # to -1, the smallest value lies 0.4 steps below the first code.
  step = 0.01
  x = step * jnp.concatenate([jnp.full(1, 127.6), jnp.full(9999, -127.4)])
  theirs = rounded(x, jnp.int8, seed=0, calibration_method="minmax")
  assert abs(theirs[1:].mean() / step + 127) < 0.01
  options = {"rounding": "stochastic", "mode": "affine"}
  leaf = precision.leaf_codec("int8", x.shape, options)
  mine = np.asarray(leaf.decode(leaf.encode(SEED, x, leaf.init())[0]))
  # Five standard errors of a coin at most; a step of ours is 255 / 254.
  assert abs(mine[1:].mean() / step + 127.4) < 5 * 0.502 / np.sqrt(9999)


def test_qwix_leaves_half_a_step_beyond_the_largest_code():
  # For less error inside the range; the largest magnitude comes back smaller.
  x = jnp.array([-1.0, 0.0, 1.0])
  theirs = rounded(x, jnp.int8)
  np.testing.assert_allclose(theirs[2], 127 / 127.5, rtol=1e-6)
  leaf = precision.leaf_codec("int8", x.shape, {})
  mine = leaf.decode(leaf.encode(SEED, x, leaf.init())[0])
  np.testing.assert_allclose(mine, x, rtol=1e-6)


def test_qwix_loses_small_updates_and_we_do_not():
  # A scale below the root of the smallest normal number becomes 1.
  x = values(scale=1e-20)
  assert not rounded(x, jnp.int8).any()
  leaf = precision.leaf_codec("int8", x.shape, {})
  mine = leaf.decode(leaf.encode(SEED, x, leaf.init())[0])
  assert float(jnp.abs(mine / x.max() - x / x.max()).max()) <= 0.51 / 127


def test_the_levels_of_nf4_are_the_published_ones():
  from qwix._src.core import numerics as theirs

  np.testing.assert_array_equal(numerics.NF4, theirs.get_nf4_buckets())
