"""A second reader of messages, written from docs/wire.md alone.

It shares no code with the package and takes bits one at a time, so that tests
can hold the two against each other. Plain integers, no attention to speed.
"""

import itertools
import math
import struct
from typing import NamedTuple

import numpy as np
import xxhash
import zstandard

EMPTY, FLOAT32, FLOAT16, BFLOAT16, E4M3, E5M2, SIGN, TERNARY = range(8)
NF4, QSGD, SPARSE, RANDOM, WITHHELD, ROTATED, BINOMIAL, RANDOMISED = range(
  8, 16
)
SYMMETRIC, AFFINE = 0x10, 0x30  # plus the bits

# Dettmers et al. 2023 (QLoRA), appendix E.
NORMAL = (
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
)


class Refused(ValueError):
  """The message is not one that the receiver waits for."""


class Rule(NamedTuple):
  """What the receiver knows of a leaf's record before it reads it."""

  tags: tuple[int, ...]  # one, unless the sender chooses
  block: int | str = "tensor"  # "tensor", "channel" or so many entries
  dither: bool = False
  power_of_two: bool = False
  levels: int = 0  # QSGD's s; the levels of a private mechanism
  ratio: float = 0.0
  bound: float = 0.0
  theta: float = 0.0
  margin: float = 0.0
  inner: "Rule | None" = None  # of the rotated entries


class Leaf(NamedTuple):
  """A leaf of the template."""

  path: str
  shape: tuple[int, ...]
  rule: Rule


class Cursor:
  """Bytes, read from the front."""

  def __init__(self, data: bytes):
    self.data = data
    self.at = 0

  def take(self, count: int) -> bytes:
    refuse_unless(self.at + count <= len(self.data), "too short")
    self.at += count
    return self.data[self.at - count : self.at]

  def numbers(self, kind: str, count: int) -> list:
    """`count` numbers of the `struct` type `kind`."""
    size = struct.calcsize("<" + kind)
    return list(struct.unpack(f"<{count}{kind}", self.take(count * size)))

  def floats(self, count: int) -> list[float]:
    values = self.numbers("f", count)
    refuse_unless(all(map(math.isfinite, values)), "not finite")
    return values


def refuse_unless(holds: bool, why: str):
  if not holds:
    raise Refused(why)


def read(
  message: bytes, agreement: str, leaves: list[Leaf], entropy: bool = False
) -> list[np.ndarray]:
  """Decoded arrays, one a leaf, float64; the message is used up exactly."""
  refuse_unless(len(message) >= 12, "too short")
  refuse_unless(message[:3] == b"MPQ", "magic")
  version, coding = message[3] & 15, message[3] >> 4
  refuse_unless(version == 4, "version")
  checksum = struct.unpack("<I", message[-4:])[0]
  refuse_unless(checksum == hash_of(message[:-4]), "checksum")
  check_agreement(agreement, leaves)
  expected = struct.pack("<I", hash_of(agreement.encode()))
  refuse_unless(message[4:8] == expected, "fingerprint")
  refuse_unless(coding == 0 or (coding == 1 and entropy), "entropy coding")
  records = message[8:-4]
  cursor = Cursor(decompressed(records) if coding else records)
  arrays = [
    np.reshape(read_record(cursor, leaf.shape, leaf.rule), leaf.shape)
    for leaf in leaves
  ]
  refuse_unless(cursor.at == len(cursor.data), "bytes left over")
  return arrays


def hash_of(data: bytes) -> int:
  return xxhash.xxh32(data, seed=0).intdigest()


def check_agreement(text: str, leaves: list[Leaf]):
  """That a text of policy and leaves has their paths, shapes and some rule."""
  _, *lines = text.split("\n")
  refuse_unless(len(lines) == len(leaves), "agreement")
  for line, leaf in zip(lines, leaves, strict=True):
    start = f"{leaf.path} {list(leaf.shape)} "
    refuse_unless(line.startswith(start) and line != start, "agreement")


