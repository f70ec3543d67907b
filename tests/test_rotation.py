"""The Hadamard rotation and DRIVE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from mpqfl_jax import counter, precision, rotation


@pytest.mark.parametrize("first, second", [(1, 1), (8, 1), (64, 2), (16, 64)])
def test_hadamard_is_scipys(first, second):
  size = first * second
  x = np.random.default_rng(0).standard_normal((3, size)).astype(np.float32)
  expected = x @ (linalg.hadamard(size) / np.sqrt(size))
  expected = expected.reshape(3, second, first).swapaxes(1, 2).reshape(3, size)
  np.testing.assert_allclose(
    rotation.hadamard(jnp.asarray(x), first), expected, atol=1e-5
  )


@pytest.mark.parametrize("first, second", [(64, 64), (64, 8)])
def test_hadamard_keeps_norms_and_is_undone(first, second):
  rng = np.random.default_rng(1)
  x = rng.standard_normal((2, first * second)).astype(np.float32)
  y = rotation.hadamard(jnp.asarray(x), first)
  np.testing.assert_allclose(
    np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=1e-6
  )
  np.testing.assert_allclose(rotation.hadamard(y, second), x, atol=1e-5)


def test_a_rotated_record_by_hand():
  # What a reader does with codes, written down: a message of before stays one.
  x = np.random.default_rng(6).standard_normal(128).astype(np.float32)
  leaf = precision.leaf_codec("int8", x.shape, {"rotate": True})
  payload, _ = leaf.encode(jnp.array([1, 2], jnp.uint32), jnp.asarray(x), ())
  codes = np.asarray(payload["inner"]["codes"]).astype(np.float64) - 127
  sent = codes.reshape(64, 2).T.reshape(128) * payload["inner"]["scale"][0]
  signs = np.asarray(rotation.signs(payload["rotation"], (1, 128)))[0]
  expected = signs * (linalg.hadamard(128) @ sent) / np.sqrt(128)
  np.testing.assert_allclose(leaf.decode(payload), expected, atol=1e-5)
  np.testing.assert_allclose(expected, x, atol=0.2)


def decoded(name, x, count, **options):
  leaf = precision.leaf_codec(name, x.shape, options)
  run = jax.jit(
    jax.vmap(lambda seed: leaf.decode(leaf.encode(seed, jnp.asarray(x), ())[0]))
  )
  return np.asarray(run(counter.seeds(jax.random.key(0), count)), np.float64)


def test_drive_errors_are_the_papers():
  # For one scale a vector and large d: vNMSE is pi / 2 - 1 for the unbiased
  # scale and 1 - 2 / pi for the one of least squared error.
  rng = np.random.default_rng(2)
  x = rng.laplace(size=4096).astype(np.float32)
  for unbiased, expected in ((True, np.pi / 2 - 1), (False, 1 - 2 / np.pi)):
    got = decoded("drive", x, 50, unbiased=unbiased)
    error = ((got - x) ** 2).sum(1).mean() / (x.astype(float) ** 2).sum()
    np.testing.assert_allclose(error, expected, rtol=0.03)


def test_drive_is_unbiased():
  x = np.random.default_rng(5).standard_normal(256).astype(np.float32)
  count = 4000
  got = decoded("drive", x, count)
  error = np.abs(got.mean(0) - x) / (got.std(0) / np.sqrt(count))
  # Exactly unbiased for a uniformly random rotation only: a Hadamard one of
  # this few entries may be off by a percent of the norm. The false-alarm rate
  # of six deviations is 5e-7 for all 256 entries together.
  bias = 0.01 * np.linalg.norm(x) / (got.std(0) / np.sqrt(count))
  assert (error < 6 + bias).all()
  # A scale off by 5% would show.
  ratio = (got.mean(0) @ x) / (x.astype(np.float64) @ x)
  np.testing.assert_allclose(ratio, 1.0, atol=0.01)


def test_rotation_helps_a_uniform_grid_on_spiky_updates():
  x = np.random.default_rng(3).standard_t(1.5, 8192).astype(np.float32)
  plain = ((decoded("int4", x, 1)[0] - x) ** 2).sum()
  rotated = ((decoded("int4", x, 1, rotate=True)[0] - x) ** 2).sum()
  assert rotated < 0.2 * plain


def test_variance_predicts_the_error():
  x = np.random.default_rng(4).standard_normal(3000).astype(np.float32)
  for name, options in [
    ("drive", {"unbiased": False}),
    ("int3", {"rotate": True}),
  ]:
    leaf = precision.leaf_codec(name, x.shape, options)
    payload, _ = leaf.encode(jnp.array([1, 2], jnp.uint32), jnp.asarray(x), ())
    error = float(((leaf.decode(payload) - x) ** 2).mean())
    np.testing.assert_allclose(leaf.bins(payload)[2].mean(), error, rtol=0.15)
