"""R-GAP: its equations, exact recovery, and what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import attacks, datasets, errors, metrics, models, precision
from mpqfl_jax.attacks import rgap
from mpqfl_jax.types import Layer, Model, Observation

MEAN, STD = np.array([0.4, 0.5], np.float32), np.array([0.25, 0.3], np.float32)
CONV = ("NHWC", "HWIO", "NHWC")


def observed(model, params, x, y, rate=0.1, codec=None):
  """What the server sees of a client with one image; adaptive with a codec."""
  update = attacks.simulate(
    model, params, x[None, None], jnp.array([[y]]), rate
  )
  bins = None
  if codec is not None:
    payload, _ = codec.encode(jax.random.key(0), update, codec.init(params))
    update, bins = codec.decode(payload), codec.bins(payload)
  return Observation(params, update, bins, None, jnp.float32(rate))


def small_stack(activation="leaky_relu", slope=0.2):
  """Two convolutions and a classifier without biases, on 6x6x2 images."""
  shapes = {
    "conv1": (4, 4, 2, 8),
    "conv2": (3, 3, 8, 16),
    "dense1": (16 * 16, 5),
  }

  def init(key):
    keys = jax.random.split(key, 3)
    return {
      name: {
        "kernel": jax.random.normal(k, shape) / np.sqrt(np.prod(shape[:-1]))
      }
      for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

  def act(z):
    if activation == "sigmoid":
      return jax.nn.sigmoid(z)
    return jax.nn.leaky_relu(z, slope)

  def apply(params, x):
    h = (x - MEAN) / STD
    for name, stride, padding in (("conv1", 2, 2), ("conv2", 1, 1)):
      h = act(
        jax.lax.conv_general_dilated(
          h,
          params[name]["kernel"],
          (stride, stride),
          ((padding, padding),) * 2,
          dimension_numbers=CONV,
        )
      )
    return h.reshape(len(x), -1) @ params["dense1"]["kernel"]

  layers = (
    Layer("conv1", activation, slope, stride=2, padding=2),
    Layer("conv2", activation, slope, stride=1, padding=1),
    Layer("dense1", "identity"),
  )
  return Model("small", init, apply, (6, 6, 2), 5, MEAN, STD, layers)


@pytest.mark.parametrize("x", [(3.0, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_case_by_hand_is_exact(x, label):
  # One leaky layer, z = (x0 + x1, x0 - x1), and a classifier of three classes:
  # for (3, 1) both units are active, for (1, 3) the second is cut in half.
  x = np.array(x)
  w1 = np.array([[1.0, 1.0], [1.0, -1.0]])
  w2 = np.array([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0]]) / 4
  z = x @ w1
  slope = np.where(z > 0, 1.0, 0.5)
  h = slope * z
  p = np.exp(h @ w2) / np.exp(h @ w2).sum()
  delta2 = p - np.eye(3)[label]
  delta1 = slope * (w2 @ delta2)
  update = {
    "dense1": {"kernel": 0.1 * np.outer(x, delta1)},
    "dense2": {"kernel": 0.1 * np.outer(h, delta2)},
  }
  params = {"dense1": {"kernel": w1}, "dense2": {"kernel": w2}}
  layers = (Layer("dense1", "leaky_relu", 0.5), Layer("dense2", "identity"))
  zero, one = np.zeros(1), np.ones(1)
  model = Model("hand", dict, lambda p, x: x, (1, 2, 1), 3, zero, one, layers)
  seen = Observation(params, update, None, None, np.float32(0.1))
  found, guess = rgap.invert(model, seen, 1e-7)
  np.testing.assert_allclose(found.ravel(), x, rtol=1e-6)
  assert guess == label


def test_equations_are_those_of_a_convolution():
  rng = np.random.default_rng(0)
  for stride, padding, size in ((1, 0, 3), (2, 1, 3), (2, 2, 4), (3, 1, 2)):
    kernel = rng.normal(size=(size, size, 2, 3)).astype(np.float32)
    x = rng.normal(size=(1, 7, 6, 2)).astype(np.float32)

    def conv(x, kernel, stride=stride, padding=padding):
      return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * 2, ((padding,) * 2,) * 2, dimension_numbers=CONV
      )

    y, pull = jax.vjp(conv, x, kernel)
    layer = Layer("conv1", "identity", stride=stride, padding=padding)
    g = rgap._Geometry(layer, (7, 6, 2), y.shape[1:], size)
    matrix = rgap.weight_matrix(g, kernel)
    np.testing.assert_allclose(matrix @ x.ravel(), y.ravel(), atol=1e-5)
    delta = rng.normal(size=y.shape).astype(np.float32)
    back, gradient = pull(jnp.asarray(delta))
    np.testing.assert_allclose(
      matrix.T @ delta.ravel(), back.ravel(), atol=1e-5
    )
    rows = rgap.gradient_matrix(g, delta.reshape(-1, 3))
    np.testing.assert_allclose(
      (rows @ x.reshape(-1, 2)).reshape(size, size, 3, 2),
      gradient.transpose(0, 1, 3, 2),
      atol=1e-4,
    )


@pytest.mark.parametrize("name", ["mlp", "lenet_zhu", "cnn6"])
def test_stacks_are_the_models(name):
  model = models.make(name, (9, 8, 2), 5, MEAN, STD, conv="slices")
  params = model.init(jax.random.key(0))
  x = np.random.default_rng(0).uniform(size=(1, 9, 8, 2))
  h = ((x - MEAN) / STD).ravel()
  for g in rgap._geometries(model, params):
    entry = jax.tree.map(np.float64, params[g.layer.name])
    kernel = entry["kernel"].reshape(g.size, g.size, g.shape[2], g.out[2])
    bias = entry.get("bias", np.zeros(g.out[2]))
    z = rgap.weight_matrix(g, kernel) @ h
    z += np.tile(bias, g.out[0] * g.out[1])
    h = z if g.layer.activation == "identity" else rgap._forward(g.layer, z)
  np.testing.assert_allclose(h, model.apply(params, x)[0], atol=1e-5)


def test_rank_analysis_counts_cnn6():
  model = models.make("cnn6", (32, 32, 3), 10, np.zeros(3), np.ones(3))
  params = jax.eval_shape(model.init, jax.random.key(0))
  # Sides 32, 17, 9, 9, 9, 5, 5; gradient constraints: kernel entries times
  # outputs a channel, or all positions of the channel.
  assert rgap.constraints(model, params) == [
    ("conv1", 32 * 32 * 3, 17 * 17 * 12, 16 * 12 * 3),
    ("conv2", 17 * 17 * 12, 9 * 9 * 36, 17 * 17 * 12),
    ("conv3", 9 * 9 * 36, 9 * 9 * 36, 9 * 9 * 36),
    ("conv4", 9 * 9 * 36, 9 * 9 * 36, 9 * 9 * 36),
    ("conv5", 9 * 9 * 36, 5 * 5 * 64, 9 * 9 * 36),
    ("conv6", 5 * 5 * 64, 5 * 5 * 128, 5 * 5 * 64),
    ("dense1", 5 * 5 * 128, 0, 5 * 5 * 128),
  ]


def test_rank_analysis_bounds_the_rank_of_the_system():
  model = small_stack()
  params = model.init(jax.random.key(0))
  rng = np.random.default_rng(1)
  for g, count in zip(
    rgap._geometries(model, params)[:-1],
    rgap.constraints(model, params),
    strict=False,
  ):
    kernel = np.float64(params[g.layer.name]["kernel"])
    weights = rgap.weight_matrix(g, kernel).toarray()
    delta = rng.normal(size=(g.out[0] * g.out[1], g.out[2]))
    gradient = np.kron(rgap.gradient_matrix(g, delta), np.eye(g.shape[2]))
    assert np.linalg.matrix_rank(gradient) == count.gradient
    assert np.linalg.matrix_rank(weights) <= count.weight
    both = np.linalg.matrix_rank(np.vstack([weights, gradient]))
    assert both == count.unknowns == math.prod(g.shape)


@pytest.mark.parametrize("activation", ["leaky_relu", "sigmoid"])
def test_least_squares_is_that_of_numpy(activation):
  model = small_stack(activation)
  params = model.init(jax.random.key(0))
  g = rgap._geometries(model, params)[0]
  rng = np.random.default_rng(2)
  weights = rgap.weight_matrix(g, np.float64(params["conv1"]["kernel"]))
  matrix = rgap.gradient_matrix(g, rng.normal(size=(16, 8)))
  output, precision_ = rng.normal(size=128), rng.uniform(1, 2, size=128)
  offset, mean = rng.normal(size=128), rng.normal(size=72)
  gradient = rng.normal(size=(2, len(matrix)))
  for noise in (0.5, 1e-5):  # with the weight constraints, and without
    got = rgap._solve(
      weights, offset, output, precision_, matrix, gradient, noise, mean, 3.0
    )
    alone = noise < 1e-3
    rows = np.vstack(
      [
        weights.toarray() * precision_[:, None] * (not alone),
        np.kron(matrix, np.eye(2)) / noise,
        np.eye(72) / 3.0,
      ]
    )
    side = np.concatenate(
      [
        (output - offset) * precision_ * (not alone),
        gradient.T.ravel() / noise,
        mean / 3.0,
      ]
    )
    want = np.linalg.lstsq(rows, side, rcond=None)[0]
    np.testing.assert_allclose(got.x, want, rtol=1e-6, atol=1e-6)
    error = np.sqrt(np.trace(np.linalg.inv(rows.T @ rows)) / 72)
    np.testing.assert_allclose(got.error, error, rtol=0.3)


@pytest.mark.parametrize("activation", ["leaky_relu", "sigmoid"])
def test_a_small_stack_is_taken_back(activation):
  model = small_stack(activation)
  params = model.init(jax.random.key(1))
  x = np.random.default_rng(0).uniform(size=(6, 6, 2)).astype(np.float32)
  seen = observed(model, params, x, 3)
  attack = attacks.make("rgap", model)
  batch = jax.tree.map(lambda a: np.asarray(a)[None], seen)
  found = attacks.run(attack, batch, jax.random.key(0), progress=False)
  assert metrics.psnr_db(x[None], found.x[:, 0])[0] > 80
  assert found.labels.tolist() == [[3]]
  assert found.objective[0] < 1e-9


def test_an_adversary_who_knows_the_codec_weighs_its_error():
  model = small_stack()
  params = model.init(jax.random.key(1))
  coder = precision.make("int8", params)
  better = []
  for i in range(6):
    x = np.random.default_rng(i).uniform(size=(6, 6, 2)).astype(np.float32)
    seen = observed(model, params, x, i % 5, codec=coder)
    blind, _ = rgap.invert(model, seen._replace(bins=None), 1e-7)
    adaptive, _ = rgap.invert(model, seen, 1e-7)
    better.append(
      metrics.psnr_db(x[None], adaptive[None])
      - metrics.psnr_db(x[None], blind[None])
    )
  assert np.median(better) > 1


@pytest.mark.parametrize("left_out", ["bias", "kernel"])
def test_a_leaf_that_was_not_sent_is_not_taken_for_zero(left_out):
  mean, std = np.full(2, 0.5, np.float32), np.full(2, 0.3, np.float32)
  model = models.make("mlp", (6, 6, 2), 5, mean, std, "slices")
  params = model.init(jax.random.key(1))
  x = np.random.default_rng(0).uniform(size=(6, 6, 2)).astype(np.float32)
  seen = observed(model, params, x, 3, codec=precision.make("none", params))
  last = models.head(params).kernel[0]
  sent = jax.tree.map(jnp.zeros_like, seen.update[last][left_out])
  seen.update[last][left_out] = sent
  for field, value in (("lower", -1), ("upper", 1), ("variance", 1)):
    getattr(seen.bins, field)[last][left_out] = value * jnp.inf + sent
  for observation in (seen, seen._replace(bins=None)):
    image, label = rgap.invert(model, observation, 1e-7)
    assert np.isfinite(image).all()
    if left_out == "bias":
      assert label == 3
      assert metrics.psnr_db(x[None], image[None]) > 20


def test_what_cannot_be_inverted_is_refused():
  def check(name, shape=(8, 8, 3)):
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    model = models.make(name, shape, 10, zero, one)
    params = jax.eval_shape(model.init, jax.random.key(0))
    seen = Observation(params, params, None, None, np.float32(1))
    attacks.make("rgap", model).check(seen)

  for name in ("resnet20", "resnet18", "convnet", "cnn"):
    with pytest.raises(errors.UserError, match=r"plain stack.*cnn6"):
      check(name, (16, 16, 3))
  for name in ("mlp", "lenet_zhu", "cnn6"):
    check(name, (32, 32, 3))
  small = small_stack()
  thin = {"conv1": (4, 4, 2, 1), "conv2": (3, 3, 1, 16), "dense1": (256, 5)}
  params = {
    name: {"kernel": np.zeros(shape, np.float32)}
    for name, shape in thin.items()
  }
  seen = Observation(params, params, None, None, np.float32(1))
  # 72 pixels; one channel of 4 x 4 outputs, 16 kernel entries for two channels.
  with pytest.raises(errors.UserError, match=r"conv1: its 72 .* 16 .* 32"):
    attacks.make("rgap", small).check(seen)
  with pytest.raises(errors.UserError, match="one image of one step"):
    attacks.make("rgap", small, batch=2)
  with pytest.raises(errors.UserError, match="noise"):
    attacks.make("rgap", small, noise=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn6", "lenet_zhu", "mlp"])
def test_real_images_are_taken_back(name):
  data = datasets.load("cifar10_sample")
  model = models.make(name, (32, 32, 3), 10, data.mean, data.std, conv="slices")
  params = model.init(jax.random.key(0))
  rows = np.arange(100, 105)
  x, y = data.x_test[rows] / np.float32(255), data.y_test[rows]
  found = [
    rgap.invert(model, observed(model, params, image, label), 1e-7)
    for image, label in zip(x, y, strict=True)
  ]
  quality = metrics.psnr_db(x, np.stack([image for image, _ in found]))
  # breaching reaches 47.4 dB on cnn6.
  assert np.median(quality) > 80
  assert np.min(quality) > 45
  assert [label for _, label in found] == y.tolist()
