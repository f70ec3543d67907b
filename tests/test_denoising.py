"""The learned prior: a density, its slope, and the images it leads to."""

import chex
import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest
import scipy.stats

from mpqfl_jax import errors
from mpqfl_jax.attacks import coordinates, denoising


def pixels(prior: coordinates.Coordinates):
  """Mean and covariance of the Gaussian, in pixels."""
  size = prior.deviation.size
  mean = np.asarray(prior.to_images(jnp.zeros(prior.shape))).reshape(size)
  basis = np.asarray(prior.to_images(jnp.eye(size))).reshape(size, size) - mean
  return mean.astype(np.float64), basis.T.astype(np.float64) @ basis


@pytest.mark.parametrize("shape", [(6, 5, 1), (4, 4, 3)])
def test_without_a_network_it_is_the_blurred_gaussian(shape):
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (200, *shape), dtype=np.uint8)
  prior = coordinates.fitted(shape, images)
  zero = jax.tree.map(
    jnp.zeros_like, denoising.init(jax.random.key(0), shape[-1])
  )
  x = rng.uniform(0, 1, (4, *shape))
  z = prior.from_images(jnp.asarray(x, jnp.float32))
  mean, covariance = pixels(prior)
  for blur in (0.05, 0.4):
    many = jnp.full(4, blur)
    found = np.asarray(denoising.energy(zero, prior, z, many))
    blurred = covariance + blur**2 * np.eye(mean.size)
    wanted = -scipy.stats.multivariate_normal(mean, blurred).logpdf(
      x.reshape(4, -1)
    )
    np.testing.assert_allclose(
      found - found[0], wanted - wanted[0], rtol=1e-3, atol=1e-2
    )
    # Wiener's filter is the mean of a Gaussian given itself and noise.
    filtered = mean + (x.reshape(4, -1) - mean) @ np.linalg.solve(
      blurred, covariance
    )
    means = prior.to_images(denoising.denoise(zero, prior, z, many))
    np.testing.assert_allclose(
      np.asarray(means).reshape(4, -1), filtered, atol=1e-4
    )


@pytest.mark.parametrize("shape", [(6, 5, 1), (4, 4, 3)])
def test_slopes_are_those_of_finite_differences(shape):
  rng = np.random.default_rng(2)
  images = rng.integers(0, 256, (200, *shape), dtype=np.uint8)
  prior = coordinates.fitted(shape, images)
  weights = denoising.init(jax.random.key(3), shape[-1])
  z = jnp.asarray(rng.normal(size=(1, *shape)), jnp.float32)

  def energy(z, weights):
    return denoising.energy(weights, prior, z, jnp.full(1, 0.3))[0]

  check_grads(energy, (z, weights), 1, ["rev"], atol=1e-2, rtol=1e-2, eps=1e-2)


def test_it_knows_what_is_rare_where_a_gaussian_knows_its_spread():
  # A pixel is light once in eight times, whatever the others are.
  rng = np.random.default_rng(4)
  shape, rare, dark, light = (8, 7, 1), 1 / 8, 51, 204
  images = np.where(rng.random((2000, *shape)) < rare, light, dark)
  images = images.astype(np.uint8)
  prior = coordinates.fitted(shape, images)
  weights = denoising.fitted(shape, images, 1000)
  zero = jax.tree.map(jnp.zeros_like, weights)
  x = images[:64] / 255
  for blur in (0.15, 0.3):
    y = x + blur * rng.normal(size=x.shape)
    # Bayes' rule for a pixel.
    a, b = (
      share * scipy.stats.norm.pdf(y, shade / 255, blur)
      for share, shade in ((rare, light), (1 - rare, dark))
    )
    best = (a * light + b * dark) / (a + b) / 255
    z = prior.from_images(jnp.asarray(y, jnp.float32))

    def off(w, z=z, best=best, blur=blur):
      many = jnp.full(len(z), blur)
      found = prior.to_images(denoising.denoise(w, prior, z, many))
      return float(np.mean(np.square(np.asarray(found) - best)))

    assert off(weights) < 0.75 * off(zero)


def test_images_of_another_kind_are_refused():
  images = np.zeros((120, 5, 4, 3), np.uint8)
  for wrong in (images.astype(np.float32), images[:, :4], images[:99]):
    with pytest.raises(errors.UserError, match="auxiliary images"):
      denoising.fitted((5, 4, 3), wrong, 1)


def test_the_same_images_give_the_same_weights():
  images = np.random.default_rng(5).integers(0, 256, (120, 5, 4, 3))
  images = images.astype(np.uint8)
  first = denoising.fitted((5, 4, 3), images, 3)
  assert denoising.fitted((5, 4, 3), images.copy(), 3) is first
  denoising._fitted.cache_clear()
  chex.assert_trees_all_equal(denoising.fitted((5, 4, 3), images, 3), first)
  other = denoising.fitted((5, 4, 3), images[1:], 3)
  assert (other[0]["kernel"] != first[0]["kernel"]).any()
