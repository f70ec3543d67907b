"""Sizes from the papers, initial weights, normalisation, the loss."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqfl_jax import errors, layers, models, trees

_MEAN, _STD = np.array([0.1307]), np.array([0.3081])


def _make(name, shape=(28, 28, 1), conv="xla"):
  mean = np.full(shape[-1], _MEAN[0])
  std = np.full(shape[-1], _STD[0])
  return models.make(name, shape, 10, mean, std, conv)


@pytest.mark.parametrize(
  "name, shape, parameters",
  [
    # McMahan et al. 2017, section 3: 199,210 and 1,663,370.
    ("mlp", (28, 28, 1), 199_210),
    ("cnn", (28, 28, 1), 1_663_370),
    # Zhu et al. 2019: 5x5x12 three times and a dense layer, on 32x32x3:
    # 912 + 3,612 + 3,612 + 7,690.
    ("lenet_zhu", (32, 32, 3), 15_826),
    # The figures that breaching and torchvision-style CIFAR models print.
    ("convnet", (32, 32, 3), 2_904_970),
    ("resnet20", (32, 32, 3), 272_474),
    ("resnet18", (32, 32, 3), 11_173_962),
    # 576 + 3,888 + 2 * 11,664 + 20,736 + 73,728 + 32,000, no biases.
    ("cnn6", (32, 32, 3), 154_256),
  ],
)
def test_number_of_parameters(name, shape, parameters):
  params = jax.eval_shape(_make(name, shape).init, jax.random.key(0))
  assert trees.size(params) == parameters


def test_lenet_weights_are_uniform_on_one_half():
  params = _make("lenet_zhu").init(jax.random.key(0))
  for leaf in jax.tree.leaves(params):
    assert np.abs(leaf).max() <= 0.5
  dense = np.asarray(params["dense1"]["kernel"]).ravel()
  # The variance of a uniform on [-1/2, 1/2] is 1/12; five standard errors.
  error = 5 * np.sqrt(1 / 180 / dense.size)
  assert abs(dense.var() - 1 / 12) < error


_LARGE = ("convnet", "resnet20", "resnet18")


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] if name in _LARGE else [])
    for name in models.MODELS
  ],
)
@pytest.mark.parametrize("form", [f for f in layers.FORMS if f != "xla"])
def test_forms_change_no_logit(name, form):
  base, other = _make(name), _make(name, conv=form)
  params = base.init(jax.random.key(0))
  x = jax.random.uniform(jax.random.key(1), (3, 28, 28, 1))
  np.testing.assert_allclose(
    jax.jit(other.apply)(params, x), jax.jit(base.apply)(params, x), atol=1e-5
  )


@pytest.mark.parametrize("name", list(models.MODELS))
def test_layers_sort_in_the_order_of_the_network(name):
  params = jax.eval_shape(_make(name).init, jax.random.key(0))
  layers_ = list(
    dict.fromkeys(n.split("/")[0] for n in trees.leaf_names(params))
  )
  convs = [layer for layer in layers_ if layer.startswith("conv")]
  assert layers_[: len(convs)] == convs


def test_a_module_without_the_fields_is_refused(monkeypatch):
  class Bare(nn.Module):
    classes: int

  monkeypatch.setitem(models.MODELS, "bare", (Bare, "no conv"))
  with pytest.raises(errors.UserError, match=r"the fields classes .* and conv"):
    _make("bare")

  class More(Bare):
    conv: str
    width: int

  monkeypatch.setitem(models.MODELS, "bare", (More, "no width"))
  with pytest.raises(errors.UserError, match=r"'width'.*all others a default"):
    _make("bare")


def test_normalises_inside():
  model = _make("mlp")
  params = model.init(jax.random.key(0))
  x = jax.random.uniform(jax.random.key(1), (2, 28, 28, 1))
  z = (np.asarray(x) - _MEAN) / _STD
  h = z.reshape(2, -1)
  for name in ("dense1", "dense2"):
    h = np.maximum(h @ params[name]["kernel"] + params[name]["bias"], 0)
  want = h @ params["dense3"]["kernel"] + params["dense3"]["bias"]
  np.testing.assert_allclose(model.apply(params, x), want, atol=1e-4)


def test_cross_entropy_of_labels_and_of_probabilities():
  model = _make("mlp")
  params = model.init(jax.random.key(0))
  x = jax.random.uniform(jax.random.key(1), (4, 28, 28, 1))
  y = jnp.array([3, 1, 4, 1])
  logits = np.asarray(model.apply(params, x), np.float64)
  want = np.log(np.exp(logits).sum(-1)) - logits[np.arange(4), y]
  hard = models.cross_entropy(model, params, x, y)
  soft = models.cross_entropy(model, params, x, jax.nn.one_hot(y, 10))
  np.testing.assert_allclose(hard, want, rtol=1e-4)
  np.testing.assert_allclose(soft, want, rtol=1e-4)


def test_unknown_model_names_the_nearest():
  with pytest.raises(errors.UserError, match="Did you mean 'lenet_zhu'"):
    _make("lenet_zu")


@pytest.mark.parametrize("conv", ["xla", "slices"])
def test_activations_are_what_layers_compute(conv):
  make = functools.partial(models.make, "mlp", (4, 4, 1), 3)
  model = make(np.zeros(1), np.ones(1), conv)
  # Normalised pixels in two steps; product, bias and ReLU of two layers of 200;
  # product and bias of the last.
  assert models.activations(model) == 2 * 16 + 2 * 3 * 200 + 2 * 3


def test_slices_hold_a_patch_for_each_position():
  def count(conv):
    shape, ones = (28, 28, 1), np.ones(1)
    return models.activations(
      models.make("lenet_zhu", shape, 10, 0 * ones, ones, conv)
    )

  patches = 14 * 14 * 25 + 7 * 7 * 25 * 12 + 7 * 7 * 25 * 12
  assert count("slices") - count("xla") == patches
