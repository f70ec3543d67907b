"""Codes of a few bits laid side by side in bytes, on the device or the host.

The layout is planar. With `width` bits a code, `8 / gcd(width, 8)` codes fill
`width / gcd(width, 8)` whole bytes. The codes are cut into that many contiguous
runs of equal length (zeros pad the last), and group j takes the j-th code of
every run, the first run in its lowest bits. Byte i of all groups is stored
before byte i + 1 of any: every shift and every store works on contiguous
memory, where codes that lie next to each other in a byte would need strided
loads.

Three-valued codes take a fifth of a byte each: five runs as the digits of a
number in base 3, the first run its lowest digit (3^5 = 243 <= 256). Codes of 16
bits stay as they are; those of 9 to 15 bits are stored as all their low bytes,
then their high parts as codes of their own.
"""

import functools
import math
import operator
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

# A `jax.Array` or a `numpy.ndarray`, as `xp` says.
Codes = Any

TRITS = 5


def width_of(levels: int) -> int:
  """Bits that hold any of `levels` codes."""
  return (levels - 1).bit_length()


def packed_size(count: int, levels: int) -> int:
  """Length of the array that `pack` makes of `count` codes."""
  if width_of(levels) == 16:
    return count
  if levels > 256:
    return count + packed_size(count, high_levels(levels))
  planes, group = _group(levels)
  return -(-count // planes) * group


def packed_type(levels: int) -> np.dtype:
  """Type of the array that `pack` makes: bytes, but for codes of 16 bits."""
  return np.dtype(np.uint16 if width_of(levels) == 16 else np.uint8)


def high_levels(levels: int) -> int:
  """Levels of the part of a code above its lowest eight bits."""
  return ((levels - 1) >> 8) + 1


def fills_byte(levels: int) -> bool:
  """Whether a whole number of codes fills a byte, of at most 256 levels."""
  return levels <= 256 and _group(levels)[1] == 1


def rows_of(levels: int) -> tuple[int, int]:
  """How codes are best cut for `pack`.

  Rows of codes that share bytes compile to better loops. Five of three-valued
  codes share one; of others, halves hold as many of each byte. Halves are no
  worse where none share one.

  Returns:
    rows: how many.
    multiple: of what the number of all codes must be a multiple.
  """
  if levels == 3:
    return TRITS, TRITS
  return 2, 2 if levels > 256 else max(_group(levels)[0], 2)


def pack(codes: Codes, levels: int, xp: ModuleType = jnp) -> Codes:
  """Packs codes into bytes.

  Args:
    codes: integers from 0, below `levels`, `count` of them in any shape; best
      in `rows_of(levels)`.
    levels: how many different codes there are, 2 to 65536.
    xp: `jax.numpy`, or `numpy` for arrays on the host.

  Returns:
    [packed_size(count, levels)], `packed_type(levels)`.
  """
  return join(parts(codes, levels, xp), xp)


def join(packed: list[Codes], xp: ModuleType = jnp) -> Codes:
  """What `pack` returns, from `parts`."""
  flat = [part.reshape(-1) for part in packed]
  return flat[0] if len(flat) == 1 else xp.concatenate(flat)


def parts(codes: Codes, levels: int, xp: ModuleType = jnp) -> list[Codes]:
  """What `pack` puts together, in shapes of its own; arguments as for `pack`.

  In a loop over a flat result, the compiler would compute where in a block each
  entry lies, and vectorise nothing.
  """
  if width_of(levels) == 16:
    return [codes.astype(xp.uint16)]
  if levels > 256:
    low = (codes & 255).astype(xp.uint8)
    return [low, *parts(codes >> 8, high_levels(levels), xp)]
  planes, group = _group(levels)
  if planes == 1:
    return [codes.astype(xp.uint8)]
  rows, multiple = rows_of(levels)
  is_cut = codes.ndim > 1 and codes.shape[0] == rows
  if is_cut and rows * codes.shape[1] % multiple == 0:
    # The shape of what is inside a run stays: no position is computed afresh.
    cut = codes.reshape(planes, -1, *codes.shape[2:])
    runs = [cut[i] for i in range(planes)]
  else:
    codes = codes.reshape(-1)
    run = -(-codes.shape[0] // planes)
    runs = [codes[i * run : (i + 1) * run] for i in range(planes)]
    if levels != 3:
      runs = [xp.pad(part, (0, run - part.size)) for part in runs]
  if levels == 3:
    return [_trits(runs, xp)]
  width = width_of(levels)
  packed = []
  for byte in range(group):
    shifted = [
      _shift(codes, i * width - 8 * byte)
      for i, codes in enumerate(runs)
      if -width < i * width - 8 * byte < 8
    ]
    # One narrowing at the end: loops over one width of number are faster.
    packed.append(functools.reduce(operator.or_, shifted).astype(xp.uint8))
  return packed


def unpack(
  packed: Codes,
  count: int,
  levels: int,
  xp: ModuleType = jnp,
  is_flat: bool = False,
) -> Codes:
  """Undoes `pack`.

  Args:
    packed: [packed_size(count, levels)], `packed_type(levels)`.
    count: number of codes.
    levels: as in `pack`.
    xp: `jax.numpy`, or `numpy` for arrays on the host.
    is_flat: they are of a leaf with one axis, for which other loops are faster.

  Returns:
    [count], uint8, or uint16 for more than 256 levels. Bytes that `pack` did
    not write may give codes of `levels` and above.
  """
  if width_of(levels) == 16:
    return packed
  if levels > 256:
    high = unpack(packed[count:], count, high_levels(levels), xp)
    codes = high.astype(xp.uint16)
    # In place on the host, where nothing larger than the leaf may be allocated.
    codes <<= 8
    codes |= packed[:count]
    return codes
  planes, group = _group(levels)
  if planes == 1:
    return packed
  if levels == 3:
    runs = []
    for _ in range(planes - 1):
      third = packed // np.uint8(3)
      runs.append(packed - third * np.uint8(3))
      packed = third
    return xp.concatenate([*runs, packed])[:count]
  width = width_of(levels)
  mask = np.uint8((1 << width) - 1)
  if group == 1:
    shifts = (width * np.arange(planes)).astype(np.uint8)
    if is_flat:
      runs = [(packed >> shift) & mask for shift in shifts]
      return xp.concatenate(runs)[:count]
    # Broadcasting, not one slice a run: compilers keep such a pass in one loop
    # with whatever shape the codes take next.
    return ((packed[None] >> shifts[:, None]) & mask).reshape(-1)[:count]
  groups = packed.reshape(group, -1)
  runs = []
  for i in range(planes):
    value = xp.zeros(groups.shape[1], xp.uint8)
    for byte in range(group):
      if -width < i * width - 8 * byte < 8:
        value = value | _shift(groups[byte], 8 * byte - i * width)
    runs.append(value & mask)
  return xp.concatenate(runs)[:count]


def look_up(packed: Codes, count: int, levels: int, table: np.ndarray) -> Codes:
  """[count], `table` [levels] at the codes that `unpack` would give.

  Codes of `levels` and above give the table's last entry.

  Raises:
    ValueError: not of 2, 3, 4, 9 to 16 or 129 to 256 levels.
  """
  if not fills_byte(levels):
    raise ValueError(f"codes of {levels} levels share several bytes.")
  planes, _ = _group(levels)
  # At bytes, in a table a run: taking codes out of them costs a CPU as much as
  # the rest.
  every = np.arange(256, dtype=np.uint8)
  codes = unpack(every, 256 * planes, levels, np)
  first = 256 * np.arange(planes, dtype=np.int32)[:, None]
  tables = jnp.asarray(table[np.minimum(codes, levels - 1)])
  found = tables.at[packed[None] + first].get(mode="promise_in_bounds")
  return found.reshape(-1)[:count]


def padding_is_zero(packed: np.ndarray, count: int, levels: int) -> bool:
  """Whether the codes that only fill up the last groups are all zero."""
  if width_of(levels) == 16:
    return True
  if levels > 256:
    return padding_is_zero(packed[count:], count, high_levels(levels))
  planes, group = _group(levels)
  run = packed.size // group
  extra = run * planes - count
  # In all but the shortest, padding is the tail of the last run: only the
  # groups that hold it matter.
  tail = packed.reshape(group, run)[:, max(run - extra, 0) :]
  codes = unpack(tail.reshape(-1), tail.shape[1] * planes, levels, np)
  return not codes[codes.size - extra :].any()


def _group(levels: int) -> tuple[int, int]:
  if levels == 3:
    return TRITS, 1
  width = width_of(levels)
  common = math.gcd(width, 8)
  return 8 // common, width // common


def _trits(runs: list[Codes], xp: ModuleType) -> Codes:
  """Numbers with digits in `runs`, the last of which may be short or empty."""
  full = runs[-1].shape[0]
  if full == runs[0].shape[0]:
    number = runs[-1]
    for digit in runs[-2::-1]:
      number = number * 3 + digit
    return number.astype(xp.uint8)
  # Where digits are missing in a loop of its own: with zeros for them, one
  # loop of all would not be vectorised.
  ends = _trits([run[full:] for run in runs[:-1]], xp)
  if full == 0:
    return ends
  return xp.concatenate([_trits([run[:full] for run in runs], xp), ends])


def _shift(codes: Codes, left: int) -> Codes:
  return codes << left if left >= 0 else codes >> -left