def decompressed(frame: bytes) -> bytes:
  """The records in a zstd frame."""
  header = zstandard.get_frame_parameters(frame)
  refuse_unless(header.window_size <= 1 << 17, "window")
  refuse_unless(not header.has_checksum, "a checksum in the frame")
  refuse_unless(header.dict_id == 0, "a dictionary")
  refuse_unless(header.content_size > len(frame), "no gain, or size unknown")
  decoder = zstandard.ZstdDecompressor().decompressobj()
  records = decoder.decompress(frame)
  refuse_unless(decoder.eof and not decoder.unused_data, "not one frame")
  refuse_unless(len(records) == header.content_size, "another size")
  return records


def read_record(cursor: Cursor, shape: tuple[int, ...], rule: Rule):
  """The values of one leaf, flat, in row-major order."""
  n = math.prod(shape)
  tag = cursor.take(1)[0]
  refuse_unless(tag in ((EMPTY,) if n == 0 else rule.tags), f"rule {tag:02x}")
  if tag in (EMPTY, WITHHELD):
    return np.zeros(n)
  if tag == FLOAT32:
    return np.array(cursor.floats(n), np.float64)
  if tag in PATTERNS:
    return read_patterns(cursor, shape, rule, tag)
  if tag == SPARSE:
    return read_sparse(cursor, n)
  if tag == RANDOM:
    return read_random(cursor, n, rule.ratio)
  if tag == ROTATED:
    return read_rotated(cursor, n, rule.inner)
  if tag == BINOMIAL:
    trials = rule.levels - 1
    codes = np.array(read_codes(cursor, n, rule.levels), np.float64)
    return (codes - trials / 2) * rule.bound / (rule.theta * trials)
  if tag == RANDOMISED:
    codes = np.array(read_codes(cursor, n, rule.levels), np.float64)
    unit = 2 * codes / (rule.levels - 1) - 1
    return unit * (1 + rule.margin) * rule.bound
  return read_grid(cursor, shape, rule, tag)


# Blocks and scales.


