"""What a client does to its update before the codec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mpqfl_jax import errors, transforms, trees

TRANSFORMS = {
  "identity": transforms.identity(),
  "clip": transforms.clip(1.0),
  "clip_l1": transforms.clip(1.0, order=1),
  "gaussian_noise": transforms.gaussian_noise(0.1),
  "laplace_noise": transforms.laplace_noise(0.1),
  "chain": transforms.chain(
    transforms.clip(1.0), transforms.gaussian_noise(0.1)
  ),
}


def _update(scale=1.0):
  key = jax.random.key(3)
  return {
    "dense1": {
      "bias": scale * jax.random.normal(key, (5,)),
      "kernel": scale * jax.random.normal(jax.random.fold_in(key, 1), (4, 5)),
    },
    "scalar": jnp.float32(scale),
    "empty": jnp.zeros((0, 3)),
  }


def _apply(transform, update, key=None, state=None):
  key = jax.random.key(0) if key is None else key
  state = transform.init(update) if state is None else state
  return transform.apply(key, update, state)


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_contract(name):
  transform, update = TRANSFORMS[name], _update()
  out, state = _apply(transform, update)
  assert jax.tree.structure(out) == jax.tree.structure(update)
  assert jax.tree.structure(state) == jax.tree.structure(transform.init(update))
  for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(update), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
  jitted, _ = jax.jit(transform.apply)(jax.random.key(0), update, state)
  again, _ = _apply(transform, update)
  for a, b, c in zip(*map(jax.tree.leaves, (out, jitted, again)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_array_equal(a, c)
  keys = jax.random.split(jax.random.key(1), 3)
  both = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), update)
  side, _ = jax.vmap(transform.apply, (0, 0, None))(keys, both, state)
  for i, factor in enumerate((1, 2, -1)):
    one, _ = _apply(transform, trees.scale(factor, update), keys[i])
    for a, b in zip(jax.tree.leaves(side), jax.tree.leaves(one), strict=True):
      np.testing.assert_allclose(a[i], b, atol=1e-6)


def test_identity_changes_nothing():
  out, _ = _apply(transforms.identity(), _update())
  for a, b in zip(
    jax.tree.leaves(out), jax.tree.leaves(_update()), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 1e6])
def test_clip_scales_to_the_ball_and_no_further(scale):
  update = _update(scale)
  flat = np.concatenate(
    [np.ravel(leaf) for leaf in jax.tree.leaves(update)]
  ).astype(np.float64)
  norm = np.linalg.norm(flat)
  out, _ = _apply(transforms.clip(1.0), update)
  factor = 1.0 if norm <= 1.0 else 1.0 / norm
  for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(update), strict=True):
    np.testing.assert_allclose(a, factor * np.asarray(b, float), rtol=1e-5)


def test_noise_is_normal_and_differs_by_leaf_and_key():
  update = {"a": jnp.zeros((20_000,)), "b": jnp.zeros((20_000,))}
  out, _ = _apply(transforms.gaussian_noise(0.3), update)
  # Kolmogorov-Smirnov: a false alarm in one of 1,000 seeds.
  assert stats.kstest(np.asarray(out["a"]) / 0.3, "norm").pvalue > 1e-3
  assert not np.array_equal(out["a"], out["b"])
  other, _ = _apply(transforms.gaussian_noise(0.3), update, jax.random.key(9))
  assert not np.array_equal(out["a"], other["a"])


def test_a_chain_applies_its_stages_in_order():
  def add(value):
    return transforms.identity()._replace(
      init=lambda params: jnp.float32(value),
      apply=lambda key, u, s: (jax.tree.map(lambda x: 2 * x + s, u), s + 1),
    )

  out, state = _apply(transforms.chain(add(1.0), add(10.0)), {"x": jnp.ones(2)})
  np.testing.assert_array_equal(out["x"], [16.0, 16.0])
  assert [float(s) for s in state] == [2.0, 11.0]


@pytest.mark.parametrize(
  "build",
  [transforms.clip, transforms.gaussian_noise, transforms.laplace_noise],
)
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_numbers_without_meaning_are_refused(build, value):
  with pytest.raises(errors.UserError, match="above 0"):
    build(value)
