"""What stands alone is one loop, with the values that it would have had."""

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import fusion


def _clipped(x, parts):
  # `jnp.where` and `jnp.clip` are compiled functions of their own.
  y = jnp.where(x > parts["edge"], jnp.clip(x, 0, 3), -x)
  return {"y": y * parts["scale"], "more": [y + 1]}


def test_values_and_trees_are_the_functions_own():
  x = jnp.linspace(-5, 5, 101)
  parts = {"edge": jnp.float32(0.5), "scale": jnp.float32(2)}
  got = jax.jit(fusion.alone(_clipped))(x, parts)
  want = jax.jit(_clipped)(x, parts)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a, b)


def test_it_is_one_call_that_calls_nothing():
  parts = {"edge": jnp.float32(0.5), "scale": jnp.float32(2)}

  def program(x):
    return jax.tree.map(lambda y: y * 3, fusion.alone(_clipped)(x + 1, parts))

  text = jax.jit(program).lower(jnp.zeros(50)).as_text()
  assert text.count("call @") == 1
  assert 'inlineable = "false"' in text


def test_it_can_be_differentiated_and_vectorised():
  def square(x):
    return jnp.where(x > 0, x * x, 0.0)

  x = jnp.array([-1.0, 2.0, 3.0])
  grads = jax.vmap(jax.grad(fusion.alone(square)))(x)
  np.testing.assert_array_equal(grads, [0.0, 4.0, 6.0])


def test_what_stands_alone_inside_becomes_a_part():
  inner = fusion.alone(lambda x: jnp.maximum(x, 0) + 1)
  outer = fusion.alone(lambda x: inner(jnp.where(x > 1, x, 0.0)) * 2)
  x = jnp.array([-1.0, 0.5, 3.0])
  np.testing.assert_array_equal(outer(x), [2.0, 2.0, 8.0])
  text = jax.jit(outer).lower(x).as_text()
  assert text.count("call @") == 1


def test_derivatives_of_ones_own_loops_and_no_arguments():
  x = jnp.array([0.0, 2.0])
  grads = jax.vmap(jax.grad(fusion.alone(lambda x: jax.nn.relu(x) * 3)))(x)
  np.testing.assert_array_equal(grads, [0.0, 3.0])

  def power(x, none):
    assert none is None
    return jax.lax.fori_loop(0, 3, lambda _, y: jnp.clip(y * x, -9, 9), x)

  assert fusion.alone(power)(jnp.float32(1.5), None) == 1.5**4
  assert fusion.alone(lambda: jnp.arange(3).sum())() == 3
