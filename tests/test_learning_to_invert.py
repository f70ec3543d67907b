"""A network that learns to invert: its features, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import attacks, datasets, errors, metrics, models, precision
from mpqfl_jax.attacks import learning_to_invert
from mpqfl_jax.types import Model, Observation

SHAPE = (6, 6, 1)
ZERO, ONE = np.zeros(1, np.float32), np.ones(1, np.float32)


def smooth(n, seed):
  """Images of 2x2 flat squares, blurred by overlap: ten numbers each."""
  rng = np.random.default_rng(seed)
  x = rng.uniform(0.1, 0.9, size=(n, 2, 2, 1)).repeat(3, 1).repeat(3, 2)
  return np.uint8(255 * x)


def dense_model():
  """Two dense layers; the first sees the image through few units."""

  def init(key):
    keys = jax.random.split(key, 2)
    return {
      "dense1": {"kernel": jax.random.normal(keys[0], (36, 12)) / 4},
      "dense2": {
        "kernel": jax.random.normal(keys[1], (12, 3)) / 4,
        "bias": jnp.zeros(3),
      },
    }

  def apply(params, x):
    h = jnp.tanh(x.reshape(len(x), -1) @ params["dense1"]["kernel"])
    return h @ params["dense2"]["kernel"] + params["dense2"]["bias"]

  return Model("dense", init, apply, SHAPE, 3, ZERO, ONE)


def observe(model, params, x, codec=None):
  """One image a client; adaptive where there is a codec."""

  def one(key, x, y):
    update = attacks.simulate(model, params, x[None, None], y[None, None], 0.1)
    if codec is None:
      return Observation(params, update, None, None, jnp.float32(0.1))
    payload, _ = codec.encode(key, update, codec.init(params))
    bins = codec.bins(payload)
    bins = bins._replace(stochastic=jax.tree.map(jnp.asarray, bins.stochastic))
    return Observation(
      params, codec.decode(payload), bins, None, jnp.float32(0.1)
    )

  keys = jax.random.split(jax.random.key(7), len(x))
  return jax.vmap(one)(keys, x, jnp.arange(len(x)) % model.num_classes)


def test_features_of_dense_layers_with_a_bias_are_their_inputs():
  model = models.make("mlp", SHAPE, 4, ZERO, ONE)
  params = model.init(jax.random.key(0))
  x = jnp.asarray(smooth(1, 0) / 255, jnp.float32)
  update = attacks.simulate(model, params, x[None], jnp.array([[2]]), 0.1)
  got = learning_to_invert.features(update, 10_000)
  # Leaves in the order of names: bias, then kernel; 200 and 36 of dense1.
  np.testing.assert_allclose(got[200:236], x.ravel(), atol=1e-5)
  assert got.shape == (200 + 36 + 200 + 200 + 4 + 200,)
  # A leaf without such a structure is hashed to the size asked for.
  assert learning_to_invert.features(update, 50).shape == (50 * 2 - 14 + 154,)


def test_hashing_keeps_inner_products_in_the_mean():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 90)).astype(np.float32)
  each = [
    float(
      learning_to_invert._hash(jnp.asarray(a), 40, seed)
      @ learning_to_invert._hash(jnp.asarray(b), 40, seed)
    )
    for seed in range(300)
  ]
  # Weinberger et al. 2009, lemma 2; five standard errors.
  error = 5 * np.std(each) / np.sqrt(len(each))
  np.testing.assert_allclose(np.mean(each), a @ b, atol=error)
  # Every entry goes to one place, with a sign.
  rows = np.abs(
    jax.vmap(lambda e: learning_to_invert._hash(e, 40, 1))(jnp.eye(90))
  )
  np.testing.assert_array_equal(rows.sum(1), 1)
  assert rows.sum(0).max() <= 3


def test_it_learns_images_that_the_update_determines():
  model = dense_model()
  params = model.init(jax.random.key(0))
  x = smooth(6, 1) / np.float32(255)
  attack = attacks.make(
    "learning_to_invert",
    model,
    auxiliary=smooth(400, 0),
    iterations=400,
    hidden=64,
  )
  seen = observe(model, params, x)
  found = attacks.run(attack, seen, jax.random.key(0), progress=False)
  quality = metrics.psnr_db(x, found.x[:, 0])
  mean = metrics.psnr_db(x, smooth(400, 0).mean(0)[None] / 255)
  assert np.median(quality) > np.median(mean) + 10
  np.testing.assert_array_equal(found.labels[:, 0], np.arange(6) % 3)
  # One network for all of them, and none for a second call.
  assert found.iterations.tolist() == [400, 0, 0, 0, 0, 0]
  again = attacks.run(attack, seen, jax.random.key(0), progress=False)
  np.testing.assert_array_equal(again.x, found.x)


def test_it_learns_the_defence_with_fresh_noise():
  model = dense_model()
  params = model.init(jax.random.key(0))
  codec = precision.make("int2", params, rounding="stochastic")

  def channel(key, update):
    return codec.decode(codec.encode(key, update, codec.init(params))[0])

  x = smooth(40, 1) / np.float32(255)
  seen = observe(model, params, x, codec)
  attack = attacks.make(
    "learning_to_invert",
    model,
    auxiliary=smooth(400, 0),
    iterations=400,
    hidden=64,
  )
  run = lambda seen, **kw: attacks.run(  # noqa: E731
    attack, seen, jax.random.key(0), progress=False, **kw
  )
  adaptive = run(seen, channel=channel)
  blind = run(seen._replace(bins=None), channel=channel)
  good, bad = (
    np.median(metrics.psnr_db(x, found.x[:, 0])) for found in (adaptive, blind)
  )
  mean = metrics.psnr_db(x, smooth(400, 0).mean(0)[None] / 255)
  assert good > bad + 1
  assert good > np.median(mean)
  with pytest.raises(errors.UserError, match="channel"):
    run(seen)


def test_it_wants_images_to_learn_from():
  with pytest.raises(errors.UserError, match="auxiliary"):
    attacks.make("learning_to_invert", dense_model())


@pytest.mark.slow
def test_it_reads_coarse_updates_of_real_images():
  data = datasets.load("cifar10_sample")
  model = models.make(
    "lenet_zhu", (32, 32, 3), 10, data.mean, data.std, conv="slices"
  )
  params = model.init(jax.random.key(0))
  codec = precision.make("int2", params)

  def channel(key, update):
    return codec.decode(codec.encode(key, update, codec.init(params))[0])

  x = data.x_test[110:130] / np.float32(255)
  attack = attacks.make(
    "learning_to_invert",
    model,
    auxiliary=data.x_train,
    iterations=200,
    hidden=256,
    size=512,
  )
  found = attacks.run(
    attack,
    observe(model, params, x, codec),
    jax.random.key(0),
    channel=channel,
    progress=False,
  )
  mean = metrics.psnr_db(x, data.x_train.mean(0)[None] / 255)
  quality = metrics.psnr_db(x, found.x[:, 0])
  assert np.median(quality) > np.median(mean) + 2
