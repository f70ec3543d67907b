"""Whole numbers packed into slots: sums to the last bit, or refused."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from tenseal import sealapi

from mpqfl_jax import bfv, errors, he


def encrypted_sum(params, updates, weights) -> he.Sum:
  key = he.key_pair(params)
  sent = [
    he.encrypt(key.public, u, w) for u, w in zip(updates, weights, strict=True)
  ]
  return he.decrypt(key, he.add(key.public, sent), len(sent))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("clients", [1, 3, 20])
def test_a_sum_is_that_of_the_whole_numbers(bits, clients):
  params = bfv.parameters(clients, bits, 0.02)
  rng = np.random.default_rng(bits)
  # Two ciphertexts, and a last slot that is not full.
  values = params.slots * params.digits + 5
  u = rng.normal(0, 0.01, (clients, values))
  w = rng.integers(1, 2**20, clients) / 2**20
  found = encrypted_sum(params, u, w)
  # The rounding by another road: ties are of probability 0 here.
  levels = 2 ** (bits - 1) - 1
  cut = np.clip(u, -0.02, 0.02)
  whole = np.rint(w[:, None] * cut / 0.02 * levels).sum(axis=0)
  np.testing.assert_array_equal(
    np.rint(found.mean * w.sum() / 0.02 * levels), whole
  )
  np.testing.assert_allclose(
    found.mean, whole * 0.02 / levels / w.sum(), rtol=1e-12, atol=0
  )
  assert found.weight == w.sum() and found.clients == clients


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_runs_into_no_other_digit(bits, sign):
  # Every client at the bound in one entry, and at the other end beside it.
  params = bfv.parameters(200, bits, 1.0)
  u = sign * np.tile([1.0, -1.0, 0.0, 7.0], 50)
  found = encrypted_sum(params, [u] * 200, [1.0] * 200)
  np.testing.assert_array_equal(found.mean, np.clip(u, -1, 1))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  clients=st.integers(1, 300),
  bits=st.integers(2, 16),
  values=st.integers(0, 40),
  seed=st.integers(0, 2**32 - 1),
)
def test_packing_and_unpacking_without_encryption(clients, bits, values, seed):
  params = bfv.parameters(clients, bits, 0.5)
  assert params.base**params.digits <= params.plain_modulus
  assert params.base ** (params.digits + 1) > params.plain_modulus
  rng = np.random.default_rng(seed)
  total, wanted = 0, np.zeros(values, np.int64)
  for _ in range(min(clients, 5)):
    u = rng.normal(0, 0.5, values)
    numbers = params.plaintext(u, 1.0, None)
    assert len(numbers) == params.slots_for(values)
    total = total + numbers
    wanted += params.entries(u, 1.0, None)
  # What is in a slot is a remainder around zero.
  half = params.plain_modulus // 2
  assert np.abs(total).max() <= half
  found = params.open(total, values, min(clients, 5))
  np.testing.assert_allclose(
    found.mean, wanted * params.step / found.weight, rtol=1e-12
  )


def test_rounding_at_random_has_the_right_mean():
  params = bfv.parameters(3, 3, 1.0)
  u = np.linspace(-1.2, 1.2, 49)
  rng = np.random.default_rng(0)
  times, weight = 4000, 0.75
  drawn = np.stack([params.entries(u, weight, rng) for _ in range(times)])
  exact = weight * np.clip(u, -1, 1) * 3
  spread = np.sqrt((exact - np.floor(exact)) * (np.ceil(exact) - exact) / times)
  assert (np.abs(drawn.mean(axis=0) - exact) <= 4.5 * spread + 1e-9).all()
  assert (np.abs(drawn - exact) < 1).all()
  # The same generator, the same entries; without one, the nearest.
  again = [
    params.entries(u, weight, np.random.default_rng(7)) for _ in range(2)
  ]
  np.testing.assert_array_equal(*again)
  nearest = params.entries(u, weight, None)
  assert (np.abs(nearest - exact) <= 0.5).all()


@pytest.mark.parametrize("clients", [1, 200])
def test_the_noise_that_is_left_room_for_is_there(clients):
  # SEAL's own measure of what is left, with the secret key at hand. It is never
  # below zero, so under a plain modulus smaller by some bits, with the same
  # noise: those bits have to be left, and little more.
  params = bfv.parameters(clients, 8, 1.0)
  spare = 4
  smaller = bfv._prime_below(
    params.plain_modulus // 2**spare, 2 * params.modulus.degree
  )
  assert math.log2(params.plain_modulus / smaller) == pytest.approx(
    spare, abs=0.01
  )
  params = params._replace(plain_modulus=smaller)
  key = he.key_pair(params)
  u = np.ones(20_000)
  total = he.add(
    key.public, [he.encrypt(key.public, u, 1.0) for _ in range(clients)]
  )
  _, _, chunks = he.unframe(params, key.public.fingerprint, total)
  secret = key.context.secret_key().data
  decryptor = sealapi.Decryptor(key.context.seal_context().data, secret)
  left = []
  for chunk in chunks:
    vector = params.read(he.library(), key.context, chunk)
    left.append(decryptor.invariant_noise_budget(vector.ciphertext()[0]))
  assert spare <= min(left) <= max(left) <= spare + 2


def test_bytes_are_those_of_the_table_in_the_docs():
  # 54 bits a coefficient, two coefficients a slot.
  for clients, bits, digits in ((10, 8, 3), (10, 4, 6), (200, 8, 2)):
    params = bfv.parameters(clients, bits, 0.05)
    assert params.digits == digits
    u = np.zeros(params.digits * params.slots * 2)
    size = len(he.encrypt(he.key_pair(params).public, u, 1.0))
    # The third ciphertext holds the two numbers that do not fit.
    each = 2 * 54 / 8 / digits
    assert size == pytest.approx(each * len(u) * 3 / 2, rel=0.15)


def test_primes_are_primes_of_the_right_form():
  limit = 10**5
  sieve = np.ones(limit, bool)
  sieve[:2] = False
  for i in range(2, math.isqrt(limit) + 1):
    if sieve[i]:
      sieve[i * i :: i] = False
  found = [bfv._is_prime(n) for n in range(limit)]
  np.testing.assert_array_equal(found, sieve)
  for step in (2, 64, 8192):
    for top in (10**5 - 1, 60_000, 50_000):
      right = [p for p in np.flatnonzero(sieve) if p < top and p % step == 1]
      assert bfv._prime_below(top, step) == max(right, default=0)
  # Strong pseudoprimes to the first bases, and a prime of 61 bits.
  for number in (3215031751, 3474749660383, 341550071728321):
    assert not bfv._is_prime(number)
  assert bfv._is_prime(2**61 - 1)


@pytest.mark.parametrize(
  "options, words",
  [
    ({"bits": 1}, "from 2 to 16"),
    ({"bits": 17}, "from 2 to 16"),
    ({"bits": 8.5}, "from 2 to 16"),
    ({"clients": 0}, "at least one client"),
    ({"bound": 0.0}, "bound above 0"),
    ({"degree": 4000}, "Expected one of 1024"),
    ({"modulus_bits": 55}, "128 bits of security"),
    ({"modulus_bits": 30}, "too small"),
    ({"clients": 10**7}, "too small"),
  ],
)
def test_parameters_that_are_not_sound_are_refused(options, words):
  with pytest.raises(errors.UserError, match=words):
    bfv.parameters(**{"clients": 3, "bits": 8, "bound": 1.0, **options})


@pytest.mark.parametrize("clients", [3, 200, 5000])
def test_the_least_modulus_that_is_named_is_accepted(clients):
  with pytest.raises(errors.UserError) as refused:
    bfv.parameters(clients, 16, 1.0, modulus_bits=28)
  least = int(str(refused.value).rstrip(".").split()[-1])
  bfv.parameters(clients, 16, 1.0, modulus_bits=least)
  with pytest.raises(errors.UserError, match="too small"):
    bfv.parameters(clients, 16, 1.0, modulus_bits=least - 1)


@pytest.mark.parametrize(
  "update, weight",
  [([np.nan], 1.0), ([np.inf], 1.0), ([0.0], 0.0), ([0.0], 1.01)],
)
def test_what_cannot_be_encoded_is_refused(update, weight):
  params = bfv.parameters(3, 8, 1.0)
  with pytest.raises(errors.UserError, match=r"finite|weight"):
    params.plaintext(np.array(update), weight, None)
  # A weight that rounds to nothing still counts.
  assert params.plaintext(np.array([0.0]), 1e-9, None)[1] == 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_sum_that_no_clients_can_have_sent_is_refused(place):
  params = bfv.parameters(5, 8, 1.0)
  numbers = 3 * params.plaintext(np.zeros(2), 1.0, None)
  assert params.open(numbers, 2, 3).clients == 3
  # Four levels' worth in a sum of three clients, or another count or weight.
  numbers[place] += {0: 1, 1: 2**20, 2: 4 * params.levels}[place]
  with pytest.raises(he.CiphertextError):
    params.open(numbers, 2, 3)
