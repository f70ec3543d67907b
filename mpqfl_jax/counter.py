"""Random bits for rounding: a hash of a counter, ten operations a number.

`jax.random` spends most of a quantiser's time on Threefry. Rounding needs bits
that are uniform and independent between entries, clients and rounds, not bits
that withstand an adversary who sees the stream: nothing of it crosses the wire
(but for subtractive dither, whose seed is sent on purpose). Each number is one
round of a 32-bit mixing function over the position, with half of the seed added
before it and half in its middle: were all of it added before, two streams would
be one and the same, shifted. The compiler fuses it into the pass that rounds.

The mixing function is the two-multiply xorshift of Wellons' search for hashes
of low avalanche bias ("Prospecting for Hash Functions", 2018: shifts 16, 15,
16, multipliers 0x7feb352d, 0x846ca68b).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax.types import Array, Key


def seeds(key: Key, count: int) -> Array:
  """Seeds of this generator from a JAX key, [count, 2] uint32."""
  return jax.random.bits(key, (count, 2), jnp.uint32)


def bits(seed: Array, shape: tuple[int, ...]) -> Array:
  """Uniform 32-bit numbers whose upper halves are the better ones.

  Args:
    seed: [2], uint32.
    shape: shape of the result.

  Returns:
    uint32 of that shape; entry i (in row-major order) depends on the seed and i
    alone.
  """
  seed = jnp.asarray(seed)  # NumPy's numbers warn of overflows.
  # Close seeds must give unrelated streams: mixed once, whatever the shape.
  first = _mix(seed[0] * _ODD + seed[1])
  second = _mix(first ^ seed[0])
  index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
  return _mix(index * _ODD + first, second)


def uniform(seed: Array, shape: tuple[int, ...]) -> Array:
  """Uniform float32 in (0, 1), odd multiples of 2^-15; arguments as in `bits`.

  For rounding: a step more would not show in the sum with a number above 255.
  """
  return _fraction(bits(seed, shape) >> 9)


def uniform_halves(seed: Array, count: int) -> Array:
  """Numbers as `uniform` gives them, two of every hash.

  Args:
    seed: [2], uint32.
    count: how many, even.

  Returns:
    [2, count / 2]. Codes that share a byte lie in different rows (`bitpack`),
    so that the compiler computes the hash of a column once for both.
  """
  # The upper half of a hash to where a fraction is read, then the lower one.
  up, down = np.array([[0], [7]], np.uint32), np.array([[9], [0]], np.uint32)
  return _fraction((bits(seed, (count // 2,)) << up) >> down)


def _fraction(mantissa: Array) -> Array:
  # As the mantissa of a number in [1, 2): conversions cost more.
  pattern = (mantissa & jnp.uint32(0x7FFE00)) | jnp.uint32(0x3F800100)
  return jax.lax.bitcast_convert_type(pattern, jnp.float32) - 1.0


# An odd multiplier keeps positions apart and spreads them over all bits.
_ODD = np.uint32(0x9E3779B9)


def _mix(h: Array, key: Array | int = 0) -> Array:
  h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D) + jnp.uint32(key)
  h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
  return h ^ (h >> 16)
