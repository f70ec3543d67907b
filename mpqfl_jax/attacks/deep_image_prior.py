"""An untrained convolutional generator as the prior of images.

Ulyanov et al. 2018 found that such a generator, fitted to one image, takes to
natural images long before noise. Jeong et al. 2021 (there GION)
search over its weights for the image behind a gradient. Nothing is trained
beforehand and no weights are needed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpqfl_jax import layers as layers_lib
from mpqfl_jax.attacks import core, descent, focus, objectives
from mpqfl_jax.types import Array, Key, Model, PyTree

# Doublings of the side from the input to the image.
_DOUBLINGS = 3


def generator(model: Model, work: core.Work, width: int) -> descent.Variables:
  """Weights of a generator and, for each image, its input.

  Noise of an eighth of the image's sides; three times: convolution 3x3, leaky
  ReLU, nearest-neighbour doubling; at last a convolution to the channels and a
  sigmoid.

  Args:
    model: gives the shape of the images.
    work: gives their number; all share the weights.
    width: channels inside.
  """
  height, wide, channels = model.image_shape
  small = [-(-side // 2**_DOUBLINGS) for side in (height, wide)]
  convolve = layers_lib.convolution(layers_lib.ATTACK_FORM)
  outputs = [width] * (_DOUBLINGS + 1) + [channels]

  def init(key: Key) -> PyTree:
    keys = jax.random.split(key, len(outputs) + 1)
    noise = jax.random.normal(keys[0], (work.images, *small, width))
    variables = {"input": noise}
    for i, (k, out) in enumerate(zip(keys[1:], outputs, strict=True)):
      # He et al. 2015; the last layer starts near grey.
      scale = np.sqrt(2 / (9 * width)) if i < len(outputs) - 1 else 1e-2
      variables[f"kernel{i}"] = scale * jax.random.normal(k, (3, 3, width, out))
      variables[f"bias{i}"] = jnp.zeros(out)
    return variables

  def to_images(v: PyTree) -> Array:
    h = v["input"]
    for i in range(len(outputs)):
      h = convolve(
        h, v[f"kernel{i}"], (1, 1), "SAME", dimension_numbers=layers_lib.NHWC
      )
      h = h + v[f"bias{i}"]
      if i == len(outputs) - 1:
        break
      # Without a scale of their own, features drift as the weights do.
      h = h - jnp.mean(h, (1, 2), keepdims=True)
      h = h * jax.lax.rsqrt(jnp.mean(h**2, (1, 2), keepdims=True) + 1e-5)
      h = jax.nn.leaky_relu(h, 0.2)
      if i < _DOUBLINGS:
        h = h.repeat(2, 1).repeat(2, 2)
    x = jax.nn.sigmoid(h[:, :height, :wide])
    return (x - model.mean) / model.std

  return descent.Variables(init, to_images, lambda v: v)


def deep_image_prior(
  model: Model,
  work: core.Work,
  *,
  iterations: int = 2000,
  restarts: int = 1,
  width: int = 64,
  total_variation: float = 1e-3,
  learning_rate: float = 1e-2,
  objective: str = "cosine",
  layers: str = focus.ALL,
) -> core.Attack:
  """Searches the weights of an untrained generator for the update's images.

  Jeong et al. 2021, without a trained generator to start from;
  Adam with a rate that falls by a cosine.

  Args:
    model: the classifier that was attacked.
    work: what the client did.
    iterations: Adam steps.
    restarts: random generators, of which the one with the lowest objective
      counts.
    width: channels of the generator.
    total_variation: weight of the image's total variation.
    learning_rate: Adam's first rate.
    objective: one of `objectives.OBJECTIVES`.
    layers: whose part of the update is compared (`focus.focused`).
  """
  distance = core.choose("objective", objective, objectives.OBJECTIVES)
  return descent.attack(
    "deep_image_prior",
    model,
    work,
    generator(model, work, width),
    distance,
    lambda z: total_variation * objectives.total_variation(z),
    optax.adam(optax.cosine_decay_schedule(learning_rate, iterations)),
    iterations=iterations,
    restarts=restarts,
    layers=layers,
  )
