"""Random bits for rounding: a hash of a counter, a dozen operations a number.

`jax.random` spends most of a quantiser's time on Threefry. Rounding needs bits
that are uniform and independent between entries, clients and rounds, not bits
that withstand an adversary who sees the stream: nothing of it crosses the wire
(but for subtractive dither, whose seed is sent on purpose). Each number is two
rounds of a 32-bit mixing function over (position, seed), which the compiler
fuses into the pass that rounds.

The mixing function is the two-multiply xorshift of Wellons' search for hashes
of low avalanche bias ("Prospecting for Hash Functions", 2018: shifts 16, 15,
16, multipliers 0x7feb352d, 0x846ca68b).
"""

import math

import jax
import jax.numpy as jnp

from mpqfl_jax.types import Array, Key


def seeds(key: Key, count: int) -> Array:
  """Seeds of this generator from a JAX key, [count, 2] uint32."""
  return jax.random.bits(key, (count, 2), jnp.uint32)


def bits(seed: Array, shape: tuple[int, ...]) -> Array:
  """Uniform 32-bit numbers.

  Args:
    seed: [2], uint32.
    shape: shape of the result.

  Returns:
    uint32 of that shape; entry i (in row-major order) depends on the seed and i
    alone.
  """
  index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
  # An odd multiplier keeps positions apart and spreads them over all bits.
  first = _mix(index * jnp.uint32(0x9E3779B9) + seed[0])
  return _mix(first + seed[1])


def uniform(seed: Array, shape: tuple[int, ...]) -> Array:
  """Uniform float32 in [0, 1), multiples of 2^-24; arguments as in `bits`."""
  # Through int32: unsigned conversion has no vector instruction before AVX-512.
  whole = (bits(seed, shape) >> 8).astype(jnp.int32)
  return whole.astype(jnp.float32) * jnp.float32(2.0**-24)


def _mix(h: Array) -> Array:
  h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
  h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
  return h ^ (h >> 16)
