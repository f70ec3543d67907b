"""Defences of the literature without a proof, inside a client's training.

Each is a `local.BatchGradient`, and what an attacker who knows it can do about
it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import errors, local, models, numerics, trees
from mpqfl_jax.types import Array, Bins, Key, Model, Params, Update

# Rows of the features' Jacobian that are held at once.
_ROWS = 32
# Variance of what is not sent, in mean squares of what is.
_UNKNOWN = 1e6


class Mixup(NamedTuple):
  """Images and labels of a batch, each mixed with its neighbour's.

  Source: Zhang et al. 2018, equation 1; against gradient inversion, Huang et
  al. 2021, section 3.

  Attributes:
    alpha: of the Beta distribution that a step's weight is drawn from.
  """

  alpha: float

  def weight(self, key: Key) -> Array:
    """Share that an image keeps of itself in one step, [] in [1/2, 1]."""
    drawn = jax.random.beta(key, self.alpha, self.alpha)
    return jnp.maximum(drawn, 1 - drawn)

  def weights(self, batches: Key, steps: int) -> Array:
    """The weights of a client's steps, [steps].

    Args:
      batches: `federated.ClientKeys.batches` of the client in its round.
      steps: of all epochs.
    """
    number = jnp.arange(steps)
    return jax.vmap(lambda i: self.weight(local.step_key(batches, i)))(number)


def mixup(alpha: float = 1.0) -> Mixup:
  """Mixing within a batch; a batch of one image stays as it is.

  Args:
    alpha: of the Beta distribution; 1 draws the weight uniformly.

  Raises:
    UserError: `alpha` is not a positive number.
  """
  numerics.require_positive("alpha", alpha)
  return Mixup(float(alpha))


def mixed_gradient(model: Model, mixing: Mixup) -> local.BatchGradient:
  """The gradient of the mean loss over a mixed batch."""

  def mean_loss(params, x, y, mask, count):
    losses = models.cross_entropy(model, params, x, y)
    return jnp.sum(mask * losses) / count

  def gradient(params, examples, rows, mask, count, key):
    # Those present stand first: the neighbour of the last is the first.
    slot = jnp.arange(len(rows))
    present = jnp.maximum(jnp.sum(mask).astype(jnp.int32), 1)
    neighbour = jnp.where(slot + 1 < present, slot + 1, 0)
    x, y = local.images(examples, rows), examples.y[rows]
    x, y = models.mix(model, x, y, mixing.weight(key), neighbour)
    return jax.value_and_grad(mean_loss)(params, x, y, mask, count)

  return gradient


class Soteria(NamedTuple):
  """Withholds the last layer's gradient for the features that tell most.

  Source: Sun et al. 2021, section 4.3 and algorithm 1.

  Attributes:
    ratio: share of the features that is withheld.
  """

  ratio: float


def soteria(ratio: float = 0.5) -> Soteria:
  """Soteria at a ratio; the paper takes up to 0.8.

  Raises:
    UserError: the ratio is not in (0, 1).
  """
  if not 0 < ratio < 1:
    raise errors.UserError(
      f"ratio={ratio}: expected a number between 0 and 1, the share of the last"
      " layer's inputs whose gradient is withheld."
    )
  return Soteria(float(ratio))


def sensitivity(model: Model, params: Params, x: Array) -> Array:
  """How far a feature moves with the image, relative to the feature.

  Args:
    model: ends in a dense layer.
    params: its parameters.
    x: [batch, height, width, channels] in [0, 1].

  Returns:
    [batch, features]: the L2 norm of a feature's gradient in the image over its
    magnitude; infinite for a feature that is zero, whose gradient is, too.

  Raises:
    UserError: the model has no last dense layer.
  """
  kernel = models.head(params, model.num_classes).kernel
  weights = trees.get(params, kernel)

  def projected(u, image):
    # The features' product with u, and a bias that gradients do not see.
    moved = trees.replace(params, kernel, weights.at[:, 0].set(u))
    return model.apply(moved, image[None])[0, 0]

  def of_image(image):
    feature = jax.grad(projected)(jnp.zeros(len(weights)), image)
    rows = jax.lax.map(
      lambda u: jnp.sum(jnp.square(jax.grad(projected, 1)(u, image))),
      jnp.eye(len(weights)),
      batch_size=_ROWS,
    )
    size = jnp.abs(feature)
    return jnp.where(size > 0, jnp.sqrt(rows) / size, jnp.inf)

  return jax.lax.map(of_image, x)


def withheld_features(score: Array, ratio: float) -> Array:
  """Which features are withheld: those of the smallest scores, [features]."""
  count = int(np.clip(round(ratio * len(score)), 1, len(score) - 1))
  rank = jnp.argsort(jnp.argsort(score))
  return rank < count


def pruned_gradient(model: Model, chosen: Soteria) -> local.BatchGradient:
  """The batch's mean gradient without the rows of the withheld features.

  The scores of a batch are the sums over its images, as in the authors' code.
  """
  mean = local.mean_gradient(model)

  def gradient(params, examples, rows, mask, count, key):
    loss, grad = mean(params, examples, rows, mask, count, key)
    x = local.images(examples, rows)
    each = jnp.where(mask[:, None] > 0, sensitivity(model, params, x), 0.0)
    hidden = withheld_features(jnp.sum(each, 0), chosen.ratio)
    kernel = models.head(params, model.num_classes).kernel
    shown = jnp.where(hidden[:, None], 0.0, trees.get(grad, kernel))
    return loss, trees.replace(grad, kernel, shown)

  return gradient


def unseen_rows(bins: Bins, update: Update, kernel: tuple[str, ...]) -> Bins:
  """Bins that say nothing of a kernel's rows that were sent as zero.

  The answer to Soteria of an attacker who knows it: rows that were withheld in
  every step weigh nothing. One that was withheld in some steps only looks as if
  it had been sent.

  Args:
    bins: of the update as it was sent.
    update: as it was decoded.
    kernel: its path.
  """
  sent = trees.get(update, kernel)
  zero = jnp.all(sent == 0, 1, keepdims=True)
  unknown = _UNKNOWN * jnp.mean(jnp.square(sent)) + 1e-20

  def replace(tree, value):
    changed = jnp.where(zero, value, trees.get(tree, kernel))
    return trees.replace(tree, kernel, changed)

  return bins._replace(
    lower=replace(bins.lower, -jnp.inf),
    upper=replace(bins.upper, jnp.inf),
    variance=replace(bins.variance, unknown),
  )


# What a defence puts in place of the mean loss's gradient.
GradientRule = Callable[[Model], local.BatchGradient]
