"""CKKS: entries of updates as numbers of fixed precision, one a slot.

Cheon et al. 2017. A value of `bound` is encoded as 2^scale_bits, and the sum
comes back with the noise of encryption on it: see `Parameters.noise_stddev`.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from mpqfl_jax import errors, he

# A sum whose noise stands less than this below the largest entry is no use.
MIN_PRECISION_BITS = 20
# Weight and count in a sum are right to far better than this.
_TOLERANCE = 1e-3


class Parameters(NamedTuple):
  """Of the scheme; see `he.Parameters`.

  Attributes:
    modulus: of the ciphertexts, whose degree is twice the values in one.
    scale_bits: a value of `bound` is encoded as 2^scale_bits.
    bound: largest magnitude of an entry of an update.
    clients: the most that a sum may have.
  """

  modulus: he.Modulus
  scale_bits: int
  bound: float
  clients: int

  @property
  def slots(self) -> int:
    return self.modulus.degree // 2

  @property
  def noise_stddev(self) -> float:
    """Standard deviation of an entry of one ciphertext's noise, in updates.

    Decoding sums `degree` coefficients (Cheon et al. 2017, section 3.4).
    """
    slot = self.modulus.noise_stddev * math.sqrt(self.modulus.degree)
    # Decoding takes the real part, which has half of the variance.
    return self.bound * slot / math.sqrt(2) / 2**self.scale_bits

  def slots_for(self, num_values: int) -> int:
    return num_values + he.EXTRA

  def context(self, library: Any) -> Any:
    made = library.context(
      library.SCHEME_TYPE.CKKS,
      self.modulus.degree,
      coeff_mod_bit_sizes=[self.modulus.bits, self.modulus.special_bits],
    )
    self.agreed(made)
    return made

  def agreed(self, context: Any) -> None:
    context.global_scale = 2.0**self.scale_bits

  def vector(self, library: Any, context: Any, numbers: np.ndarray) -> Any:
    return library.ckks_vector(context, numbers)

  def read(self, library: Any, context: Any, message: bytes) -> Any:
    return library.ckks_vector_from(context, message)

  def agrees(self, ciphertext: Any) -> bool:
    return ciphertext.scale == 2.0**self.scale_bits

  def plaintext(
    self, update: np.ndarray, weight: float, rng: np.random.Generator | None
  ) -> np.ndarray:
    """[2 + values] float64: a one, the weight, the weighted entries.

    Raises:
      UserError: an entry beyond the bound, or a weight out of its range.
    """
    del rng  # nothing is rounded
    update = np.asarray(update, np.float64)
    he.check(self, update, weight)
    largest = float(np.max(np.abs(update), initial=0.0))
    if largest > self.bound:
      raise errors.UserError(
        f"an entry of magnitude {largest} cannot be encrypted. Expected finite"
        f" entries of at most bound={self.bound}."
      )
    return np.concatenate([[1.0, weight], weight / self.bound * update])

  def open(self, numbers: np.ndarray, num_values: int, count: int) -> he.Sum:
    """The mean out of a sum of plaintexts, checked.

    Raises:
      CiphertextError: the sum is not of `count` clients, or holds values that
        no clients can have sent.
    """
    found, weight = float(numbers[0]), float(numbers[1])
    values = numbers[he.EXTRA : he.EXTRA + num_values]
    if not abs(found - count) < _TOLERANCE:
      raise he.CiphertextError(
        f"the sum holds {found:.6g} clients, expected {count}"
      )
    if not 0 < weight < count + _TOLERANCE or not (
      np.max(np.abs(numbers)) < count + _TOLERANCE
    ):
      raise he.CiphertextError(
        "the sum holds values that no clients can have sent"
      )
    return he.Sum(values * (self.bound / weight), weight, count)


def parameters(
  clients: int,
  bound: float = 4.0,
  degree: int = 4096,
  modulus_bits: int = 54,
) -> Parameters:
  """Parameters of 128-bit security for sums over so many clients.

  The scale is the largest with which no sum can wrap around the modulus.

  Args:
    clients: the most that a sum may have.
    bound: largest magnitude of an entry of an update.
    degree: of the polynomials, a power of two.
    modulus_bits: bits of the prime that carries the data.

  Raises:
    UserError: see `he.modulus`; or a modulus too small for the sum.
  """
  modulus = he.modulus(clients, bound, degree, modulus_bits)
  # Half of the modulus is for the sign, and a factor of two stays free.
  scale_bits = modulus_bits - 2 - math.ceil(math.log2(clients))
  made = Parameters(modulus, scale_bits, float(bound), clients)
  noise = made.noise_stddev * math.sqrt(clients)
  precision = math.log2(bound / noise)
  if precision < MIN_PRECISION_BITS:
    least = modulus_bits + math.ceil(MIN_PRECISION_BITS - precision)
    raise errors.UserError(
      f"modulus_bits={modulus_bits} is too small: a sum over {clients} clients"
      f" would stand {precision:.0f} bits above its noise, which needs"
      f" {MIN_PRECISION_BITS}. Expected modulus_bits of at least {least}."
    )
  return made
