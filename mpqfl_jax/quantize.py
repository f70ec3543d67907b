"""Numerics of quantising one array: grids, rounding, number formats.

A grid is a scale, a zero point and the range of the codes, all of them arrays,
so that one compilation serves every bit width. Symmetric grids keep zero at
code zero and use 2^b - 1 of the 2^b codes; affine ones are TFLite's: the range
is extended to contain zero and the zero point is an integer, so that zero is
represented exactly.

>>> import jax.numpy as jnp
>>> x = jnp.array([-1.0, 0.0, 0.25, 1.75])
>>> grid = symmetric_grid(x, None, high=7)
>>> codes = quantize(x, grid)
>>> codes.tolist()
[-4, 0, 1, 7]
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mpqfl_jax.types import Array

# Magnitudes a codec can carry. The margin below float32's largest keeps every
# scale, range and decoded value finite; below the smallest normal number
# processors differ in whether they flush to zero.
LARGEST = np.float32(2.0**126)
SMALLEST = np.float32(2.0**-126)
# Its last bit is worth 1, and so is that of every float32 within 2^22 of it.
_ANCHOR = np.float32(1.5 * 2.0**23)
# Arrays from this size on are reduced in so many rows; along leading axes, rows
# are reduced so few at a time where their number allows.
_LARGE, _ROWS, _FEW = 2**15, range(16, 7, -1), 32
# So many float32 fill a cache line.
_LINE = 16

# What runs along a block: one axis, several, or all.
Axis = int | tuple[int, ...] | None


class Grid(NamedTuple):
  """The values (code - zero_point) * scale for integer codes in [low, high].

  Attributes:
    scale: float32, broadcastable to the array that is quantised.
    zero_point: float32 holding integers, of the same shape.
    low, high: smallest and largest code, numbers or float32 arrays.
  """

  scale: Array
  zero_point: Array
  low: Array | float
  high: Array | float


def finite(x: Array) -> Array:
  """Maps NaN to 0 and saturates at ±2^126, so that every payload is valid."""
  x = jnp.asarray(x, jnp.float32)
  return without_nan(jnp.clip(x, -LARGEST, LARGEST))


def largest_magnitude(x: Array, axis: Axis = None) -> Array:
  """Largest magnitude along `axis` (kept, of length 1), at most 2^126.

  Where an entry is not finite it is 2^126, so that in such an update little
  else survives.
  """
  if not _is_leading(axis, x.ndim):
    bottom, top = extremes(x, axis)
    return jnp.maximum(-bottom, top)
  parts, axes, kept = _parts(x, axis)
  # Without their sign, patterns are in the order of magnitudes.
  found = _numbers(jnp.max(_patterns(parts) & 0x7FFFFFFF, axes))
  found = jnp.where(found < jnp.inf, jnp.minimum(found, LARGEST), LARGEST)
  return jnp.max(found, 0).reshape(kept)


def extremes(x: Array, axis: Axis = None) -> tuple[Array, Array]:
  """Smallest and largest entry along `axis` (kept, of length 1), within ±2^126.

  Where an entry is not finite they are -2^126 and 2^126.
  """
  parts, axes, kept = _parts(x, axis)
  ordered = _ordered(_patterns(parts))
  if _is_leading(axis, x.ndim):
    ends = jnp.min(ordered, axes), jnp.max(ordered, axes)
  else:
    # One reduction for both: of a reduction to one result, XLA:CPU makes many
    # short ones, or calls a library whose maximum passes over NaN.
    integers = np.iinfo(np.int32)
    ends = jax.lax.reduce(
      (ordered, ordered),
      (np.int32(integers.max), np.int32(integers.min)),
      lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])),
      axes,
    )
  bottom, top = (_numbers(_ordered(end)) for end in ends)
  is_finite = (bottom > -jnp.inf) & (top < jnp.inf)
  bottom = jnp.where(is_finite, jnp.clip(bottom, -LARGEST, LARGEST), -LARGEST)
  top = jnp.where(is_finite, jnp.clip(top, -LARGEST, LARGEST), LARGEST)
  return jnp.min(bottom, 0).reshape(kept), jnp.max(top, 0).reshape(kept)


def _parts(
  x: Array, axis: Axis
) -> tuple[Array, tuple[int, ...], tuple[int, ...]]:
  """Cuts an array into parts, in which its extremes are found first.

  Args:
    x: the array.
    axis: what its extremes are wanted along.

  Returns:
    The array with parts along a first axis, the axes along which to reduce each
    of them, and the shape of the result, `axis` kept.
  """
  axes = _axes(axis, x.ndim)
  kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
  if _is_leading(axis, x.ndim):
    # Few rows at a time: of many, XLA:CPU would store a padded copy first.
    rows = math.prod(x.shape[: len(axes)])
    few = next((n for n in range(_FEW, 1, -1) if rows % n == 0), rows)
    return x.reshape(-1, few, *x.shape[len(axes) :]), (1,), kept
  if axis is None:
    return in_rows(x), (1,), kept
  return x[None], tuple(i + 1 for i in axes), kept


def in_rows(x: Array) -> Array:
  """[rows, n], one row, or of a large array rows that the cores can share."""
  if x.size < _LARGE:
    return x.reshape(1, -1)
  # Rows that begin where cache lines do: a load of a whole one that does not
  # takes two.
  aligned = (n for n in _ROWS if x.size % (n * _LINE) == 0)
  return x.reshape(next(aligned, math.gcd(x.size, _ROWS.start)), -1)


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
  axes = range(ndim) if axis is None else np.atleast_1d(axis)
  return tuple(sorted(int(i) % ndim for i in axes))


def _is_leading(axis: Axis, ndim: int) -> bool:
  axes = _axes(axis, ndim)
  return len(axes) < ndim and axes == tuple(range(len(axes)))


def _patterns(x: Array) -> Array:
  return jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.int32)


def _numbers(patterns: Array) -> Array:
  return jax.lax.bitcast_convert_type(patterns, jnp.float32)


def _ordered(patterns: Array) -> Array:
  """Patterns of float32 numbers to integers in the same order, and back, int32.

  NaN comes below all numbers or above all.
  """
  return patterns ^ ((patterns >> 31) & 0x7FFFFFFF)


def symmetric_grid(x: Array, axis: Axis, high: Array | float) -> Grid:
  """The grid with codes -high ... high whose end is the largest magnitude.

  Args:
    x: values to quantise.
    axis: axis that shares a scale; None for all of `x`.
    high: largest code.

  Returns:
    The grid; its scale keeps the reduced axes with length 1.
  """
  magnitude = largest_magnitude(x, axis)
  # A product: the compiler turns a division by a constant into one, and the
  # same payload must come out whether it sees a constant or not.
  scale = jnp.maximum(magnitude * (1 / high), SMALLEST)
  return Grid(scale, jnp.zeros_like(scale), -high, high)


def affine_grid(
  x: Array,
  axis: Axis,
  low: Array | float,
  high: Array | float,
  roomy: bool = False,
) -> Grid:
  """The grid from the smallest to the largest value, zero included.

  Args:
    x: values to quantise.
    axis: axis that shares a scale; None for all of `x`.
    low, high: smallest and largest code.
    roomy: leave a step of the range unused. TFLite rounds the zero point, which
      pushes entries at one end of the range out of it by up to half a step;
      rounding to the nearest hides that, random rounding would be biased there.

  Returns:
    The grid; scale and zero point keep the reduced axes with length 1.

  Source: Jacob et al., "Quantization and Training of Neural Networks for
  Efficient Integer-Arithmetic-Only Inference" (CVPR 2018), section 3, as TFLite
  computes it (`ChooseQuantizationParams`).
  """
  bottom, top = extremes(x, axis)
  bottom, top = jnp.minimum(bottom, 0.0), jnp.maximum(top, 0.0)
  steps = high - low - (1 if roomy else 0)
  # A reciprocal beyond would not be a normal number.
  scale = jnp.clip((top - bottom) * (1 / steps), SMALLEST, LARGEST)
  exact = low - bottom / scale
  zero_point = jnp.ceil(exact) if roomy else jnp.round(exact)
  return Grid(scale, jnp.clip(zero_point, low, high), low, high)


def quantize(
  x: Array, grid: Grid, uniform: Array | None = None, wide: bool = False
) -> Array:
  """The codes of the nearest grid points, or of a neighbour drawn at random.

  Args:
    x: values, which need not be finite.
    grid: what to quantise to.
    uniform: independent draws of `counter.uniform` like `x` for stochastic
      rounding; None rounds to the nearest, ties to even.
    wide: the grid has more than 256 codes.

  Returns:
    Codes, int32 in [grid.low, grid.high].
  """
  # The compiler makes this product of a division by one number, but not of one
  # by many; written out, both give the same codes.
  steps = without_nan(x) * (1 / grid.scale)
  if uniform is None or wide:
    return to_codes(round_to_integer(steps, uniform), grid)
  # Below 256 steps the sum is as good as `steps`; see `counter.uniform`.
  return to_codes(jnp.floor(steps + uniform), grid)


def without_nan(x: Array) -> Array:
  """Maps NaN to 0.

  For before the arithmetic: compilers move a selection between it and a
  constant to its end, to bytes, which takes a CPU as long as all the rest.
  """
  return jnp.where(jnp.isnan(x), 0.0, x)


def to_codes(steps: Array, grid: Grid) -> Array:
  """The codes of rounded multiples of the scale other than NaN, int32."""
  # The sum of an integer and the anchor holds it in its last bits, and read as
  # integers, float32 numbers above zero are in order, negative ones below them:
  # a clamp finds all that is too far. XLA's conversion would take five
  # operations an entry to look for NaN and for what is too large.
  steps = jnp.asarray(steps, jnp.float32)
  low, high = (jnp.asarray(e, jnp.int32) for e in (grid.low, grid.high))
  lowest = low + int(_ANCHOR.view(np.int32))
  above = jnp.maximum(_patterns(steps + (_ANCHOR + grid.zero_point)), lowest)
  # Unsigned: a compiler that sees bytes in it packs them as such.
  above = jax.lax.bitcast_convert_type(above - lowest, jnp.uint32)
  above = jnp.minimum(above, (high - low).astype(jnp.uint32))
  return above.astype(jnp.int32) + low


def dequantize(codes: Array, grid: Grid) -> Array:
  """The values of codes, float32; under dither the codes are no integers."""
  return (codes - grid.zero_point) * grid.scale


def round_to_integer(x: Array, uniform: Array | None = None) -> Array:
  """Rounds to the nearest integer, or to a neighbour without bias.

  Args:
    x: float32 values.
    uniform: draws from [0, 1), or None for nearest, ties to even.

  Returns:
    float32 holding integers; with `uniform` their expectation is `x`.
  """
  if uniform is None:
    return jnp.round(x)
  # floor(x + u) in exact arithmetic. The sum itself would lose the low bits of
  # u, and round to the next integer where u is close to 1; the fraction that
  # floor leaves is exact in float32.
  whole = jnp.floor(x)
  return whole + (uniform < x - whole)


class FloatFormat(NamedTuple):
  """A binary floating-point format below float32.

  Attributes:
    dtype: NumPy dtype of the format.
    mantissa: explicit mantissa bits.
    min_exponent: exponent of the smallest normal number.
    largest: largest finite value.
  """

  dtype: np.dtype
  mantissa: int
  min_exponent: int
  largest: float

  @property
  def unit(self) -> np.float32:
    """Of an 8-bit format: its numbers over the float16 of the same fields.

    The two differ in the exponents' bias, but for float8_e5m2.
    """
    return np.float32(2.0 ** (14 + self.min_exponent))


def _float_format(dtype: type) -> FloatFormat:
  info = ml_dtypes.finfo(dtype)
  return FloatFormat(
    np.dtype(dtype), info.nmant, int(info.minexp), float(info.max)
  )


FLOAT_FORMATS = {
  "float16": _float_format(np.float16),
  "bfloat16": _float_format(ml_dtypes.bfloat16),
  "float8_e4m3": _float_format(ml_dtypes.float8_e4m3fn),
  "float8_e5m2": _float_format(ml_dtypes.float8_e5m2),
}


def float_step(x: Array, fmt: FloatFormat) -> tuple[Array, Array]:
  """Distance of the format's numbers around `x`, and its reciprocal.

  Args:
    x: float32 values.
    fmt: the format.

  Returns:
    Two powers of two like `x`, float32, the first at least 2^-126.
  """
  pattern = _patterns(x)
  exponent = ((pattern >> 23) & 0xFF) - 127
  # The floor matters to bfloat16 alone, whose smallest steps are subnormal.
  low = max(fmt.min_exponent, fmt.mantissa - 126)
  power = jnp.maximum(exponent, low) - fmt.mantissa
  return power_of_two(power), power_of_two(-power)


def power_of_two(exponent: Array) -> Array:
  """2^exponent as float32, for int32 exponents from -126 to 127."""
  return _numbers((exponent + 127) << 23)


def to_format(
  x: Array, fmt: FloatFormat, uniform: Array | None = None
) -> Array:
  """Rounds float32 to a narrower format, saturating at its largest value.

  Args:
    x: float32 values other than NaN. Beyond 2^126 they saturate, too.
    fmt: the format.
    uniform: draws from [0, 1) like `x` for stochastic rounding; None rounds to
      the nearest, ties to even.

  Returns:
    Values of the format's dtype, finite.
  """
  largest = min(fmt.largest, float(LARGEST))
  x = jnp.clip(x, -largest, largest)
  if uniform is not None:
    step, reciprocal = float_step(x, fmt)
    # A product: of two divisions in a row, the second here and the caller's,
    # the compiler makes one by a product that may underflow.
    x = round_to_integer(x * reciprocal, uniform) * step
  if fmt.dtype == np.float16:
    return x.astype(fmt.dtype)
  is_bfloat16 = fmt.dtype == jnp.bfloat16
  codes = _bfloat16_codes(x) if is_bfloat16 else _float8_codes(x, fmt)
  return jax.lax.bitcast_convert_type(codes, fmt.dtype)


def from_format(codes: Array, fmt: FloatFormat) -> Array:
  """The float32 numbers of finite numbers' bit patterns, uint8 or uint16."""
  if fmt.dtype.itemsize > 1:
    return jax.lax.bitcast_convert_type(codes, fmt.dtype).astype(jnp.float32)
  # As float16, whose exponents have room for theirs: processors know how to
  # convert it, and would take twice as long otherwise.
  codes = codes.astype(jnp.uint16)
  magnitude = (codes & 0x7F) << (10 - fmt.mantissa)
  pattern = magnitude | ((codes & 0x80) << 8)
  value = jax.lax.bitcast_convert_type(pattern, jnp.float16)
  return value.astype(jnp.float32) * fmt.unit


