"""Homomorphic encryption of updates: CKKS, packed vectors, sums only.

A client encrypts its weighted update, whoever has the public parameters adds
ciphertexts, and the holder of the secret key opens the sum:

    key = key_pair(parameters(clients=2))
    messages = [encrypt(key.public, u, w) for u, w in ((u1, 1.0), (u2, 0.5))]
    total = decrypt(key, add(key.public, messages), count=2)
    total.mean  # (u1 + 0.5 * u2) / 1.5

A message is ciphertexts as bytes, as long as what crosses the wire: a header
(magic and version, the key's fingerprint, the number of values, of ciphertexts
and of clients in the sum), each ciphertext with its length, and a checksum.
Every client's vector begins with a one and with its weight, so that the sum
says how many clients and how much weight are in it: a sum of the wrong clients
is refused instead of being divided by the wrong number.

CKKS by TenSEAL (Cheon et al. 2017; Benaissa et al. 2021). Only sums are taken,
so one prime carries the data and a second one, which leaves the noise of
encryption small, is dropped before a ciphertext is sent. The randomness is the
library's own, from the operating system: no two ciphertexts are alike, and no
seed gives one back.
"""

from collections.abc import Sequence
import hashlib
import math
import struct
from typing import Any, NamedTuple
import zlib

import numpy as np

from mpqfl_jax import errors

# Largest number of bits of the whole modulus, by degree, for 128 bits of
# security against classical attacks with ternary secrets: Albrecht et al. 2018,
# "Homomorphic Encryption Standard", table 1.
MAX_MODULUS_BITS = {
  1024: 27,
  2048: 54,
  4096: 109,
  8192: 218,
  16384: 438,
  32768: 881,
}
MAX_PRIME_BITS = 60  # of SEAL
# A sum whose noise stands less than this below the largest entry is no use.
MIN_PRECISION_BITS = 20
# Weight and count in a sum are right to far better than this.
TOLERANCE = 1e-3

_HEADER = struct.Struct("<3sB8sIII")
_LENGTH = struct.Struct("<I")
_CHECKSUM = struct.Struct("<I")
_MAGIC, _VERSION = b"MHE", 1
_EXTRA = 2  # slots before the values: a one, and the weight


class CiphertextError(Exception):
  """A message that cannot be added or opened: damaged, or of another key."""


