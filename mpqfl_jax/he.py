"""Homomorphic encryption of updates: packed vectors, sums only.

A client encrypts its weighted update, whoever has the public parameters adds
ciphertexts, and the holder of the secret key opens the sum:

    key = key_pair(ckks.parameters(clients=2))
    messages = [encrypt(key.public, u, w) for u, w in ((u1, 1.0), (u2, 0.5))]
    total = decrypt(key, add(key.public, messages), count=2)
    total.mean  # (u1 + 0.5 * u2) / 1.5

`ckks` sends entries as they are, `bfv` rounds them to a few bits and packs
several into each number. A message is ciphertexts as bytes, as long as what
crosses the wire: a header (magic and version, the key's fingerprint, the number
of values, of ciphertexts and of clients in the sum), each ciphertext with its
length, and a checksum. Every client's vector begins with a one and with its
weight, so that the sum says how many clients and how much weight are in it: one
of the wrong clients is refused instead of being divided by the wrong number.

By TenSEAL (Benaissa et al. 2021). Only sums are taken, so one prime carries the
data and a second one, which leaves the noise of encryption small, is dropped
before a ciphertext is sent. The randomness of encryption is the library's own,
from the operating system: no two ciphertexts are alike, and no seed gives one
back.
"""

from collections.abc import Sequence
import hashlib
import math
import struct
from typing import Any, NamedTuple, Protocol
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
EXTRA = 2  # numbers before an update's own: a one, and the weight

_HEADER = struct.Struct("<3sB8sIII")
_LENGTH = struct.Struct("<I")
_CHECKSUM = struct.Struct("<I")
_MAGIC, _VERSION = b"MHE", 1


class CiphertextError(Exception):
  """A message that cannot be added or opened: damaged, or of another key."""


class Modulus(NamedTuple):
  """What a scheme's security rests on.

  Attributes:
    degree: of the polynomials.
    bits: of the prime that carries the data.
    special_bits: of the prime that is there during encryption only.
  """

  degree: int
  bits: int
  special_bits: int

  @property
  def noise_stddev(self) -> float:
    """Standard deviation of a coefficient of one ciphertext's noise.

    Dropping the special prime rounds both polynomials: each of their
    coefficients moves by a uniform error of variance 1/12, the second's times
    the secret's `2/3 * degree` nonzero coefficients (Cheon et al. 2017, lemma 2
    on rescaling).
    """
    return math.sqrt((1 + 2 * self.degree / 3) / 12)


def modulus(clients: int, bound: float, degree: int, bits: int) -> Modulus:
  """A modulus with 128 bits of security.

  Args:
    clients: the most that a sum may have.
    bound: largest magnitude of an entry of an update.
    degree: of the polynomials, a power of two.
    bits: of the prime that carries the data.

  Raises:
    UserError: no clients or no bound, a degree that the standard has no figures
      of, or a modulus too large to be secure.
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
  special_bits = min(bits + 1, MAX_PRIME_BITS)
  total, most = bits + special_bits, MAX_MODULUS_BITS[degree]
  if bits > MAX_PRIME_BITS or total > most:
    raise errors.UserError(
      f"modulus_bits={bits} makes a modulus of {total} bits with the"
      f" special prime; at degree {degree} only {most} have 128 bits of"
      f" security. Expected modulus_bits of at most"
      f" {min((most - 1) // 2, MAX_PRIME_BITS)}, or a larger degree."
    )
  return Modulus(degree, bits, special_bits)


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


class Parameters(Protocol):
  """A scheme with all its numbers: `ckks.Parameters`, `bfv.Parameters`.

  Public, and the same for all clients.
  """

  @property
  def clients(self) -> int:
    """The most that a sum may have."""

  @property
  def bound(self) -> float:
    """Largest magnitude of an entry of an update."""

  @property
  def slots(self) -> int:
    """Numbers in a ciphertext."""

  def slots_for(self, num_values: int) -> int:
    """Numbers that an update of so many values makes."""

  def context(self, library: Any) -> Any:
    """A new pair of keys, as TenSEAL's context."""

  def agreed(self, context: Any) -> None:
    """Sets what is agreed, not taken from the wire, of a context read there."""

  def vector(self, library: Any, context: Any, numbers: np.ndarray) -> Any:
    """Numbers of one ciphertext, encrypted."""

  def read(self, library: Any, context: Any, message: bytes) -> Any:
    """A ciphertext as it crossed the wire; ValueError where it is none."""

  def agrees(self, ciphertext: Any) -> bool:
    """Whether a ciphertext is one of these parameters."""

  def plaintext(
    self, update: np.ndarray, weight: float, rng: np.random.Generator | None
  ) -> np.ndarray:
    """[slots_for(values)] what a client encrypts."""

  def open(self, numbers: np.ndarray, num_values: int, count: int) -> Sum:
    """The mean out of a sum of plaintexts, checked."""


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


