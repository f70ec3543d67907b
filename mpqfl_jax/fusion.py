"""A say in what XLA makes one loop of."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax.experimental import xla_metadata
from jax.extend import core

from mpqfl_jax.types import Array


def alone(fn: Callable) -> Callable:
  """Keeps XLA from fusing `fn` with what comes before and after it.

  XLA would compute the former again for each use, or all of it in the latter's
  shape, whose loops it may not vectorise. A barrier does not help: XLA:CPU
  drops it before it fuses.
  """

  def inlined(*args):
    shape = jax.eval_shape(fn, *args)
    program = jax.make_jaxpr(fn)(*args)
    leaves = _evaluate(program.jaxpr, program.consts, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), leaves)

  compiled = jax.jit(inlined)

  @functools.wraps(fn)
  def call(*args):
    with xla_metadata.set_xla_metadata(inlineable="false"):
      return compiled(*args)

  return call


def _evaluate(
  jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Array]
) -> list[Array]:
  """A program's results, what it calls that is compiled itself in place.

  `jnp.where` is such a call, which would stand alone, too.
  """
  values = dict(zip(jaxpr.constvars, consts, strict=True))
  values.update(zip(jaxpr.invars, args, strict=True))

  def read(atom):
    return atom.val if isinstance(atom, core.Literal) else values[atom]

  for equation in jaxpr.eqns:
    given = [read(atom) for atom in equation.invars]
    if equation.primitive.name in ("jit", "pjit"):
      inner = equation.params["jaxpr"]
      results = _evaluate(inner.jaxpr, inner.consts, given)
    else:
      results = equation.primitive.bind(*given, **equation.params)
      if not equation.primitive.multiple_results:
        results = [results]
    values.update(zip(equation.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]