class Parameters(NamedTuple):
  """Of the scheme, public and the same for all clients.

  Attributes:
    degree: of the polynomials; a ciphertext holds half as many values.
    modulus_bits: bits of the prime that carries the data.
    special_bits: bits of the prime that is there during encryption only.
    scale_bits: a value of `bound` is encoded as 2^scale_bits.
    bound: largest magnitude of an entry of an update.
    clients: the most that a sum may have.
  """

  degree: int
  modulus_bits: int
  special_bits: int
  scale_bits: int
  bound: float
  clients: int

  @property
  def slots(self) -> int:
    """Values in a ciphertext."""
    return self.degree // 2

  @property
  def noise_stddev(self) -> float:
    """Standard deviation of an entry of one ciphertext's noise, in updates.

    Dropping the special prime rounds both polynomials: each of their
    coefficients moves by a uniform error of variance 1/12, the second's times
    the secret's `2/3 * degree` nonzero coefficients; decoding sums `degree` of
    them (Cheon et al. 2017, section 3.4, and lemma 2 on rescaling).
    """
    coefficient = math.sqrt((1 + 2 * self.degree / 3) / 12)
    slot = coefficient * math.sqrt(self.degree)
    # Decoding takes the real part, which has half of the variance.
    return self.bound * slot / math.sqrt(2) / 2**self.scale_bits

  def ciphertexts(self, num_values: int) -> int:
    """Ciphertexts that a vector of `num_values` is cut into."""
    return -(-(num_values + _EXTRA) // self.slots)


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
    UserError: a degree that the standard has no figures of; a modulus too large
      to be secure or too small for the sum.
  """
  if clients < 1 or not bound > 0 or not math.isfinite(bound):
    raise errors.UserError(
      f"encryption for {clients} clients with entries up to {bound}. Expected"
      " at least one client and a bound above 0."
    )
  if degree not in MAX_MODULUS_BITS:
    raise errors.UserError(
      f"degree={degree}. Expected one of"
      f" {', '.join(map(str, MAX_MODULUS_BITS))}."
    )
  special_bits = min(modulus_bits + 1, MAX_PRIME_BITS)
  total, most = modulus_bits + special_bits, MAX_MODULUS_BITS[degree]
  if modulus_bits > MAX_PRIME_BITS or total > most:
    raise errors.UserError(
      f"modulus_bits={modulus_bits} makes a modulus of {total} bits with the"
      f" special prime; at degree {degree} only {most} have 128 bits of"
      f" security. Expected modulus_bits of at most"
      f" {min((most - 1) // 2, MAX_PRIME_BITS)}, or a larger degree."
    )
  # Half of the modulus is for the sign, and a factor of two stays free.
  scale_bits = modulus_bits - 2 - math.ceil(math.log2(clients))
  made = Parameters(
    degree, modulus_bits, special_bits, scale_bits, float(bound), clients
  )
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


class PublicKey(NamedTuple):
  """What encrypts and adds.

  Attributes:
    parameters: of the scheme.
    fingerprint: 8 bytes that tell keys apart.
    serialized: as it crosses the wire.
    context: TenSEAL's, without a secret.
  """

  parameters: Parameters
  fingerprint: bytes
  serialized: bytes
  context: Any


class SecretKey(NamedTuple):
  """What opens a sum.

  Attributes:
    public: its public key.
    serialized: as it crosses the wire to who may hold it.
    context: TenSEAL's, with the secret.
  """

  public: PublicKey
  serialized: bytes
  context: Any


class Sum(NamedTuple):
  """An opened sum.

  Attributes:
    mean: [values] float64, the weighted mean of the updates.
    weight: the sum of the weights.
    clients: how many are in it.
  """

  mean: np.ndarray
  weight: float
  clients: int


def key_pair(params: Parameters) -> SecretKey:
  """Makes a pair of keys.

  Raises:
    UserError: TenSEAL is not installed.
  """
  ts = library()
  context = ts.context(
    ts.SCHEME_TYPE.CKKS,
    params.degree,
    coeff_mod_bit_sizes=[params.modulus_bits, params.special_bits],
  )
  context.global_scale = 2.0**params.scale_bits
  keep = {"save_galois_keys": False, "save_relin_keys": False}
  public = context.serialize(
    save_public_key=True, save_secret_key=False, **keep
  )
  secret = context.serialize(
    save_public_key=False, save_secret_key=True, **keep
  )
  return SecretKey(public_key(public, params), secret, context)


def public_key(serialized: bytes, params: Parameters) -> PublicKey:
  """Reads a public key off the wire.

  Raises:
    CiphertextError: it is none.
  """
  try:
    context = library().context_from(serialized)
  except (ValueError, RuntimeError) as e:
    raise CiphertextError(f"not a public key: {e}") from e
  if context.has_secret_key() or not context.has_public_key():
    raise CiphertextError("not a public key: it holds a secret, or no key")
  # What a key is made for is agreed, not taken from the wire.
  context.global_scale = 2.0**params.scale_bits
  fingerprint = hashlib.sha256(serialized).digest()[:8]
  return PublicKey(params, fingerprint, serialized, context)


def library() -> Any:
  """TenSEAL.

  Raises:
    UserError: it is not installed.
  """
  try:
    import tenseal
  except ImportError as e:
    raise errors.UserError(
      f"homomorphic encryption needs TenSEAL, which does not load ({e})."
      " Expected: pip install 'mpqfl_jax[he]'."
    ) from e
  return tenseal


def encrypt(key: PublicKey, update: np.ndarray, weight: float) -> bytes:
  """Encrypts a client's weighted update.

  Args:
    key: whose holder may open it.
    update: [values], finite, no entry beyond the parameters' bound.
    weight: in (0, 1]; in units that all clients agree on.

  Returns:
    The message, cut into as many ciphertexts as it takes.

  Raises:
    UserError: an entry beyond the bound, or a weight out of its range.
  """
  params = key.parameters
  make = library().ckks_vector
  chunks = [
    make(key.context, chunk).serialize()
    for chunk in plaintexts(params, update, weight)
  ]
  return frame(key.fingerprint, len(update), 1, chunks)


def add(key: PublicKey, messages: Sequence[bytes]) -> bytes:
  """Adds clients' messages without opening them.

  Args:
    key: the public key that they were encrypted under.
    messages: at least one, of vectors of the same length.

  Returns:
    The message of the sum.

  Raises:
    CiphertextError: a message is damaged, of another key or of another length,
      or there are more clients than the parameters allow for.
  """
  if not messages:
    raise CiphertextError("no message to add")
  num_values, count, total = 0, 0, []
  for i, message in enumerate(messages):
    length, clients, chunks = unframe(key.parameters, key.fingerprint, message)
    vectors = _vectors(key, length, chunks)
    if i == 0:
      num_values, total = length, vectors
    elif length != num_values:
      raise CiphertextError(f"sum of {num_values} values and {length}")
    else:
      total = [a.add_(b) for a, b in zip(total, vectors, strict=True)]
    count += clients
  if count > key.parameters.clients:
    raise CiphertextError(
      f"sum of {count} clients, the parameters are for {key.parameters.clients}"
    )
  return frame(
    key.fingerprint, num_values, count, [v.serialize() for v in total]
  )


def decrypt(key: SecretKey, message: bytes, count: int) -> Sum:
  """Opens a sum.

  Args:
    key: of the public key that it was encrypted under.
    message: from `encrypt` or `add`.
    count: how many clients it should have.

  Raises:
    CiphertextError: the message is damaged or of another key, or the sum is
      not of `count` clients.
  """
  params = key.public.parameters
  num_values, _, chunks = unframe(params, key.public.fingerprint, message)
  vectors = _vectors(key.public, num_values, chunks)
  for vector in vectors:
    vector.link_context(key.context)
  values = np.concatenate([np.asarray(v.decrypt()) for v in vectors])
  return open_values(params, values, count)


def plaintexts(
  params: Parameters, update: np.ndarray, weight: float
) -> list[np.ndarray]:
  """What a client encrypts, cut into vectors of as many values as fit.

  Raises:
    UserError: an entry beyond the bound, or a weight out of its range.
  """
  update = np.asarray(update, np.float64)
  largest = float(np.max(np.abs(update), initial=0.0))
  if not largest <= params.bound:  # NaN, too
    raise errors.UserError(
      f"an entry of magnitude {largest} cannot be encrypted. Expected finite"
      f" entries of at most bound={params.bound}."
    )
  if not 0 < weight <= 1:
    raise errors.UserError(f"weight is {weight}. Expected one in (0, 1].")
  values = np.concatenate([[1.0, weight], weight / params.bound * update])
  return [
    values[i : i + params.slots] for i in range(0, len(values), params.slots)
  ]


def open_values(params: Parameters, values: np.ndarray, count: int) -> Sum:
  """The mean out of decrypted values, checked.

  Args:
    params: of the scheme.
    values: [2 + values]: number of clients, weight, weighted updates in units
      of the bound.
    count: how many clients there should be.

  Raises:
    CiphertextError: the sum is not of `count` clients, or holds values that no
      clients can have sent.
  """
  found, weight = float(values[0]), float(values[1])
  if not abs(found - count) < TOLERANCE:
    raise CiphertextError(
      f"the sum holds {found:.6g} clients, expected {count}"
    )
  if not 0 < weight < count + TOLERANCE or not (
    np.max(np.abs(values)) < count + TOLERANCE
  ):
    raise CiphertextError("the sum holds values that no clients can have sent")
  return Sum(values[_EXTRA:] * (params.bound / weight), weight, count)


def frame(
  fingerprint: bytes, num_values: int, count: int, chunks: Sequence[bytes]
) -> bytes:
  """Ciphertexts as one message: see the module's docstring."""
  header = _HEADER.pack(
    _MAGIC, _VERSION, fingerprint, num_values, len(chunks), count
  )
  body = b"".join(
    [header, *(p for c in chunks for p in (_LENGTH.pack(len(c)), c))]
  )
  return body + _CHECKSUM.pack(zlib.crc32(body))


def unframe(
  params: Parameters, fingerprint: bytes, message: bytes
) -> tuple[int, int, list[bytes]]:
  """(values, clients, ciphertexts) of a message.

  Raises:
    CiphertextError: it is damaged, or of another key.
  """
  if len(message) < _HEADER.size + _CHECKSUM.size:
    raise CiphertextError(f"message of {len(message)} bytes is truncated")
  body = memoryview(message)[: -_CHECKSUM.size]
  if _CHECKSUM.unpack_from(message, len(body))[0] != zlib.crc32(body):
    raise CiphertextError("checksum does not match: truncated or damaged")
  magic, version, found, num_values, pieces, count = _HEADER.unpack_from(body)
  if (magic, version) != (_MAGIC, _VERSION):
    raise CiphertextError(f"magic is {magic!r}, version {version}")
  if found != fingerprint:
    raise CiphertextError(
      f"encrypted under the key {found.hex()}, this one is {fingerprint.hex()}"
    )
  if pieces != params.ciphertexts(num_values) or count < 1:
    raise CiphertextError(
      f"{pieces} ciphertexts of {count} clients for {num_values} values"
    )
  chunks, at = [], _HEADER.size
  for _ in range(pieces):
    if at + _LENGTH.size > len(body):
      raise CiphertextError("a ciphertext is missing")
    (length,) = _LENGTH.unpack_from(body, at)
    at += _LENGTH.size
    if at + length > len(body):
      raise CiphertextError("a ciphertext is truncated")
    chunks.append(bytes(body[at : at + length]))
    at += length
  if at != len(body):
    raise CiphertextError(f"{len(body) - at} bytes after the last ciphertext")
  return num_values, count, chunks


def _vectors(key: PublicKey, num_values: int, chunks: Sequence[bytes]) -> list:
  """The ciphertexts as TenSEAL's vectors, each of the length it must have."""
  params, vectors = key.parameters, []
  left = num_values + _EXTRA
  for chunk in chunks:
    try:
      vector = library().ckks_vector_from(key.context, chunk)
      parts = vector.ciphertext()
      size = vector.size()
    except (ValueError, RuntimeError) as e:
      raise CiphertextError(f"not a ciphertext of this key: {e}") from e
    wanted = min(left, params.slots)
    if size != wanted or len(parts) != 1:
      raise CiphertextError(f"ciphertext of {size} values, expected {wanted}")
    if parts[0].size() != 2 or parts[0].scale != 2.0**params.scale_bits:
      raise CiphertextError("ciphertext of another scale or shape")
    left -= wanted
    vectors.append(vector)
  return vectors
