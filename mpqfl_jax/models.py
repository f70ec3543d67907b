"""The classifiers: Flax modules turned into plain `Model`s.

No module past this one knows Flax.
"""

from collections.abc import Callable, Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import errors, layers
from mpqfl_jax.types import Array, Model


def _uniform(bound: float) -> Callable:
  """Initialiser: uniform on [-bound, bound]."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class _MLP(nn.Module):
  classes: int
  conv: Callable
  hidden: Sequence[int] = (200, 200)

  @nn.compact
  def __call__(self, x):
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.hidden):
      x = nn.relu(nn.Dense(width, name=f"dense{i + 1}")(x))
    return nn.Dense(self.classes, name=f"dense{len(self.hidden) + 1}")(x)


class _LeNetZhu(nn.Module):
  classes: int
  conv: Callable

  @nn.compact
  def __call__(self, x):
    init = _uniform(0.5)
    for i, stride in enumerate((2, 2, 1)):
      x = nn.Conv(
        12,
        (5, 5),
        (stride, stride),
        padding=((2, 2), (2, 2)),
        kernel_init=init,
        bias_init=init,
        conv_general_dilated=self.conv,
        name=f"conv{i + 1}",
      )(x)
      x = nn.sigmoid(x)
    x = x.reshape(x.shape[0], -1)
    return nn.Dense(
      self.classes, kernel_init=init, bias_init=init, name="dense1"
    )(x)


class _CNN(nn.Module):
  classes: int
  conv: Callable

  @nn.compact
  def __call__(self, x):
    for i, width in enumerate((32, 64)):
      x = nn.Conv(
        width, (5, 5), conv_general_dilated=self.conv, name=f"conv{i + 1}"
      )(x)
      x = layers.max_pool(nn.relu(x), 2)
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(nn.Dense(512, name="dense1")(x))
    return nn.Dense(self.classes, name="dense2")(x)


# name -> (module, one line with its source)
MODELS: dict[str, tuple[Callable, str]] = {
  "mlp": (_MLP, "two hidden layers of 200, McMahan et al. 2017, section 3"),
  "lenet_zhu": (
    _LeNetZhu,
    "sigmoid LeNet of Deep Leakage from Gradients, Zhu et al. 2019",
  ),
  "cnn": (_CNN, "two convolutions and 512 units, McMahan et al. 2017"),
}


def make(
  name: str,
  image_shape: tuple[int, int, int],
  num_classes: int,
  mean: np.ndarray,
  std: np.ndarray,
  conv: str = "xla",
) -> Model:
  """Builds a model for images of one shape.

  Args:
    name: one of `MODELS`.
    image_shape: (height, width, channels).
    num_classes: number of classes.
    mean: [channels] float32, subtracted from images in [0, 1].
    std: [channels] float32, divided by.
    conv: the form of its convolutions, one of `layers.FORMS`; it changes speed
      and float32 summation order, nothing else.

  Raises:
    UserError: no such model or form.
  """
  if name not in MODELS:
    raise errors.unknown_name("model", name, MODELS)
  module = MODELS[name][0](classes=num_classes, conv=layers.convolution(conv))
  mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

  @jax.jit
  def init(key):
    sample = jnp.zeros((1, *image_shape), jnp.float32)
    return dict(module.init(key, sample)["params"])

  def apply(params, x: Array) -> Array:
    return module.apply({"params": params}, (x - mean) / std)

  return Model(name, init, apply, image_shape, num_classes, mean, std)


def cross_entropy(model: Model, params, x: Array, y: Array) -> Array:
  """Cross-entropy of each example, [batch] float32.

  Args:
    model: the classifier.
    params: its parameters.
    x: [batch, height, width, channels] in [0, 1].
    y: [batch] int32 labels, or [batch, classes] float32 class probabilities.
  """
  log_probs = jax.nn.log_softmax(model.apply(params, x))
  if y.ndim == 1:
    return -jnp.take_along_axis(log_probs, y[:, None], 1)[:, 0]
  return -jnp.sum(y * log_probs, -1)