def blocks(shape: tuple[int, ...], block: int | str) -> list[int]:
  """The block of each entry of a leaf."""
  n = math.prod(shape)
  if block == "channel" and len(shape) > 1:
    return [i % shape[-1] for i in range(n)]
  if isinstance(block, int):
    return [i // block for i in range(n)]
  return [0] * n


def read_scales(
  cursor: Cursor, count: int, power_of_two: bool, least: float = 2.0**-126
) -> list[float]:
  if power_of_two:
    scales = [math.ldexp(1.0, e - 127) for e in cursor.take(count)]
    refuse_unless(all(2.0**-127 < s < 2.0**128 for s in scales), "scale")
    return scales
  scales = cursor.floats(count)
  refuse_unless(all(s >= least for s in scales), "scale")
  return scales


def read_grid(cursor: Cursor, shape: tuple[int, ...], rule: Rule, tag: int):
  """Sign, ternary, NF4, QSGD and integers: scales, zero points, codes."""
  levels, affine = {
    SIGN: (2, False),
    TERNARY: (3, False),
    NF4: (16, False),
    QSGD: (2 * rule.levels + 1, False),
  }.get(tag) or (
    ((1 << (tag - AFFINE)), True)
    if tag > AFFINE
    else ((1 << (tag - SYMMETRIC)) - 1, False)
  )
  # Sender's choices share a rule: what integers have, other records have not.
  dither = rule.dither and tag > SYMMETRIC
  seed = cursor.numbers("I", 2) if dither else None
  block = blocks(shape, rule.block)
  count = max(block) + 1
  least = 0.0 if tag == SIGN else 2.0**-126
  scales = read_scales(cursor, count, rule.power_of_two, least)
  zeros = [(levels - 1) / 2] * count
  if affine:
    zeros = cursor.numbers("B" if levels <= 256 else "H", count)
    refuse_unless(all(z < levels for z in zeros), "zero point")
  values = []
  for i, code in enumerate(read_codes(cursor, len(block), levels)):
    s, z = scales[block[i]], zeros[block[i]]
    if tag == SIGN:
      values.append((2 * code - 1) * s)
    elif tag == NF4:
      values.append(NORMAL[code] * s)
    else:
      shift = draw(seed, i) - 0.5 if dither else 0.0
      values.append((code - z - shift) * s)
  return np.array(values)


# Codes.


def read_codes(cursor: Cursor, n: int, levels: int) -> list[int]:
  """n codes in [0, levels)."""
  bits = (levels - 1).bit_length()
  if levels == 3:
    codes = read_base3(cursor, n)
  elif bits == 16:
    codes = cursor.numbers("H", n)
  elif bits > 8:
    low = cursor.take(n)
    high = read_codes(cursor, n, ((levels - 1) >> 8) + 1)
    codes = [a | b << 8 for a, b in zip(low, high, strict=True)]
  else:
    codes = read_bits(cursor, n, bits)
  refuse_unless(all(code < levels for code in codes), "code beyond the levels")
  return codes


def read_bits(cursor: Cursor, n: int, bits: int) -> list[int]:
  """n codes of at most 8 bits, from runs that share groups of bytes."""
  runs = 8 // math.gcd(bits, 8)
  width = bits // math.gcd(bits, 8)
  m = -(-n // runs)
  data = cursor.take(m * width)
  codes = []
  for run in range(runs):
    for j in range(m):
      code = 0
      for k in range(bits):
        byte, bit = divmod(run * bits + k, 8)
        code |= (data[byte * m + j] >> bit & 1) << k
      codes.append(code)
  refuse_unless(not any(codes[n:]), "padding")
  return codes[:n]


def read_base3(cursor: Cursor, n: int) -> list[int]:
  """n codes of three levels, five to a byte."""
  data = cursor.take(-(-n // 5))
  refuse_unless(all(byte < 243 for byte in data), "base-3 byte")
  codes = [byte // 3**run % 3 for run in range(5) for byte in data]
  refuse_unless(not any(codes[n:]), "padding")
  return codes[:n]


# Floating point patterns.

# Bits, bits of the exponent, bits of the mantissa; e4m3 has no infinities.
PATTERNS = {
  FLOAT16: (16, 5, 10),
  BFLOAT16: (16, 8, 7),
  E4M3: (8, 4, 3),
  E5M2: (8, 5, 2),
}


def read_patterns(cursor: Cursor, shape: tuple[int, ...], rule: Rule, tag: int):
  block = blocks(shape, rule.block)
  if tag in (E4M3, E5M2):
    scales = read_scales(cursor, max(block) + 1, rule.power_of_two)
    codes = list(cursor.take(len(block)))
  else:
    scales = [1.0] * (max(block) + 1)
    codes = cursor.numbers("H", len(block))
  return np.array(
    [number(c, tag) * scales[b] for c, b in zip(codes, block, strict=True)]
  )


def number(code: int, tag: int) -> float:
  """The number of a pattern of sign, exponent and mantissa."""
  bits, exponent_bits, mantissa_bits = PATTERNS[tag]
  sign = -1.0 if code >> (bits - 1) else 1.0
  exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
  mantissa = code & (1 << mantissa_bits) - 1
  top = exponent == (1 << exponent_bits) - 1
  refuse_unless(not (top and (tag != E4M3 or mantissa == 7)), "not finite")
  if exponent:
    mantissa += 1 << mantissa_bits
  bias = (1 << (exponent_bits - 1)) - 1
  return sign * math.ldexp(mantissa, max(exponent, 1) - bias - mantissa_bits)


# Sparse leaves.


def read_sparse(cursor: Cursor, n: int):
  """Top-k and prune: count, coding of the indices, indices, values."""
  count = cursor.numbers("I", 1)[0]
  refuse_unless(count <= n, "more entries than the leaf has")
  coding = cursor.take(1)[0]
  if count == 0:
    refuse_unless(coding == 0xFF, f"coding {coding} of nothing")
    return np.zeros(n)
  sizes = {r: elias_fano_bytes(n, count, r) for r in range(32)}
  # Order decides where sizes tie.
  sizes = {0xFF: (-(-n // 8), 0), **sizes}
  shortest = min(sizes, key=lambda r: sum(sizes[r]))
  refuse_unless(coding == shortest, f"coding {coding}, not {shortest}")
  if coding == 0xFF:
    indices = set_bits(cursor.take(-(-n // 8)))
    refuse_unless(len(indices) == count, "another count")
  else:
    indices = read_elias_fano(cursor, n, count, coding)
  refuse_unless(all(i < n for i in indices), "index beyond the leaf")
  increasing = all(a < b for a, b in itertools.pairwise(indices))
  refuse_unless(increasing, "indices do not increase")
  values = cursor.floats(count)
  refuse_unless(all(values), "a sparse value that is zero")
  result = np.zeros(n)
  result[indices] = values
  return result


def elias_fano_bytes(n: int, count: int, r: int) -> tuple[int, int]:
  """Lengths of the low bits and of the string."""
  return -(-count * r // 8), -(-(count + ((n - 1) >> r)) // 8)


def read_elias_fano(cursor: Cursor, n: int, count: int, r: int) -> list[int]:
  low_bytes, high_bytes = elias_fano_bytes(n, count, r)
  low = int.from_bytes(cursor.take(low_bytes), "little")
  refuse_unless(low >> count * r == 0, "padding")
  high = set_bits(cursor.take(high_bytes))
  refuse_unless(len(high) == count, "another count")
  return [
    (bit - i) << r | low >> i * r & (1 << r) - 1 for i, bit in enumerate(high)
  ]


def set_bits(data: bytes) -> list[int]:
  """Where a string of bits, lowest of each byte first, has ones."""
  return [i for i in range(8 * len(data)) if data[i // 8] >> i % 8 & 1]


def read_random(cursor: Cursor, n: int, ratio: float):
  """Random-k: the seed says which entries were sent."""
  seed = cursor.numbers("I", 2)
  threshold = round(ratio * 2**24)
  sent = [i for i in range(n) if entry(seed, i) >> 8 < threshold]
  result = np.zeros(n)
  result[sent] = np.array(cursor.floats(len(sent))) / (threshold / 2**24)
  return result


# Seeds.


def mix(h: int, k: int) -> int:
  h = ((h ^ h >> 16) * 0x7FEB352D + k) % 2**32
  h = (h ^ h >> 15) * 0x846CA68B % 2**32
  return h ^ h >> 16


def entry(seed: list[int], i: int) -> int:
  """The seed's number i, 32 bits."""
  a, b = seed
  f = mix((a * 0x9E3779B9 + b) % 2**32, 0)
  g = mix(f ^ a, 0)
  return mix((i * 0x9E3779B9 + f) % 2**32, g)


def draw(seed: list[int], i: int) -> float:
  """Of subtractive dither, in (0, 1)."""
  return (entry(seed, i) >> 18) / 2**14 + 2**-15


# Rotations.


def read_rotated(cursor: Cursor, n: int, inner: Rule):
  """Entries before their rotation; the padding is cut off."""
  seed = cursor.numbers("I", 2)
  sizes = [4096] * (n // 4096)
  if n % 4096:
    last = 1 << (n % 4096 - 1).bit_length()
    sizes.append(last if len(sizes) < 64 else 4096)
  padded = sum(sizes)
  sent = read_record(cursor, (padded,), inner)
  sent = np.clip(sent, -(2.0**64), 2.0**64)
  turned = []
  for d, end in zip(sizes, itertools.accumulate(sizes), strict=True):
    columns = min(d, 64)
    product = sent[end - d : end].reshape(columns, d // columns).T.reshape(d)
    # The matrix over sqrt(d) is symmetric and its own inverse.
    turned.append(hadamard(product) / math.sqrt(d))
  signs = [-1.0 if entry(seed, i) >> 31 else 1.0 for i in range(padded)]
  return (np.concatenate(turned) * signs)[:n]


def hadamard(x: np.ndarray) -> np.ndarray:
  """Sylvester's matrix times x: H(2n) is [[H, H], [H, -H]]."""
  if len(x) == 1:
    return x
  a, b = hadamard(x[: len(x) // 2]), hadamard(x[len(x) // 2 :])
  return np.concatenate([a + b, a - b])
