"""Joint keys: a sum opens with all shares, and never otherwise."""

import functools

import jax
import numpy as np
import pytest

from mpqfl_jax import defenses, errors, he, threshold
from tests import small

try:
  import openfhe
except ImportError:
  openfhe = None
needs_openfhe = pytest.mark.skipif(
  openfhe is None, reason="OpenFHE has no wheel that loads here"
)

MEMBERS = (7, 3, 9, 4)
VALUES = 2100


@functools.cache
def group(index: int = 0) -> threshold.Group:
  return threshold.generate(threshold.parameters(len(MEMBERS)), MEMBERS)


@functools.cache
def updates() -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  size = (len(MEMBERS), VALUES)
  return rng.normal(0, 0.01, size), rng.uniform(0.1, 1, len(MEMBERS))


@functools.cache
def total() -> bytes:
  u, w = updates()
  key = group()
  return threshold.add(
    key, [threshold.encrypt(key, *uw) for uw in zip(u, w, strict=True)]
  )


@functools.cache
def shares() -> dict[int, bytes]:
  return {c: threshold.share(group(), c, total()) for c in MEMBERS}


def opened(**changes) -> he.Sum:
  given = {"message": total(), "shares": shares(), "count": len(MEMBERS)}
  return threshold.open_shares(group(), **{**given, **changes})


@needs_openfhe
def test_sum_is_the_weighted_mean():
  u, w = updates()
  exact = np.average(u, axis=0, weights=w)
  error = np.linalg.norm(opened().mean - exact) / np.linalg.norm(exact)
  assert error < 1e-4
  assert opened().weight == pytest.approx(w.sum(), rel=1e-6)


@needs_openfhe
def test_noise_is_what_the_formula_says():
  u, w = updates()
  exact = np.average(u, axis=0, weights=w)
  noise = (opened().mean - exact) * w.sum()
  wanted = threshold.noise_stddev(group().parameters, len(MEMBERS))
  assert np.std(noise) == pytest.approx(wanted, rel=0.1)


@needs_openfhe
@pytest.mark.parametrize("client", MEMBERS)
def test_a_missing_share_leaves_the_sum_closed(client):
  fewer = {c: s for c, s in shares().items() if c != client}
  with pytest.raises(he.CiphertextError, match=f"from client {client}"):
    opened(shares=fewer)
  # Another's share in its place is no help.
  other = MEMBERS[1] if client != MEMBERS[1] else MEMBERS[2]
  with pytest.raises(he.CiphertextError):
    opened(shares={**shares(), client: shares()[other]})


@needs_openfhe
def test_a_client_that_drops_out_of_key_generation_is_passed_over():
  u, w = updates()
  for absent in MEMBERS:
    key = threshold.generate(
      threshold.parameters(len(MEMBERS)), MEMBERS, absent={absent}
    )
    assert key.members == tuple(c for c in MEMBERS if c != absent)
    sent = [threshold.encrypt(key, u[i], w[i]) for i in range(3)]
    both = threshold.add(key, sent)
    parts = {c: threshold.share(key, c, both) for c in key.members}
    mean = threshold.open_shares(key, both, parts, 3).mean
    exact = np.average(u[:3], axis=0, weights=w[:3])
    np.testing.assert_allclose(mean, exact, atol=1e-6)


@needs_openfhe
def test_messages_of_another_key_and_damaged_ones_are_refused():
  other = group(1)
  with pytest.raises(he.CiphertextError, match="encrypted under the key"):
    threshold.share(other, MEMBERS[0], total())
  with pytest.raises(he.CiphertextError, match="checksum"):
    threshold.add(group(), [total()[:-9]])
  foreign = threshold.share(
    other, MEMBERS[1], threshold.encrypt(other, updates()[0][0], 1.0)
  )
  with pytest.raises(he.CiphertextError, match="encrypted under the key"):
    opened(shares={**shares(), MEMBERS[1]: foreign})
  with pytest.raises(he.CiphertextError, match="clients, expected 3"):
    opened(count=3)


@needs_openfhe
def test_too_many_and_none_are_refused():
  u, w = updates()
  one = threshold.encrypt(group(), u[0], w[0])
  with pytest.raises(he.CiphertextError, match="the key has 4"):
    threshold.add(group(), [one] * 5)
  with pytest.raises(he.CiphertextError, match="no message"):
    threshold.add(group(), [])
  short = threshold.encrypt(group(), u[0][:10], w[0])
  with pytest.raises(he.CiphertextError, match="values"):
    threshold.add(group(), [one, short])
  with pytest.raises(errors.UserError, match="bound"):
    threshold.encrypt(group(), np.array([4.5]), 1.0)


@pytest.mark.parametrize(
  "options, words",
  [
    ({"clients": 1}, "at least two"),
    ({"clients": 3, "degree": 2048}, "128 bits"),
    ({"clients": 3, "degree": 1000}, "Expected one of 4096"),
    ({"clients": 3, "bound": -1.0}, "bound above 0"),
    ({"clients": 300}, "too small"),
  ],
)
def test_parameters_that_are_not_sound_are_refused(options, words):
  with pytest.raises(errors.UserError, match=words):
    threshold.parameters(**options)


def test_a_group_of_one_is_refused():
  with pytest.raises(errors.UserError, match="1 clients are there"):
    threshold.generate(threshold.parameters(3), [1, 2, 3], absent={1, 2})


@pytest.mark.skipif(openfhe is not None, reason="OpenFHE loads here")
def test_without_the_library_the_message_says_so():
  with pytest.raises(errors.UserError, match="needs OpenFHE"):
    threshold.generate(threshold.parameters(3), [1, 2, 3])
  params = small.model().init(jax.random.key(0))
  with pytest.raises(errors.UserError, match="needs OpenFHE"):
    defenses.make("he(keys=threshold)", params)
