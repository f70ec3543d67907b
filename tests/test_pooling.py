"""Pooling against XLA's `reduce_window` and the gradient of `jnp.max`."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import pooling

# Rounded, so that windows have ties.
X = jnp.round(jax.random.normal(jax.random.key(0), (3, 7, 9, 2)))
XS = jnp.stack([X, 2 * X, -X])


def _reference(x, window):
  h, w = (n // window for n in x.shape[1:3])
  x = x[:, : h * window, : w * window]
  shape = (x.shape[0], h, window, w, window, x.shape[3])
  return x.reshape(shape).max((2, 4))


@pytest.mark.parametrize("window", [1, 2, 3])
def test_equals_reduce_window(window):
  sides = (1, window, window, 1)
  want = lax.reduce_window(X, -jnp.inf, lax.max, sides, sides, "VALID")
  np.testing.assert_array_equal(pooling.max_pool(X, window), want)


def _loss(pool):
  return lambda x: jnp.sum(jnp.tanh(pool(x, 2)) ** 2)


DERIVATIVES = {
  "gradient": lambda f: jax.grad(f)(X),
  "forward": lambda f: jax.jvp(f, (X,), (X + 1,)),
  "forward over reverse": lambda f: jax.jvp(jax.grad(f), (X,), (X,))[1],
  "reverse over reverse": lambda f: jax.grad(
    lambda x: jnp.sum(jax.grad(f)(x) ** 2)
  )(X),
  "vmap of gradient": lambda f: jax.vmap(jax.grad(f))(XS),
  "gradient of vmap": lambda f: jax.grad(
    lambda xs: jnp.sum(jax.vmap(f)(xs) ** 2)
  )(XS),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_share_ties_as_those_of_max(name):
  derivative = DERIVATIVES[name]
  got = jax.jit(lambda: derivative(_loss(pooling.max_pool)))()
  want = jax.jit(lambda: derivative(_loss(_reference)))()
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
