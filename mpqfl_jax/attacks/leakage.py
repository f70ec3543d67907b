"""Predicted leakage: how well the best attack will do, without attacking.

Around the true image the update is linear in the image. With a Gaussian prior
over images and Gaussian noise on every leaf the posterior is then Gaussian too,
and its covariance needs only one Jacobian an image: its Gram matrix, leaf by
leaf. Any assignment of noise to leaves is judged from those in milliseconds,
which is what a search over policies needs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from mpqfl_jax import errors, trees
from mpqfl_jax.attacks import coordinates, core
from mpqfl_jax.types import Array, Model, Params

# Coordinates of an image that are looked at, the others count as unseen.
COMPONENTS = 800
# Noise that every leaf has at least, relative to its root mean square: what the
# arithmetic of the attack itself resolves.
_RESOLUTION = 1e-4


class Sensitivity(NamedTuple):
  """How an update answers to small changes of the image behind it.

  Attributes:
    leaves: names of the leaves, in the order of `jax.tree.leaves`.
    grams: [leaves, k, k] float64, J^T J of each leaf's Jacobian with respect to
      the k whitened coordinates of largest deviation.
    signal: [leaves], mean square of the update's entries.
    variance: [k], squared pixel error, summed over pixels, of a unit error in
      each coordinate.
    rest: squared pixel error of all other coordinates, which count as unseen.
    pixels: number of values in an image.
  """

  leaves: tuple[str, ...]
  grams: np.ndarray
  signal: np.ndarray
  variance: np.ndarray
  rest: float
  pixels: int


def sensitivity(
  model: Model,
  params: Params,
  x: Array,
  y: Array,
  learning_rate: float,
  auxiliary: np.ndarray,
  components: int | None = None,
) -> list[Sensitivity]:
  """Jacobians of one-image, one-step updates, condensed.

  Args:
    model: the classifier.
    params: where the client starts.
    x: [images, height, width, channels] float32 in [0, 1].
    y: [images] int32.
    learning_rate: the client's step size.
    auxiliary: [n, height, width, channels] uint8, images for the prior.
    components: coordinates that are looked at; at most 800 where None.

  Returns:
    One Sensitivity an image.

  Raises:
    UserError: auxiliary images that give no prior, or more components than an
      image has values.
  """
  prior = coordinates.fitted(model.image_shape, auxiliary)
  pixels = prior.deviation.size
  if components is None:
    components = min(COMPONENTS, pixels)
  if not 1 <= components <= pixels:
    raise errors.UserError(
      f"components={components}: expected 1 to the {pixels} values of an image."
    )
  deviation = prior.deviation.reshape(-1)
  order = np.argsort(-deviation)
  chosen, others = order[:components], order[components:]

  @jax.jit
  def condense(params, image, label):
    center = prior.from_images(image[None]).reshape(-1)

    def update(z):
      moved = prior.to_images(center.at[chosen].add(z))
      return core.simulate(
        model, params, moved[None], label[None, None], learning_rate
      )

    value, push = jax.linearize(update, jnp.zeros(components))
    jacobian = jax.lax.map(push, jnp.eye(components), batch_size=50)
    rows = [j.reshape(components, -1) for j in jax.tree.leaves(jacobian)]
    signal = jnp.stack(
      [jnp.mean(jnp.square(leaf)) for leaf in jax.tree.leaves(value)]
    )
    return rows, signal

  names = tuple(trees.leaf_names(params))
  found = []
  for image, label in zip(x, y, strict=True):
    rows, signal = condense(params, jnp.asarray(image), jnp.asarray(label))
    # In float64: a leaf sent finely weighs so much that a float32 product's
    # rounding would make the posterior's precision indefinite.
    wide = [np.asarray(row, np.float64) for row in rows]
    found.append(
      Sensitivity(
        names,
        np.stack([row @ row.T for row in wide]),
        np.asarray(signal),
        deviation[chosen] ** 2,
        float(np.sum(deviation[others] ** 2)),
        pixels,
      )
    )
  return found


def expected_psnr_db(
  sensitivities: Sequence[Sensitivity],
  noise: np.ndarray,
  share: np.ndarray | float = 1.0,
) -> np.ndarray:
  """PSNR that the maximum a posteriori attack is expected to reach.

  The posterior covariance is (sum over leaves of G_l / noise_l + I)^-1 in
  whitened coordinates; its trace, weighted by the variances, is the
  expected squared error.

  Args:
    sensitivities: one an image.
    noise: [images, leaves] float, mean squared error of each leaf's decoded
      entries (as `Bins.variance`, averaged); infinite for a leaf that is not
      sent.
    share: [images, leaves] float, how much of each leaf was sent, entries
      chosen at random; what the others say is taken to be as much as these do.

  Returns:
    [images] float64, dB.
  """
  result = []
  shares = np.broadcast_to(np.float64(share), np.shape(noise))
  for image, variance, sent in zip(sensitivities, noise, shares, strict=True):
    floor = _RESOLUTION**2 * image.signal + 1e-30
    weight = sent / (np.asarray(variance, np.float64) + floor)
    precision = np.tensordot(weight, image.grams, 1)
    precision[np.diag_indices_from(precision)] += 1.0
    factor, info = scipy.linalg.lapack.dpotrf(precision, lower=1)
    if info:
      raise FloatingPointError("the posterior precision is not positive")
    inverse, _ = scipy.linalg.lapack.dpotri(factor, lower=1)
    error = np.sum(np.diag(inverse) * image.variance) + image.rest
    result.append(-10 * np.log10(error / image.pixels))
  return np.array(result)
