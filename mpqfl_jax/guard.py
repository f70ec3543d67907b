"""A policy that leaks least, found by predicted leakage before training starts.

`attacks.leakage` judges an assignment of precisions to leaves in milliseconds.
The search here starts from several assignments that fit the bounds and takes
the best change of one leaf, or of two that pay for each other, until none
helps. The result is a policy file like any other: the same for every client and
round, and public.
"""

from collections.abc import Callable, Sequence
import glob
import itertools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import budget, choice, trees, wire
from mpqfl_jax.attacks import leakage
from mpqfl_jax.errors import UserError
from mpqfl_jax.policy import QuantRule
from mpqfl_jax.types import Params, Update

# Pairs of changes that are judged exactly in a step of the search.
_PAIRS = 24
# Starting points that are followed to their end, the best ones.
_STARTS = 2


class Tables(NamedTuple):
  """What each option costs each leaf.

  Attributes:
    menu: the options.
    error: [images, leaves, options] float64, squared error.
    energy: [images, leaves] float64, squared norm.
    cost: [leaves, options] int64, bytes.
    entries: [leaves] int64.
    fixed: bytes of a message beside its leaves.
  """

  menu: choice.Menu
  error: np.ndarray
  energy: np.ndarray
  cost: np.ndarray
  entries: np.ndarray
  fixed: int


class Found(NamedTuple):
  """An assignment and what it comes to.

  Attributes:
    picked: [leaves] int, option of each leaf.
    psnr_db: predicted for an attacker who knows the policy, mean over images.
    error: squared error over squared norm, mean over images.
    num_bytes: of a message.
  """

  picked: np.ndarray
  psnr_db: float
  error: float
  num_bytes: int


def tables(updates: Sequence[Update], rounding: str = "nearest") -> Tables:
  """Bytes and errors of every option of `budget.OPTIONS`.

  Args:
    updates: typical ones, those of the sensitivities that the search takes.
    rounding: `nearest` or `stochastic`.

  Raises:
    UserError: an update with an empty leaf, which no rule could send.
  """
  menu = choice.menu(budget.OPTIONS, rounding)
  sizes = [leaf.size for leaf in jax.tree.leaves(updates[0])]
  if 0 in sizes:
    raise UserError("guard: a leaf of the model is empty; leave it out.")
  errors_of = jax.jit(lambda x, unit: budget.expected_errors(menu, x, unit))
  error, energy = [], []
  for update in updates:
    leaves = jax.tree.leaves(update)
    # Squares of the largest entry would leave float32 for tiny gradients.
    peak = max(float(jnp.max(jnp.abs(x))) for x in leaves) or 1.0
    error.append(
      [peak**2 * np.asarray(errors_of(x, peak), np.float64) for x in leaves]
    )
    energy.append(
      [peak**2 * float(jnp.sum((jnp.asarray(x) / peak) ** 2)) for x in leaves]
    )
  return Tables(
    menu,
    np.array(error),
    np.array(energy),
    np.array([choice.record_bytes(menu, n) for n in sizes], np.int64),
    np.array(sizes, np.int64),
    wire.OVERHEAD,
  )


