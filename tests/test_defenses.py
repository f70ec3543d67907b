"""Every defence that a flag can name builds, and says what it knows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import accounting, defenses, errors
from tests import small

PARAMS = small.model().init(jax.random.key(0))


def test_codecs_and_transforming_defences_build_by_name():
  plain = defenses.make("int4(mode=affine)", PARAMS)
  once = accounting.Ledger(1, np.ones(2, int))
  assert plain.epsilon(once, 1e-5) is None and plain.spec == "int4(mode=affine)"
  noisy = defenses.make("dp_gaussian(clip=2,noise_multiplier=0.5)", PARAMS)
  assert noisy.noise_stddev == 1.0
  thrice = accounting.Ledger(5, np.array([0, 3]))
  assert noisy.epsilon(thrice, 1e-5) > noisy.epsilon(once, 1e-5) > 0
  # What is asked for is spent by whoever sends most.
  protocol = accounting.one_update()._replace(ledger=thrice)
  asked = defenses.make("dp_laplace(epsilon=8)", PARAMS, protocol)
  assert 7.9 < asked.epsilon(thrice, 1e-5) <= 8


@pytest.mark.parametrize(
  "spec", ["int4", "dp_gaussian(clip=2)", "dp_laplace(clip=9)"]
)
def test_bins_hold_the_update_that_the_client_meant_to_send(spec):
  defense = defenses.make(spec, PARAMS)
  update = jax.tree.map(
    lambda p: 0.01 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), PARAMS
  )
  moved, _ = defense.transform.apply(
    jax.random.key(1), update, defense.transform.init(update)
  )
  payload, _ = defense.codec.encode(
    jax.random.key(2), moved, defense.codec.init(update)
  )
  bins = defenses.bins(defense, payload)
  for low, u, high in zip(
    *map(jax.tree.leaves, (bins.lower, update, bins.upper)), strict=True
  ):
    assert np.all(low <= u) and np.all(u <= high)
  # The squared error is the stated variance, within a factor for 28 draws.
  error = sum(
    float(jnp.sum((a - b) ** 2))
    for a, b in zip(
      *map(jax.tree.leaves, (defense.codec.decode(payload), update)),
      strict=True,
    )
  )
  stated = sum(
    float(jnp.sum(jnp.broadcast_to(v, u.shape)))
    for v, u in zip(*map(jax.tree.leaves, (bins.variance, update)), strict=True)
  )
  assert stated / 4 < error < 4 * stated


@pytest.mark.parametrize(
  "spec, words",
  [
    ("dp_gausian", "Did you mean 'dp_gaussian'"),
    ("dp_gaussian(sigma=1)", "unknown parameter"),
    ("dp_gaussian(noise_multiplier=0)", "without noise there is no"),
    ("inexistent.toml", "inexistent.toml"),
    ("policy.tml", "'policy.tml': policy files end in .toml. Expected one, or"),
  ],
)
def test_mistakes_are_named(spec, words):
  with pytest.raises(errors.UserError, match=words):
    defenses.make(spec, PARAMS)
