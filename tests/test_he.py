"""Sums of ciphertexts: right, within the standard's security, or refused."""

import functools
import math
import struct
import zlib

import numpy as np
import pytest
from tenseal import sealapi

from mpqfl_jax import bfv, ckks, errors, he

CLIENTS, VALUES = 5, 3000


# Entries beyond the bound of the second one are cut off.
SCHEMES = {
  "ckks": ckks.parameters(CLIENTS),
  "bfv": bfv.parameters(CLIENTS, 16, 0.05),
}
both = pytest.mark.parametrize("scheme", SCHEMES)


@functools.cache
def _pair(index: int, scheme: str) -> he.SecretKey:
  return he.key_pair(SCHEMES[scheme])


def pair(index: int = 0, scheme: str = "ckks") -> he.SecretKey:
  return _pair(index, scheme)


def updates(values: int = VALUES) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  return rng.normal(0, 0.01, (CLIENTS, values)), rng.uniform(0.1, 1, CLIENTS)


@functools.cache
def messages(scheme: str = "ckks") -> list[bytes]:
  public = pair(0, scheme).public
  return [he.encrypt(public, u, w) for u, w in zip(*updates(), strict=True)]


def reseal(body: bytes) -> bytes:
  return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize("degree", sorted(he.MAX_MODULUS_BITS))
def test_security_bounds_are_those_of_the_standard(degree):
  # SEAL carries the standard's table itself.
  standard = sealapi.CoeffModulus.MaxBitCount(
    degree, sealapi.SEC_LEVEL_TYPE.TC128
  )
  assert he.MAX_MODULUS_BITS[degree] == standard


@both
def test_a_key_has_the_modulus_that_was_checked(scheme):
  public = pair(0, scheme).public
  primes = public.context.seal_context().data.key_context_data()
  modulus = public.parameters.modulus
  total = modulus.bits + modulus.special_bits
  assert primes.total_coeff_modulus_bit_count() == total <= 109


def test_sum_is_the_weighted_mean():
  u, w = updates()
  key = pair()
  total = he.decrypt(key, he.add(key.public, messages()), CLIENTS)
  exact = np.average(u, axis=0, weights=w)
  error = np.linalg.norm(total.mean - exact) / np.linalg.norm(exact)
  assert error < 1e-7
  assert total.clients == CLIENTS
  assert total.weight == pytest.approx(w.sum(), rel=1e-9)


@pytest.mark.parametrize(
  "clients, degree, modulus_bits",
  [
    (200, 4096, 54),
    (3, 8192, 60),
  ],
)
def test_noise_is_what_the_formula_says(clients, degree, modulus_bits):
  params = ckks.parameters(clients, degree=degree, modulus_bits=modulus_bits)
  key = he.key_pair(params)
  zeros = np.zeros(3 * params.slots)
  message = he.encrypt(key.public, zeros, 1.0)
  total = he.decrypt(key, he.add(key.public, [message] * 2), 2)
  # The same ciphertext twice: twice its noise, halved by the mean.
  assert np.std(total.mean) == pytest.approx(params.noise_stddev, rel=0.05)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
def test_largest_sum_keeps_its_accuracy(scale):
  params = ckks.parameters(200)
  key = he.key_pair(params)
  u = np.full(10, params.bound * scale) * np.tile([1, -1], 5)
  total = he.add(key.public, [he.encrypt(key.public, u, 1.0)] * 200)
  found = he.decrypt(key, total, 200).mean
  np.testing.assert_allclose(found, u, rtol=1e-4)


@pytest.mark.parametrize("values", [0, 1, 2045, 2046, 2047, 4094, 4095])
def test_a_vector_longer_than_the_slots_is_cut(values):
  u, w = updates(values)
  key = pair()
  sent = [he.encrypt(key.public, *uw) for uw in zip(u[:2], w[:2], strict=True)]
  total = he.decrypt(key, he.add(key.public, sent), 2)
  exact = np.average(u[:2], axis=0, weights=w[:2])
  np.testing.assert_allclose(total.mean, exact, rtol=0, atol=1e-8)
  pieces = math.ceil((values + 2) / 2048)
  assert he.pieces(key.public.parameters, values) == pieces
  # Each ciphertext is two polynomials of 4096 coefficients of 54 bits; the
  # library's packing is within 15% of that.
  assert len(sent[0]) == pytest.approx(pieces * 2 * 4096 * 54 / 8, rel=0.15)


@both
def test_the_server_has_no_secret_and_no_two_ciphertexts_are_alike(scheme):
  key = pair(0, scheme)
  public = he.public_key(key.public.serialized, key.public.parameters)
  assert not public.context.has_secret_key()
  assert public.fingerprint == key.public.fingerprint
  u, w = updates()
  again = he.encrypt(public, u[0], w[0])
  assert again != messages(scheme)[0]
  # Ciphertexts are uniform: nothing is left to compress.
  assert len(zlib.compress(again)) > 0.95 * len(again)


