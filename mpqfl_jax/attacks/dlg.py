"""Deep Leakage from Gradients, and what grew out of it directly.

Dummy images, and dummy label logits where the labels are unknown, are moved by
L-BFGS until their update equals the observed one.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpqfl_jax import errors
from mpqfl_jax.attacks import coordinates, core, focus, lbfgs, objectives
from mpqfl_jax.attacks import labels as labels_lib
from mpqfl_jax.types import Array, Key, Model, Observation


class State(NamedTuple):
  """Optimiser state and the labels that are held fixed.

  Attributes:
    optimizer: L-BFGS over standardised pixels and, where the labels are
      searched for, their logits, as one vector.
    labels: [steps, batch] int32; unused where they are searched for.
    taken: [] int32, iterations taken.
    mark: [] float32, objective when progress was last looked at.
    stalled: [] bool, whether there was next to none since the look before.
  """

  optimizer: lbfgs.State
  labels: Array
  taken: Array
  mark: Array
  stalled: Array


# A search that has not lowered its objective by a hundredth in this many steps
# is over: coarse updates have no exact match to go on for.
_PATIENCE = 100
_PROGRESS = 0.99


def _matching(
  name: str,
  objective,
  infer: bool,
  model: Model,
  work: core.Work,
  iterations: int,
  restarts: int,
  history: int,
  tolerance: float,
  exponent: float,
  spread: float,
  layers: str,
) -> core.Attack:
  images = work.images
  pixels = images * math.prod(model.image_shape)
  search = coordinates.natural(model, exponent)

  def split(v: Array) -> tuple[Array, Array]:
    logits = v[pixels:].reshape(work.steps, work.batch, -1)
    return search.to_images(v[:pixels]), logits

  def joint(observation: Observation) -> bool:
    return observation.labels is None and not infer

  def loss(v: Array, labels: Array, observation: Observation) -> Array:
    x, logits = split(v)
    if joint(observation):
      labels = jax.nn.softmax(logits)
    update = core.explain(model, observation, x, labels, work)
    compared = focus.focused(layers, observation, model, work)
    return objective(update, compared)

  def init(key: Key, observation: Observation) -> State:
    keys = jax.random.split(key)
    v = spread * jax.random.normal(keys[0], (pixels,))
    if joint(observation):
      logits = jax.random.normal(keys[1], (images * model.num_classes,))
      v = jnp.concatenate([v, logits])
    if observation.labels is not None:
      labels = observation.labels
    elif infer:
      labels = labels_lib.infer(model, observation, work)
    else:
      labels = jnp.zeros((work.steps, work.batch), jnp.int32)
    return State(
      lbfgs.init(v, history),
      labels,
      jnp.int32(0),
      jnp.float32(jnp.inf),
      jnp.bool_(False),
    )

  def step(state: State, observation: Observation) -> tuple[State, Array]:
    fn = functools.partial(loss, labels=state.labels, observation=observation)
    value = state.optimizer.value
    optimizer = lbfgs.step(fn, state.optimizer)
    taken = state.taken + 1
    look = taken % _PATIENCE == 0
    return State(
      optimizer,
      state.labels,
      taken,
      jnp.where(look, optimizer.value, state.mark),
      look & ~(optimizer.value < _PROGRESS * state.mark),
    ), value

  def extract(state: State) -> tuple[Array, Array]:
    x, logits = split(state.optimizer.x)
    x = jnp.clip(x, 0.0, 1.0)
    labels = jnp.argmax(logits, -1) if logits.size else state.labels
    return x, labels.reshape(images).astype(jnp.int32)

  def finished(state: State) -> Array:
    stuck = state.stalled | (state.optimizer.failures >= 3)
    return stuck | (state.optimizer.value < tolerance)

  def check(observation: Observation) -> None:
    core.check_labels(observation, work)
    focus.check(layers, observation)
    if infer and observation.labels is None:
      labels_lib.check(observation.params, model, images)
      if images > 1:
        raise errors.UserError(
          f"{name} infers the label of one image; this update comes from"
          f" {images}. Use dlg or inverting_gradients, or give the labels."
        )

  return core.Attack(
    name, init, step, extract, finished, check, images, iterations, restarts
  )


def dlg(
  model: Model,
  work: core.Work,
  *,
  iterations: int = 1200,
  restarts: int = 1,
  history: int = 100,
  tolerance: float = 1e-8,
  exponent: float = 1.0,
  spread: float = coordinates.NEAR_MEAN,
  layers: str = focus.ALL,
) -> core.Attack:
  """Deep Leakage from Gradients: squared distance, soft labels searched too.

  Zhu, Liu and Han 2019, algorithm 1, by L-BFGS as there. Theirs searches in
  pixels from standard normal noise: that is `exponent=0, spread=1`. Ours starts
  near grey in the coordinates of natural images, which needs a quarter of the
  iterations for 15 dB more; no image is known to the adversary.

  Args:
    model: the classifier that was attacked.
    work: what the client did.
    iterations: most L-BFGS steps.
    restarts: random starts, of which the one with the lowest objective counts.
    history: curvature pairs kept.
    tolerance: relative squared distance at which the search ends.
    exponent: of the search coordinates (`coordinates.natural`).
    spread: deviation of the starting point in these coordinates.
    layers: whose part of the update is compared (`focus.focused`).
  """
  return _matching(
    "dlg",
    objectives.squared,
    False,
    model,
    work,
    iterations,
    restarts,
    history,
    tolerance,
    exponent,
    spread,
    layers,
  )


def idlg(
  model: Model,
  work: core.Work,
  *,
  iterations: int = 1200,
  restarts: int = 1,
  history: int = 100,
  tolerance: float = 1e-8,
  exponent: float = 1.0,
  spread: float = coordinates.NEAR_MEAN,
  layers: str = focus.ALL,
) -> core.Attack:
  """Improved DLG: the label is read off the last layer first.

  Zhao, Mopuri and Bilen 2020. Arguments as for `dlg`.
  """
  return _matching(
    "idlg",
    objectives.squared,
    True,
    model,
    work,
    iterations,
    restarts,
    history,
    tolerance,
    exponent,
    spread,
    layers,
  )