def key_pair(params: Parameters) -> SecretKey:
  """Makes a pair of keys.

  Raises:
    UserError: TenSEAL is not installed.
  """
  context = params.context(library())
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
  params.agreed(context)
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


def encrypt(
  key: PublicKey,
  update: np.ndarray,
  weight: float,
  rng: np.random.Generator | None = None,
) -> bytes:
  """Encrypts a client's weighted update.

  Args:
    key: whose holder may open it.
    update: [values], finite; of `ckks`, no entry beyond the parameters' bound.
    weight: in (0, 1]; in units that all clients agree on.
    rng: rounds the entries of `bfv` up or down at random, so that their mean is
      right; without it they are rounded to the nearest.

  Returns:
    The message, cut into as many ciphertexts as it takes.

  Raises:
    UserError: an entry that cannot be encoded, or a weight out of its range.
  """
  params, ts = key.parameters, library()
  chunks = [
    params.vector(ts, key.context, numbers).serialize()
    for numbers in cut(params, params.plaintext(update, weight, rng))
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
  numbers = np.concatenate([np.asarray(v.decrypt()) for v in vectors])
  return params.open(numbers, num_values, count)


def check(params: Parameters, update: np.ndarray, weight: float) -> None:
  """Refuses what no client may encrypt.

  Raises:
    UserError: entries that are not finite, or a weight out of its range.
  """
  if not np.isfinite(update).all():
    raise errors.UserError(
      "an update with entries that are not finite cannot be encrypted. Expected"
      f" finite entries of at most bound={params.bound}."
    )
  if not 0 < weight <= 1:
    raise errors.UserError(f"weight is {weight}. Expected one in (0, 1].")


def pieces(params: Parameters, num_values: int) -> int:
  """Ciphertexts that an update of `num_values` is cut into."""
  return -(-params.slots_for(num_values) // params.slots)


def cut(params: Parameters, numbers: np.ndarray) -> list[np.ndarray]:
  """Numbers as vectors of as many as fit into a ciphertext."""
  return [
    numbers[i : i + params.slots] for i in range(0, len(numbers), params.slots)
  ]


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
  magic, version, found, num_values, parts, count = _HEADER.unpack_from(body)
  if (magic, version) != (_MAGIC, _VERSION):
    raise CiphertextError(f"magic is {magic!r}, version {version}")
  if found != fingerprint:
    raise CiphertextError(
      f"encrypted under the key {found.hex()}, this one is {fingerprint.hex()}"
    )
  if parts != pieces(params, num_values) or count < 1:
    raise CiphertextError(
      f"{parts} ciphertexts of {count} clients for {num_values} values"
    )
  chunks, at = [], _HEADER.size
  for _ in range(parts):
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
  params, ts, vectors = key.parameters, library(), []
  left = params.slots_for(num_values)
  for chunk in chunks:
    try:
      vector = params.read(ts, key.context, chunk)
      parts = vector.ciphertext()
      size = vector.size()
    except (ValueError, RuntimeError) as e:
      raise CiphertextError(f"not a ciphertext of this key: {e}") from e
    wanted = min(left, params.slots)
    if size != wanted or len(parts) != 1:
      raise CiphertextError(f"ciphertext of {size} numbers, expected {wanted}")
    if parts[0].size() != 2 or not params.agrees(parts[0]):
      raise CiphertextError("ciphertext of another scale or shape")
    left -= wanted
    vectors.append(vector)
  return vectors
