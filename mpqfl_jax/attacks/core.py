"""What an attack is made of, and the forward model that all of them share.

An adversary who knows the global parameters can compute, for any images, the
update that a client holding them would have sent. An attack searches for images
whose simulated update explains the observed one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import errors, models, trees
from mpqfl_jax.types import (
  Array,
  Key,
  Model,
  Observation,
  Params,
  PyTree,
  Update,
)


class Attack(NamedTuple):
  """A gradient-inversion attack as plain functions of one observation.

  Attributes:
    name: the name that flags and result files use.
    init: (key, observation) -> state, a random starting point.
    step: (state, observation) -> (state, loss), one iteration; `loss` is the
      objective, [] float32, of the state that went in.
    extract: state -> (x, labels): images [images, height, width, channels] in
      [0, 1] and labels [images] int32, where images is steps * batch.
    finished: state -> [] bool, whether further steps are pointless.
    check: observation -> None, on the host, before anything is compiled; raises
      `UserError` where the attack does not apply.
    images: number of images in one client's update, steps * batch.
    iterations: most steps that are taken from one starting point.
    restarts: default number of starting points.
  """

  name: str
  init: Callable[[Key, Observation], PyTree]
  step: Callable[[PyTree, Observation], tuple[PyTree, Array]]
  extract: Callable[[PyTree], tuple[Array, Array]]
  finished: Callable[[PyTree], Array]
  check: Callable[[Observation], None]
  images: int
  iterations: int
  restarts: int


class Answer(NamedTuple):
  """What an attack without a search on the device finds.

  Attributes:
    x: [images, height, width, channels] float32 in [0, 1].
    labels: [images] int32.
    objective: how well the update is explained; lower is better.
    iterations: steps taken.
  """

  x: np.ndarray
  labels: np.ndarray
  objective: float
  iterations: int


class Direct(NamedTuple):
  """An attack that answers at once, on the host: linear algebra, a network.

  Attributes:
    name: the name that flags and result files use.
    solve: (key, observation without leading axes) -> Answer.
    check: as for `Attack`.
    images: number of images in one client's update, steps * batch.
    iterations: what one call of `solve` counts for in a progress bar.
    restarts: default number of calls, of which the best counts.
  """

  name: str
  solve: Callable[[Key, Observation], Answer]
  check: Callable[[Observation], None]
  images: int
  iterations: int = 1
  restarts: int = 1


AnyAttack = Attack | Direct


def simulate(
  model: Model,
  params: Params,
  x: Array,
  labels: Array,
  learning_rate: Array | float,
) -> Update:
  """The update that a client would send that trained on the given images.

  Plain SGD, one step for each leading row of `x`, differentiable in `x` and
  `labels` (Geiping et al. 2020, section 6: the unrolled steps of federated
  averaging). The update is the sum of the steps taken, which loses nothing to
  the cancellation in `params - local`.

  Args:
    model: the classifier.
    params: where the client started.
    x: [steps, batch, height, width, channels] in [0, 1].
    labels: [steps, batch] int32, or [steps, batch, classes] probabilities.
    learning_rate: the client's step size.

  Returns:
    params minus local params, a pytree like `params`.
  """

  def loss(local, x, labels):
    return jnp.mean(models.cross_entropy(model, local, x, labels))

  gradient = jax.grad(loss)
  total: Any = None
  for images, targets in zip(x, labels, strict=True):
    local = params if total is None else trees.subtract(params, total)
    step = trees.scale(learning_rate, gradient(local, images, targets))
    total = step if total is None else trees.add(total, step)
  return total


def to_images(model: Model, z: Array) -> Array:
  """Search coordinates to images: mean + std * z, not clipped.

  Args:
    model: gives the mean and deviation of each channel.
    z: [...] of any shape that flattens to whole images, standardised.

  Returns:
    [images, height, width, channels].
  """
  return z.reshape(-1, *model.image_shape) * model.std + model.mean


def check_labels(observation: Observation, steps: int, batch: int) -> None:
  """Refuses labels of another shape than the attack was built for.

  Args:
    observation: with or without leading axes.
    steps: local steps that the attack simulates.
    batch: images in a step.

  Raises:
    UserError: the labels' shape is another.
  """
  labels = observation.labels
  if labels is not None and labels.shape[-2:] != (steps, batch):
    raise errors.UserError(
      f"the attack was built for {steps} steps of {batch} images, and the"
      f" observation's labels have shape {tuple(labels.shape)}; give `steps`"
      " and `batch` of the observed client."
    )


def choose(kind: str, name: str, table: dict) -> Any:
  """The entry of a table, or the error that names the nearest one."""
  if name not in table:
    raise errors.unknown_name(kind, name, table)
  return table[name]
