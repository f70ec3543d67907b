"""The quantisers that keep one code an entry, a few lines each.

Each constructor gives the `Numerics` that `codecs.blockwise` wraps into the
codec of a leaf. Side information (scales, zero points) is on the wire and an
adversary sees it.
"""

from collections.abc import Callable
import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import quantize
from mpqfl_jax.errors import UserError
from mpqfl_jax.types import Array

ROUNDINGS = ("nearest", "stochastic", "dither")
MODES = ("symmetric", "affine")

# Slack of the certain intervals for the rounding of float32 itself.
SLACK = np.float32(2.0**-21)

Side = dict[str, Array]


class SideField(NamedTuple):
  """Side information of a block: its type, and what an encoder may write."""

  dtype: type
  check: Callable[[np.ndarray], bool]


class Numerics(NamedTuple):
  """How a block of entries becomes codes.

  Attributes:
    name: the rule in words; part of the fingerprint that both sides compare.
    tag: the rule's byte on the wire.
    levels: codes are unsigned integers below this.
    rounding: one of `ROUNDINGS`.
    side: name -> one number a block.
    fit: (y, axis, sizes) -> side information of the blocks that run along
      `axis` and have `sizes` entries before padding; `y` may hold what is not
      finite.
    encode: (y, side, uniform) -> codes. `uniform` are draws from [0, 1) like
      `y`, or None where rounding is to nearest.
    decode: (codes, side, uniform) -> y; `uniform` only under dither.
    bins: (codes, side, uniform) -> (lower, upper, variance).
    valid: codes on the host -> whether an encoder can have written them.
    table: [levels] float32, what `decode` is given in place of codes, or None.
    grid: side information -> the grid that codes from 0 are on, or None.
    format: of a cast, or None.
  """

  name: str
  tag: int
  levels: int
  rounding: str
  side: dict[str, SideField]
  fit: Callable[[Array, quantize.Axis, np.ndarray], Side]
  encode: Callable[[Array, Side, Array | None], Array]
  decode: Callable[[Array, Side, Array | None], Array]
  bins: Callable[[Array, Side, Array | None], tuple[Array, Array, Array]]
  valid: Callable[[np.ndarray], bool]
  table: np.ndarray | None = None
  grid: Callable[[Side], quantize.Grid] | None = None
  format: quantize.FloatFormat | None = None


def integer(
  bits: int,
  mode: str = "symmetric",
  rounding: str = "nearest",
  power_of_two: bool = False,
) -> Numerics:
  """Integers of a fixed width on a uniform grid.

  Args:
    bits: width of a code: 2 to 16 in symmetric mode, 1 to 16 in affine.
    mode: `symmetric` (codes ±(2^(bits-1) - 1), the scale is the largest
      magnitude over that) or `affine` (TFLite's scale and zero point).
    rounding: `nearest`, `stochastic` or `dither` (subtractive: the server
      subtracts the draws again that the client added).
    power_of_two: round the scale up to a power of two, sent as one byte;
      symmetric mode only.

  Returns:
    The numerics.

  Source: Jacob et al. (CVPR 2018), section 3; dither: Roberts, "Picture Coding
  Using Pseudo-Random Noise" (1962).
  """
  require_choice("mode", mode, MODES)
  require_choice("rounding", rounding, ROUNDINGS)
  name = f"int{bits} {mode} {rounding}"
  if bits == 1 and (mode == "symmetric" or rounding != "nearest"):
    raise UserError(
      f"{name}: one bit has no such grid (a symmetric one has only the code 0)."
      " Expected mode=affine with rounding=nearest, or the codec sign, which"
      " sends signs and a scale."
    )
  if mode == "symmetric":
    require_range("bits", bits, 2, 16)
    high = 2 ** (bits - 1) - 1
    return _linear(
      name,
      tag=0x10 + bits,
      low=-high,
      high=high,
      rounding=rounding,
      fit=lambda y, axis, sizes: quantize.symmetric_grid(y, axis, high),
      power_of_two=power_of_two,
    )
  require_range("bits", bits, 1, 16)
  if power_of_two:
    raise UserError("power_of_two=True: expected mode='symmetric'.")
  low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  return _linear(
    name,
    tag=0x30 + bits,
    low=low,
    high=high,
    rounding=rounding,
    fit=lambda y, axis, sizes: quantize.affine_grid(
      y, axis, low, high, roomy=rounding != "nearest"
    ),
    affine=True,
  )


