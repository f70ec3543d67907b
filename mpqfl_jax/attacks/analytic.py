"""Analytic inversion of a dense first layer: no search at all.

The gradient of a unit's weights is the unit's error times the input, and the
gradient of its bias is the error alone: their quotient is the input.
"""

from typing import NamedTuple

import jax.numpy as jnp

from mpqfl_jax import errors, trees
from mpqfl_jax.attacks import core, objectives
from mpqfl_jax.attacks import labels as labels_lib
from mpqfl_jax.types import Array, Key, Model, Observation, Params


class State(NamedTuple):
  """The finished answer.

  Attributes:
    x: [1, height, width, channels] in [0, 1].
    labels: [1, 1] int32.
  """

  x: Array
  labels: Array


def first_dense(params: Params, inputs: int) -> str:
  """Name of the layer that takes the flattened image, with a bias.

  Args:
    params: parameters, or their shapes, without leading axes.
    inputs: number of values in an image.

  Raises:
    UserError: there is none, or more than one.
  """
  found = [
    name
    for name, leaf in params.items()
    if isinstance(leaf, dict)
    and "bias" in leaf
    and leaf["kernel"].ndim == 2
    and leaf["kernel"].shape[0] == inputs
  ]
  if len(found) != 1:
    raise errors.UserError(
      "attack 'analytic' needs one dense layer with a bias that takes the"
      f" {inputs} values of the image; the model's leaves are"
      f" {', '.join(trees.leaf_names(params))}. Use it with mlp."
    )
  return found[0]


def analytic(model: Model, work: core.Work) -> core.Attack:
  """Reads one image off a dense first layer.

  Phong et al. 2018, section 3; Geiping et al. 2020, proposition 3.1. The
  quotients of all units are combined by least squares, each with the weight of
  its bias gradient's square.

  Args:
    model: the classifier that was attacked.
    work: what the client did; only one step on one image.

  Raises:
    UserError: more than one image or step.
  """
  core.check_single("analytic", work)
  height, width, channels = model.image_shape
  inputs = height * width * channels

  def solve(observation: Observation) -> Array:
    layer = observation.update[first_dense(observation.params, inputs)]
    kernel, bias = layer["kernel"], layer["bias"]
    # Scaled, because the squares of a small gradient underflow.
    size = jnp.max(jnp.abs(bias)) + 1e-30
    kernel, bias = kernel / size, bias / size
    z = kernel @ bias / (bias @ bias)
    return core.to_images(model, z)

  def init(key: Key, observation: Observation) -> State:
    del key
    labels = observation.labels
    if labels is None:
      labels = labels_lib.infer(model, observation, work)
    return State(jnp.clip(solve(observation), 0.0, 1.0), labels)

  def step(state: State, observation: Observation) -> tuple[State, Array]:
    update = core.explain(model, observation, state.x, state.labels, work)
    return state, objectives.squared(update, observation)

  def extract(state: State) -> tuple[Array, Array]:
    return state.x, state.labels.reshape(1)

  def check(observation: Observation) -> None:
    core.check_labels(observation, work)
    first_dense(observation.params, inputs)
    if observation.labels is None:
      labels_lib.check(observation.params, model, 1)

  return core.Attack(
    "analytic",
    init,
    step,
    extract,
    lambda state: jnp.bool_(True),
    check,
    images=1,
    iterations=1,
    restarts=1,
  )
