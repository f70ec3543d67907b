"""BFV: entries of updates as whole numbers of a few bits, several a slot.

A weighted entry is cut off at `bound`, rounded to one of 2^bits - 1 levels and
put beside others as a digit of one number, as in BatchCrypt (Zhang et al. 2020,
section 4). Where BatchCrypt leaves bits free for the sum, here the base of the
digits is just what a sum over all clients can reach, and digits are signed: no
digit runs over into the next, and a sum is that of the whole numbers to the
last bit. The scheme is that of Brakerski 2012 and Fan and Vercauteren 2012,
with as many slots as the degree (Smart and Vercauteren 2014).
"""

import math
from typing import Any, NamedTuple

import numpy as np

from mpqfl_jax import errors, he

MIN_BITS, MAX_BITS = 2, 16
_WEIGHT_BITS = 20  # a weight is sent as a whole number of 2^-20
# A coefficient's noise is a sum of some thousand roundings: that it is beyond
# eight deviations has a probability of 1e-15.
_DEVIATIONS = 8
# With these bases the test of Miller and Rabin is exact below 3e24 (Sorenson
# and Webster 2017).
_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


class Parameters(NamedTuple):
  """Of the scheme; see `he.Parameters`.

  Attributes:
    modulus: of the ciphertexts, whose degree is the number of slots.
    plain_modulus: a prime; sums of slots are right modulo it.
    bits: of an entry.
    bound: entries are cut off there.
    clients: the most that a sum may have.
  """

  modulus: he.Modulus
  plain_modulus: int
  bits: int
  bound: float
  clients: int

  @property
  def slots(self) -> int:
    return self.modulus.degree

  @property
  def levels(self) -> int:
    """Of an entry of `bound`."""
    return levels(self.bits)

  @property
  def base(self) -> int:
    """Of the digits: what a sum over all clients can be."""
    return 2 * self.levels * self.clients + 1

  @property
  def digits(self) -> int:
    """Entries in a slot."""
    count = 1
    while self.base ** (count + 1) <= self.plain_modulus:
      count += 1
    return count

  @property
  def step(self) -> float:
    """Between two levels of a weighted entry."""
    return self.bound / self.levels

  def slots_for(self, num_values: int) -> int:
    return he.EXTRA - (-num_values // self.digits)

  def context(self, library: Any) -> Any:
    return library.context(
      library.SCHEME_TYPE.BFV,
      self.modulus.degree,
      plain_modulus=self.plain_modulus,
      coeff_mod_bit_sizes=[self.modulus.bits, self.modulus.special_bits],
    )

  def agreed(self, context: Any) -> None:
    del context  # a plain modulus of its own makes another context

  def vector(self, library: Any, context: Any, numbers: np.ndarray) -> Any:
    return library.bfv_vector(context, numbers.tolist())

  def read(self, library: Any, context: Any, message: bytes) -> Any:
    return library.bfv_vector_from(context, message)

  def agrees(self, ciphertext: Any) -> bool:
    del ciphertext  # has no scale
    return True

  def entries(
    self, update: np.ndarray, weight: float, rng: np.random.Generator | None
  ) -> np.ndarray:
    """[values] int64 of at most `levels`: the weighted entries, rounded.

    Args:
      update: [values], finite.
      weight: in (0, 1].
      rng: rounds up or down at random, so that the mean is right; None rounds
        to the nearest.
    """
    update = np.asarray(update, np.float64)
    scaled = weight * np.clip(update, -self.bound, self.bound) / self.step
    shift = 0.5 if rng is None else rng.random(scaled.shape)
    rounded = np.floor(scaled + shift).astype(np.int64)
    return np.clip(rounded, -self.levels, self.levels)

  def plaintext(
    self, update: np.ndarray, weight: float, rng: np.random.Generator | None
  ) -> np.ndarray:
    """[slots_for(values)] int64: a one, the weight, the entries as digits.

    Raises:
      UserError: an entry that is not finite, or a weight out of its range.
    """
    he.check(self, update, weight)
    # At least one, or the sum might hold no weight.
    whole = max(round(weight * 2**_WEIGHT_BITS), 1)
    entries = self.entries(update, whole / 2**_WEIGHT_BITS, rng)
    count = self.slots_for(len(entries)) - he.EXTRA
    digits = np.zeros(count * self.digits, np.int64)
    digits[: len(entries)] = entries
    powers = self.base ** np.arange(self.digits, dtype=np.int64)
    packed = digits.reshape(count, self.digits) @ powers
    return np.concatenate([[1, whole], packed])

  def open(self, numbers: np.ndarray, num_values: int, count: int) -> he.Sum:
    """The mean out of a sum of plaintexts, checked.

    Raises:
      CiphertextError: the sum is not of `count` clients, or holds values that
        no clients can have sent.
    """
    found, weight = int(numbers[0]), int(numbers[1]) / 2**_WEIGHT_BITS
    if found != count:
      raise he.CiphertextError(
        f"the sum holds {found} clients, expected {count}"
      )
    # Signed digits: moved up by as much as each can be below zero.
    middle = self.levels * self.clients
    left = numbers[he.EXTRA :] + (self.base**self.digits - 1) // 2
    digits = np.empty((len(left), self.digits), np.int64)
    for i in range(self.digits):
      left, digits[:, i] = np.divmod(left, self.base)
    entries = digits.reshape(-1)[:num_values] - middle
    most = np.max(np.abs(entries), initial=0)
    if not 0 < weight <= count or left.any() or most > self.levels * count:
      raise he.CiphertextError(
        "the sum holds values that no clients can have sent"
      )
    return he.Sum(entries * (self.step / weight), weight, count)


def levels(bits: int) -> int:
  """The whole number that an entry of `bound` becomes."""
  return 2 ** (bits - 1) - 1


def parameters(
  clients: int,
  bits: int,
  bound: float,
  degree: int = 4096,
  modulus_bits: int = 54,
) -> Parameters:
  """Parameters of 128-bit security for sums over so many clients.

  The plain modulus is the largest prime with which no noise of so many
  ciphertexts can reach a sum, and as many entries go into a slot as it holds.

  Args:
    clients: the most that a sum may have.
    bits: of an entry, from 2 to 16.
    bound: entries of larger magnitude are cut off there.
    degree: of the polynomials, a power of two.
    modulus_bits: bits of the prime that carries the data.

  Raises:
    UserError: see `he.modulus`; bits out of their range; or a modulus too small
      for a sum of entries of so many bits.
  """
  if not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
    raise errors.UserError(
      f"bits={bits}. Expected a whole number from {MIN_BITS} to {MAX_BITS}."
    )
  modulus = he.modulus(clients, bound, degree, modulus_bits)
  # Decryption rounds to the nearest multiple of modulus / plain modulus
  # (Fan and Vercauteren 2012, section 4); each ciphertext's own multiple was
  # rounded, too.
  noise = _DEVIATIONS * modulus.noise_stddev * math.sqrt(clients) + clients
  room = int(2**modulus_bits / (2 * noise))
  # What is in a slot: a sum of weights, or of entries, and their signs.
  least = 2 * clients * max(2**_WEIGHT_BITS, levels(bits)) + 1
  plain = _prime_below(room, 2 * degree) if room > least else 0
  if plain < least:
    needed = modulus_bits + math.ceil(math.log2((least + 2 * degree) / room))
    raise errors.UserError(
      f"modulus_bits={modulus_bits} is too small: a sum of {clients} entries of"
      f" {bits} bits, or of as many weights of {_WEIGHT_BITS}, needs"
      f" {math.log2(least):.0f} bits above the noise and there are"
      f" {math.log2(room):.0f}. Expected modulus_bits of at least {needed}."
    )
  return Parameters(modulus, plain, bits, float(bound), clients)


def _prime_below(limit: int, step: int) -> int:
  """The largest prime below `limit` that is 1 modulo `step`; 0 without one."""
  number = (limit - 2) // step * step + 1
  while number > 1 and not _is_prime(number):
    number -= step
  return number if number > 1 else 0


def _is_prime(number: int) -> bool:
  """Whether a number below 3e24 is prime: Miller and Rabin."""
  if number < 2:
    return False
  for base in _BASES:
    if number % base == 0:
      return number == base
  odd, twos = number - 1, 0
  while odd % 2 == 0:
    odd, twos = odd // 2, twos + 1
  for base in _BASES:
    power = pow(base, odd, number)
    if power in (1, number - 1):
      continue
    for _ in range(twos - 1):
      power = power * power % number
      if power == number - 1:
        break
    else:
      return False
  return True