def ternary(clip: float = 2.5) -> Numerics:
  """TernGrad: -s, 0 or s at random without bias, after clipping.

  Args:
    clip: entries are clipped at this many standard deviations of the block
      first (which biases them); `inf` for none.

  Returns:
    The numerics.

  Source: Wen et al., "TernGrad" (NeurIPS 2017), equations 1 to 3 and section
  3.3 on gradient clipping, where clip is 2.5.
  """
  require_positive("clip", clip)

  def fit(y, axis, sizes):
    largest = _largest(y, axis)
    mean = _sum(lambda unit: unit, y, largest, axis) * (1 / sizes)
    square = _sum(jnp.square, y, largest, axis) * (1 / sizes)
    variance = square - mean * mean
    # A constant block has no deviation to clip by but what rounding leaves.
    varies = variance > square * np.float32(2.0**-16)
    limit = clip * jnp.sqrt(jnp.where(varies, variance, np.inf))
    scale = largest * jnp.minimum(limit, 1.0)
    scale = jnp.maximum(scale, quantize.SMALLEST)
    return quantize.Grid(scale, jnp.zeros_like(scale), -1, 1)

  return _linear(
    f"ternary clip={clip:g}",
    tag=0x07,
    low=-1,
    high=1,
    rounding="stochastic",
    fit=fit,
    saturates=np.isfinite(clip),
  )


def qsgd(levels: int = 7, norm: str = "l2") -> Numerics:
  """QSGD: multiples of norm / levels, rounded at random without bias.

  Args:
    levels: s of the paper, quantisation levels on each side of zero.
    norm: `l2`, the paper's, or `max`, that of its implementation.

  Returns:
    The numerics.

  Source: Alistarh et al., "QSGD" (NeurIPS 2017), section 3.1. Codes are sent at
  their fixed width, not by Elias' code.
  """
  require_choice("norm", norm, ("l2", "max"))
  require_range("levels", levels, 1, 32767)

  def fit(y, axis, sizes):
    largest = _largest(y, axis)
    length = largest
    if norm == "l2":
      square = _sum(jnp.square, y, largest, axis)
      # No less than the largest: it is 2^126 where an entry is NaN.
      length = largest * jnp.maximum(jnp.sqrt(square), 1.0)
      length = jnp.minimum(length, quantize.LARGEST)
    scale = jnp.maximum(length * (1 / levels), quantize.SMALLEST)
    return quantize.Grid(scale, jnp.zeros_like(scale), -levels, levels)

  return _linear(
    f"qsgd levels={levels} norm={norm}",
    tag=0x09,
    low=-levels,
    high=levels,
    rounding="stochastic",
    fit=fit,
  )


def _linear(
  name: str,
  tag: int,
  low: int,
  high: int,
  rounding: str,
  fit: Callable[[Array, quantize.Axis, np.ndarray], quantize.Grid],
  affine: bool = False,
  power_of_two: bool = False,
  saturates: bool = False,
) -> Numerics:
  """Numerics of a uniform grid; codes on the wire are offset by `low`."""
  levels = high - low + 1
  # The largest scale of a valid input; with it every decoded value is finite.
  steps = high - low - (1 if affine and rounding != "nearest" else 0)
  limit = 2.0**127 / steps * (2.0 if power_of_two else 1.0 + 2.0**-20)
  if power_of_two:
    name += " pow2"
    largest = int(np.floor(np.log2(limit))) + 127
    side = {"exponent": SideField(np.uint8, between(1, min(largest, 254)))}
  else:
    side = {"scale": SideField(np.float32, between(quantize.SMALLEST, limit))}
  if affine:
    dtype = np.uint8 if levels <= 256 else np.uint16
    side["zero_point"] = SideField(dtype, between(0, levels - 1))

  def fit_side(y, axis, sizes):
    grid = fit(y, axis, sizes)
    if power_of_two:
      return {"exponent": _exponent_above(grid.scale)}
    if affine:
      return {"scale": grid.scale, "zero_point": grid.zero_point - low}
    return {"scale": grid.scale}

  def grid_of(side):
    scale = _power(side["exponent"]) if power_of_two else side["scale"]
    zero = jnp.full_like(scale, -low)
    if affine:
      zero = side["zero_point"].astype(jnp.float32)
    return quantize.Grid(scale, zero, 0, levels - 1)

  def encode(y, side, uniform):
    grid = grid_of(side)
    if rounding == "dither":
      steps = quantize.without_nan(y) * (1 / grid.scale) + (uniform - 0.5)
      return quantize.to_codes(jnp.round(steps), grid)
    return quantize.quantize(y, grid, uniform, wide=levels > 256)

  def decode(codes, side, uniform):
    codes = codes.astype(jnp.float32)
    if rounding == "dither":
      codes = codes - (uniform - 0.5)
    return quantize.dequantize(codes, grid_of(side))

  def bins(codes, side, uniform):
    value = decode(codes, side, uniform)
    lower, upper, variance = grid_bins(value, grid_of(side).scale, rounding)
    if saturates:
      lower = jnp.where(codes == 0, -jnp.inf, lower)
      upper = jnp.where(codes == levels - 1, jnp.inf, upper)
    return lower, upper, variance

  return Numerics(
    name,
    tag,
    levels,
    rounding,
    side,
    fit_side,
    encode,
    decode,
    bins,
    between(0, levels - 1),
    grid=None if rounding == "dither" else grid_of,
  )