def search(
  sensitivities: Sequence[leakage.Sensitivity],
  known: Tables,
  num_bytes: int,
  max_error: float = 0.1,
  told: Callable[[float], None] = lambda psnr_db: None,
) -> Found:
  """The least predicted leakage within so many bytes and so much error.

  A local search: no proof that nothing better exists.

  Args:
    sensitivities: one an image, of the updates behind `known`.
    known: bytes and errors.
    num_bytes: the longest message, everything included.
    max_error: bound of the squared error over the squared norm.
    told: gets the predicted PSNR after each step, for a progress bar.

  Returns:
    The best assignment found.

  Raises:
    UserError: nothing fits the bounds.
  """
  share = (known.error / known.energy.sum(1)[:, None, None]).mean(0)
  leaves = np.arange(len(known.entries))

  def size(picked):
    return known.fixed + int(known.cost[leaves, picked].sum())

  def error(picked):
    return float(share[leaves, picked].sum())

  def fits(picked):
    return size(picked) <= num_bytes and error(picked) <= max_error

  seen: dict[tuple[int, ...], float] = {}

  def judged(picked):
    key = tuple(int(i) for i in picked)
    if key not in seen:
      noise = known.error[:, leaves, picked] / known.entries
      withheld = known.menu.kind[picked] == choice.WITHHELD
      noise[:, withheld] = np.inf
      seen[key] = float(leakage.expected_psnr_db(sensitivities, noise).mean())
    return seen[key]

  def changed(picked, *moves):
    picked = picked.copy()
    for leaf, option in moves:
      picked[leaf] = option
    return picked

  def step(picked):
    """The best neighbour that fits, or None."""
    here = judged(picked)
    moves = [
      (leaf, option)
      for leaf in leaves
      for option in range(len(known.menu.options))
      if option != picked[leaf]
    ]
    gains = {m: here - judged(changed(picked, m)) for m in moves}
    pairs = [
      ((a, b), gains[a] + gains[b])
      for a, b in itertools.combinations(moves, 2)
      if a[0] != b[0] and fits(changed(picked, a, b))
    ]
    pairs.sort(key=lambda pair: -pair[1])
    near = [changed(picked, m) for m in moves if fits(changed(picked, m))]
    near += [changed(picked, *both) for both, _ in pairs[:_PAIRS]]
    best = min(near, key=judged, default=picked)
    return best if judged(best) < here - 1e-6 else None

  starts = [p for p in _starts(known, share, num_bytes) if fits(p)]
  if not starts:
    raise UserError(
      f"no precisions keep the update's error within {max_error:g} in"
      f" {num_bytes:,} bytes. Allow more bytes, or more error."
    )
  best = None
  for start in sorted(starts, key=judged)[:_STARTS]:
    picked: np.ndarray | None = start
    while picked is not None:
      best = min((p for p in (best, picked) if p is not None), key=judged)
      told(judged(best))
      picked = step(picked)
  assert best is not None
  return Found(best, judged(best), error(best), size(best))


def _starts(
  known: Tables, share: np.ndarray, num_bytes: int
) -> list[np.ndarray]:
  """Every uniform assignment, and the one of least error in the bytes."""
  count, options = known.cost.shape
  found = [np.full(count, option) for option in range(options)]
  if known.cost.min(1).sum() + known.fixed <= num_bytes:
    cheapest = budget.cheapest(
      jnp.asarray(share, jnp.float32),
      jnp.asarray(known.cost, jnp.int32),
      num_bytes - known.fixed,
    )
    found.append(np.asarray(cheapest.picked))
  return found


def rules(found: Found, known: Tables, params: Params) -> list[QuantRule]:
  """The assignment as rules, one a leaf."""
  out = []
  for name, option in zip(trees.leaf_names(params), found.picked, strict=True):
    precision, mode = known.menu.options[int(option)]
    options = {} if precision == "none" else {"rounding": known.menu.rounding}
    if mode:
      options["mode"] = mode
    out.append(
      QuantRule(
        glob.escape(name),
        "withheld" if precision == "none" else precision,
        options,
      )
    )
  return out


def write(path: pathlib.Path, rules: Sequence[QuantRule], comment: str) -> None:
  """Writes a policy file.

  Args:
    path: where; its name becomes the policy's.
    rules: with options that are words.
    comment: first line.
  """
  parts = [f"# {comment}\n"]
  for rule in rules:
    lines = {"path": rule.path, "precision": rule.precision, **rule.options}
    parts.append(
      "[[rule]]\n" + "".join(f'{k} = "{v}"\n' for k, v in lines.items())
    )
  path.write_text("\n".join(parts), encoding="utf-8")
