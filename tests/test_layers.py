"""Every form of convolution equals XLA's, with first and second derivatives."""

import functools
import re

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import errors, layers, winograd

_NHWC = ("NHWC", "HWIO", "NHWC")
_CASES = [
  # (channels in, channels out, kernel, strides, padding)
  (3, 12, (5, 5), (2, 2), ((2, 2), (2, 2))),
  (16, 32, (5, 5), (1, 1), "SAME"),
  (32, 8, (3, 3), (1, 1), "VALID"),
  (16, 16, (3, 2), (1, 1), ((2, 0), (0, 1))),
  (4, 6, (3, 3), (2, 1), "SAME"),
]


# Channels in and out and kernel of a case that `winograd` computes in tiles.
_TILED = (16, 32, (5, 5))


def test_tiles_are_reached():
  """Or the tests of `winograd` would be those of `canonical`."""
  cin, cout, kernel = _TILED
  for size in ((9, 11), (8, 8)):
    pads = ((2, 2), (2, 2))
    assert winograd.tiling(size, pads, kernel, 2, (cin, cout)) is not None


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
  x, w = _arrays(*_TILED)
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


def _hlo_convolutions(fn, *args):
  text = jax.jit(fn).lower(*args).as_text()
  groups = re.findall(r"feature_group_count = (\d+)", text)
  groups += re.findall(r"batch_group_count = (\d+)", text)
  return [int(g) for g in groups]


@pytest.mark.parametrize("form", ["winograd", "canonical", "planes", "slices"])
@pytest.mark.parametrize("channels", [4, 16])
def test_vmap_over_kernels_makes_no_grouped_convolution(form, channels):
  shape = (2 * channels, (5, 5))
  net = nn.Conv(*shape, conv_general_dilated=layers.convolution(form))
  x = jax.random.normal(jax.random.key(1), (5, 2, 8, 8, channels))
  variables = jax.vmap(lambda k: net.init(k, x[0]))(
    jax.random.split(jax.random.key(0), 5)
  )

  def loss(variables, x):
    return jnp.sum(net.apply(variables, x) ** 2)

  grads = jax.vmap(jax.grad(loss, (0, 1)))
  assert set(_hlo_convolutions(grads, variables, x)) <= {1}
  plain = nn.Conv(*shape)

  def plain_loss(variables, x):
    return jnp.sum(plain.apply(variables, x) ** 2)

  plain_grads = jax.vmap(jax.grad(plain_loss, (0, 1)))
  assert max(_hlo_convolutions(plain_grads, variables, x)) > 1
  _assert_close(jax.jit(grads)(variables, x), plain_grads(variables, x))


@pytest.mark.parametrize(
  "form, strides, sizes",
  [
    ("winograd", (1, 1), _TILED),
    ("canonical", (2, 1), (3, 4, (3, 2))),
    ("canonical", (1, 1), _TILED),
    ("planes", (2, 1), (3, 4, (3, 2))),
  ],
)
def test_derivatives_commute_with_vmap_and_with_each_other(
  form, strides, sizes
):
  conv, want = layers.convolution(form), lax.conv_general_dilated
  x, w = _arrays(*sizes)
  xs, ws = jnp.stack([x, -x]), jnp.stack([w, 2 * w])

  def loss(conv):
    def fn(x, w):
      y = conv(x, w, strides, "SAME", dimension_numbers=_NHWC)
      return jnp.sum(jnp.tanh(y))

    return fn

  def cases(fn):
    both = jax.vmap(fn)
    return (
      jax.vmap(jax.grad(fn), (0, None))(xs, w),
      jax.vmap(jax.grad(fn, 1), (0, None))(xs, w),
      jax.vmap(jax.grad(fn), (None, 0))(x, ws),
      jax.vmap(jax.vmap(fn, (0, None)), (None, 0))(xs, ws),
      jax.grad(lambda x, w: jnp.sum(both(x, w)), (0, 1))(xs, ws),
      jax.jvp(jax.grad(fn, (0, 1)), (x, w), (x, w))[1],
      jax.jvp(lambda w: jax.linearize(fn, x, w)[1](x, w), (w,), (w,))[1],
    )

  got = jax.jit(lambda: cases(loss(conv)))()
  _assert_close(got, jax.jit(lambda: cases(loss(want)))())


@pytest.mark.parametrize("form", list(layers.FORMS))
@pytest.mark.parametrize("channels", [2, 20])
def test_block_equals_flax(form, channels):
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, channels))
  w = jax.random.normal(jax.random.key(1), (3, 3, channels, channels))
  bias = jnp.linspace(-1, 1, channels)

  def ours(w, bias):
    y = layers.block(
      form, x, w, bias, (1, 1), ((1, 1), (1, 1)), nn.sigmoid, pool=2
    )
    return jnp.sum(y**2), y

  def theirs(w, bias):
    y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=_NHWC)
    y = nn.max_pool(nn.sigmoid(y + bias), (2, 2), (2, 2))
    return jnp.sum(y**2), y

  def both(fn):
    return jax.jit(jax.grad(fn, (0, 1), has_aux=True))(w, bias)

  _assert_close(both(ours), both(theirs))


def test_unknown_form_names_the_nearest():
  with pytest.raises(errors.UserError, match="Did you mean 'slices'"):
    layers.convolution("slice")
