"""The coordinates in which an attack searches for images.

Natural images have far more power at low spatial frequencies, and in brightness
than in colour. A search in coordinates where every unit is one standard
deviation of an image needs several times fewer iterations than one in pixels,
and ends at a likelier image where the update leaves a choice. The cosine
transform of positions together with a rotation of the colours at each frequency
is close to the principal components of photographs, costs two small matrix
products, and can be fitted to few images without overfitting. Small images of
one kind in one place, such as digits, are far from stationary: there a full
covariance, shrunk towards that of the cosine transform, is a better prior.
"""

from collections.abc import Callable, Iterator
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mpqfl_jax import errors
from mpqfl_jax.types import Array, Model

# Brightness, and two differences of colour (Ohta, Kanade and Sakai 1980).
_OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]], np.float32)
# Deviation of a colour difference relative to that of brightness, roughly that
# of photographs.
_COLOUR = 0.35
# Deviation of where a search starts, in those of images: noise as strong as an
# image's own takes a search many steps to be rid of.
NEAR_MEAN = 0.1


class Coordinates(NamedTuple):
  """A linear map from coordinates to images.

  Attributes:
    shape: of one image's coordinates, (height, width, channels).
    deviation: [height, width, channels], how far an image moves, as a root sum
      of squares over pixels, for a unit step of one coordinate; the steps are
      orthogonal.
    to_images: coordinates of any shape that flattens to whole images ->
      [images, height, width, channels], not clipped to [0, 1].
    from_images: its inverse, [images, height, width, channels] -> coordinates
      of the same shape.
  """

  shape: tuple[int, int, int]
  deviation: np.ndarray
  to_images: Callable[[Array], Array]
  from_images: Callable[[Array], Array]


def cosine_matrix(n: int) -> np.ndarray:
  """The orthonormal DCT-II, [frequency, position] float32."""
  positions = np.arange(n)
  angle = np.pi / n * (positions[None] + 0.5) * positions[:, None]
  matrix = math.sqrt(2 / n) * np.cos(angle)
  matrix[0] /= math.sqrt(2)
  return matrix.astype(np.float32)


def _spectral(mean: np.ndarray, factor: np.ndarray) -> Coordinates:
  """x = mean + inverse DCT of (z times a matrix over channels a frequency).

  Args:
    mean: broadcastable to [height, width, channels].
    factor: [height, width, channels, channels]: row i is where coordinate i of
      that frequency points; the rows are orthogonal.
  """
  height, width, channels, _ = factor.shape
  rows, columns = cosine_matrix(height), cosine_matrix(width)
  inverse = np.linalg.inv(factor.astype(np.float64)).astype(np.float32)
  shape = (height, width, channels)

  def to_images(z: Array) -> Array:
    z = z.reshape(-1, *shape)
    spectrum = sum(z[..., i, None] * factor[..., i, :] for i in range(channels))
    half = jnp.einsum("fp,bfgc->bpgc", rows, spectrum)
    return jnp.einsum("gq,bpgc->bpqc", columns, half) + mean

  def from_images(x: Array) -> Array:
    half = jnp.einsum("fp,bpqc->bfqc", rows, x - mean)
    spectrum = jnp.einsum("gq,bfqc->bfgc", columns, half)
    return jnp.einsum("bfgc,fgcd->bfgd", spectrum, inverse)

  deviation = np.sqrt(np.sum(np.square(factor), -1))
  return Coordinates(shape, deviation, to_images, from_images)


def natural(model: Model, exponent: float = 1.0) -> Coordinates:
  """Coordinates for natural images in general: no images are needed.

  The deviation at frequency f is proportional to (1 + f)^-exponent, about 1 for
  photographs (Field 1987), and is scaled so that a standard normal point has
  the pixel variance, over all channels, that the model normalises by.

  Args:
    model: gives shape, mean and deviation of the images.
    exponent: fall of the deviation with frequency; 0 gives pixels.
  """
  height, width, channels = model.image_shape
  frequency = np.hypot(np.arange(height)[:, None], np.arange(width))
  deviation = (1.0 + frequency) ** -exponent
  deviation /= np.sqrt(np.mean(deviation**2))
  colours = np.diag(model.std)
  if channels == 3 and exponent:
    colours = _OPPONENT / np.linalg.norm(_OPPONENT, axis=1, keepdims=True)
    spread = np.array([1, _COLOUR, _COLOUR])
    spread *= np.sqrt(np.mean(model.std**2) / np.mean(spread**2))
    colours = colours * spread[:, None]
  factor = deviation[..., None, None] * colours
  return _spectral(
    np.asarray(model.mean, np.float32), factor.astype(np.float32)
  )


# Images of more values keep the cosine transform: a matrix of all pairs would
# be read twice in every step of a search.
MAX_FULL = 1024
# How much of the cosine transform's covariance the full one keeps; 1 is all.
SHRINKAGES = (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)


