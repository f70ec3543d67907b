"""Maximum a posteriori inversion: exact likelihood of the payload, image prior.

The strongest attack here on quantised updates. Balunovic et al. 2022 show that
every gradient inversion is an approximation of the Bayes-optimal attack
(section 4): this one writes down both factors. The likelihood is that of the
codes as they were sent, interval by interval; the prior is a Gaussian fitted to
auxiliary images, in whose whitened coordinates the search moves. The likelihood
is smoothed and the smoothing is lowered as the search goes on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpqfl_jax import errors
from mpqfl_jax.attacks import coordinates, core, objectives
from mpqfl_jax.attacks import labels as labels_lib
from mpqfl_jax.types import Array, Key, Model, Observation

# Weight of the squared distance by which a pixel leaves [0, 1].
_BOX = 10.0


class State(NamedTuple):
  """Whitened coordinates, Adam's moments, and the labels held fixed.

  Attributes:
    z: [images, height, width, channels] float32.
    adam: optax state.
    labels: [steps, batch] int32.
  """

  z: Array
  adam: optax.ScaleByAdamState
  labels: Array


def maximum_a_posteriori(
  model: Model,
  steps: int = 1,
  batch: int = 1,
  *,
  auxiliary: np.ndarray | None = None,
  iterations: int = 600,
  restarts: int = 1,
  learning_rate: float = 0.05,
  first_smoothing: float = 1.0,
  last_smoothing: float = 1e-4,
  spread: float = 0.3,
) -> core.Attack:
  """Most probable images given the payload and a prior from auxiliary images.

  Args:
    model: the classifier that was attacked.
    steps: local steps of the client.
    batch: images in a step.
    auxiliary: [images, height, width, channels] uint8, images of the same kind
      as the client's and disjoint from them.
    iterations: Adam steps.
    restarts: random starts, of which the most probable result counts.
    learning_rate: Adam's first rate, in deviations of the prior; it falls to 0
      along a cosine.
    first_smoothing: smoothing of the likelihood at the start, in root mean
      squares of a leaf.
    last_smoothing: smoothing after four fifths of the iterations.
    spread: deviation of the starting point, in deviations of the prior.

  Raises:
    UserError: no auxiliary images.
  """
  if auxiliary is None:
    raise errors.UserError(
      "attack 'map' needs auxiliary images for its prior; none were given."
    )
  images = steps * batch
  prior = coordinates.fitted(model, np.asarray(auxiliary))
  adam = optax.scale_by_adam(b1=0.9, b2=0.99)
  rate = optax.cosine_decay_schedule(learning_rate, iterations, alpha=0.01)
  smoothing = optax.exponential_decay(
    first_smoothing,
    max(1, int(0.8 * iterations)),
    last_smoothing / first_smoothing,
    end_value=last_smoothing,
  )

  def loss(z, labels, observation: Observation, width: Array) -> Array:
    x = prior.to_images(z)
    update = core.simulate(
      model,
      observation.params,
      x.reshape(steps, batch, *model.image_shape),
      labels,
      observation.learning_rate,
    )
    outside = jnp.sum(jnp.square(x - jnp.clip(x, 0.0, 1.0)))
    return (
      -objectives.log_likelihood(update, observation, width)
      + 0.5 * jnp.sum(jnp.square(z))
      + _BOX * outside
    )

  def init(key: Key, observation: Observation) -> State:
    z = spread * jax.random.normal(key, (images, *model.image_shape))
    labels = observation.labels
    if labels is None:
      labels = labels_lib.infer(model, observation, steps, batch)
    return State(z, adam.init(z), labels)

  def step(state: State, observation: Observation) -> tuple[State, Array]:
    count = state.adam.count
    width = smoothing(count)
    value, gradient = jax.value_and_grad(loss)(
      state.z, state.labels, observation, width
    )
    direction, moments = adam.update(gradient, state.adam)
    z = state.z - rate(count) * direction
    # Values under different smoothing do not compare: only the last counts.
    final = width <= last_smoothing * 1.0001
    value = jnp.where(final, value, jnp.inf)
    return State(z, moments, state.labels), value

  def extract(state: State) -> tuple[Array, Array]:
    x = jnp.clip(prior.to_images(state.z), 0.0, 1.0)
    return x, state.labels.reshape(images)

  def check(observation: Observation) -> None:
    core.check_labels(observation, steps, batch)
    if observation.labels is None:
      labels_lib.check(observation.params, model, images)

  return core.Attack(
    "map",
    init,
    step,
    extract,
    lambda state: jnp.bool_(False),
    check,
    images,
    iterations,
    restarts,
  )