def grid_bins(
  value: Array, scale: Array, rounding: str
) -> tuple[Array, Array, Array]:
  """What a value on a grid, or a dithered one, says of the entry it stands for.

  Args:
    value: decoded.
    scale: of the grid, broadcasts against `value`.
    rounding: one of `ROUNDINGS`.

  Returns:
    lower, upper and variance like `value`, see `types.Bins`.
  """
  reach, share = (1.0, 6.0) if rounding == "stochastic" else (0.5, 12.0)
  # What is no normal number is flushed: half a step, and a value with dither.
  half = jnp.maximum(reach * scale, quantize.SMALLEST) + quantize.SMALLEST
  half = half + (jnp.abs(value) + scale) * SLACK
  variance = jnp.broadcast_to(scale * scale / share, value.shape)
  return value - half, value + half, variance


def cast(name: str, rounding: str = "nearest") -> Numerics:
  """A narrower floating-point format; eight-bit ones are scaled to fit.

  Args:
    name: one of `quantize.FLOAT_FORMATS`.
    rounding: `nearest` or `stochastic`.

  Returns:
    The numerics. Magnitudes beyond the format's largest saturate; the float8
    formats carry one float32 scale a block, its largest magnitude mapped to the
    format's largest.

  Source: IEEE 754-2019; float8: Micikevicius et al., "FP8 Formats for Deep
  Learning" (2022).
  """
  require_choice("rounding", rounding, ROUNDINGS[:2])
  fmt = quantize.FLOAT_FORMATS[name]
  scaled = fmt.dtype.itemsize == 1
  code_type = jnp.uint8 if scaled else jnp.uint16
  limit = float(quantize.LARGEST) / fmt.largest * (1 + 2.0**-20)
  side = {}
  if scaled:
    side["scale"] = SideField(np.float32, between(quantize.SMALLEST, limit))

  def fit(y, axis, sizes):
    if not scaled:
      return {}
    return {"scale": quantize.symmetric_grid(y, axis, fmt.largest).scale}

  def encode(y, side, uniform):
    y = quantize.without_nan(y)
    if scaled:
      y = y * (1 / side["scale"])
    value = quantize.to_format(y, fmt, uniform)
    return jax.lax.bitcast_convert_type(value, code_type)

  def unscaled(codes):
    return quantize.from_format(codes.astype(code_type), fmt)

  def decode(codes, side, uniform):
    value = unscaled(codes)
    return value * side["scale"] if scaled else value

  def bins(codes, side, uniform):
    value = unscaled(codes)
    scale = side["scale"] if scaled else jnp.float32(1)
    step, _ = quantize.float_step(value, fmt)
    reach = 1.0 if rounding == "stochastic" else 0.5
    half = reach * step + quantize.SMALLEST + jnp.abs(value) * SLACK
    lower = jnp.where(value <= -fmt.largest, -jnp.inf, value - half)
    upper = jnp.where(value >= fmt.largest, jnp.inf, value + half)
    if scaled:
      # The scale maps the largest magnitude onto the format's: none saturates.
      lower = jnp.maximum(lower, -fmt.largest * (1 + SLACK))
      upper = jnp.minimum(upper, fmt.largest * (1 + SLACK))
    share = 6.0 if rounding == "stochastic" else 12.0
    return lower * scale, upper * scale, (step * scale) ** 2 / share

  # As patterns, which are in the order of magnitudes.
  unsigned = np.dtype(code_type)
  largest = np.array(min(fmt.largest, float(quantize.LARGEST)), fmt.dtype)
  most = largest.view(unsigned)
  magnitude = np.iinfo(unsigned).max >> 1

  def valid(codes):
    return bool(((codes & magnitude) <= most).all())

  tags = {"float16": 2, "bfloat16": 3, "float8_e4m3": 4, "float8_e5m2": 5}
  return Numerics(
    f"{name} {rounding}",
    tags[name],
    256 if scaled else 65536,
    rounding,
    side,
    fit,
    encode,
    decode,
    bins,
    valid,
    format=fmt,
  )


