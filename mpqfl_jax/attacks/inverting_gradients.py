"""Attacks that follow a gradient: Inverting Gradients, TAG, GradInversion."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from mpqfl_jax import errors
from mpqfl_jax.attacks import core, descent, focus, objectives
from mpqfl_jax.types import Array, Model

# Added to a distance before its logarithm is taken. In float32 one minus a
# cosine is off by 1e-7 either way, which must not decide between two images.
_FLOOR = 1e-6


class Search(NamedTuple):
  """How Inverting Gradients looks for its minimum.

  Attributes:
    variables: (model, work) -> what is searched over.
    rate: (first rate, steps) -> learning rate of each step.
    signed: whether Adam sees the gradient's sign only.
    scale: a rising function of the distance, which is what is descended.
    total_variation: default weight of the prior beside it.
  """

  variables: Callable[[Model, core.Work], descent.Variables]
  rate: Callable[[float, int], optax.Schedule]
  signed: bool
  scale: Callable[[Array], Array]
  total_variation: float


def _in_three_cuts(rate: float, iterations: int) -> optax.Schedule:
  cuts = {int(iterations * f): 0.1 for f in (3 / 8, 5 / 8, 7 / 8)}
  return optax.piecewise_constant_schedule(rate, cuts)


def _logarithm(distance: Array) -> Array:
  return jnp.log(jnp.maximum(distance, 0.0) + _FLOOR)


def _check_steps(attack: str, iterations: int) -> None:
  if iterations < 1:
    raise errors.UserError(
      f"attack {attack!r}: iterations={iterations}, expected at least 1."
    )


SEARCHES = {
  "natural": Search(
    descent.natural, optax.cosine_decay_schedule, False, _logarithm, 0.1
  ),
  "pixels": Search(descent.pixels, _in_three_cuts, True, lambda d: d, 0.01),
}


def inverting_gradients(
  model: Model,
  work: core.Work,
  *,
  iterations: int = 4800,
  restarts: int = 1,
  search: str = "natural",
  total_variation: float | None = None,
  learning_rate: float = 0.1,
  objective: str = "cosine",
  layers: str = focus.ALL,
) -> core.Attack:
  """Inverting Gradients: cosine distance and total variation, by Adam.

  Geiping et al. 2020, section 5. `search=pixels` is theirs: Adam on the sign of
  the gradient, the rate cut to a tenth after 3/8, 5/8 and 7/8 of 4,800 steps,
  every iterate projected onto images in [0, 1]. `search=natural` has the same
  distance, prior and box, and comes further in as many steps (docs/attacks.md
  says where it was measured): coordinates of natural images, in which Adam's
  equal steps suit all frequencies; the distance's logarithm, whose slope does
  not vanish as the search comes near; a rate that falls by a cosine. Labels are
  inferred where they are not given.

  Args:
    model: the classifier that was attacked.
    work: what the client did.
    iterations: Adam steps.
    restarts: random starts, of which the one with the lowest objective counts.
    search: one of `SEARCHES`.
    total_variation: weight of the image's total variation beside the distance,
      by default 0.01, or beside its logarithm, by default 0.1.
    learning_rate: Adam's first rate, in standard deviations of a channel or of
      a coordinate.
    objective: one of `objectives.OBJECTIVES`.
    layers: whose part of the update is compared (`focus.focused`).

  Raises:
    UserError: no such search or objective, or less than one step.
  """
  distance = core.choose("objective", objective, objectives.OBJECTIVES)
  how = core.choose("search", search, SEARCHES)
  _check_steps("inverting_gradients", iterations)
  if total_variation is None:
    total_variation = how.total_variation
  return descent.attack(
    "inverting_gradients",
    model,
    work,
    how.variables(model, work),
    lambda simulated, observed: how.scale(distance(simulated, observed)),
    lambda z: total_variation * objectives.total_variation(z),
    optax.adam(how.rate(learning_rate, iterations)),
    iterations=iterations,
    restarts=restarts,
    layers=layers,
    signed=how.signed,
  )


def tag(
  model: Model,
  work: core.Work,
  *,
  iterations: int = 1000,
  restarts: int = 1,
  absolute: float = 0.1,
  learning_rate: float = 0.05,
  layers: str = focus.ALL,
) -> core.Attack:
  """TAG: squared and absolute distance, first layers counting most, by AdamW.

  Deng et al. 2021, there for transformers: the rate rises over 50
  steps and then falls to 0. Nothing is said of a prior of images.

  Args:
    model: the classifier that was attacked.
    work: what the client did.
    iterations: AdamW steps.
    restarts: random starts, of which the one with the lowest objective counts.
    absolute: weight of the absolute distance in the first layer.
    learning_rate: AdamW's largest rate, in standard deviations of a channel.
    layers: whose part of the update is compared (`focus.focused`).
  """
  _check_steps("tag", iterations)
  rise = min(50, iterations // 2)
  rate = optax.join_schedules(
    [
      optax.linear_schedule(0.0, learning_rate, rise),
      optax.linear_schedule(learning_rate, 0.0, iterations - rise),
    ],
    [rise],
  )

  def distance(simulated, observation) -> Array:
    return objectives.squared_and_absolute(simulated, observation, absolute)

  return descent.attack(
    "tag",
    model,
    work,
    descent.pixels(model, work),
    distance,
    lambda z: jnp.float32(0),
    optax.adamw(rate, weight_decay=1e-4),
    iterations=iterations,
    restarts=restarts,
    layers=layers,
  )


def gradinversion(
  model: Model,
  work: core.Work,
  *,
  iterations: int = 2000,
  restarts: int = 1,
  members: int = 4,
  total_variation: float = 1e-2,
  norm: float = 1e-6,
  consistency: float = 1e-2,
  batch_norm: float = 0.0,
  learning_rate: float = 0.1,
  objective: str = "squared",
  layers: str = focus.ALL,
) -> core.Attack:
  """GradInversion: several searches that are drawn to their common mean.

  Yin et al. 2021, with Adam and a rate that falls by a
  cosine: squared distance of gradients, total variation, the image's norm, and
  group consistency over the members, whose consensus is their mean, without
  registration.

  Args:
    model: the classifier that was attacked.
    work: what the client did.
    iterations: Adam steps.
    restarts: groups of random starts.
    members: starts in a group.
    total_variation: weight of the image's total variation.
    norm: weight of the image's mean square.
    consistency: weight of the members' distance from their mean.
    batch_norm: weight of the distance of feature statistics from those that
      batch normalisation keeps; only 0, for no model here sends any.
    learning_rate: Adam's first rate, in standard deviations of a channel.
    objective: one of `objectives.OBJECTIVES`.
    layers: whose part of the update is compared (`focus.focused`).

  Raises:
    UserError: statistics of batch normalisation asked for, no members, or less
      than one step.
  """
  if batch_norm:
    raise errors.UserError(
      f"attack 'gradinversion': batch_norm={batch_norm}, but {model.name!r}"
      " keeps no statistics of batches: its normalisation layers, where it has"
      " any, are affine maps. Expected batch_norm=0."
    )
  _check_steps("gradinversion", iterations)
  if members < 1:
    raise errors.UserError(
      f"attack 'gradinversion': members={members}, expected at least 1."
    )
  distance = core.choose("objective", objective, objectives.OBJECTIVES)

  def prior(z: Array) -> Array:
    smooth = total_variation * objectives.total_variation(z)
    return smooth + norm * jnp.mean(jnp.square(z))

  return descent.attack(
    "gradinversion",
    model,
    work,
    descent.pixels(model, work),
    distance,
    prior,
    optax.adam(optax.cosine_decay_schedule(learning_rate, iterations)),
    iterations=iterations,
    restarts=restarts,
    layers=layers,
    members=members,
    consistency=consistency,
  )