@pytest.mark.parametrize(
  "options, words",
  [
    ({"clients": 0}, "at least one client"),
    ({"clients": 3, "bound": 0.0}, "bound above 0"),
    ({"clients": 3, "degree": 4000}, "Expected one of 1024"),
    ({"clients": 3, "modulus_bits": 55}, "128 bits of security"),
    ({"clients": 3, "degree": 16384, "modulus_bits": 61}, "at most 60"),
    ({"clients": 3, "degree": 2048, "modulus_bits": 26}, "too small"),
    ({"clients": 200, "modulus_bits": 36}, "too small"),
  ],
)
def test_parameters_that_are_not_sound_are_refused(options, words):
  with pytest.raises(errors.UserError, match=words):
    ckks.parameters(**options)


def test_the_least_modulus_that_is_named_is_accepted():
  with pytest.raises(errors.UserError) as refused:
    ckks.parameters(200, modulus_bits=36)
  least = int(str(refused.value).rstrip(".").split()[-1])
  ckks.parameters(200, modulus_bits=least)
  with pytest.raises(errors.UserError, match="too small"):
    ckks.parameters(200, modulus_bits=least - 1)


@pytest.mark.parametrize(
  "update, weight",
  [
    ([0.0, 4.01], 1.0),
    ([np.nan], 1.0),
    ([np.inf], 1.0),
    ([0.0], 0.0),
    ([0.0], 1.01),
  ],
)
def test_what_cannot_be_encoded_is_refused(update, weight):
  with pytest.raises(errors.UserError):
    he.encrypt(pair().public, np.array(update), weight)


@both
def test_another_key_is_refused(scheme):
  key, other = pair(0, scheme), pair(1, scheme)
  total = he.add(key.public, messages(scheme))
  with pytest.raises(he.CiphertextError, match="encrypted under the key"):
    he.decrypt(other, total, CLIENTS)
  with pytest.raises(he.CiphertextError, match="encrypted under the key"):
    he.add(other.public, messages(scheme))
  # Even with the key's name on it.
  forged = total[:4] + other.public.fingerprint + total[12:-4]
  with pytest.raises(he.CiphertextError, match="holds"):
    he.decrypt(other, reseal(forged), CLIENTS)


@both
@pytest.mark.parametrize("count", [1, CLIENTS - 1, CLIENTS + 1])
def test_a_sum_of_the_wrong_clients_is_refused(count, scheme):
  key = pair(0, scheme)
  total = he.add(key.public, messages(scheme))
  with pytest.raises(he.CiphertextError, match="clients, expected"):
    he.decrypt(key, total, count)


@both
def test_more_clients_than_fit_are_refused(scheme):
  sent = messages(scheme)
  with pytest.raises(he.CiphertextError, match="the parameters are for"):
    he.add(pair(0, scheme).public, [*sent, sent[0]])
  with pytest.raises(he.CiphertextError, match="no message"):
    he.add(pair().public, [])


def test_vectors_of_two_lengths_are_refused():
  short = he.encrypt(pair().public, np.zeros(VALUES - 1), 1.0)
  with pytest.raises(he.CiphertextError, match="values"):
    he.add(pair().public, [messages()[0], short])


@both
@pytest.mark.parametrize("sealed", [False, True])
def test_a_truncated_message_is_refused(sealed, scheme):
  key, whole = pair(0, scheme), messages(scheme)[0]
  rng = np.random.default_rng(1)
  for length in [0, 3, 27, 28, 32, *rng.integers(0, len(whole), 40)]:
    cut = whole[:length]
    with pytest.raises(he.CiphertextError):
      he.decrypt(key, reseal(cut) if sealed else cut, 1)


@both
def test_damage_never_makes_a_wrong_sum(scheme):
  key, whole = pair(0, scheme), messages(scheme)[0][:-4]
  right = he.decrypt(key, reseal(whole), 1).mean
  rng = np.random.default_rng(2)
  refused = 0
  for place in [*range(0, 120, 3), *rng.integers(0, len(whole), 60)]:
    damaged = bytearray(whole)
    damaged[place] ^= 1 << rng.integers(8)
    try:
      # The checksum is repaired: what lies behind it has to notice.
      found = he.decrypt(key, reseal(bytes(damaged)), 1).mean
    except he.CiphertextError:
      refused += 1
    else:
      np.testing.assert_allclose(found, right, atol=1e-8)
  assert refused > 80


@pytest.mark.parametrize("junk", [b"", b"no key", bytes(1000)])
def test_what_is_no_public_key_is_refused(junk):
  with pytest.raises(he.CiphertextError, match="not a public key"):
    he.public_key(junk, pair().public.parameters)


def test_a_secret_key_is_not_taken_for_a_public_one():
  with pytest.raises(he.CiphertextError, match="holds a secret"):
    he.public_key(pair().serialized, pair().public.parameters)
