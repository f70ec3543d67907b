"""Reading labels off the last layer of an update.

The gradient of the cross-entropy with respect to the last layer's bias is the
batch's mean of probabilities minus one-hot labels, so that a label pulls its
entry down and nothing else does.
"""

import jax
import jax.numpy as jnp

from mpqfl_jax import errors, models, trees
from mpqfl_jax.attacks import core
from mpqfl_jax.types import Array, Model, Observation, Params, Update


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
  batch * (mean probability of c - gradient of c's bias); the probabilities are
  estimated by the model's answer to noise (as in LLG*, Wainakh et al. 2022,
  section 4.2) and the counts are rounded so that they sum to the number of
  images, largest remainder first. Where a defence withholds the bias, the
  columns of the kernel, over the sum of the features that noise has, take its
  place. Which image belongs to which step is not in
  the update of several steps: labels go to the steps in ascending order.

  Args:
    model: the classifier.
    observation: what the adversary sees.
    work: what the client did.

  Raises:
    UserError: the model has no last dense layer, or, for more than one image,
      no bias in it.
  """
  classes, images = model.num_classes, work.images
  score = scores(observation.update, classes)
  if images == 1:
    return jnp.argmin(score).astype(jnp.int32).reshape(1, 1)
  check(observation.params, model, images)
  noise = jax.random.normal(jax.random.key(0), (64, *model.image_shape))
  noise = noise * model.std + model.mean
  mean = jnp.mean(jax.nn.softmax(model.apply(observation.params, noise)), 0)
  paths = models.head(observation.params, classes)
  assert paths.bias is not None  # checked above
  shown = jnp.any(trees.get(observation.update, paths.bias) != 0)
  per_bias = jnp.where(
    shown, 1.0, _features(model, observation.params, noise, paths.kernel)
  )
  gradient = score / (
    per_bias * observation.learning_rate * work.steps * work.epochs
  )
  counts = round_counts(images * (mean - gradient), images)
  labels = jnp.repeat(
    jnp.arange(classes, dtype=jnp.int32), counts, total_repeat_length=images
  )
  return work.batches(labels)


def _features(model: Model, params: Params, x: Array, kernel: tuple) -> Array:
  """Sum of the last layer's inputs, [], mean over images."""
  # It is the gradient of a logit.

  def logit(weights):
    moved = trees.replace(params, kernel, weights)
    return jnp.mean(model.apply(moved, x)[:, 0])

  return jnp.sum(jax.grad(logit)(trees.get(params, kernel))[:, 0])


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
