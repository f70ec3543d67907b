"""Maximum a posteriori inversion: exact likelihood of the payload, image prior.

The strongest attack here on quantised updates. Balunovic et al. 2022 show that
every gradient inversion is an approximation of the Bayes-optimal attack
(section 4): this one writes down both factors. The likelihood is that of the
codes as they were sent, interval by interval; the prior is a Gaussian fitted to
auxiliary images, in whose whitened coordinates the search moves. The likelihood
is smoothed, and the smoothing is lowered in stages. A learned prior, of blurred
images, takes over where the Gaussian one is done, and the blur is lowered, too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import errors
from mpqfl_jax.attacks import (
  coordinates,
  core,
  denoising,
  focus,
  lbfgs,
  objectives,
)
from mpqfl_jax.attacks import labels as labels_lib
from mpqfl_jax.types import Array, Key, Model, Observation, PyTree

# Weight of the squared distance by which a pixel leaves [0, 1].
_BOX = 10.0
PRIORS = ("gaussian", "stationary", "learned")


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
  last_smoothing: float | None = None,
  spread: float = 0.3,
  prior: str = "gaussian",
  training: int = 1200,
  first_blur: float = 1.0,
  last_blur: float = 0.07,
  layers: str = focus.ALL,
) -> core.Attack:
  """Most probable images given the payload and a prior from auxiliary images.

  Args:
    model: the classifier that was attacked.
    work: what the client did.
    auxiliary: [images, height, width, channels] uint8, images of the same kind
      as the client's and disjoint from them.
    iterations: L-BFGS steps over all stages; half of them are under the learned
      prior where there is one.
    restarts: random starts, of which the most probable result counts.
    stages: values of the smoothing, from the first to the last in equal ratios.
    history: curvature pairs kept.
    first_smoothing: smoothing of the likelihood at the start, in root mean
      squares of a leaf.
    last_smoothing: smoothing in the last stage; None is 1e-4, and 0.01 with the
      learned prior, which a likelihood with edges as sharp as that would hold
      where the Gaussian one left it.
    spread: deviation of the starting point, in deviations of the prior.
    prior: "gaussian"; "stationary", a Gaussian that is the same everywhere in
      the image, as it is for large ones (`coordinates.fitted`); or "learned",
      which goes on from the image that the Gaussian one finds (`denoising`).
      The most probable image is far from the mean where an update says little:
      the learned one is for the others.
    training: steps that the learned prior is trained for.
    first_blur: deviation in pixels of the blur of the learned prior at first.
    last_blur: in the last stage.
    layers: whose part of the update is compared (`focus.focused`).

  Raises:
    UserError: no auxiliary images, no such prior, a blur that it is not trained
      for, or stages that do not fit.
  """
  if prior not in PRIORS:
    raise errors.unknown_name("prior of attack 'map':", prior, PRIORS)
  least, most = denoising.LEAST, denoising.MOST
  if not least <= last_blur <= first_blur <= most:
    raise errors.UserError(
      f"attack 'map': a blur from first_blur={first_blur} to"
      f" last_blur={last_blur}, expected one that falls, from {most} to {least}"
      " at most."
    )
  learned = prior == "learned"
  if last_smoothing is None:
    last_smoothing = 0.01 if learned else 1e-4
  if training < 1:
    raise errors.UserError(
      f"attack 'map': training={training}, expected at least 1 step."
    )
  # Of the smoothing, then of the blur.
  parts = 2 if learned else 1
  if stages < 2 or parts * stages > iterations:
    raise errors.UserError(
      f"attack 'map': stages={stages}, expected 2 to {iterations // parts}, as"
      f" there are iterations={iterations}."
    )
  if auxiliary is None:
    raise errors.UserError(
      "attack 'map' needs auxiliary images for its prior; none were given."
    )
  images = work.images
  auxiliary = np.asarray(auxiliary)
  gaussian = coordinates.fitted(
    model.image_shape, auxiliary, prior == "stationary"
  )
  every = iterations // (parts * stages)
  last = parts * stages - 1

  def lowered(start: float, end: float, stage: Array) -> Array:
    ratio = (end / start) ** (1 / (stages - 1))
    return start * ratio ** jnp.clip(stage, 0, stages - 1)

  def weights() -> PyTree:
    return denoising.fitted(model.image_shape, auxiliary, training)

  def penalty(z: Array, stage: Array) -> Array:
    """Minus the log-density of the images."""
    simple = 0.5 * jnp.sum(jnp.square(z))
    if not learned:
      return simple

    def blurred() -> Array:
      blur = lowered(first_blur, last_blur, stage - stages)
      each = z.reshape(images, *gaussian.shape)
      return jnp.sum(
        denoising.energy(weights(), gaussian, each, jnp.full(images, blur))
      )

    return jax.lax.cond(stage < stages, lambda: simple, blurred)

  def loss(z, labels, observation: Observation, stage: Array) -> Array:
    x = gaussian.to_images(z)
    update = core.explain(model, observation, x, labels, work)
    outside = jnp.sum(jnp.square(x - jnp.clip(x, 0.0, 1.0)))
    smoothing = lowered(first_smoothing, last_smoothing, stage)
    compared = focus.focused(layers, observation, model, work)
    return (
      -objectives.log_likelihood(update, compared, smoothing)
      + penalty(z, stage)
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
    stage = jnp.minimum(count // every, last)
    # A new stage has another objective: its value at this point is unknown, and
    # the curvature found so far is not its own.
    fresh = (count % every == 0) & (count <= last * every)
    o = state.optimizer
    o = o._replace(
      value=jnp.where(fresh, jnp.inf, o.value),
      gradient=jnp.where(fresh, 0.0, o.gradient),
      filled=jnp.where(fresh, 0, o.filled),
    )
    # Values of different stages do not compare: only the last counts.
    value = jnp.where(stage == last, o.value, jnp.inf)
    o = lbfgs.step(lambda z: loss(z, state.labels, observation, stage), o)
    return State(o, count + 1, state.labels), value

  def extract(state: State) -> tuple[Array, Array]:
    x = jnp.clip(gaussian.to_images(state.optimizer.x), 0.0, 1.0)
    return x, state.labels.reshape(images)

  def finished(state: State) -> Array:
    # A failure of the stage before does not count.
    late = state.taken > last * every
    return late & (state.optimizer.failures >= 3)

  def check(observation: Observation) -> None:
    core.check_labels(observation, work)
    focus.check(layers, observation)
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
    weights if learned else lambda: None,
  )
