"""Robbing the Fed: a server that changes the model to read images off it.

Fowl et al. 2022. This is another threat model than that of all other attacks
here: the server is malicious, not merely curious, and sends its clients a model
with a module of its own in front. All units of the module measure the same
thing, the brightness of the image, against thresholds in ascending order; all
feed the rest of the network by the same weights, so that they get the same
error from it. The gradients of two neighbouring units differ by what came from
images between their thresholds: where that is one image, the quotient of the
weight and the bias difference is the image, whatever the batch.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import errors
from mpqfl_jax.attacks import core
from mpqfl_jax.attacks import labels as labels_lib
from mpqfl_jax.types import Array, Key, Model, Observation

# Default number of units.
BINS = 128
# Parameter names of the module.
_MEASURE, _SPREAD = "imprint1", "imprint2"
# A bias difference below this share of the largest one is rounding error.
_NOTHING = 1e-5
# For an adaptive adversary: below this many deviations of the codec's error.
_DEVIATIONS = 3.0


def implant(model: Model, bins: int, auxiliary: np.ndarray) -> Model:
  """Puts an imprint module in front of a model.

  The module adds to each standardised image a multiple of one fixed pattern, so
  that the model behaves much as before.

  Args:
    model: the classifier that clients expect.
    bins: units of the module. The chance that an image is alone in its bin is
      (1 - 1 / bins) to the power of the number of other images.
    auxiliary: [images, height, width, channels] uint8, images of the same kind
      as the clients', whose brightness gives the thresholds, as many images
      between each two.

  Returns:
    A model with two more entries in its parameters.

  Raises:
    UserError: fewer than 2 bins, or fewer images than bins.
  """
  if bins < 2 or len(auxiliary) < bins:
    raise errors.UserError(
      f"attack 'imprint': bins={bins} with {len(auxiliary)} auxiliary images,"
      " expected at least 2 bins and as many images."
    )
  pixels = int(np.prod(model.image_shape))
  mean = np.asarray(auxiliary, np.float32).mean((1, 2)) / 255
  brightness = ((mean - model.mean) / model.std).mean(-1)
  thresholds = np.quantile(brightness, np.arange(bins) / bins)
  # Images darker than all auxiliary ones fall into the first bin too.
  thresholds[0] -= 10
  bias = -thresholds.astype(np.float32)

  def init(key: Key):
    keys = jax.random.split(key)
    pattern = jax.random.normal(keys[1], (pixels,)) / bins
    return {
      **model.init(keys[0]),
      _MEASURE: {
        "kernel": jnp.full((pixels, bins), 1 / pixels, jnp.float32),
        "bias": jnp.asarray(bias),
      },
      _SPREAD: {"kernel": jnp.tile(pattern, (bins, 1))},
    }

  def apply(params, x: Array) -> Array:
    z = ((x - model.mean) / model.std).reshape(x.shape[0], -1)
    units = z @ params[_MEASURE]["kernel"] + params[_MEASURE]["bias"]
    z = z + jax.nn.relu(units) @ params[_SPREAD]["kernel"]
    return model.apply(params, core.to_images(model, z))

  return model._replace(
    name=f"{model.name} with imprint", init=init, apply=apply, layers=None
  )


def imprint(model: Model, work: core.Work, *, bins: int = BINS) -> core.Direct:
  """Reads the images of a batch off the module that `implant` put in.

  Fowl et al. 2022.

  Args:
    model: the model with the module.
    work: what the client did; one step on any number of images.
    bins: units of the module, as given to `implant`.

  Raises:
    UserError: more than one step.
  """
  if work.steps * work.epochs != 1:
    raise errors.UserError(
      "attack 'imprint' reads the images of one step; this update comes from"
      f" {work}. Use inverting_gradients or map."
    )

  def candidates(observation: Observation) -> list[tuple[float, np.ndarray]]:
    layer = jax.tree.map(np.float64, observation.update[_MEASURE])
    # A unit passes on the images above its threshold: neighbours' difference.
    kernel = layer["kernel"] - np.pad(layer["kernel"][:, 1:], ((0, 0), (0, 1)))
    bias = layer["bias"] - np.pad(layer["bias"][1:], (0, 1))
    least = np.full(bins, _NOTHING * np.abs(layer["bias"]).max() + 1e-30)
    if observation.bins is not None:
      variance = np.asarray(observation.bins.variance[_MEASURE]["bias"])
      both = variance + np.append(variance[1:], 0.0)
      least = np.maximum(least, _DEVIATIONS * np.sqrt(both))
    found = []
    for i in np.flatnonzero(np.abs(bias) > least):
      z = kernel[:, i] / bias[i]
      x = z.reshape(model.image_shape) * model.std + model.mean
      # A mixture of images of one bin leaves [0, 1] where errors differ in
      # sign, and an image does not.
      outside = np.mean(np.square(x - np.clip(x, 0, 1)))
      found.append((outside, np.clip(x, 0, 1)))
    return sorted(found, key=lambda pair: pair[0])

  def solve(observation: Observation, given: core.Help) -> core.Answer:
    del given  # There is nothing random in it.
    found = candidates(observation)[: work.images]
    x = np.full((work.images, *model.image_shape), 0.5, np.float32)
    for i, (_, image) in enumerate(found):
      x[i] = image
    labels = observation.labels
    if labels is None:
      labels = labels_lib.infer(model, observation, work)
    # Images that the module does not show count as unexplained.
    missing = 1 - len(found) / work.images
    outside = sum(error for error, _ in found) / work.images
    return core.Answer(
      x, np.asarray(labels).reshape(work.images), missing + outside, 1
    )

  def check(observation: Observation) -> None:
    core.check_labels(observation, work)
    shape = (int(np.prod(model.image_shape)), bins)
    params = observation.params
    if _MEASURE not in params or params[_MEASURE]["kernel"].shape != shape:
      raise errors.UserError(
        f"attack 'imprint' needs a model that holds its module of {bins} bins,"
        " which a malicious server puts in; this one has none. Use it with"
        " --task=attack, or make the model with imprint.implant."
      )
    if observation.labels is None:
      labels_lib.check(params, model, work.images)

  return core.Direct("imprint", solve, check, work.images)