def check(shape: tuple[int, int, int], auxiliary: np.ndarray) -> None:
  """Refuses auxiliary images that no prior can be fitted to.

  Args:
    shape: of an image, (height, width, channels).
    auxiliary: [images, height, width, channels] uint8.

  Raises:
    UserError: too few images, or of another shape or type.
  """
  expected = tuple(shape)
  if auxiliary.dtype != np.uint8 or auxiliary.shape[1:] != expected:
    raise errors.UserError(
      f"auxiliary images have shape {auxiliary.shape} and type"
      f" {auxiliary.dtype}; expected (images, *{expected}) of type uint8."
    )
  if len(auxiliary) < 100:
    raise errors.UserError(
      f"a prior needs at least 100 auxiliary images, not {len(auxiliary)}."
    )


def _parts(auxiliary: np.ndarray) -> Iterator[np.ndarray]:
  """The images as float32 from 0 to 255, about a thousand at a time."""
  for part in np.array_split(auxiliary, -(-len(auxiliary) // 1000)):
    yield part.astype(np.float32)


def fitted(
  shape: tuple[int, int, int], auxiliary: np.ndarray, stationary: bool = False
) -> Coordinates:
  """Coordinates in which images of the auxiliary set are about white.

  The origin is their mean image. At each frequency the covariance over channels
  is theirs; coefficients of different frequencies are taken as uncorrelated.
  For images of at most `MAX_FULL` values the full covariance takes its place,
  where it finds images that it was not fitted to more likely.

  Args:
    shape: of an image, (height, width, channels).
    auxiliary: [images, height, width, channels] uint8.
    stationary: keeps the cosine transform in any case.

  Raises:
    UserError: see `check`.
  """
  check(shape, auxiliary)
  height, width, channels = shape
  rows, columns = cosine_matrix(height), cosine_matrix(width)
  total = np.zeros(shape)
  for part in _parts(auxiliary):
    total += part.sum(0)
  mean = (total / len(auxiliary) / 255.0).astype(np.float32)
  covariance = np.zeros((height, width, channels, channels))
  for part in _parts(auxiliary):
    x = part / 255.0 - mean
    spectrum = np.einsum("fp,bpqc->bfqc", rows, x, optimize=True)
    spectrum = np.einsum("gq,bfqc->bfgc", columns, spectrum, optimize=True)
    covariance += np.einsum(
      "bfgc,bfgd->fgcd", spectrum, spectrum, optimize=True
    )
  covariance /= len(auxiliary)
  # A pixel step of 1/255 is rounded in the data; below a tenth of its variance
  # there is nothing to know.
  covariance += np.eye(channels) * (0.1 * (1 / 255) ** 2 / 12)
  variance, directions = np.linalg.eigh(covariance)
  factor = np.sqrt(variance)[..., None] * directions.swapaxes(-1, -2)
  simple = _spectral(mean, factor.astype(np.float32))
  if stationary or mean.size > MAX_FULL:
    return simple
  return _full(simple, auxiliary)


def _full(simple: Coordinates, auxiliary: np.ndarray) -> Coordinates:
  """Principal components of images, a share of their covariance shrunk.

  The share is the one of `SHRINKAGES` under which every tenth image is most
  likely, by a covariance of the others (as Ledoit and Wolf 2004 shrink towards
  a simple one, with the share found by likelihood instead of in closed form).
  """
  mean = np.asarray(simple.to_images(jnp.zeros(simple.shape)))[0]
  white = np.concatenate(
    [
      np.asarray(simple.from_images(jnp.asarray(part) / 255))
      for part in _parts(auxiliary)
    ]
  ).reshape(len(auxiliary), -1)
  held = np.arange(len(white)) % 10 == 9
  # In coordinates that the simple covariance makes white, it is one.
  rest = white[~held]
  variance, directions = np.linalg.eigh(rest.T @ rest / len(rest))
  power = np.mean(np.square(white[held] @ directions), 0)
  costs = []
  for share in SHRINKAGES:
    shrunk = (1 - share) * np.maximum(variance, 0.0) + share
    costs.append(np.sum(power / shrunk + np.log(shrunk)))
  share = SHRINKAGES[int(np.argmin(costs))]
  if share == 1.0:
    return simple
  # Of all images, and in pixels, where its components are orthogonal steps.
  basis = np.asarray(
    simple.to_images(jnp.eye(mean.size, dtype=jnp.float32))
  ).reshape(mean.size, -1) - mean.reshape(-1)
  second = white.T @ white / len(white)
  shrunk = (1 - share) * second + share * np.eye(mean.size, dtype=np.float32)
  variance, directions = np.linalg.eigh(
    basis.T.astype(np.float64) @ shrunk @ basis
  )
  # Largest first, as frequencies are.
  deviation = np.sqrt(variance[::-1])
  directions = directions[:, ::-1]
  forward = (deviation * directions).T.astype(np.float32)
  inverse = (directions / deviation).astype(np.float32)
  shape = simple.shape

  def to_images(z: Array) -> Array:
    return (z.reshape(-1, mean.size) @ forward).reshape(-1, *shape) + mean

  def from_images(x: Array) -> Array:
    return ((x - mean).reshape(-1, mean.size) @ inverse).reshape(-1, *shape)

  return Coordinates(
    shape, deviation.reshape(shape).astype(np.float32), to_images, from_images
  )
