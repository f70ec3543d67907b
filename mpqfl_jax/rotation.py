"""Randomised Hadamard rotation in front of a quantiser.

A rotation spreads every entry over its whole block: the largest magnitude
shrinks towards sqrt(2 log d) deviations whatever the update looks like, so
that uniform grids and signs waste less. The server rotates back. Each entry of
the update then depends on all codes of its block, and none is bounded by them.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import bitpack, codecs, counter, quantize, wire
from mpqfl_jax.types import Array

TAG = 0x0D
BLOCK = 4096
# Keeps sums over a block finite in both directions.
_LARGEST = np.float32(2.0**64)
_FACTOR = 64
_MANY = 64
_SEED = wire.Field("rotation", np.dtype(np.uint32), (2,), lambda seed: True)


def hadamard(x: Array, first: int) -> Array:
  """Applies the orthonormal Hadamard matrix to the last axis, and transposes.

  As a product of two small matrices: matrix units and caches like it better
  than log2(d) butterfly passes. To transpose once more after the second, so
  that entries had their order again, would cost as much as either.

  Args:
    x: [..., d] float32, d a power of two.
    first: size of the matrix that is applied first, a power of two, at most d.

  Returns:
    [..., d] float32, the product as [d / first, first] with its axes swapped.
    Applied again, with the other factor of d as `first`, it gives `x`.
  """
  second = x.shape[-1] // first
  y = _product(x.reshape(*x.shape[:-1], second, first))
  return _product(jnp.swapaxes(y, -1, -2)).reshape(x.shape)


def _product(x: Array) -> Array:
  size = x.shape[-1]
  if size == 1:
    return x
  matrix = np.ones((1, 1), np.float32)
  while matrix.shape[0] < size:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  matrix /= np.float32(math.sqrt(size))
  return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


def signs(seed: Array, shape: tuple[int, ...]) -> Array:
  """Random signs, float32 ±1."""
  top = (counter.bits(seed, shape) >> 31).astype(jnp.int32)
  return (1 - 2 * top).astype(jnp.float32)


def rotated(
  shape: codecs.Shape,
  inner_of: Callable[[codecs.Shape, int], codecs.LeafCodec],
) -> codecs.LeafCodec:
  """The codec that rotates blocks of a leaf and sends them by another codec.

  Args:
    shape: the leaf's.
    inner_of: (shape, block) -> the codec of the rotated entries. Blocks have
      `block` of them, the last one may have fewer: 4096, and the next power of
      two of what is left (4096 again after 64 blocks), which zeros fill.

  Returns:
    The leaf's codec.
  """
  entries = math.prod(shape)
  if entries == 0:
    return codecs.empty(shape)
  blocks = _blocks(entries)
  block = blocks[0][1]
  padded = sum(rows * size for rows, size in blocks)
  inner = inner_of((padded,), block)

  def turned(y: Array, forth: bool) -> Array:
    """Rotates [padded] entries block by block, or back."""
    parts = []
    for part in _cut(y, blocks):
      size = part.shape[-1]
      first = min(size, _FACTOR)
      parts.append(hadamard(part, first if forth else size // first))
    return bitpack.join(parts)

  def encode(seed, x, state):
    # The inner codec rounds by the seed, which who sees the rotation's must not
    # find: Threefry has no inverse without the key, a hash of a counter does.
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    rotation = jax.random.bits(key, (2,), jnp.uint32)
    x = jnp.clip(quantize.finite(x), -_LARGEST, _LARGEST).reshape(-1)
    y = jnp.pad(x, (0, padded - entries))
    y = turned(y * signs(rotation, y.shape), forth=True)
    payload, state = inner.encode(seed, y, state)
    return {"rotation": rotation, "inner": payload}, state

  def decode(payload):
    y = jnp.clip(inner.decode(payload["inner"]), -_LARGEST, _LARGEST)
    x = turned(y, forth=False) * signs(payload["rotation"], y.shape)
    return x[:entries].reshape(shape)

  def bins(payload):
    _, _, variance = inner.bins(payload["inner"])
    # Rotating back spreads the error of a block evenly over its entries.
    means = [
      jnp.broadcast_to(jnp.mean(part, 1, keepdims=True), part.shape)
      for part in _cut(variance, blocks)
    ]
    variance = bitpack.join(means)[:entries].reshape(shape)
    far = jnp.full(shape, jnp.inf, jnp.float32)
    return -far, far, variance

  def unpack(reader):
    wire.read_tag(reader, (TAG,))
    payload = wire.read_fields([_SEED], reader)
    return payload | {"inner": inner.unpack(reader)}

  overhead = 1 + _SEED.num_bytes
  return codecs.LeafCodec(
    name=f"rotated {inner.name}",
    stochastic=inner.stochastic,
    init=inner.init,
    encode=encode,
    decode=decode,
    num_bytes=lambda payload: overhead + inner.num_bytes(payload["inner"]),
    max_bytes=overhead + inner.max_bytes,
    pack=lambda payload: [
      bytes([TAG]),
      *wire.write_fields([_SEED], payload),
      *inner.pack(payload["inner"]),
    ],
    unpack=unpack,
    bins=bins,
    rule=lambda payload: f"rotated {inner.rule(payload['inner'])}",
  )


def _blocks(entries: int) -> list[tuple[int, int]]:
  """How many blocks of what size a leaf is cut into, one or two sizes."""
  whole, rest = divmod(entries, BLOCK)
  last = 1 << (rest - 1).bit_length() if rest else 0
  # In a large leaf a smaller block would save a percent and cost a copy.
  if last == BLOCK or (last and whole >= _MANY):
    whole, last = whole + 1, 0
  return [(n, d) for n, d in ((whole, BLOCK), (1, last)) if n * d]


def _cut(y: Array, blocks: list[tuple[int, int]]) -> list[Array]:
  parts, at = [], 0
  for rows, size in blocks:
    parts.append(y[at : at + rows * size].reshape(rows, size))
    at += rows * size
  return parts
