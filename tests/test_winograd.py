"""Minimal filtering is convolution as defined, by NumPy in float64."""

import fractions
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import convolutions
from mpqfl_jax import datasets, layers, models, winograd

# Every (tile, kernel) that there are points for.
_FILTERS = [
  (tile, kernel)
  for tile, kernel in itertools.product(range(1, 8), range(2, 8))
  if tile + kernel - 1 <= 8
]
_CASES = [
  # (height and width, pads, kernel, channels, batch)
  ((14, 14), ((2, 2), (2, 2)), (5, 5), (32, 64), 4),
  ((16, 16), ((1, 1), (1, 1)), (3, 3), (48, 64), 4),
  ((9, 11), ((0, 0), (0, 0)), (3, 3), (32, 32), 8),
  ((7, 12), ((2, 0), (0, 3)), (3, 2), (32, 48), 8),
  ((6, 5), ((4, 4), (3, 3)), (5, 4), (32, 32), 8),
]


@pytest.mark.parametrize("tile, kernel", _FILTERS)
def test_matrices_are_exact(tile, kernel):
  """In rational arithmetic, as the theorem has it: no rounding can hide."""
  exact = np.vectorize(
    lambda v: fractions.Fraction(v).limit_denominator(10**5), otypes=[object]
  )
  output, taps, signal = map(exact, winograd.matrices(tile, kernel))
  points = tile + kernel - 1
  for k, i in itertools.product(range(kernel), range(points)):
    w, x = np.zeros((2, points), dtype=object)
    w[k], x[i] = 1, 1
    got = output @ ((taps @ w[:kernel]) * (signal @ x))
    want = [int(0 <= i - k < tile and j == i - k) for j in range(tile)]
    assert list(got) == want


def _distance(got, want):
  got = np.asarray(got, np.float64)
  assert got.shape == want.shape
  return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("size, pads, kernel, channels, batch", _CASES)
def test_value_and_gradients_equal_the_definition(
  size, pads, kernel, channels, batch
):
  plan = winograd.tiling(size, pads, kernel, batch, channels)
  assert plan is not None
  outputs = [
    n + sum(p) - k + 1 for n, p, k in zip(size, pads, kernel, strict=True)
  ]
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.nn.relu(jax.random.normal(keys[0], (batch, *size, channels[0])))
  w = jax.random.normal(keys[1], (*kernel, *channels))
  d = jax.random.normal(keys[2], (batch, *outputs, channels[1]))
  want = convolutions.exactly(x, w, d, pads)
  got = jax.jit(
    lambda x, w, d: (
      winograd.convolve(x, w, plan),
      winograd.input_gradient(w, d, plan),
      winograd.kernel_gradient(x, d, plan),
    )
  )(x, w, d)
  for a, b in zip(got, want, strict=True):
    assert _distance(a, b) < 1e-5
  # And they are the transposes that autodiff finds.
  _, back = jax.vjp(lambda x, w: winograd.convolve(x, w, plan), x, w)
  for a, b in zip(back(d), want[1:], strict=True):
    assert _distance(a, b) < 1e-5


@pytest.mark.parametrize("tile, kernel", _FILTERS)
def test_rounding_stays_near_that_of_the_definition(tile, kernel):
  """Every tile that may be picked: 1e-5, and 50 times NumPy's in float32."""
  output, taps, signal = (
    m.astype(np.float32) for m in winograd.matrices(tile, kernel)
  )
  rng = np.random.default_rng(0)
  points = tile + kernel - 1
  x = rng.standard_normal((200, points, points, 32), np.float32)
  w = rng.standard_normal((kernel, kernel, 32), np.float32)
  values = np.einsum("ai,bj,nijc->nabc", signal, signal, x, optimize=True)
  kernels = np.einsum("ai,bj,ijc->abc", taps, taps, w, optimize=True)
  products = (values * kernels).sum(-1)
  got = np.einsum("ia,jb,nab->nij", output, output, products, optimize=True)
  want, _, _ = convolutions.exactly(
    x, w[..., None], np.zeros((200, tile, tile, 1)), ((0, 0), (0, 0))
  )
  distance = _distance(got[..., None], want)
  plain = sum(
    (x[:, i : i + tile, j : j + tile] * w[i, j]).sum(-1)
    for i, j in itertools.product(range(kernel), repeat=2)
  )
  assert distance < min(1e-5, 50 * _distance(plain[..., None], want))


def test_tiles_are_taken_where_they_save():
  # 64 points for 16 tiles of an image, where the definition takes 25 products
  # for each of 196 places.
  plan = winograd.tiling((14, 14), ((2, 2), (2, 2)), (5, 5), 16, (32, 64))
  assert (plan.points, plan.tiles) == (64, 16)
  # One tap has nothing to save; nor has one place, or one channel.
  none = ((0, 0), (0, 0))
  assert winograd.tiling((14, 14), none, (1, 1), 16, (64, 64)) is None
  assert winograd.tiling((3, 3), none, (3, 3), 16, (64, 64)) is None
  assert winograd.tiling((14, 14), none, (3, 3), 16, (1, 64)) is None
  # Fewer images than it takes to be worth the kernel's values.
  size, pads = (4, 4), ((1, 1), (1, 1))
  assert winograd.tiling(size, pads, (3, 3), 64, (64, 64)) is not None
  assert winograd.tiling(size, pads, (3, 3), 1, (512, 512)) is None


def test_padding_is_never_computed():
  """The matrices leave it out."""
  plan = winograd.tiling((14, 14), ((2, 2), (2, 2)), (5, 5), 2, (32, 64))
  jaxpr = jax.make_jaxpr(lambda x, w: winograd.convolve(x, w, plan))(
    jnp.zeros((2, 14, 14, 32)), jnp.zeros((5, 5, 32, 64))
  )
  assert "pad" not in str(jaxpr)


def test_low_precision_is_left_to_others():
  """Values at the points would lose what bfloat16 has."""
  conv = layers.convolution("winograd")
  shapes = [(4, 14, 14, 32), (5, 5, 32, 64)]
  for dtype, exact in ((jnp.bfloat16, False), (jnp.float32, True)):
    arrays = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]
    lowered = jax.jit(
      lambda x, w: conv(x, w, (1, 1), "SAME", dimension_numbers=layers.NHWC)
    ).lower(*arrays)
    assert lowered.out_info.dtype == dtype
    assert ("stablehlo.convolution" not in lowered.as_text()) == exact


def test_a_gradient_on_dark_images_is_that_of_the_definition():
  """Where the background is even, and sums that cancel might cross a kink."""
  data = datasets.load("mnist_sample")
  x = jnp.asarray(data.x_train[:16], jnp.float32) / 255
  y = jnp.asarray(data.y_train[:16])

  def gradient(form):
    net = models.make(
      "cnn",
      data.x_train.shape[1:],
      len(data.class_names),
      data.mean,
      data.std,
      form,
    )

    def loss(params):
      return models.cross_entropy(net, params, x, y).mean()

    return jax.jit(jax.grad(loss))(net.init(jax.random.key(0)))

  for a, b in zip(
    *map(jax.tree.leaves, (gradient("winograd"), gradient("canonical"))),
    strict=True,
  ):
    assert _distance(a, np.asarray(b, np.float64)) < 1e-5
