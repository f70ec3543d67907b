"""Learning rates by round against their closed forms."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import errors, schedules

R, ROUNDS, RATE = np.arange(40), 40, 0.3
RISE = RATE * (R + 1) / 6
LATER = np.maximum(R - 5, 0)
CLOSED = {
  "constant": np.full(40, RATE),
  "cosine": RATE * (1 + np.cos(np.pi * R / 40)) / 2,
  "cosine(final=0.1)": RATE * (0.1 + 0.9 * (1 + np.cos(np.pi * R / 40)) / 2),
  "linear": RATE * (1 - R / 40),
  "linear(final=0.5)": RATE * (1 - 0.5 * R / 40),
  "exponential(decay=0.9,every=3)": RATE * 0.9 ** (R / 3),
  # Rounds of flags and metrics are counted from 1.
  "step(at=(11,31),factor=0.5)": RATE * 0.5 ** (1 * (R >= 10) + (R >= 30)),
  "step(at=11)": np.where(R >= 10, 0.1, 1) * RATE,
  "constant(warmup=5)": np.minimum(RISE, RATE),
  "cosine(warmup=5)": np.where(
    R < 5, RISE, RATE * (1 + np.cos(np.pi * LATER / 35)) / 2
  ),
}


@pytest.mark.parametrize("spec", list(CLOSED))
def test_closed_forms(spec):
  rate = schedules.make(spec, RATE, ROUNDS)
  want = CLOSED[spec]
  np.testing.assert_allclose([rate(r) for r in R], want, rtol=1e-5, atol=1e-7)
  traced = jax.jit(jax.vmap(rate))(jnp.asarray(R))
  np.testing.assert_allclose(
    np.broadcast_to(traced, 40), want, rtol=1e-5, atol=1e-7
  )


@pytest.mark.parametrize(
  "spec, words",
  [
    ("cosin", "Did you mean 'cosine'"),
    ("cosine(end=1)", "end"),
    ("cosine(final=2)", "final"),
    ("cosine(final=low)", "final"),
    ("exponential(decay=0)", "decay"),
    ("exponential(every=x)", "every"),
    ("step", "at=None"),
    ("step(at=half)", "at=half"),
    ("step(at=(0,3))", "from which"),
    ("constant(warmup=40)", "warmup"),
    ("constant(warmup=0.5)", "warmup"),
    ("exponential(decay=1e-30)", "stays above 0"),
  ],
)
def test_mistakes(spec, words):
  with pytest.raises(errors.UserError) as e:
    schedules.make(spec, RATE, ROUNDS)
  assert words in str(e.value)


def test_example_in_the_docs():
  result = doctest.testmod(schedules)
  assert result.attempted == 2 and result.failed == 0
