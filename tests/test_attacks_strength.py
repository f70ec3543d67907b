"""How much the attacks bring back of real images they were not tuned on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import attacks, datasets, metrics, models, precision, types
from mpqfl_jax.attacks import leakage


@pytest.fixture(scope="module")
def cifar():
  return datasets.load("cifar10_sample")


def lenet(data):
  model = models.make(
    "lenet_zhu",
    data.x_train.shape[1:],
    10,
    data.mean,
    data.std,
    conv="slices",
  )
  return model, model.init(jax.random.key(0))


def observe(model, params, data, rows, codec="none", adaptive=False, **options):
  """Test images, and what the server sees of clients that hold one each."""
  x = data.x_test[rows] / np.float32(255)
  y = jnp.asarray(data.y_test[rows])
  coder = precision.make(codec, params, **options)

  @jax.jit
  def send(key, x, y):
    update = attacks.simulate(model, params, x[None, None], y[None, None], 0.1)
    return coder.encode(key, update, coder.init(params))[0]

  seen = []
  for i, (image, label) in enumerate(zip(x, y, strict=True)):
    payload = send(jax.random.key(i), image, label)
    bins = coder.bins(payload) if adaptive else None
    seen.append(
      types.Observation(
        params, coder.decode(payload), bins, None, jnp.float32(0.1)
      )
    )
  return x, np.asarray(y), jax.tree.map(lambda *a: np.stack(a), *seen)


def attack(name, model, data, observation, **options):
  made = attacks.make(name, model, auxiliary=data.x_train, **options)
  return attacks.run(made, observation, jax.random.key(1), progress=False)


def test_dlg_takes_back_a_real_image(cifar):
  model, params = lenet(cifar)
  x, y, observation = observe(model, params, cifar, [0])
  found = attack("dlg", model, cifar, observation, iterations=300)
  assert metrics.psnr_db(x, found.x[:, 0])[0] > 25
  assert found.labels[0, 0] == y[0]


@pytest.mark.slow
def test_dlg_takes_back_undefended_images(cifar):
  model, params = lenet(cifar)
  x, y, observation = observe(model, params, cifar, np.arange(100, 108))
  found = attack("dlg", model, cifar, observation)
  quality = metrics.psnr_db(x, found.x[:, 0])
  assert np.sum(quality >= 20) >= 7
  assert np.median(quality) >= 40
  np.testing.assert_array_equal(found.labels[:, 0], y)


@pytest.mark.slow
@pytest.mark.parametrize(
  "codec, options, expected_db",
  [
    # A few dB below what was measured on training images.
    ("int8", {}, 36),
    ("paper", {}, 32),
    ("int4", {}, 26),
    ("int2", {}, 17),
    ("sign", {}, 18),
    ("ternary", {}, 15),
  ],
)
def test_map_reads_quantised_updates(cifar, codec, options, expected_db):
  model, params = lenet(cifar)
  rows = np.arange(110, 114)
  x, _, observation = observe(
    model, params, cifar, rows, codec, adaptive=True, **options
  )
  found = attack("map", model, cifar, observation)
  assert np.median(metrics.psnr_db(x, found.x[:, 0])) >= expected_db


@pytest.mark.slow
def test_four_bits_do_not_stop_a_blind_search_that_knows_photographs(cifar):
  model, params = lenet(cifar)
  x, _, observation = observe(model, params, cifar, np.arange(110, 114), "int4")
  quality = {}
  for search in ("natural", "pixels"):
    found = attack(
      "inverting_gradients",
      model,
      cifar,
      observation,
      search=search,
      iterations=400,
    )
    quality[search] = metrics.psnr_db(x, found.x[:, 0])
  assert np.median(quality["natural"]) >= 19
  assert np.median(quality["natural"] - quality["pixels"]) >= 6


@pytest.mark.slow
def test_a_learned_prior_knows_digits_better_than_a_gaussian():
  mnist = datasets.load("mnist_sample")
  model, params = lenet(mnist)
  rows = np.arange(200, 208)
  x, _, observation = observe(
    model, params, mnist, rows, "int2", adaptive=True, rounding="stochastic"
  )
  quality = {}
  for prior in ("gaussian", "learned"):
    found = attack("map", model, mnist, observation, prior=prior)
    quality[prior] = metrics.psnr_db(x, found.x[:, 0])
  # 2.6 dB here; between -0.7, a wrong digit, and 5.5.
  assert np.median(quality["learned"] - quality["gaussian"]) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
  "codec",
  [
    pytest.param(
      "int5",
      marks=pytest.mark.xfail(
        reason="predicts 34.8 dB where 38.3 are reached: 800 components count"
        " the rest of the image as unseen, which caps fine updates",
      ),
    ),
    "int4",
    "int3",
  ],
)
def test_predicted_leakage_is_what_the_attack_reaches(cifar, codec):
  model, params = lenet(cifar)
  rows = np.arange(120, 123)
  y = cifar.y_test[rows]
  images = cifar.x_test[rows] / np.float32(255)
  sensitivities = leakage.sensitivity(
    model, params, images, y, 0.1, cifar.x_train
  )
  x, _, observation = observe(model, params, cifar, rows, codec, adaptive=True)
  variances = jax.tree.leaves(observation.bins.variance)
  noise = np.stack([v.reshape(len(x), -1).mean(1) for v in variances], 1)
  predicted = leakage.expected_psnr_db(sensitivities, noise)
  found = attack("map", model, cifar, observation)
  reached = metrics.psnr_db(x, found.x[:, 0])
  assert abs(np.median(predicted) - np.median(reached)) < 2.5
