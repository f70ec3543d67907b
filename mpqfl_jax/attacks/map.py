"""Maximum a posteriori inversion: exact likelihood of the payload, image prior.

The strongest attack here on quantised updates. Balunovic et al. 2022 show that
every gradient inversion is an approximation of the Bayes-optimal attack
(section 4): this one writes down both factors. The likelihood is that of the
codes as they were sent, interval by interval; the prior is a Gaussian fitted to
auxiliary images, in whose whitened coordinates the search moves. The likelihood
is smoothed, and the smoothing is lowered in stages.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import errors
from mpqfl_jax.attacks import coordinates, core, lbfgs, objectives
from mpqfl_jax.attacks import labels as labels_lib
from mpqfl_jax.types import Array, Key, Model, Observation

# Weight of the squared distance by which a pixel leaves [0, 1].
_BOX = 10.0


class State(NamedTuple):
  """Optimiser over whitened coordinates, and the labels held fixed.

  Attributes:
    optimizer: L-BFGS over the coordinates of all images as one vector.
    taken: [] int32, iterations taken.
    labels: [steps, batch] int32.
  """

  optimizer: lbfgs.State
  taken: Array
  labels: Array


def maximum_a_posteriori(
  model: Model,
  work: core.Work,
  *,
  auxiliary: np.ndarray | None = None,
  iterations: int = 500,
  restarts: int = 1,
  stages: int = 5,
  history: int = 50,
  first_smoothing: float = 1.0,
  last_smoothing: float = 1e-4,
  spread: float = 0.3,
  stationary: bool = False,
) -> core.Attack:
  """Most probable images given the payload and a prior from auxiliary images.

  Args:
    model: the classifier that was attacked.
    work: what the client did.
    auxiliary: [images, height, width, channels] uint8, images of the same kind
      as the client's and disjoint from them.
    iterations: L-BFGS steps over all stages.
    restarts: random starts, of which the most probable result counts.
    stages: values of the smoothing, from the first to the last in equal ratios.
    history: curvature pairs kept.
    first_smoothing: smoothing of the likelihood at the start, in root mean
      squares of a leaf.
    last_smoothing: smoothing in the last stage.
    spread: deviation of the starting point, in deviations of the prior.
    stationary: keeps to a prior that is the same everywhere in the image, as it
      is for large ones; see `coordinates.fitted`.

  Raises:
    UserError: no auxiliary images, or stages that do not fit.
  """
  if not 2 <= stages <= iterations:
    raise errors.UserError(
      f"attack 'map': stages={stages}, expected 2 to iterations={iterations}."
    )
  if auxiliary is None:
    raise errors.UserError(
      "attack 'map' needs auxiliary images for its prior; none were given."
    )
  images = work.images
  prior = coordinates.fitted(model, np.asarray(auxiliary), stationary)
  every = iterations // stages
  ratio = (last_smoothing / first_smoothing) ** (1 / (stages - 1))

  def smoothing(count):
    stage = jnp.minimum(count // every, stages - 1)
    return first_smoothing * ratio**stage

  def loss(z, labels, observation: Observation, width: Array) -> Array:
    x = prior.to_images(z)
    update = core.explain(model, observation, x, labels, work)
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
      labels = labels_lib.infer(model, observation, work)
    return State(lbfgs.init(z.reshape(-1), history), jnp.int32(0), labels)

  def step(state: State, observation: Observation) -> tuple[State, Array]:
    count = state.taken
    width = smoothing(count)
    # A new stage has another objective: its value at this point is unknown, and
    # the curvature found so far is not its own.
    fresh = (count % every == 0) & (count < stages * every)
    o = state.optimizer
    o = o._replace(
      value=jnp.where(fresh, jnp.inf, o.value),
      gradient=jnp.where(fresh, 0.0, o.gradient),
      filled=jnp.where(fresh, 0, o.filled),
    )
    # Values under different smoothing do not compare: only the last counts.
    value = jnp.where(count >= (stages - 1) * every, o.value, jnp.inf)
    o = lbfgs.step(lambda z: loss(z, state.labels, observation, width), o)
    return State(o, count + 1, state.labels), value

  def extract(state: State) -> tuple[Array, Array]:
    x = jnp.clip(prior.to_images(state.optimizer.x), 0.0, 1.0)
    return x, state.labels.reshape(images)

  def finished(state: State) -> Array:
    # A failure of the stage before does not count.
    last = state.taken > (stages - 1) * every
    return last & (state.optimizer.failures >= 3)

  def check(observation: Observation) -> None:
    core.check_labels(observation, work)
    if observation.labels is None:
      labels_lib.check(observation.params, model, images)

  return core.Attack(
    "map",
    init,
    step,
    extract,
    finished,
    check,
    images,
    iterations,
    restarts,
  )
