"""What part of an update a search compares: all of it, or layers of its choice.

Where layers are protected unequally, an attacker who takes the update at face
value does better to look at the best kept of them alone, and DLG on one layer
shows how much that one gives away.
"""

import math

import jax
import jax.numpy as jnp

from mpqfl_jax import errors, policy, trees
from mpqfl_jax.attacks import core
from mpqfl_jax.types import Array, Bins, Model, Observation, Update

ALL = "*"
LEAST_PROTECTED = "least_protected"
# Of a float32's fraction: no entry is known better.
_MOST_BITS = 24
# Layers that differ by less than this share say as much as one another.
_AS_MUCH = 1e-3


def check(layers: str, observation: Observation) -> None:
  """Refuses what `focused` cannot follow.

  Args:
    layers: as there.
    observation: without leading axes.

  Raises:
    UserError: a pattern that no leaf matches, or the least protected layer
      wanted by an adversary who does not know how they are protected.
  """
  if layers == LEAST_PROTECTED:
    if observation.bins is None:
      raise errors.UserError(
        f"layers={LEAST_PROTECTED}: a blind adversary does not know how layers"
        " are protected. Expected --attack_knowledge=adaptive, or a pattern"
        " such as layers=conv*."
      )
    return
  names = trees.leaf_names(observation.update)
  if not any(policy.matches(str(layers), name) for name in names):
    raise errors.UserError(
      f"layers={layers} is the name of no layer. Expected {LEAST_PROTECTED}, or"
      " a shell pattern of"
      f" {', '.join(dict.fromkeys(map(policy.layer_of, names)))}."
    )


def focused(
  layers: str, observation: Observation, model: Model, work: core.Work
) -> Observation:
  """The observation with `focus` on some layers; labels may still use all.

  Args:
    layers: a shell pattern of layers or leaves, as in a policy's rules, or
      `least_protected`: the layer of which the payload says most (`bits`), the
      first of those that say as much.
    observation: without leading axes.
    model: the classifier.
    work: what the client did.
  """
  if layers == ALL:
    return observation
  names = trees.leaf_names(observation.update)
  if layers == LEAST_PROTECTED:
    assert observation.bins is not None  # checked before
    known = bits(observation.update, observation.bins, model, work)
    each = jnp.stack(list(known.values()))
    best = jnp.argmax(each >= (1 - _AS_MUCH) * jnp.max(each))
    order = {layer: i for i, layer in enumerate(known)}
    kept = [order[policy.layer_of(name)] == best for name in names]
  else:
    kept = [policy.matches(layers, name) for name in names]
  structure = jax.tree.structure(observation.update)
  focus = jax.tree.unflatten(structure, [jnp.float32(k) for k in kept])
  return observation._replace(focus=focus)


def bits(
  update: Update, bins: Bins, model: Model, work: core.Work
) -> dict[str, Array]:
  """How much a payload says of the images by each layer, [] float32 bits.

  For each entry the capacity of a Gaussian channel, log2(1 + S / N) / 2, where
  N is the entry's expected squared error and S the mean square of the leaf's
  entries that were sent, less that of the errors in them. The best known
  entries of a layer count, as many as the images have values: more measure what
  is measured already. So do those of a dense kernel beyond the rows and columns
  of its outer products, one an image.

  Args:
    update: as decoded.
    bins: of the payload.
    model: the classifier.
    work: what the client did.
  """
  unknowns = work.images * math.prod(model.image_shape)
  said: dict[str, list[Array]] = {}
  leaves = zip(
    trees.leaf_names(update),
    jax.tree.leaves(update),
    jax.tree.leaves(bins.variance),
    strict=True,
  )
  for name, v, variance in leaves:
    noise = jnp.broadcast_to(variance, v.shape)
    seen = jnp.isfinite(noise)
    power = jnp.where(seen, jnp.square(v) - noise, 0.0)
    signal = jnp.maximum(jnp.sum(power) / jnp.maximum(jnp.sum(seen), 1), 0.0)
    least = signal * 4.0**-_MOST_BITS + 1e-30
    each = jnp.log2(1 + signal / (noise + least)) / 2
    free = work.images * sum(v.shape) if v.ndim == 2 else v.size
    said.setdefault(policy.layer_of(name), []).append(_largest(each, free))
  return {
    layer: jnp.sum(_largest(jnp.concatenate(leaf), unknowns))
    for layer, leaf in said.items()
  }


def _largest(values: Array, count: int) -> Array:
  """At most so many of the values, the largest, as a vector."""
  return -jnp.sort(-values.reshape(-1))[:count]
