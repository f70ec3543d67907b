"""Every form of convolution equals XLA's, with first and second derivatives."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import errors, layers

_NHWC = ("NHWC", "HWIO", "NHWC")
_CASES = [
  # (channels in, channels out, kernel, strides, padding)
  (3, 12, (5, 5), (2, 2), ((2, 2), (2, 2))),
  (16, 32, (5, 5), (1, 1), "SAME"),
  (32, 8, (3, 3), (1, 1), "VALID"),
  (16, 16, (3, 2), (1, 1), ((2, 0), (0, 1))),
  (4, 6, (3, 3), (2, 1), "SAME"),
]


def _arrays(cin, cout, kernel):
  x = jax.random.normal(jax.random.key(0), (2, 9, 11, cin))
  w = jax.random.normal(jax.random.key(1), (*kernel, cin, cout))
  return x, w / np.sqrt(w[..., 0].size)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _derivatives(conv, x, w, strides, padding):
  """Value, both gradients, and gradients of the gradients' squared norm."""

  def value(x, w):
    y = conv(x, w, strides, padding, dimension_numbers=_NHWC)
    return jnp.sum(jnp.tanh(y)), y

  def norm(x, w):
    gx, gw = jax.grad(lambda *a: value(*a)[0], (0, 1))(x, w)
    return jnp.sum(gx**2) + jnp.sum(gw**2)

  return (
    value(x, w)[1],
    jax.grad(lambda *a: value(*a)[0], (0, 1))(x, w),
    jax.grad(norm, (0, 1))(x, w),
  )


def _assert_close(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    scale = np.abs(b).max()
    np.testing.assert_allclose(a, b, atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize("form", [f for f in layers.FORMS if f != "xla"])
@pytest.mark.parametrize("cin, cout, kernel, strides, padding", _CASES)
def test_equals_xla(form, cin, cout, kernel, strides, padding):
  x, w = _arrays(cin, cout, kernel)
  got = _derivatives(layers.convolution(form), x, w, strides, padding)
  want = _derivatives(lax.conv_general_dilated, x, w, strides, padding)
  _assert_close(got, want)


@pytest.mark.parametrize("form", list(layers.FORMS))
def test_vmap_over_kernels_equals_a_loop(form):
  conv = layers.convolution(form)
  x, w = _arrays(16, 16, (3, 3))
  kernels = jnp.stack([w, 2 * w, -w])

  def one(w):
    return jax.grad(
      lambda w: jnp.sum(
        conv(x, w, (1, 1), "SAME", dimension_numbers=_NHWC) ** 2
      )
    )(w)

  _assert_close(
    jax.jit(jax.vmap(one))(kernels),
    jax.jit(functools.partial(lax.map, one))(kernels),
  )


@pytest.mark.parametrize("form", list(layers.FORMS))
def test_what_a_form_does_not_cover_goes_to_xla(form):
  conv = layers.convolution(form)
  x, w = _arrays(4, 6, (3, 3))
  grouped = w[:, :, :2]
  want = lax.conv_general_dilated(
    x, grouped, (1, 1), "SAME", dimension_numbers=_NHWC, feature_group_count=2
  )
  got = conv(
    x, grouped, (1, 1), "SAME", dimension_numbers=_NHWC, feature_group_count=2
  )
  np.testing.assert_array_equal(got, want)
  dilated = conv(
    x, w, (1, 1), "SAME", rhs_dilation=(2, 2), dimension_numbers=_NHWC
  )
  assert dilated.shape == (2, 9, 11, 6)


def test_max_pool_equals_reduce_window():
  x = jax.random.normal(jax.random.key(0), (2, 7, 9, 3))
  want = lax.reduce_window(
    x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
  )
  np.testing.assert_array_equal(layers.max_pool(x, 2), want)


def test_unknown_form_names_the_nearest():
  with pytest.raises(errors.UserError, match="Did you mean 'slices'"):
    layers.convolution("slice")
