"""Sparse updates: exact thresholds, index coding, and the leaf codecs.

On the device a sparse leaf stays dense, zeros and all: what is not sent costs
no bytes, and gathering the rest would cost more time than it saves. The wire
has the number of entries, their indices and their values.

Indices are a bitmap or, where that is smaller, an Elias-Fano code (Elias 1974,
Fano 1971): the low r bits of each index as they are, the rest as a bit string
in which entry i of k sets bit (index >> r) + i. Its length depends on the
number of entries alone, so that a device counts it without laying it out, and
it stays within about half a bit an entry of the entropy of random positions.
"""

from collections.abc import Callable, Iterator
import math

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import codecs, counter, numerics, quantize, wire
from mpqfl_jax.types import Array

BITMAP = 0xFF
_SECTIONS = 8


def magnitude_threshold(x: Array, k: int) -> Array:
  """A threshold that the `k` largest magnitudes and their ties reach.

  Args:
    x: float32 within ±2^126, of any shape.
    k: 1 to x.size.

  Returns:
    [] int32: the bit pattern of the threshold. Patterns of non-negative floats
    are ordered as the floats are.
  """
  # In eight sections, over and over: about nine passes that count, where a
  # sort takes as long as hundreds. Counts above several places take XLA:CPU no
  # longer than above one, of which it would make a ladder of short reductions.
  pattern = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
  rows = quantize.in_rows(pattern)
  section = np.arange(1, _SECTIONS, dtype=np.int32)

  def unfinished(state):
    low, high, reached = state
    return (high - low > 1) & (reached != k)

  def narrow(state):
    low, high, reached = state
    width = high - low
    # width * section would overflow.
    parts = (
      width // _SECTIONS * section + width % _SECTIONS * section // _SECTIONS
    )
    places = low + parts
    above = [(rows >= place).astype(jnp.int32) for place in places]
    counts = jax.lax.reduce(
      above,
      [np.int32(0)] * len(above),
      lambda a, b: [m + n for m, n in zip(a, b, strict=True)],
      (1,),
    )
    counts = jnp.sum(jnp.stack(counts), 1, dtype=jnp.int32)
    # Counts decrease: so many places are reached by enough.
    last = jnp.sum(counts >= k)
    ends = jnp.concatenate([low[None], places, high[None]])
    counts = jnp.concatenate([reached[None], counts])
    return ends[last], ends[last + 1], counts[last]

  largest = quantize.largest_magnitude(x).reshape(())
  high = jax.lax.bitcast_convert_type(largest, jnp.int32) + 1
  start = jnp.int32(0), high, jnp.int32(x.size)
  return jax.lax.while_loop(unfinished, narrow, start)[0]