def sign(unbiased: bool = False) -> Numerics:
  """One bit an entry and a scale: scaled signSGD, or DRIVE behind a rotation.

  Args:
    unbiased: the scale is |y|_2^2 / |y|_1, which makes the decoded vector's
      product with the block right, rather than |y|_1 / d, the mean magnitude,
      which makes its squared error least.

  Returns:
    The numerics. Zero counts as positive.

  Source: Bernstein et al., "signSGD" (ICML 2018); the mean magnitude:
  Karimireddy et al., "Error Feedback Fixes SignSGD" (ICML 2019), algorithm 1;
  unbiased: Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation"
  (NeurIPS 2021).
  """

  def fit(y, axis, sizes):
    largest = _largest(y, axis)
    total = _sum(jnp.abs, y, largest, axis)
    if unbiased:
      square = _sum(jnp.square, y, largest, axis)
      scale = largest * square / jnp.maximum(total, 1e-30)
    else:
      scale = largest * (total * (1 / sizes))
    # Zero says that all entries are; beside NaN or infinity, it may underflow.
    least = jnp.where(largest > quantize.SMALLEST, quantize.SMALLEST, 0.0)
    return {"scale": jnp.maximum(scale, least)}

  def decode(codes, side, uniform):
    return (2.0 * codes.astype(jnp.float32) - 1.0) * side["scale"]

  def bins(codes, side, uniform):
    scale = jnp.broadcast_to(side["scale"], codes.shape)
    # A block of mean magnitude 0 is all zeros.
    far = jnp.where(scale > 0, jnp.inf, 0.0)
    lower = jnp.where(codes == 0, -far, 0.0)
    upper = jnp.where(codes == 0, 0.0, far)
    # Of a normal variable x: E(|x| - E|x|)^2 = (pi / 2 - 1) (E|x|)^2.
    return lower, upper, (np.pi / 2 - 1) * scale * scale

  within = between(0.0, quantize.LARGEST * np.float32(1 + 2.0**-20))

  def check(scale):
    least = (scale == 0) & ~np.signbit(scale) | (scale >= quantize.SMALLEST)
    return within(scale) and bool(least.all())

  return Numerics(
    "sign unbiased" if unbiased else "sign",
    0x06,
    2,
    "nearest",
    {"scale": SideField(np.float32, check)},
    fit,
    lambda y, side, uniform: (y >= 0) | jnp.isnan(y),
    decode,
    bins,
    between(0, 1),
  )


# Quantiles of a normal distribution, normalised to [-1, 1], an exact zero
# among them (Dettmers et al., QLoRA, NeurIPS 2023, appendix E).
NF4 = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)


