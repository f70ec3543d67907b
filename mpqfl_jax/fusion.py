"""A say in what XLA makes one loop of."""

from collections.abc import Callable
import functools

import jax
from jax.experimental import xla_metadata
from jax.extend import core


def alone(fn: Callable) -> Callable:
  """Keeps XLA from fusing `fn` with what comes before and after it.

  XLA would compute the former again for each use, or all of it in the latter's
  shape, whose loops it may not vectorise. A barrier does not help: XLA:CPU
  drops it before it fuses. What `fn` calls that is compiled itself, as
  `jnp.where` is, or stands alone, becomes a part of it; what has a derivative
  of its own does not.

  Outside of a compiled function, the result is compiled for each shape once:
  to be made once, not anew for each call.
  """

  @functools.wraps(fn)
  def flat(*args):
    program, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    leaves = jax.tree.leaves(args)
    while any(map(_is_call, program.jaxpr.eqns)):
      program = jax.make_jaxpr(core.jaxpr_as_fun(_opened(program)))(*leaves)
    return jax.tree.unflatten(
      jax.tree.structure(shape), core.jaxpr_as_fun(program)(*leaves)
    )

  compiled = jax.jit(flat)

  @functools.wraps(fn)
  def call(*args):
    with xla_metadata.set_xla_metadata(inlineable="false"):
      return compiled(*args)

  return call


def _is_call(equation: core.JaxprEqn) -> bool:
  return "inline" in equation.params


def _opened(program: core.ClosedJaxpr) -> core.ClosedJaxpr:
  """The program, its calls marked for tracing to put what they do in place."""
  equations = [
    equation.replace(params=equation.params | {"inline": True})
    if _is_call(equation)
    else equation
    for equation in program.jaxpr.eqns
  ]
  return core.ClosedJaxpr(program.jaxpr.replace(eqns=equations), program.consts)
