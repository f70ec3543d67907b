"""Numerics against closed forms, ml_dtypes, TFLite's formulas and qwix's."""

import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy import stats

from mpqfl_jax import codecs, counter, numerics, precision, quantize
from mpqfl_jax.errors import UserError

hypothesis.settings.register_profile(
  "numerics", deadline=None, max_examples=50, derandomize=True
)
hypothesis.settings.load_profile("numerics")

# One length: every example of a property runs the same compiled program.
SIZE = 37
# Of an array that is reduced in rows, and is no multiple of what shares a byte.
LARGE = 32_787
values = hnp.arrays(
  np.float32,
  SIZE,
  elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)
WIDTHS = [2, 3, 4, 5, 6, 7, 8, 16]
# What the quick run compiles of them.
QUICK_WIDTHS = (2, 4, 8)
some_widths = [
  bits if bits in QUICK_WIDTHS else pytest.param(bits, marks=pytest.mark.slow)
  for bits in WIDTHS
]
# Of a false alarm in one statistical test; there are about 60 of them.
ALPHA = 1e-6


def roundtrip(x, name, seed=0, **options):
  x = jnp.asarray(x)
  leaf = precision.leaf_codec(name, x.shape, options)
  payload, _ = leaf.encode(_seed(seed), x, leaf.init())
  return np.asarray(leaf.decode(payload)), payload


def _seed(seed):
  return counter.seeds(jax.random.key(seed), 1)[0]


# --- Integers against formulas written down by hand -------------------------


def tflite_affine(x, bits):
  """ChooseQuantizationParams and Quantize of TFLite, in float64."""
  low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  bottom, top = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
  scale = (top - bottom) / (high - low)
  zero_point = int(np.clip(np.round(low - bottom / scale), low, high))
  codes = np.clip(np.round(x / scale) + zero_point, low, high)
  return scale, zero_point, codes, (codes - zero_point) * scale


@pytest.mark.parametrize("bits", [1, *WIDTHS])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.2, 3.0])
def test_affine_is_tflite(bits, shift):
  rng = np.random.default_rng(bits)
  x = (rng.standard_normal(500) + shift).astype(np.float32)
  scale, zero_point, _, decoded = tflite_affine(x.astype(np.float64), bits)
  got, payload = roundtrip(x, f"int{bits}", mode="affine")
  np.testing.assert_allclose(payload["scale"][0], scale, rtol=1e-6)
  assert int(payload["zero_point"][0]) - 2 ** (bits - 1) == zero_point
  # In float32 a value on the edge between two codes may fall to either.
  off = np.abs(got - decoded) > 0.05 * scale
  assert off.mean() <= (0.05 if bits == 16 else 0.005)
  assert np.abs(got - decoded).max() <= 1.01 * scale