def _bfloat16_codes(x: Array) -> Array:
  """What a cast does to numbers within ±2^126, uint16, at twice its speed."""
  pattern = _patterns(x)
  # The last bit that stays decides ties; what overflows carries upwards.
  return ((pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16).astype(jnp.uint16)


def _float8_codes(x: Array, fmt: FloatFormat) -> Array:
  """What a cast does, uint8, at five times its speed on a CPU."""
  magnitude = jnp.abs(x)
  pattern = _patterns(magnitude)
  # Of normal numbers, the last bit that stays decides ties; a mantissa that
  # overflows carries into the exponent, as it should.
  drop = 23 - fmt.mantissa
  even = (pattern >> drop) & 1
  rounded = (pattern + (1 << (drop - 1)) - 1 + even) >> drop
  normal = rounded - ((fmt.min_exponent + 126) << fmt.mantissa)
  # Subnormal numbers are whole multiples of one step: a sum with a number whose
  # last bit is that step rounds to them.
  anchor = np.float32(2.0 ** (fmt.min_exponent - fmt.mantissa + 23))
  subnormal = _patterns(magnitude + anchor) - int(anchor.view(np.int32))
  is_normal = magnitude >= np.float32(2.0**fmt.min_exponent)
  sign = (_patterns(x) >> 24) & 0x80
  return (jnp.where(is_normal, normal, subnormal) | sign).astype(jnp.uint8)
