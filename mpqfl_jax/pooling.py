"""Maximum over windows, and its gradient, in few passes over the entries.

JAX's own gradient of `jnp.max` writes an array of the ties of every entry and
reads it twice; that of `reduce_window` is a scatter. Here the gradient reads
the entries once, and all orders of derivatives, forward and reverse, are
composed of two linear operations that are each other's transposes.
"""

import functools

import jax
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp

from mpqfl_jax import fusion
from mpqfl_jax.types import Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_pool(x: Array, window: int) -> Array:
  def largest(x):
    return functools.reduce(jnp.maximum, _cells(x, window))

  return fusion.alone(largest)(x)


@_max_pool.defjvp
def _max_pool_jvp(window, primals, tangents):
  (x,), (t,) = primals, tangents
  y = _max_pool(x, window)

  def count(x, y):
    return sum((cell == y).astype(x.dtype) for cell in _cells(x, window))

  ties = fusion.alone(count)(x, y)
  return y, _choose.bind(t, x, y, window=window) / ties


# The sum over each window of those entries of t whose x is the window's y, and
# its transpose: y's place in each window gets g. Primitives, since the parts
# that JAX would split them into pass over every entry of x several times.
_choose = core.Primitive("max_pool_choose")
_spread = core.Primitive("max_pool_spread")


def _compute_choose(t, x, y, *, window):
  def choose(t, x, y):
    hits = zip(_cells(t, window), _cells(x, window), strict=True)
    zero = jnp.zeros_like(y)
    return sum(lax.select(cell == y, value, zero) for value, cell in hits)

  return fusion.alone(choose)(t, x, y)


def _compute_spread(g, x, y, *, window):
  def spread(g, x, y):
    blocks = _blocks(x, window)
    y, g = (lax.broadcast_in_dim(a, blocks.shape, (0, 1, 3, 5)) for a in (y, g))
    return lax.select(blocks == y, g, jnp.zeros_like(g))

  return fusion.alone(spread)(g, x, y).reshape(x.shape)


def _define(primitive, compute, abstract, transpose) -> None:
  """Rules of one of the two, which are linear in their first operand."""

  def batch(args, dims, *, window):
    size = next(
      a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None
    )
    full = [
      jnp.broadcast_to(a, (size, *a.shape))
      if d is None
      else jnp.moveaxis(a, d, 0)
      for a, d in zip(args, dims, strict=True)
    ]
    flat = (a.reshape(-1, *a.shape[2:]) for a in full)
    out = primitive.bind(*flat, window=window)
    return out.reshape(size, -1, *out.shape[1:]), 0

  def jvp(t, v, x, y, *, window):
    return primitive.bind(t, x, y, window=window)

  def backward(ct, v, x, y, *, window):
    return transpose.bind(ct, x, y, window=window), None, None

  primitive.def_impl(jax.jit(compute, static_argnames="window"))
  primitive.def_abstract_eval(abstract)
  ad.defjvp(primitive, jvp, None, None)
  ad.primitive_transposes[primitive] = backward
  batching.primitive_batchers[primitive] = batch
  mlir.register_lowering(
    primitive, mlir.lower_fun(compute, multiple_results=False)
  )


_define(_choose, _compute_choose, lambda t, x, y, window: y, _spread)
_define(_spread, _compute_spread, lambda g, x, y, window: x, _choose)


def _blocks(x: Array, window: int) -> Array:
  a, height, width, b = x.shape
  return x.reshape(a, height // window, window, width // window, window, b)


def _cells(x: Array, window: int) -> list[Array]:
  """One array for each place in a window."""
  blocks = _blocks(x, window)
  return [blocks[:, :, i, :, j] for i in range(window) for j in range(window)]


def max_pool(x: Array, window: int) -> Array:
  """Maximum over windows that do not overlap; a rest at the edge is cut off.

  Where several entries are the largest, they share the gradient equally.

  Args:
    x: [batch, height, width, channels], or planar.
    window: side length; also the stride.

  Returns:
    [batch, height // window, width // window, channels].
  """
  height, width = (n // window * window for n in x.shape[1:3])
  return _max_pool(x[:, :height, :width], window)