@pytest.mark.parametrize("odd", [None, np.nan, -np.nan, np.inf, -np.inf, -3e38])
@pytest.mark.parametrize(
  "shape", [(50,), (9, 3000), (2, 2**19), (1024, 1040), (1048583,)]
)
def test_ranges_of_arrays(odd, shape):
  """Small ones, large ones in rows, and one that cannot be cut."""
  x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  bottom, top = x.min(), x.max()
  if odd is not None:
    x.ravel()[x.size // 3] = odd
    bottom, top = -quantize.LARGEST, quantize.LARGEST
    if np.isfinite(odd):
      top = x.max()
  found = jax.jit(quantize.largest_magnitude)(x)
  assert found.shape == (1,) * x.ndim
  assert found.item() == max(-bottom, top)
  ends = jax.jit(quantize.extremes)(x)
  assert [end.shape for end in ends] == [(1,) * x.ndim] * 2
  assert [end.item() for end in ends] == [bottom, top]


@pytest.mark.parametrize("odd", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
  "shape, axis",
  [
    ((20, 20_000), 0),
    ((20, 20_000), 1),
    ((20_000, 20), 0),
    ((2, 320, 60), (0, 1)),
    ((37, 11), 0),
    ((5, 6, 7), 1),
    ((5, 6, 7), -1),
    ((5, 6, 7), (0, -1)),
    ((1, 50), -2),
    ((1, 50), -1),
  ],
)
def test_ranges_along_axes_where_not_all_is_finite(odd, shape, axis):
  """Of rows, of channels in parts or not, and of an axis in the middle."""
  x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  x -= np.float32(0.5)
  bottom, top = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
  x.ravel()[x.size // 3] = odd
  is_odd = ~np.isfinite(x).all(axis, keepdims=True)
  assert is_odd.sum() == 1
  bottom = np.where(is_odd, -quantize.LARGEST, bottom)
  top = np.where(is_odd, quantize.LARGEST, top)
  found = jax.jit(lambda x: quantize.extremes(x, axis))(x)
  np.testing.assert_array_equal(found, (bottom, top))
  found = jax.jit(lambda x: quantize.largest_magnitude(x, axis))(x)
  np.testing.assert_array_equal(found, np.maximum(-bottom, top))


def test_affine_by_hand():
  # Range [-1, 2] over 15 steps: scale 0.2, zero point -8 + 5 = -3.
  x = np.array([-1.0, 0.0, 0.31, 1.0, 2.0], np.float32)
  got, payload = roundtrip(x, "int4", mode="affine")
  np.testing.assert_allclose(payload["scale"], [0.2], rtol=1e-6)
  assert payload["zero_point"].tolist() == [5]
  np.testing.assert_allclose(got, [-1.0, 0.0, 0.4, 1.0, 2.0], rtol=1e-6)


def test_symmetric_by_hand():
  # Scale 7 / 7: ties go to even, codes are -7 ... 7.
  x = np.array([-7.0, -2.5, -0.5, 0.4, 0.5, 1.5, 6.6], np.float32)
  got, _ = roundtrip(x, "int4")
  assert got.tolist() == [-7.0, -2.0, 0.0, 0.0, 0.0, 2.0, 7.0]


def test_channels_are_tensors_of_their_own():
  x = np.random.default_rng(0).standard_normal((3, 3, 4, 6)).astype(np.float32)
  x *= np.logspace(-3, 3, 6, dtype=np.float32)
  for mode in numerics.MODES:
    got, _ = roundtrip(x, "int5", mode=mode, granularity="channel")
    for channel in range(6):
      one, _ = roundtrip(x[..., channel], "int5", mode=mode)
      np.testing.assert_array_equal(got[..., channel], one)


@pytest.mark.parametrize(
  "name, entries, options",
  [
    ("int3", 100, {}),  # the last group is padded
    ("int3", 100, {"mode": "affine"}),
    # Three groups, packed in halves of one and a half.
    ("int8", 96, {"mode": "affine"}),
    ("int4", 25 * 32, {"mode": "affine"}),  # the same, two codes a byte
    ("int2", 20 * 32, {"mode": "affine"}),
    ("ternary", 25 * 32, {}),
  ],
)
def test_groups_are_tensors_of_their_own(name, entries, options):
  x = np.random.default_rng(1).standard_normal(entries).astype(np.float32)
  if options:
    x *= np.logspace(-3, 3, entries, dtype=np.float32)
  if name == "ternary":
    x = np.sign(x) * np.repeat(np.arange(1.0, 26.0, dtype=np.float32), 32)
  got, payload = roundtrip(x, name, granularity=32, **options)
  assert payload["scale"].shape == (-(-entries // 32),)
  for start in range(0, entries, 32):
    one, _ = roundtrip(x[start : start + 32], name, **options)
    np.testing.assert_array_equal(got[start : start + 32], one)


@pytest.mark.parametrize("rounding", ["stochastic", "dither"])
@pytest.mark.parametrize("name, entries", [("int4", 25 * 64), ("int8", 3 * 64)])
def test_groups_in_pieces_round_at_random(name, entries, rounding):
  """Both sides draw alike; every block stays within a step of its own scale."""
  x = np.random.default_rng(2).standard_normal(entries).astype(np.float32)
  x *= np.logspace(-3, 3, entries, dtype=np.float32)
  leaf = precision.leaf_codec(
    name, x.shape, {"granularity": 64, "rounding": rounding}
  )
  seeds = jax.random.bits(jax.random.key(0), (400, 2), jnp.uint32)

  def trip(seed):
    payload, _ = leaf.encode(seed, x, leaf.init())
    return leaf.decode(payload), *leaf.bins(payload), payload["scale"]

  got, lower, upper, _, scale = jax.jit(jax.vmap(trip))(seeds)
  scale = np.repeat(np.asarray(scale[0], np.float64), 64)
  reach = scale * (1.0 if rounding == "stochastic" else 0.5)
  assert (np.abs(got - x) <= reach * 1.001).all()
  assert ((lower <= x) & (x <= upper)).all()
  # Of 400 means one a block in 10^7 lies so many standard errors off.
  error = np.abs(np.asarray(got, np.float64).mean(0) - x)
  assert (error < 6 * 0.5 * scale / np.sqrt(400)).all()


def test_static_ranges_of_groups_and_channels():
  """The second update meets the first one's ranges, block by block."""
  rng = np.random.default_rng(3)
  first = rng.uniform(-1, 1, (64, 25)).astype(np.float32)
  for granularity, axis in (("channel", 0), (64, 1)):
    shape = first.shape if axis == 0 else first.T.shape
    x = first.reshape(shape)
    x[0, :], x[:, 0] = 1.0, 1.0
    factor = np.logspace(0, 2, 25, dtype=np.float32)
    x = x * (factor if axis == 0 else factor[:, None])
    leaf = precision.leaf_codec(
      "int4", shape, {"granularity": granularity, "range": "static"}
    )
    seed = jnp.zeros(2, jnp.uint32)
    _, state = leaf.encode(seed, x, leaf.init())
    payload, _ = leaf.encode(seed, 3 * x, state)
    got = np.asarray(leaf.decode(payload))
    largest = np.abs(x).max(axis)
    np.testing.assert_allclose(np.abs(got).max(axis), largest, rtol=1e-6)


@pytest.mark.parametrize(
  "low, high, zero",
  [(0, 254, 127), (-8, 7, 3), (-32768, 32767, -5), (0, 65535, 32768)],
)
def test_codes_of_steps_however_far(low, high, zero):
  """Clipped like whole numbers, where float32 holds none any more."""
  far = np.float32(2.0) ** np.arange(0, 128)
  near = np.arange(-300, 301, dtype=np.float32)
  edge = np.float32(1.5 * 2**23) + near
  steps = np.concatenate([near, edge, -edge, far, -far, [np.inf, -np.inf]])
  # Zero points and ends as numbers of the program, or of an array of blocks.
  zeros = np.array([[zero], [0]], np.float32)
  grid = quantize.Grid(
    jnp.ones((2, 1)), jnp.asarray(zeros), jnp.int32(low), jnp.int32(high)
  )
  both = np.stack([steps] * 2).astype(np.float32)
  codes = jax.jit(quantize.to_codes)(both, grid)
  want = np.clip(steps.astype(np.float64) + zeros, low, high)
  np.testing.assert_array_equal(codes, want)
  # Of a scale of one, entries are the steps; NaN has the code of zero.
  both = np.concatenate([both, np.full((2, 9), np.nan, np.float32)], 1)
  codes = jax.jit(quantize.quantize)(both, grid)
  np.testing.assert_array_equal(codes[:, :-9], want)
  np.testing.assert_array_equal(codes[:, -9:], np.repeat(zeros, 9, 1))


def test_bias_has_one_scale_even_per_channel():
  x = np.arange(9, dtype=np.float32)
  per_channel, payload = roundtrip(x, "int8", granularity="channel")
  assert payload["scale"].shape == (1,)
  np.testing.assert_array_equal(per_channel, roundtrip(x, "int8")[0])


def test_power_of_two_scale():
  x = np.array([0.9, -0.3, 0.1], np.float32)
  # 0.9 / 7 = 0.1286 is between 2^-3 and 2^-2.
  got, payload = roundtrip(x, "int4", power_of_two=True)
  assert payload["exponent"].tolist() == [127 - 2]
  assert got.tolist() == [1.0, -0.25, 0.0]
  exact, _ = roundtrip(
    np.array([7.0, 1.0], np.float32), "int4", power_of_two=True
  )
  assert exact.tolist() == [7.0, 1.0]


# --- Properties -------------------------------------------------------------


def jitted(name, **options):
  return jitted_of(SIZE, name, **options)


def jitted_of(size, name, **options):
  leaf = precision.leaf_codec(name, (size,), options)

  @jax.jit
  def run(x, seed):
    payload, _ = leaf.encode(seed, x, leaf.init())
    return leaf.decode(payload)

  return lambda x, seed=0: np.asarray(run(jnp.asarray(x), _seed(seed)))


def step_of(x, bits, mode):
  if mode == "symmetric":
    return np.abs(x).max() / (2 ** (bits - 1) - 1)
  return (max(x.max(), 0) - min(x.min(), 0)) / (2**bits - 1)


@pytest.mark.parametrize("mode", numerics.MODES)
@pytest.mark.parametrize("bits", some_widths)
def test_nearest_properties(bits, mode):
  run = jitted(f"int{bits}", mode=mode)
  large = jitted_of(LARGE, f"int{bits}", mode=mode)

  @hypothesis.given(values)
  def check(x):
    got = run(x)
    # The same entries over and over have the same range.
    again = large(np.resize(x, LARGE))
    np.testing.assert_array_equal(again, np.resize(got, LARGE))
    step = step_of(x.astype(np.float64), bits, mode)
    # Half a step, and a whole one at the ends of an affine range, where the
    # zero point's own rounding comes on top.
    error = np.abs(got - x.astype(np.float64))
    slack = 1e-5 * np.abs(x).max()
    assert error.max() <= (1.0 if mode == "affine" else 0.5) * step + slack
    inside = np.abs(x) < (2 ** (bits - 1) - 2) * step
    if inside.any():
      assert error[inside].max() <= 0.5 * step + slack
    order = np.argsort(x, kind="stable")
    assert (np.diff(got[order]) >= 0).all()
    # Idempotent on the same grid, whose multiples all decoded values are. Where
    # the zero point's rounding moves one end of an affine range out of it, what
    # is left has a narrower one.
    steps = got / max(step, 2.0**-126)
    assert np.abs(steps - np.rint(steps)).max() < 0.02
    span = max(got.max(), 0) - min(got.min(), 0)
    if mode == "symmetric" or span > (2**bits - 1.5) * step:
      np.testing.assert_allclose(run(got), got, rtol=1e-5, atol=slack)
    np.testing.assert_array_equal(run(8 * x), 8 * got)
    if mode == "symmetric":
      np.testing.assert_array_equal(run(-x), -got)
    assert (got[x == 0] == 0).all()

  check()


@pytest.mark.parametrize("mode", numerics.MODES)
@pytest.mark.parametrize("rounding", ["stochastic", "dither"])
def test_random_rounding_stays_within_a_step(mode, rounding):
  run = jitted("int4", mode=mode, rounding=rounding)
  reach = {"stochastic": 1.0, "dither": 0.5}[rounding]

  @hypothesis.given(values, st.integers(0, 2**31 - 1))
  def check(x, seed):
    got = run(x, seed)
    step = step_of(x.astype(np.float64), 4, mode)
    step = max(step * (15 / 14 if mode == "affine" else 1), 2.0**-126)
    # What dither decodes below the smallest normal number is flushed to zero.
    flushed = (got == 0) * (2.0**-126 if rounding == "dither" else 0.0)
    error = np.abs(got.astype(np.float64) - x) - flushed
    assert error.max() <= reach * step + 1e-5 * np.abs(x).max()

  check()


# --- Random rounding: unbiased, with the variance of the closed form ----------


def draws(name, x, count, **options):
  leaf = precision.leaf_codec(name, x.shape, options)
  seeds = counter.seeds(jax.random.key(7), count)

  @jax.jit
  @jax.vmap
  def run(seed):
    return leaf.decode(leaf.encode(seed, jnp.asarray(x), leaf.init())[0])

  return np.asarray(run(seeds), np.float64)


STOCHASTIC = [
  *(
    pytest.param(
      f"int{bits}",
      {"mode": mode, "rounding": "stochastic"},
      marks=[] if bits in QUICK_WIDTHS else [pytest.mark.slow],
    )
    for bits in WIDTHS
    for mode in numerics.MODES
  ),
  ("int4", {"rounding": "dither"}),
  ("int4", {"power_of_two": True, "rounding": "stochastic"}),
  ("float16", {"rounding": "stochastic"}),
  ("bfloat16", {"rounding": "stochastic"}),
  ("float8", {"rounding": "stochastic"}),
  ("float8", {"format": "e5m2", "rounding": "stochastic"}),
  ("ternary", {"clip": float("inf")}),
  ("qsgd", {}),
  ("qsgd", {"norm": "max", "levels": 4}),
  ("randomk", {"ratio": 0.25}),
]


@pytest.mark.parametrize(
  ("name", "options"), STOCHASTIC, ids=lambda case: str(case)
)
def test_random_rounding_is_unbiased(name, options):
  x = np.linspace(-1.0, 1.7, 28).astype(np.float32)
  count = 4000
  got = draws(name, x, count, **options)
  spread = got.std(0, ddof=1)
  error = np.abs(got.mean(0) - x)
  # float32 itself keeps 2^-24 of the value; the rest is the draw's.
  z = error / np.maximum(spread / np.sqrt(count), 2e-7)
  # Bonferroni over the entries, two-sided.
  limit = stats.norm.isf(ALPHA / 2 / x.size)
  assert z.max() < limit + 2, (z.argmax(), z.max())


@pytest.mark.parametrize("rounding", ["stochastic", "dither"])
def test_variance_has_the_closed_form(rounding):
  x = np.linspace(-1.0, 1.0, 31).astype(np.float32)
  count = 20000
  got = draws("int3", x, count, rounding=rounding)
  step = 1 / 3
  fraction = x / step - np.floor(x / step)
  # Rounding at random: f (1 - f) step^2. Subtractive dither: the error is
  # uniform over a step whatever the value (Schuchman 1964), step^2 / 12.
  expected = {
    "stochastic": fraction * (1 - fraction) * step**2,
    "dither": np.full(x.shape, step**2 / 12),
  }[rounding]
  error = ((got - x) ** 2).mean(0)
  # The squared error is at most step^2: Hoeffding's bound.
  limit = step**2 * np.sqrt(np.log(2 * x.size / ALPHA) / (2 * count))
  assert np.abs(error - expected).max() < limit


def test_dithered_error_is_uniform_and_independent_of_the_value():
  x = np.linspace(-1.0, 1.0, 31).astype(np.float32)
  got = draws("int3", x, 2000, rounding="dither")
  error = (got - x) * 3
  for entry in range(1, 30):
    result = stats.kstest(error[:, entry], stats.uniform(-0.5, 1).cdf)
    assert result.pvalue > ALPHA


def test_qsgd_variance_bound():
  # Lemma 3.1: E |Q(v) - v|^2 <= min(n / s^2, sqrt(n) / s) |v|^2.
  x = np.random.default_rng(3).standard_normal(400).astype(np.float32)
  for levels in (1, 4, 16):
    got = draws("qsgd", x, 200, levels=levels)
    error = ((got - x) ** 2).sum(1).mean()
    bound = min(400 / levels**2, 20 / levels) * (x**2).sum()
    assert error <= bound
    # The exact value: |x| s / |v| = l + f gives f (1 - f) (|v| / s)^2.
    unit = np.sqrt((x.astype(np.float64) ** 2).sum()) / levels
    f = np.abs(x) / unit % 1
    np.testing.assert_allclose(error, (f * (1 - f)).sum() * unit**2, rtol=0.1)


def test_terngrad_is_its_formula():
  x = np.array([0.5, -1.0, 0.25, 0.0], np.float32)
  got = draws("ternary", x, 20000, clip=float("inf"))
  assert set(np.unique(got)) == {-1.0, 0.0, 1.0}
  # Equation 3: a coordinate survives with probability |g| / s.
  rate = (got != 0).mean(0)
  np.testing.assert_allclose(rate, [0.5, 1.0, 0.25, 0.0], atol=0.02)
  # Clipping at 2.5 deviations caps the scale.
  spiky = np.zeros(1000, np.float32)
  spiky[0] = 1.0
  _, payload = roundtrip(spiky, "ternary")
  np.testing.assert_allclose(payload["scale"], [2.5 * spiky.std()], rtol=1e-5)


# --- Floating point ---------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "options", "dtype"),
  [
    ("float16", {}, np.float16),
    ("bfloat16", {}, ml_dtypes.bfloat16),
    ("float8", {}, ml_dtypes.float8_e4m3fn),
    ("float8", {"format": "e5m2"}, ml_dtypes.float8_e5m2),
  ],
)
def test_casts_are_those_of_ml_dtypes(name, options, dtype):
  rng = np.random.default_rng(0)
  x = rng.standard_normal(20000).astype(np.float32)
  x *= np.exp2(rng.integers(-20, 4, x.size)).astype(np.float32)
  got, payload = roundtrip(x, name, **options)
  scale = payload["scale"][0] if "scale" in payload else np.float32(1)
  expected = (x / np.float32(scale)).astype(dtype).astype(np.float32) * scale
  np.testing.assert_array_equal(got, expected)


def test_every_small_float_survives():
  for name, fmt in quantize.FLOAT_FORMATS.items():
    if fmt.dtype.itemsize == 1:
      codes = np.arange(256, dtype=np.uint8)
    else:
      codes = np.arange(65536, dtype=np.uint16)
    x = codes.view(fmt.dtype).astype(np.float32)
    # Compiled, processors may flush what is below the smallest normal number.
    kept = np.isfinite(x) & ((np.abs(x) >= 2.0**-126) | (x == 0))
    # Beyond, numbers saturate: bfloat16's alone go so far.
    kept &= np.abs(x) <= 2.0**126
    codes, x = codes[kept], x[kept]
    read = jax.jit(lambda codes, fmt=fmt: quantize.from_format(codes, fmt))(
      codes
    )
    np.testing.assert_array_equal(
      np.asarray(read).view(np.int32), x.view(np.int32)
    )
    got = quantize.to_format(jnp.asarray(x), fmt)
    assert (np.asarray(got.astype(jnp.float32)) == x).all(), name
    # bfloat16's last steps are below float32's smallest normal number.
    x = x[np.abs(x) >= 2.0**-119]
    got = quantize.to_format(jnp.asarray(x), fmt, jnp.full(x.shape, 0.999))
    assert (np.asarray(got.astype(jnp.float32)) == x).all(), name


@pytest.mark.parametrize("name", quantize.FLOAT_FORMATS)
def test_casts_decide_ties_as_ml_dtypes_does(name):
  fmt = quantize.FLOAT_FORMATS[name]
  codes = np.arange(256**fmt.dtype.itemsize, dtype=f"u{fmt.dtype.itemsize}")
  with np.errstate(invalid="ignore"):
    values = np.unique(codes.view(fmt.dtype).astype(np.float64))
  values = values[np.abs(values) <= min(fmt.largest, 2.0**126)]
  middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
  x = np.concatenate(
    [middle, np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)],
    dtype=np.float32,
  )
  # Compiled, processors may flush what is below the smallest normal number.
  x = x[np.abs(x) >= 2.0**-126]
  got = jax.jit(lambda x: quantize.to_format(x, fmt))(x)
  np.testing.assert_array_equal(
    np.asarray(got).view(codes.dtype), x.astype(fmt.dtype).view(codes.dtype)
  )


@pytest.mark.parametrize(
  "size, rows",
  [(8, 1), (32768, 16), (80000, 10), (32770, 2), (65537, 1), (98304, 16)],
)
def test_rows_hold_every_entry(size, rows):
  got = quantize.in_rows(jnp.arange(size))
  assert got.shape == (rows, size // rows)
  assert (got.reshape(-1) == jnp.arange(size)).all()


@pytest.mark.parametrize("granularity", [48, 64, 256, 300, "tensor"])
@pytest.mark.parametrize("entries", [700, 33280, 40001])
def test_norms_are_numpys(granularity, entries):
  rng = np.random.default_rng(entries)
  x = rng.laplace(size=entries).astype(np.float32)
  size = entries if granularity == "tensor" else min(granularity, entries)
  padded = np.pad(x.astype(np.float64), (0, -entries % size)).reshape(-1, size)
  count = np.minimum(entries - size * np.arange(len(padded)), size)
  _, payload = roundtrip(x, "sign", granularity=granularity)
  expected = np.abs(padded).sum(1) / count
  np.testing.assert_allclose(payload["scale"], expected, rtol=2e-5)
  _, payload = roundtrip(x, "qsgd", granularity=granularity)
  expected = np.linalg.norm(padded, axis=1) / 7
  np.testing.assert_allclose(payload["scale"], expected, rtol=2e-5)


@pytest.mark.parametrize("name", ["sign", "qsgd", "drive", "ternary", "int8"])
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_bins_hold_what_is_finite_beside_what_is_not(name, odd):
  x = np.array([odd, 1.0, 2.0, -3.0, 0.5, 0.0], np.float32)
  leaf = precision.leaf_codec(name, x.shape, {})
  payload, _ = leaf.encode(_seed(0), jnp.asarray(x), leaf.init())
  lower, upper, _ = map(np.asarray, leaf.bins(payload))
  assert ((lower <= x) & (x <= upper))[1:].all()


@pytest.mark.parametrize("name", ["nf4", "int4", "int8", "sign"])
def test_padding_changes_no_other_code(name):
  x = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
  got, _ = roundtrip(x, name, granularity=64)
  whole, _ = roundtrip(x[:1984], name, granularity=64)
  np.testing.assert_array_equal(got[:1984], whole)
  last, _ = roundtrip(x[1984:], name)
  np.testing.assert_allclose(got[1984:], last, rtol=1e-6)


def test_casts_saturate():
  got, _ = roundtrip(np.array([1e6, -1e6, 65519.0, 1.0], np.float32), "float16")
  assert got.tolist() == [65504.0, -65504.0, 65504.0, 1.0]


# --- Sign, NF4 --------------------------------------------------------------


def test_sign_by_hand():
  x = np.array([3.0, -1.0, 0.0, -2.0], np.float32)
  got, _ = roundtrip(x, "sign")
  assert got.tolist() == [1.5, -1.5, 1.5, -1.5]


def test_sign_scale_has_least_squared_error():
  # (|x|_1 / d) sign(x) is the projection of x onto the ray of sign(x).
  x = np.random.default_rng(2).standard_normal(300).astype(np.float32)
  got, _ = roundtrip(x, "sign")
  best = ((got - x) ** 2).sum()
  for factor in (0.99, 1.01):
    assert ((factor * got - x) ** 2).sum() > best
  # Karimireddy et al.: |x - C(x)|^2 = (1 - |x|_1^2 / (d |x|_2^2)) |x|^2.
  density = np.abs(x).sum() ** 2 / (300 * (x**2).sum())
  np.testing.assert_allclose(best, (1 - density) * (x**2).sum(), rtol=1e-5)


def test_nf4_levels_follow_from_the_normal_distribution():
  # QLoRA's construction: 8 quantiles above zero, 7 below, and zero itself.
  offset = 0.9677083
  above = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
  below = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
  levels = np.sort(np.concatenate([above, below, [0.0]]))
  np.testing.assert_allclose(numerics.NF4, levels / levels.max(), atol=2e-7)


def test_nf4_takes_the_nearest_level():
  x = np.random.default_rng(4).standard_normal(256).astype(np.float32)
  got, payload = roundtrip(x, "nf4")
  assert payload["scale"].shape == (4,)
  for block in range(4):
    part = x[64 * block : 64 * block + 64]
    largest = np.abs(part).max()
    distance = np.abs(part[:, None] - largest * numerics.NF4.astype(np.float64))
    expected = largest * numerics.NF4[distance.argmin(1)]
    np.testing.assert_allclose(
      got[64 * block : 64 * block + 64], expected, rtol=1e-6
    )


# --- Static ranges ----------------------------------------------------------


def test_static_range_lags_and_saturates():
  leaf = precision.leaf_codec(
    "int8", (2,), {"range": "static", "momentum": 0.5}
  )
  state = leaf.init()
  x = jnp.array([1.0, -0.5])
  payload, state = leaf.encode(_seed(0), x, state)
  np.testing.assert_allclose(leaf.decode(payload), x, atol=1 / 250)
  # The range is still that of the first update: ±1.
  payload, state = leaf.encode(_seed(0), 4 * x, state)
  np.testing.assert_allclose(leaf.decode(payload), [1.0, -1.0], rtol=1e-6)
  lower, upper, _ = leaf.bins(payload)
  assert upper[0] == np.inf and lower[1] == -np.inf
  # Halfway from 1 to 4, the range is 2.5 now.
  payload, state = leaf.encode(_seed(0), 4 * x, state)
  np.testing.assert_allclose(leaf.decode(payload), [2.5, -2.0], atol=1 / 100)


# --- Odd leaves and bad options ---------------------------------------------


@pytest.mark.parametrize("x", [0.0, 3.0, -2.5, np.nan, np.inf, 1e-45])
def test_scalar_leaves(x):
  for name in ("int8", "int4", "int2", "float16", "sign", "nf4", "qsgd"):
    got, _ = roundtrip(np.float32(x), name)
    assert got.shape == () and np.isfinite(got)
    if abs(x) in (2.5, 3.0):
      np.testing.assert_allclose(got, x, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 8, 21, 41, 64, 1000])
def test_ternary_does_not_clip_constants(size):
  """Their deviation is what rounding leaves of it."""
  run = jitted_of(size, "ternary")
  for value in np.random.default_rng(size).uniform(-1, 1, 40):
    x = np.full(size, value, np.float32)
    np.testing.assert_allclose(run(x), x, rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_infinities_keep_to_their_side(bits):
  x = np.array([np.inf, 1.0, -1.0, np.nan, -np.inf], np.float32)
  got, _ = roundtrip(x, f"int{bits}", mode="affine")
  # Of one bit there is no code above zero, where the range is even.
  assert got[0] >= (0 if bits == 1 else 0.6 * quantize.LARGEST)
  assert got[-1] <= -0.9 * quantize.LARGEST
  np.testing.assert_array_equal(got[1:-1], 0)


@pytest.mark.parametrize("name", ["sign", "qsgd", "ternary"])
def test_norms_of_large_leaves(name):
  """Summed in rows, of which float64 makes the same."""
  x = np.random.default_rng(0).standard_normal((1024, 1040)).astype(np.float32)
  _, payload = roundtrip(x, name)
  exact = x.astype(np.float64)
  want = {
    "sign": np.abs(exact).mean(),
    "qsgd": np.linalg.norm(exact) / 7,
    "ternary": 2.5 * exact.std(),
  }[name]
  np.testing.assert_allclose(payload["scale"], [want], rtol=1e-6)


def test_constant_leaves_are_exact():
  x = np.full((7, 3), -0.123, np.float32)
  for name in ("int8", "int2", "sign", "ternary"):
    np.testing.assert_allclose(roundtrip(x, name)[0], x, rtol=1e-6)
  for bits in (1, 4, 8):
    got, _ = roundtrip(x, f"int{bits}", mode="affine")
    np.testing.assert_allclose(got, x, rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("int8", {"mode": "asymmetric"}),
    ("int8", {"rounding": "up"}),
    ("int8", {"granularity": "row"}),
    ("int8", {"granularity": 0}),
    ("int8", {"range": "fixed"}),
    ("int8", {"range": "static", "momentum": 2.0}),
    ("int8", {"mode": "affine", "power_of_two": True}),
    ("int1", {"mode": "symmetric"}),
    ("int1", {"rounding": "stochastic"}),
    ("float16", {"rounding": "dither"}),
    ("float8", {"format": "e3m4"}),
    ("ternary", {"clip": 0}),
    ("qsgd", {"norm": "l1"}),
    ("qsgd", {"levels": 0}),
    ("topk", {"ratio": 0.0}),
    ("prune", {"ratio": 1.5}),
    ("randomk", {"ratio": "many"}),
    ("int9", {}),
    ("int8", {"bits": 8}),
  ],
)
def test_bad_options(name, options):
  with pytest.raises(UserError, match=r"[Ee]xpected"):
    precision.leaf_codec(name, (4, 4), options)


@pytest.mark.parametrize("option", ["mode=symmetric", "rounding=stochastic"])
def test_one_bit_points_to_sign(option):
  with pytest.raises(UserError, match="or the codec sign"):
    precision.leaf_codec("int1", (4,), dict([option.split("=")]))


def test_traced_width_is_one_program():
  # Every width out of one compilation, equal to the static codec's.
  x = jnp.asarray(np.random.default_rng(5).standard_normal(50), jnp.float32)

  @jax.jit
  def coded(x, high):
    grid = quantize.symmetric_grid(x, None, high)
    return quantize.dequantize(quantize.quantize(x, grid), grid)

  for bits in WIDTHS:
    leaf = codecs.blockwise((50,), numerics.integer(bits))
    expected = leaf.decode(leaf.encode(_seed(0), x, ())[0])
    got = coded(x, jnp.float32(2 ** (bits - 1) - 1))
    np.testing.assert_array_equal(got, expected)
  assert coded._cache_size() == 1


@pytest.mark.parametrize("rounding", numerics.ROUNDINGS)
@pytest.mark.parametrize("steps", [0.4, 3.0, 20.0])
def test_bins_hold_the_smallest_numbers(rounding, steps):
  """Half a step of the smallest scale, and what is flushed."""
  x = np.linspace(-steps, steps, 501) * 2.0**-126
  x = x[(np.abs(x) >= 2.0**-126) | (x == 0)].astype(np.float32)
  leaf = precision.leaf_codec("int4", x.shape, {"rounding": rounding})
  for seed in counter.seeds(jax.random.key(0), 4):
    payload, _ = leaf.encode(seed, x, leaf.init())
    lower, upper, _ = map(np.asarray, leaf.bins(payload))
    assert (lower.astype(float) <= x).all() and (x <= upper.astype(float)).all()