def index_bytes(count: Array | int, entries: int) -> tuple[Array, Array]:
  """How `count` of `entries` indices are coded, and in how many bytes.

  Args:
    count: [] int32 (or int on the host), number of indices.
    entries: how many there could be.

  Returns:
    coding: [] int32, `BITMAP` or r of the Elias-Fano code.
    num_bytes: [] int32.
  """
  xp = np if isinstance(count, (int, np.integer)) else jnp
  shift = np.arange(entries.bit_length(), dtype=np.int32)
  # The product itself would overflow in leaves of many millions.
  low = count // 8 * shift + (count % 8 * shift + 7) // 8
  high = -(-(count + ((entries - 1) >> shift)) // 8)
  sizes = low + high
  best = xp.argmin(sizes)
  bitmap = -(-entries // 8)
  coding = xp.where(bitmap <= sizes[best], BITMAP, best)
  size = xp.minimum(bitmap, sizes[best])
  return xp.where(count == 0, BITMAP, coding), xp.where(count == 0, 0, size)


def write_indices(index: np.ndarray, entries: int) -> tuple[int, bytes]:
  """Codes increasing indices below `entries`: (coding, bytes)."""
  coding = int(index_bytes(index.size, entries)[0])
  if index.size == 0:
    return coding, b""
  if coding == BITMAP:
    mask = np.zeros(entries, bool)
    mask[index] = True
    return coding, np.packbits(mask, bitorder="little").tobytes()
  low = (index[:, None] >> np.arange(coding)) & 1
  high = np.zeros(index.size + ((entries - 1) >> coding), bool)
  high[(index >> coding) + np.arange(index.size)] = True
  return coding, (
    np.packbits(low.astype(bool), bitorder="little").tobytes()
    + np.packbits(high, bitorder="little").tobytes()
  )


def read_indices(
  reader: wire.Reader, coding: int, count: int, entries: int
) -> Iterator[np.ndarray]:
  """The inverse of `write_indices`, so many at a time that little is allocated.

  Args:
    reader: at the first byte of the indices; moved behind the last.
    coding: what the record says.
    count: number of indices, at most `entries`.
    entries: how many there could be.

  Returns:
    Arrays of increasing indices, int64, `count` of them in all.

  Raises:
    wire.WireError: `write_indices` cannot have written them. Some may have been
      given by then.
  """
  if coding != int(index_bytes(count, entries)[0]):
    raise wire.WireError(f"index coding {coding:#04x} is not the shortest one")
  if count == 0:
    return iter(())
  if coding == BITMAP:
    return _ones(_read_string(reader, entries), count)
  low = _read_string(reader, count * coding)
  high = _read_string(reader, count + ((entries - 1) >> coding))

  def indices():
    done, last = 0, -1
    for place in _ones(high, count):
      index = (place - np.arange(done, done + place.size)) << coding
      index |= _numbers(low, coding, done, place.size)
      if index.size:
        if index[0] <= last or not (np.diff(index) > 0).all():
          raise wire.WireError("indices do not increase")
        last = int(index[-1])
      if last >= entries:
        raise wire.WireError(f"index {last} in a leaf of {entries} entries")
      done += index.size
      yield index

  return indices()


# So many bytes of a string of bits are taken apart at a time.
_BYTES = 1 << 10


def _read_string(reader: wire.Reader, bits: int) -> np.ndarray:
  """The next bytes, which hold so many bits and then zeros."""
  raw = np.frombuffer(reader.take(-(-bits // 8)), np.uint8)
  if bits % 8 and raw[-1] >> (bits % 8):
    raise wire.WireError("padding bits are not zero")
  return raw


def _ones(string: np.ndarray, count: int) -> Iterator[np.ndarray]:
  """Where the ones of a string of bits are; refuses any but `count` of them."""
  done = 0
  for start in range(0, string.size, _BYTES):
    bits = np.unpackbits(string[start : start + _BYTES], bitorder="little")
    place = 8 * start + np.flatnonzero(bits)
    done += place.size
    if done > count:
      break
    yield place
  if done != count:
    raise wire.WireError(f"{count} indices announced, others are there")


def _scattered(
  places: Iterator[np.ndarray], sent: np.ndarray, entries: int, rest: float
) -> np.ndarray:
  """[entries] float32: what was sent at its places, `rest` elsewhere."""
  values = np.full(entries, rest, np.float32)
  done = 0
  for place in places:
    values[place] = sent[done : done + place.size]
    done += place.size
  return values


def _numbers(
  string: np.ndarray, width: int, first: int, count: int
) -> np.ndarray:
  """Numbers of `width` bits in a string of them, from the one at `first` on."""
  start, end = first * width, (first + count) * width
  part = np.unpackbits(string[start // 8 : -(-end // 8)], bitorder="little")
  bits = part[start % 8 :][: end - start].reshape(count, width)
  return bits @ (1 << np.arange(width, dtype=np.int64))


def largest(
  shape: codecs.Shape, keep: Callable[[int], int], name: str
) -> codecs.LeafCodec:
  """Sends the entries of largest magnitude as float32, the rest as zero.

  Entries that tie with the smallest one that is kept are kept too; zeros never
  cost anything.

  Args:
    shape: the leaf's.
    keep: entries of the leaf -> how many to keep.
    name: of the rule.

  Returns:
    The leaf's codec.
  """
  entries = math.prod(shape)
  if entries == 0:
    return codecs.empty(shape)
  kept = keep(entries)
  within = numerics.between(-quantize.LARGEST, quantize.LARGEST)

  def is_sendable(sent):
    # Without magnitudes, which would take as much room as the leaf.
    tiny = (sent < quantize.SMALLEST) & (sent > -quantize.SMALLEST)
    return not tiny.any() and within(sent)

  def encode(seed, x, state):
    x = quantize.finite(x)
    threshold = jnp.int32(np.float32(np.inf).view(np.int32))
    if kept > 0:
      threshold = magnitude_threshold(x, kept)
    # Below the smallest normal number, devices disagree on what is zero.
    threshold = jnp.maximum(threshold, quantize.SMALLEST.view(np.int32))
    pattern = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    return {"values": jnp.where(pattern >= threshold, x, 0.0)}, state

  def bins(payload):
    x = payload["values"]
    magnitude = jnp.where(x == 0, jnp.inf, jnp.abs(x))
    smallest = jnp.min(magnitude)
    # Fewer than were to be kept: all others are zero.
    short = jnp.sum(x != 0) < kept
    bound = jnp.where(short, quantize.SMALLEST, smallest)
    bound = jnp.where(x == 0, bound, 0.0)
    return x - bound, x + bound, bound * bound / 3

  def num_bytes(payload):
    count = jnp.sum(payload["values"] != 0, dtype=jnp.int32)
    return 6 + index_bytes(count, entries)[1] + 4 * count

  def pack(payload):
    values = np.asarray(payload["values"], "<f4").reshape(-1)
    index = np.flatnonzero(values)
    coding, indices = write_indices(index, entries)
    count = index.size.to_bytes(4, "little")
    return [
      bytes([TAG_LARGEST]),
      count,
      bytes([coding]),
      indices,
      values[index].data,
    ]

  def unpack(reader):
    wire.read_tag(reader, (TAG_LARGEST,))
    count = int.from_bytes(reader.take(4), "little")
    if count > entries:
      raise wire.WireError(f"{count} entries in a leaf of {entries}")
    coding = reader.take(1)[0]
    indices = read_indices(reader, coding, count, entries)
    sent = np.frombuffer(reader.take(4 * count), "<f4")
    if not is_sendable(sent):
      raise wire.WireError("a sparse value is zero, too large or no number")
    values = _scattered(indices, sent, entries, 0.0)
    return {"values": values.reshape(shape)}

  return codecs.LeafCodec(
    name=name,
    stochastic=False,
    init=lambda: (),
    encode=encode,
    decode=lambda payload: payload["values"],
    num_bytes=num_bytes,
    max_bytes=6 + -(-entries // 8) + 4 * entries,
    pack=pack,
    unpack=unpack,
    bins=bins,
    rule=lambda payload: name,
  )


TAG_LARGEST = 0x0A
TAG_RANDOM = 0x0B


def random(shape: codecs.Shape, ratio: float) -> codecs.LeafCodec:
  """Sends each entry with probability `ratio`, scaled so as not to bias.

  Which entries follows from a seed that is sent, so that indices cost nothing.

  Args:
    shape: the leaf's.
    ratio: probability, from 2^-24 to 1.

  Returns:
    The leaf's codec.

  Source: Konečný et al., "Federated Learning: Strategies for Improving
  Communication Efficiency" (2016), section 3, random masks.
  """
  entries = math.prod(shape)
  if entries == 0:
    return codecs.empty(shape)
  name = f"randomk ratio={ratio:g}"
  # In 24 bits, which float32 holds exactly.
  threshold = np.uint32(round(ratio * 2**24))
  limit = np.float32(threshold / 2**24)
  factor = np.float32(1) / limit
  largest = quantize.LARGEST * limit
  is_sendable = numerics.between(-largest, largest)

  def mask(seed):
    return (counter.bits(seed, shape) >> 8) < threshold

  compiled_mask = jax.jit(mask)

  def encode(seed, x, state):
    # What is decoded, not only what is sent, stays finite.
    x = jnp.clip(quantize.finite(x), -largest, largest)
    # NaN stands for what is not sent, so that the payload alone says what is.
    return {"seed": seed, "values": jnp.where(mask(seed), x, jnp.nan)}, state

  def read(payload):
    sent = ~jnp.isnan(payload["values"])
    return jnp.where(sent, payload["values"], 0.0), sent

  def decode(payload):
    return read(payload)[0] * factor

  def bins(payload):
    # Before scaling, what was sent is exact but where it is the largest that
    # can be; of the rest nothing is known.
    x, sent = read(payload)
    lower = jnp.where(sent & (x > -largest), x, -jnp.inf)
    upper = jnp.where(sent & (x < largest), x, jnp.inf)
    known = (lower > -jnp.inf) & (upper < jnp.inf)
    return lower, upper, jnp.where(known, 0.0, jnp.inf)

  def num_bytes(payload):
    return 9 + 4 * jnp.sum(read(payload)[1], dtype=jnp.int32)

  def pack(payload):
    seed = np.asarray(payload["seed"], "<u4")
    values = np.asarray(payload["values"], "<f4")
    return [bytes([TAG_RANDOM]), seed.data, values[~np.isnan(values)].data]

  def unpack(reader):
    wire.read_tag(reader, (TAG_RANDOM,))
    seed = np.frombuffer(reader.take(8), "<u4").astype(np.uint32)
    sent = np.asarray(compiled_mask(seed))
    found = np.frombuffer(reader.take(4 * np.count_nonzero(sent)), "<f4")
    # As bits, for which there is room beside the values.
    sent = np.packbits(sent, bitorder="little")
    if not is_sendable(found):
      raise wire.WireError("a value is too large or no number")
    values = _scattered(_ones(sent, found.size), found, entries, np.nan)
    return {"seed": seed, "values": values.reshape(shape)}

  return codecs.LeafCodec(
    name=name,
    stochastic=False,
    init=lambda: (),
    encode=encode,
    decode=decode,
    num_bytes=num_bytes,
    max_bytes=9 + 4 * entries,
    pack=pack,
    unpack=unpack,
    bins=bins,
    rule=lambda payload: name,
  )
