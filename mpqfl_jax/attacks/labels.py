"""Reading labels off the last layer of an update.

The gradient of the cross-entropy with respect to the last layer's bias is the
batch's mean of probabilities minus one-hot labels, so that a label pulls its
entry down and nothing else does.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import errors, models, trees
from mpqfl_jax.attacks import core
from mpqfl_jax.types import Array, Bins, Model, Observation, Params, Update


def scores(update: Update, classes: int) -> Array:
  """One number a class, [classes] float32, low where the class was present.

  The bias entry where a bias was sent; else the sum of the class's kernel
  column, which has the same sign for activations that are never negative
  (Zhao et al. 2020, equation 4).
  """
  paths = models.head(update, classes)
  columns = jnp.sum(trees.get(update, paths.kernel), 0)
  if paths.bias is None:
    return columns
  bias = trees.get(update, paths.bias)
  return jnp.where(jnp.any(bias != 0), bias, columns)


def check(params: Params, model: Model, images: int) -> None:
  """Refuses a model whose last layer does not show its labels.

  Args:
    params: the model's parameters.
    model: the classifier.
    images: steps * batch.

  Raises:
    UserError: the model has no last dense layer, or, for more than one image,
      no bias in it.
  """
  if models.head(params, model.num_classes).bias is None and images > 1:
    raise errors.UserError(
      "label counts of a batch need a last layer with a bias; this model has"
      " none. Give the labels to the attack instead."
    )


def infer(model: Model, observation: Observation, work: core.Work) -> Array:
  """Labels of the images behind an update, ascending, [steps, batch] int32.

  For one image the only negative score is the label's (iDLG; Zhao et al. 2020,
  section 3). For more, the number of images of class c in a step is
  batch * (mean probability of c - gradient of c's bias). In an update of one
  step that is nearly exact, the probabilities are those that the model gives
  the features which the update itself shows: see `shares`. In others they are
  estimated by the model's answer to noise (as in LLG*, Wainakh et al. 2022,
  section 4.2), or half by it and half as equal, which a trained model's are
  more like, whichever comes nearer to whole numbers. The counts are rounded so
  that they sum to the number of images, largest remainder first. Which image
  belongs to which step is not in the update of several steps: labels go to the
  steps in ascending order.

  A blind adversary takes the bias as it came, or where it was withheld the
  columns of the kernel over the sum of the features that noise has. One who
  knows the codec weighs both: see `gradients`.

  Args:
    model: the classifier.
    observation: what the adversary sees.
    work: what the client did.

  Raises:
    UserError: the model has no last dense layer, or, for more than one image,
      no bias in it.
  """
  classes, images = model.num_classes, work.images
  params = observation.params
  if images == 1 and observation.bins is None:
    score = scores(observation.update, classes)
    return jnp.argmin(score).astype(jnp.int32).reshape(1, 1)
  check(params, model, images)
  noise = jax.random.normal(jax.random.key(0), (64, *model.image_shape))
  noise = noise * model.std + model.mean
  paths = models.head(params, classes)
  features = _features(model, params, noise, paths.kernel)
  way = observation.learning_rate * work.steps * work.epochs
  if observation.bins is None:
    assert paths.bias is not None  # checked above
    update = observation.update
    score = scores(update, classes)
    shown = jnp.any(trees.get(update, paths.bias) != 0)
    gradient = score / (jnp.where(shown, 1.0, jnp.sum(features)) * way)
  else:
    update = core.told(observation)
    gradient = gradients(observation, paths, features) / way
  if images == 1:
    return jnp.argmin(gradient).astype(jnp.int32).reshape(1, 1)
  mean = jnp.mean(jax.nn.softmax(model.apply(params, noise)), 0)
  guesses = jnp.stack([mean, (mean + 1 / classes) / 2])
  expected = images * (guesses - gradient)
  whole = jax.vmap(lambda e: round_counts(e, images))(expected)
  counts = whole[jnp.argmin(jnp.sum(jnp.square(expected - whole), 1))]
  if work.steps * work.epochs == 1:
    assert paths.bias is not None  # checked above
    kernel = trees.get(update, paths.kernel) / way
    # Probabilities sum to one, so that the rows of an exact kernel sum to zero;
    # what they do sum to tells how coarse it is, whatever the codec.
    left = jnp.sum(jnp.square(jnp.sum(kernel, 1)))
    exact = left < _EXACT * jnp.sum(jnp.square(kernel))
    layer = trees.get(params, paths.kernel), trees.get(params, paths.bias)
    shown = shares(kernel, gradient, *layer, features, mean, images)
    counts = jnp.where(exact, round_counts(images * shown, images), counts)
  labels = jnp.repeat(
    jnp.arange(classes, dtype=jnp.int32), counts, total_repeat_length=images
  )
  return work.batches(labels)


# Of the square of a kernel's entries: some 1.5 % of noise in each.
_EXACT = 2e-3


def shares(
  kernel: Array,
  gradient: Array,
  weights: Array,
  offset: Array,
  features: Array,
  mean: Array,
  images: int,
) -> Array:
  """Share of each class in a batch, [classes] float32, from an exact gradient.

  The last kernel's gradient is the mean over images of features times
  (probabilities - label). A class that is not there shows the mean features in
  its column; what its images add to a class's own is then the rest of it. The
  last layer gives those features their probabilities, and the bias's gradient
  is a sum of (probabilities - label) over classes, with the shares sought as
  coefficients. The three are repeated in turns, from the mean probabilities
  that noise gives. Ma et al. 2023 ("Instance-wise batch label restoration via
  gradients in federated learning") solve a like system without the turns.

  Args:
    kernel: [features, classes], gradient of the last kernel.
    gradient: [classes], of its bias.
    weights, offset: the last layer, [features, classes] and [classes].
    features: [features], mean over noise.
    mean: [classes], mean probabilities of noise.
    images: in the batch.
  """
  classes = len(gradient)
  spread = jnp.std(features) / 2
  low, high = jnp.min(features) - spread, jnp.max(features) + spread
  probabilities = mean
  for _ in range(_TURNS):
    share = jnp.maximum(probabilities - gradient, 0.0)
    share /= jnp.maximum(jnp.sum(share), 1e-12)
    absent = share < 0.5 / images
    weight = jnp.sum(jnp.where(absent, gradient, 0.0))
    shown = (kernel @ absent) / jnp.maximum(weight, 1e-12)
    typical = jnp.where(weight > _LEAST, shown, features)
    own = typical[:, None] * probabilities - kernel
    own = jnp.clip(own / jnp.maximum(share, 1 / images), low, high)
    answers = jax.nn.softmax(own.T @ weights + offset)
    system = jnp.vstack([(answers - jnp.eye(classes)).T, jnp.ones(classes)])
    found = jnp.linalg.lstsq(system, jnp.append(gradient, 1.0))[0]
    found = jnp.maximum(found, 0.0)
    found /= jnp.maximum(jnp.sum(found), 1e-12)
    probabilities = found @ answers
  return probabilities - gradient


def _features(model: Model, params: Params, x: Array, kernel: tuple) -> Array:
  """The last layer's inputs, [features], mean over images."""
  # They are the gradient of a logit.

  def logit(weights):
    moved = trees.replace(params, kernel, weights)
    return jnp.mean(model.apply(moved, x)[:, 0])

  return jax.grad(logit)(trees.get(params, kernel))[:, 0]


# How far the features of images are from those of noise, and how wrong a
# gradient is that was read off the kernel alone, of their own size.
_APART = 0.3
_WRONG = 0.15
# Errors of entries that were rounded alike add up where they are as alike.
_ALIKE = 0.2
_TURNS = 5
# Probability of absent classes that shows the features well.
_LEAST = 0.05


def gradients(
  observation: Observation, paths: models.Head, features: Array
) -> Array:
  """What the update does to the last bias, [classes] float32.

  An update's last kernel is, image by image, features times what the bias gets,
  so that each of its entries measures the bias, too: coarse codes that were
  rounded at random average out over hundreds of features. Features and bias are
  estimated in turns, each entry of both leaves weighed by what the payload says
  of it. The features are near those of noise, up to a factor that the two
  leaves share.

  Args:
    observation: with `bins`.
    paths: of the last layer.
    features: [features], what noise gives.
  """
  bins = observation.bins
  assert bins is not None
  update = core.told(observation)

  def known(path):
    variance = trees.get(bins.variance, path)
    seen = jnp.isfinite(variance)
    kept = (
      jnp.where(seen, a, 0.0) for a in (trees.get(update, path), variance)
    )
    return *kept, seen

  kernel, variance, seen = known(paths.kernel)
  alike = _alike(bins, paths.kernel)
  size = jnp.sum(jnp.square(kernel), 0) / jnp.maximum(jnp.sum(seen, 0), 1)
  # Rounding to the nearest makes errors that are alike unless the values are
  # spread over steps: by the factor by which a Gaussian of that spread damps a
  # sawtooth, squared.
  spread = jnp.square(_APART) * size
  alike *= jnp.exp(-(np.pi**2) * spread / (3 * variance + 1e-30))
  level = jnp.mean(jnp.square(features)) + 1e-30
  typical = jnp.mean(size) / level
  variance *= 1 + alike * len(features)
  variance += _WRONG * jnp.square(_APART) * level * typical + 1e-30
  weight = jnp.where(seen & (alike < _ALIKE), 1 / variance, 0.0)
  if paths.bias is None:
    bias = error = jnp.zeros(kernel.shape[1])
    shown = jnp.zeros(kernel.shape[1], bool)
  else:
    bias, error, shown = known(paths.bias)

  def turn(h: Array, near: Array) -> tuple[Array, Array, Array]:
    precision = weight.T @ jnp.square(h)
    read = (weight * kernel).T @ h / (precision + 1e-6 / typical)
    doubt = 1 / jnp.maximum(precision, 1e-30)
    trust = shown / (error + doubt + _WRONG * typical / 3)
    factor = (trust @ (read * bias) + 4) / (trust @ jnp.square(read) + 4)
    return near / factor, read * factor, doubt * jnp.square(factor)

  h = near = features
  for _ in range(_TURNS):
    near, read, doubt = turn(h, near)
    doubt += jnp.square(_WRONG) * jnp.maximum(jnp.square(read), typical / 10)
    share = shown * doubt / (doubt + error + 1e-30)
    gradient = share * bias + (1 - share) * read
    # The features again, given what the bias gets.
    least = 1 / (jnp.square(_APART) * level)
    h = (near * least + (weight * kernel) @ gradient) / (
      least + weight @ jnp.square(gradient)
    )
  return gradient


def _alike(bins: Bins, path: tuple) -> Array:
  """How far errors of a column can be one error, [features, classes] in [0, 1].

  Those of noise and of random rounding are not, nor are dithered ones, whose
  grids are shifted at random; nearest codes lie on one grid a column.
  """
  lower, upper = trees.get(bins.lower, path), trees.get(bins.upper, path)
  width = upper - lower
  on = jnp.isfinite(width) & (width > 0)
  turned = 2 * np.pi * jnp.where(on, lower / jnp.where(on, width, 1.0), 0.0)
  count = jnp.sum(on, 0)
  along = jnp.sum(on * jnp.cos(turned), 0) / jnp.maximum(count, 1)
  across = jnp.sum(on * jnp.sin(turned), 0) / jnp.maximum(count, 1)
  grid = jnp.square(along) + jnp.square(across)
  apart = ~jnp.isfinite(lower) & ~jnp.isfinite(upper)
  apart |= trees.get(bins.stochastic, path) | (width == 0)
  return jnp.where(apart, 0.0, jnp.where(count > 0, grid, 1.0))


def round_counts(expected: Array, total: int) -> Array:
  """Non-negative integers with a given sum, near the expected counts.

  Args:
    expected: [classes] float32.
    total: what the result sums to.

  Returns:
    [classes] int32, by largest remainder.
  """
  expected = jnp.maximum(expected, 0.0)
  expected = expected * total / jnp.maximum(jnp.sum(expected), 1e-12)
  whole = jnp.floor(expected)
  missing = total - jnp.sum(whole)
  rank = jnp.argsort(jnp.argsort(whole - expected))
  return (whole + (rank < missing)).astype(jnp.int32)
