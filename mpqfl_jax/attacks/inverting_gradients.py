"""Inverting Gradients: cosine similarity, total variation, signed Adam."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpqfl_jax.attacks import core, objectives
from mpqfl_jax.attacks import labels as labels_lib
from mpqfl_jax.types import Array, Key, Model, Observation


class State(NamedTuple):
  """Standardised pixels, Adam's moments, and the labels held fixed.

  Attributes:
    z: [images, height, width, channels] float32.
    adam: optax state.
    labels: [steps, batch] int32.
  """

  z: Array
  adam: optax.ScaleByAdamState
  labels: Array


def inverting_gradients(
  model: Model,
  steps: int = 1,
  batch: int = 1,
  *,
  iterations: int = 4800,
  restarts: int = 1,
  total_variation: float = 1e-2,
  learning_rate: float = 0.1,
  objective: str = "cosine",
) -> core.Attack:
  """Inverting Gradients: cosine distance by signed Adam with step decay.

  Geiping et al. 2020, section 5: Adam on the sign of the gradient, the rate cut
  to a tenth after 3/8, 5/8 and 7/8 of 4,800 steps, every iterate projected onto
  images in [0, 1]. Labels are inferred where they are not given.

  Args:
    model: the classifier that was attacked.
    steps: local steps of the client.
    batch: images in a step.
    iterations: Adam steps.
    restarts: random starts, of which the one with the lowest objective counts.
    total_variation: weight of the image's total variation.
    learning_rate: Adam's first rate, in standard deviations of a channel.
    objective: one of `objectives.OBJECTIVES`.
  """
  images = steps * batch
  distance = core.choose("objective", objective, objectives.OBJECTIVES)
  low, high = (0 - model.mean) / model.std, (1 - model.mean) / model.std
  shape = (images, *model.image_shape)
  adam = optax.scale_by_adam()
  rate = optax.piecewise_constant_schedule(
    learning_rate, {int(iterations * f): 0.1 for f in (3 / 8, 5 / 8, 7 / 8)}
  )

  def loss(z: Array, labels: Array, observation: Observation) -> Array:
    x = core.to_images(model, z)
    update = core.simulate(
      model,
      observation.params,
      x.reshape(steps, batch, *model.image_shape),
      labels,
      observation.learning_rate,
    )
    prior = total_variation * objectives.total_variation(z)
    return distance(update, observation) + prior

  def init(key: Key, observation: Observation) -> State:
    z = jnp.clip(jax.random.normal(key, shape), low, high)
    labels = observation.labels
    if labels is None:
      labels = labels_lib.infer(model, observation, steps, batch)
    return State(z, adam.init(z), labels)

  def step(state: State, observation: Observation) -> tuple[State, Array]:
    value, gradient = jax.value_and_grad(loss)(
      state.z, state.labels, observation
    )
    now = rate(state.adam.count)
    direction, moments = adam.update(jnp.sign(gradient), state.adam)
    z = jnp.clip(state.z - now * direction, low, high)
    return State(z, moments, state.labels), value

  def extract(state: State) -> tuple[Array, Array]:
    x = jnp.clip(core.to_images(model, state.z), 0.0, 1.0)
    return x, state.labels.reshape(images)

  def check(observation: Observation) -> None:
    core.check_labels(observation, steps, batch)
    if observation.labels is None:
      labels_lib.check(observation.params, model, images)

  return core.Attack(
    "inverting_gradients",
    init,
    step,
    extract,
    lambda state: jnp.bool_(False),
    check,
    images,
    iterations,
    restarts,
  )
