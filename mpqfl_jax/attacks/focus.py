"""What part of an update a search compares: all of it, or layers of its choice.

Where layers are protected unequally, an attacker who takes the update at face
value does better to look at the best kept of them alone, and DLG on one layer
shows how much that one gives away.
"""

import jax
import jax.numpy as jnp

from mpqfl_jax import errors, policy, trees
from mpqfl_jax.types import Array, Bins, Observation, Update

ALL = "*"
LEAST_PROTECTED = "least_protected"
# Of a float32's fraction: no entry is known better.
_MOST_BITS = 24


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
  layers: str, observation: Observation, unknowns: int
) -> Observation:
  """The observation with `focus` on some layers; labels may still use all.

  Args:
    layers: a shell pattern of layers or leaves, as in a policy's rules, or
      `least_protected`: the layer of which the payload says most (`bits`).
    observation: without leading axes.
    unknowns: number of values that are searched for.
  """
  if layers == ALL:
    return observation
  names = trees.leaf_names(observation.update)
  if layers == LEAST_PROTECTED:
    assert observation.bins is not None  # checked before
    known = bits(observation.update, observation.bins, unknowns)
    most = jnp.argmax(jnp.stack(list(known.values())))
    order = {layer: i for i, layer in enumerate(known)}
    kept = [order[policy.layer_of(name)] == most for name in names]
  else:
    kept = [policy.matches(layers, name) for name in names]
  structure = jax.tree.structure(observation.update)
  focus = jax.tree.unflatten(structure, [jnp.float32(k) for k in kept])
  return observation._replace(focus=focus)


def bits(update: Update, bins: Bins, unknowns: int) -> dict[str, Array]:
  """How much a payload says of so many unknowns by each layer, [] float32 bits.

  For each entry the capacity of a Gaussian channel, log2(1 + S / N) / 2, where
  S is the mean square of the leaf and N the entry's expected squared error. Of
  more entries than there are unknowns, their mean counts as often as there are
  unknowns: the others measure what is measured already.

  Args:
    update: as decoded.
    bins: of the payload.
    unknowns: number of values that are searched for.
  """
  said: dict[str, list[Array]] = {}
  leaves = zip(
    trees.leaf_names(update),
    jax.tree.leaves(update),
    jax.tree.leaves(bins.variance),
    strict=True,
  )
  for name, v, variance in leaves:
    signal = jnp.mean(jnp.square(v)) + 1e-30
    noise = jnp.broadcast_to(variance, v.shape) / signal + 4.0**-_MOST_BITS
    each = jnp.log2(1 + 1 / noise) / 2
    said.setdefault(policy.layer_of(name), []).append(each.reshape(-1))
  together = {layer: jnp.concatenate(leaf) for layer, leaf in said.items()}
  return {
    layer: jnp.mean(each) * min(len(each), unknowns)
    for layer, each in together.items()
  }
