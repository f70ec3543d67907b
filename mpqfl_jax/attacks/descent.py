"""First-order searches: what Inverting Gradients, TAG and their kin share.

Such an attack is a set of variables with a map to images, a distance of
updates, a prior of images, and an optimiser. Several members can be searched at
once, tied to one another.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpqfl_jax.attacks import coordinates, core, focus
from mpqfl_jax.attacks import labels as labels_lib
from mpqfl_jax.types import Array, Key, Model, Observation, PyTree


class Variables(NamedTuple):
  """What is searched over.

  Attributes:
    init: key -> pytree of arrays.
    to_images: pytree -> [images, height, width, channels], standardised.
    project: pytree -> one whose images are the nearest in [0, 1].
  """

  init: Callable[[Key], PyTree]
  to_images: Callable[[PyTree], Array]
  project: Callable[[PyTree], PyTree]


class State(NamedTuple):
  """Where a search is.

  Attributes:
    v: the variables, with a leading axis of members where there are several.
    optimizer: optax state.
    labels: [steps, batch] int32.
    best: [] int32, the member that explained the update best in the iteration
      before.
  """

  v: PyTree
  optimizer: optax.OptState
  labels: Array
  best: Array


def pixels(model: Model, work: core.Work) -> Variables:
  """Standardised pixels from standard normal noise, kept in [0, 1]."""
  low, high = (0 - model.mean) / model.std, (1 - model.mean) / model.std
  shape = (work.images, *model.image_shape)

  def project(z: Array) -> Array:
    return jnp.clip(z, low, high)

  return Variables(
    lambda key: project(jax.random.normal(key, shape)), lambda z: z, project
  )


def natural(model: Model, work: core.Work) -> Variables:
  """Coordinates of natural images, from near their mean, kept in [0, 1]."""
  search = coordinates.natural(model)
  shape = (work.images, *search.shape)

  def project(v: Array) -> Array:
    return search.from_images(jnp.clip(search.to_images(v), 0.0, 1.0))

  return Variables(
    lambda key: coordinates.NEAR_MEAN * jax.random.normal(key, shape),
    lambda v: (search.to_images(v) - model.mean) / model.std,
    project,
  )


def attack(
  name: str,
  model: Model,
  work: core.Work,
  variables: Variables,
  distance: Callable[[PyTree, Observation], Array],
  prior: Callable[[Array], Array],
  optimizer: optax.GradientTransformation,
  *,
  iterations: int,
  restarts: int,
  signed: bool = False,
  members: int = 1,
  consistency: float = 0.0,
  layers: str = focus.ALL,
) -> core.Attack:
  """Builds an attack that follows a gradient.

  Args:
    name: for flags and result files.
    model: the classifier that was attacked.
    work: what the client did.
    variables: what is searched over.
    distance: (simulated update, observation) -> [] float32.
    prior: standardised images -> [] float32, added to the distance.
    optimizer: its learning rate included.
    iterations: steps.
    restarts: random starts.
    signed: whether the optimiser sees the gradient's sign only.
    members: candidates that are searched at once from one starting point; the
      one with the lowest distance and prior counts.
    consistency: weight of the mean squared distance of the members from their
      mean image.
    layers: whose part of the update is compared (`focus.focused`).
  """

  def fidelity(v, labels: Array, observation: Observation):
    z = variables.to_images(v)
    x = core.to_images(model, z)
    update = core.explain(model, observation, x, labels, work)
    compared = focus.focused(layers, observation, model, work)
    return distance(update, compared) + prior(z), z

  def loss(v, labels: Array, observation: Observation):
    if members == 1:
      value, _ = fidelity(v, labels, observation)
      return value, value[None]
    values, z = jax.vmap(lambda v: fidelity(v, labels, observation))(v)
    apart = jnp.mean(jnp.square(z - jnp.mean(z, 0)))
    # The sum, so that each member's gradient is its own.
    return jnp.sum(values) + members * consistency * apart, values

  def init(key: Key, observation: Observation) -> State:
    v = (
      variables.init(key)
      if members == 1
      else jax.vmap(variables.init)(jax.random.split(key, members))
    )
    labels = observation.labels
    if labels is None:
      labels = labels_lib.infer(model, observation, work)
    return State(v, optimizer.init(v), labels, jnp.int32(0))

  def step(state: State, observation: Observation) -> tuple[State, Array]:
    (_, values), gradient = jax.value_and_grad(loss, has_aux=True)(
      state.v, state.labels, observation
    )
    if signed:
      gradient = jax.tree.map(jnp.sign, gradient)
    change, moments = optimizer.update(gradient, state.optimizer, state.v)
    v = variables.project(optax.apply_updates(state.v, change))
    best = jnp.argmin(values).astype(jnp.int32)
    return State(v, moments, state.labels, best), values[state.best]

  def extract(state: State) -> tuple[Array, Array]:
    v = state.v
    if members > 1:
      v = jax.tree.map(lambda a: a[state.best], v)
    x = jnp.clip(core.to_images(model, variables.to_images(v)), 0.0, 1.0)
    return x, state.labels.reshape(work.images)

  def check(observation: Observation) -> None:
    core.check_labels(observation, work)
    focus.check(layers, observation)
    if observation.labels is None:
      labels_lib.check(observation.params, model, work.images)

  return core.Attack(
    name,
    init,
    step,
    extract,
    lambda state: jnp.bool_(False),
    check,
    work.images,
    iterations,
    restarts,
  )
