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


class Work(NamedTuple):
  """What the observed client is known to have done.

  Attributes:
    steps: local steps in an epoch.
    batch: images in a step.
    epochs: passes over the same steps.
  """

  steps: int = 1
  batch: int = 1
  epochs: int = 1

  @property
  def images(self) -> int:
    """Different images behind the update."""
    return self.steps * self.batch

  @property
  def single(self) -> bool:
    """Whether it is one step on one image."""
    return self == (1, 1, 1)

  def batches(self, x: Array) -> Array:
    """[images, ...] as [steps, batch, ...]."""
    return x.reshape(self.steps, self.batch, *x.shape[1:])

  def __str__(self) -> str:
    epochs = f" in {self.epochs} epochs" if self.epochs > 1 else ""
    return f"{self.steps} steps of {self.batch} images{epochs}"


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
    prepare: on the host, after `check` and before anything is compiled: learns
      what serves all observations. A second call costs nothing.
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
  prepare: Callable[[], object] = lambda: None


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


# What a defence makes of an update: (key, update) -> the update as decoded.
Channel = Callable[[Key, Update], Update]


class Help(NamedTuple):
  """What a direct attack is given beside the observation.

  Attributes:
    key: of this restart, the same for all observations.
    channel: the defence, with fresh randomness for each key, for an adversary
      who knows it; None where it is not known.
    told: takes a few words on how far the attack is, for a progress bar.
  """

  key: Key
  channel: Channel | None
  told: Callable[[str], None]


class Direct(NamedTuple):
  """An attack that answers on the host: linear algebra, a trained network.

  Attributes:
    name: the name that flags and result files use.
    solve: (observation without leading axes, help) -> Answer.
    check: as for `Attack`.
    images: number of images in one client's update, steps * batch.
    restarts: default number of calls, of which the best counts.
  """

  name: str
  solve: Callable[[Observation, Help], Answer]
  check: Callable[[Observation], None]
  images: int
  restarts: int = 1


AnyAttack = Attack | Direct


def told(observation: Observation) -> Update:
  """The update as the payload tells it, a pytree like `params`.

  What is decoded, or the value that an entry had for certain: entries that were
  sent at random are decoded larger than they are, for those that were not.
  """
  if observation.bins is None:
    return observation.update
  return jax.tree.map(
    lambda v, low, high: jnp.where(low == high, low, v),
    observation.update,
    observation.bins.lower,
    observation.bins.upper,
  )


def simulate(
  model: Model,
  params: Params,
  x: Array,
  labels: Array,
  learning_rate: Array | float,
  epochs: int = 1,
  mixing: Array | None = None,
) -> Update:
  """The update that a client would send that trained on the given images.

  Plain SGD, one step for each leading row of `x`, differentiable in `x` and
  `labels` (Geiping et al. 2020, section 6: the unrolled steps of federated
  averaging). The update is the sum of the steps taken, which loses nothing to
  the cancellation in `params - local`.

  Every epoch goes through the same batches in the same order. A client that
  draws new batches in each epoch is simulated exactly where all its images make
  one batch, and else up to the order, which the server does not see (Dimitrov
  et al. 2022, section 4).

  Args:
    model: the classifier.
    params: where the client started.
    x: [steps, batch, height, width, channels] in [0, 1].
    labels: [steps, batch] int32, or [steps, batch, classes] probabilities.
    learning_rate: the client's step size.
    epochs: passes over the steps.
    mixing: [epochs * steps] float32, what an image keeps of itself where
      batches are mixed (`heuristics.Mixup`), each image with the one after it;
      None where they are not.

  Returns:
    params minus local params, a pytree like `params`.
  """

  def loss(local, x, labels):
    return jnp.mean(models.cross_entropy(model, local, x, labels))

  gradient = jax.grad(loss)
  total: Any = None
  batches = list(zip(x, labels, strict=True)) * epochs
  for number, (images, targets) in enumerate(batches):
    if mixing is not None:
      after = (jnp.arange(len(images)) + 1) % len(images)
      images, targets = models.mix(
        model, images, targets, mixing[number], after
      )
    local = params if total is None else trees.subtract(params, total)
    step = trees.scale(learning_rate, gradient(local, images, targets))
    total = step if total is None else trees.add(total, step)
  return total


def explain(
  model: Model, observation: Observation, x: Array, labels: Array, work: Work
) -> Update:
  """The update that the observed client would have sent had it held `x`.

  Args:
    model: the classifier.
    observation: without leading axes.
    x: [images, height, width, channels] in [0, 1].
    labels: [steps, batch] int32, or [steps, batch, classes] probabilities.
    work: what the client did.
  """
  return simulate(
    model,
    observation.params,
    work.batches(x),
    labels,
    observation.learning_rate,
    work.epochs,
    observation.mixing,
  )


def to_images(model: Model, z: Array) -> Array:
  """Search coordinates to images: mean + std * z, not clipped.

  Args:
    model: gives the mean and deviation of each channel.
    z: [...] of any shape that flattens to whole images, standardised.

  Returns:
    [images, height, width, channels].
  """
  return z.reshape(-1, *model.image_shape) * model.std + model.mean


def check_labels(observation: Observation, work: Work) -> None:
  """Refuses labels of another shape than the attack was built for.

  Args:
    observation: with or without leading axes.
    work: what the attack simulates.

  Raises:
    UserError: the labels' shape is another.
  """
  labels = observation.labels
  if labels is not None and labels.shape[-2:] != (work.steps, work.batch):
    raise errors.UserError(
      f"the attack was built for {work}, and the observation's labels have"
      f" shape {tuple(labels.shape)}; give `steps` and `batch` of the observed"
      " client."
    )


def check_single(name: str, work: Work) -> None:
  """Refuses more than one step on one image.

  Raises:
    UserError: there is more.
  """
  if not work.single:
    raise errors.UserError(
      f"attack {name!r} takes back one image of one step; this update comes"
      f" from {work}. Use dlg, inverting_gradients or map."
    )


def choose(kind: str, name: str, table: dict) -> Any:
  """The entry of a table, or the error that names the nearest one."""
  if name not in table:
    raise errors.unknown_name(kind, name, table)
  return table[name]