def nf4() -> Numerics:
  """Four-bit NormalFloat: the quantiles of a normal distribution.

  Returns:
    The numerics; the scale is the block's largest magnitude.

  Source: Dettmers et al., "QLoRA" (NeurIPS 2023), section 3 and appendix E.
  """
  middle = (NF4[1:] + NF4[:-1]) / 2
  edges = jnp.asarray(np.concatenate([[-1], middle, [1]]), jnp.float32)

  def encode(y, side, uniform):
    unit = quantize.finite(y) / side["scale"]
    # A binary search, from the highest bit of the code down.
    found: list[Array] = []
    for bit in (8, 4, 2, 1):
      edge = list(middle[bit - 1 :: 2 * bit])
      for above in reversed(found):
        pairs = zip(edge[1::2], edge[::2], strict=True)
        edge = [jnp.where(above, one, zero) for one, zero in pairs]
      found.append(unit > edge[0])
    return sum(
      above.astype(jnp.int32) << place
      for above, place in zip(found, (3, 2, 1, 0), strict=True)
    )

  def decode(values, side, uniform):
    return values * side["scale"]

  def bins(codes, side, uniform):
    codes, scale = codes.astype(jnp.int32), side["scale"]
    lower, upper = edges[codes], edges[codes + 1]
    variance = ((upper - lower) * scale) ** 2 / 12
    return (lower - SLACK) * scale, (upper + SLACK) * scale, variance

  return Numerics(
    "nf4",
    0x08,
    16,
    "nearest",
    {
      "scale": SideField(
        np.float32, between(quantize.SMALLEST, quantize.LARGEST)
      )
    },
    lambda y, axis, sizes: {"scale": _largest(y, axis)},
    encode,
    decode,
    bins,
    between(0, 15),
    NF4,
  )


def between(
  low: float | np.floating, high: float | np.floating
) -> Callable[[np.ndarray], bool]:
  """The check that all numbers of an array on the host are in [low, high]."""
  # Of NaN, both ends are. Nothing as large as the array is allocated.
  return lambda x: not x.size or bool(x.min() >= low and x.max() <= high)


def require_choice(what: str, given: str, known: tuple[str, ...]) -> None:
  """Raises UserError unless `given` is one of `known`."""
  if given not in known:
    raise UserError(f"{what}={given!r}: expected one of {', '.join(known)}.")


def require_range(what: str, given: int, low: int, high: int) -> None:
  """Raises UserError unless `given` is an integer in [low, high]."""
  if isinstance(given, bool) or not isinstance(given, int):
    raise UserError(f"{what}={given!r}: expected an integer.")
  if not low <= given <= high:
    raise UserError(f"{what}={given}: expected {low} to {high}.")


def require_positive(what: str, given: float) -> None:
  """Raises UserError unless `given` is a number above zero."""
  if isinstance(given, bool) or not isinstance(given, (int, float)):
    raise UserError(f"{what}={given!r}: expected a number.")
  if not given > 0:
    raise UserError(f"{what}={given}: expected a number above 0.")


def require_share(what: str, given: float) -> None:
  """Raises UserError unless `given` is a number in (0, 1]."""
  require_positive(what, given)
  if given > 1:
    raise UserError(f"{what}={given}: expected a number in (0, 1].")


def _largest(y: Array, axis: quantize.Axis) -> Array:
  return jnp.maximum(quantize.largest_magnitude(y, axis), quantize.SMALLEST)


def _sum(
  fn: Callable[[Array], Array], y: Array, largest: Array, axis: quantize.Axis
) -> Array:
  """The sum along `axis` (kept) of `fn` of entries as shares of the largest."""

  def terms(y):
    return fn(quantize.finite(y) * (1 / largest))

  if axis is None:
    parts, kept = quantize.in_rows(y)[None], (1,) * y.ndim
    largest = largest.reshape(1, 1)
  elif axis == y.ndim - 1:
    size = y.shape[-1]
    rows = math.gcd(size, 16 if size >= 256 else 4)
    parts, kept = y.reshape(-1, rows, size // rows), (*y.shape[:-1], 1)
    largest = largest.reshape(-1, 1)
  else:
    return jnp.sum(terms(y), axis, keepdims=True)
  # Rows side by side: XLA:CPU adds up one after the other what is in a row, and
  # would store the terms of a sum of all.
  side_by_side = [terms(parts[:, i]) for i in range(parts.shape[1])]
  # The selection changes nothing, but ends the loop: XLA:CPU would hand all it
  # finds before the last sum to a library, piece by piece.
  part = quantize.without_nan(functools.reduce(operator.add, side_by_side))
  return jnp.sum(part, 1).reshape(kept)


def _exponent_above(scale: Array) -> Array:
  """Biased exponent of the smallest power of two not below `scale`."""
  pattern = jax.lax.bitcast_convert_type(scale, jnp.int32)
  return ((pattern + 0x7FFFFF) >> 23).astype(jnp.uint8)


def _power(exponent: Array) -> Array:
  return quantize.power_of_two(exponent.astype(jnp.int32) - 127)
