"""The classifiers: Flax modules turned into plain `Model`s.

No module past this one knows Flax.
"""

from collections.abc import Callable, Sequence
import functools
import inspect
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import errors, layers, pooling, trees
from mpqfl_jax.types import Array, Layer, Model, Params


def _uniform(bound: float) -> Callable:
  """Initialiser: uniform on [-bound, bound]."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class _Block(nn.Module):
  """Convolution, pooling, bias and activation; parameters as `nn.Conv`'s."""

  features: int
  kernel_size: tuple[int, int]
  conv: str
  activation: Callable
  strides: tuple[int, int] = (1, 1)
  padding: str | tuple[tuple[int, int], tuple[int, int]] = "SAME"
  pool: int = 1
  kernel_init: Callable = nn.initializers.lecun_normal()
  bias_init: Callable = nn.initializers.zeros

  @nn.compact
  def __call__(self, x):
    shape = (*self.kernel_size, x.shape[-1], self.features)
    return layers.block(
      self.conv,
      x,
      self.param("kernel", self.kernel_init, shape),
      self.param("bias", self.bias_init, (self.features,)),
      self.strides,
      self.padding,
      self.activation,
      self.pool,
    )


_MLP_HIDDEN = (200, 200)


class _MLP(nn.Module):
  classes: int
  conv: str
  hidden: Sequence[int] = _MLP_HIDDEN

  @nn.compact
  def __call__(self, x):
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.hidden):
      x = nn.relu(nn.Dense(width, name=f"dense{i + 1}")(x))
    return nn.Dense(self.classes, name=f"dense{len(self.hidden) + 1}")(x)


_LENET_STRIDES = (2, 2, 1)


class _LeNetZhu(nn.Module):
  classes: int
  conv: str

  @nn.compact
  def __call__(self, x):
    init = _uniform(0.5)
    for i, stride in enumerate(_LENET_STRIDES):
      x = _Block(
        12,
        (5, 5),
        self.conv,
        nn.sigmoid,
        (stride, stride),
        ((2, 2), (2, 2)),
        kernel_init=init,
        bias_init=init,
        name=f"conv{i + 1}",
      )(x)
    x = x.reshape(x.shape[0], -1)
    return nn.Dense(
      self.classes, kernel_init=init, bias_init=init, name="dense1"
    )(x)


class _CNN(nn.Module):
  classes: int
  conv: str

  @nn.compact
  def __call__(self, x):
    for i, width in enumerate((32, 64)):
      x = _Block(
        width, (5, 5), self.conv, nn.relu, pool=2, name=f"conv{i + 1}"
      )(x)
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(nn.Dense(512, name="dense1")(x))
    return nn.Dense(self.classes, name="dense2")(x)


class _Affine(nn.Module):
  """Batch normalisation with running statistics of mean 0 and variance 1.

  That is its inference mode at initialisation. Its scale and offset are
  trained; statistics of a client's batch are neither used nor sent.
  """

  @nn.compact
  def __call__(self, x):
    shape = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    return x * (scale / np.sqrt(1 + 1e-5)) + bias


def _torch_uniform(fan_in: int) -> Callable:
  """Uniform on one over the root of the fan-in: what PyTorch starts from."""
  return _uniform(fan_in**-0.5)


class _ConvNet(nn.Module):
  classes: int
  conv: str
  width: int = 64

  @nn.compact
  def __call__(self, x):
    for i, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4)):
      init = _torch_uniform(9 * x.shape[-1])
      x = nn.Conv(
        factor * self.width,
        (3, 3),
        kernel_init=init,
        bias_init=init,
        conv_general_dilated=layers.convolution(self.conv),
        name=f"conv{i + 1}",
      )(x)
      x = nn.relu(_Affine(name=f"conv{i + 1}_norm")(x))
      if i in (5, 7):
        x = pooling.max_pool(x, 3)
    x = x.reshape(x.shape[0], -1)
    init = _torch_uniform(x.shape[-1])
    return nn.Dense(
      self.classes, kernel_init=init, bias_init=init, name="dense1"
    )(x)


class _ResNet(nn.Module):
  classes: int
  conv: str
  blocks: Sequence[int]
  width: int

  @nn.compact
  def __call__(self, x):
    he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

    def conv(x, width, size, stride, name):
      pad = size // 2
      x = nn.Conv(
        width,
        (size, size),
        (stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        kernel_init=he,
        conv_general_dilated=layers.convolution(self.conv),
        name=name,
      )(x)
      return _Affine(name=f"{name}_norm")(x)

    x = nn.relu(conv(x, self.width, 3, 1, "block0_conv1"))
    number = 0
    for stage, count in enumerate(self.blocks):
      width = self.width * 2**stage
      for i in range(count):
        number += 1
        stride = 2 if i == 0 and stage > 0 else 1
        name = f"block{number}"
        y = nn.relu(conv(x, width, 3, stride, f"{name}_conv1"))
        y = conv(y, width, 3, 1, f"{name}_conv2")
        if stride > 1:
          x = conv(x, width, 1, stride, f"{name}_skip")
        x = nn.relu(x + y)
    x = x.mean((1, 2))
    init = _torch_uniform(x.shape[-1])
    return nn.Dense(
      self.classes, kernel_init=init, bias_init=init, name="dense1"
    )(x)


# (channels, kernel, stride, padding) of cnn6's convolutions.
CNN6_LAYERS = (
  (12, 4, 2, 2),
  (36, 3, 2, 1),
  (36, 3, 1, 1),
  (36, 3, 1, 1),
  (64, 3, 2, 1),
  (128, 3, 1, 1),
)
CNN6_SLOPE = 0.2


class _CNN6(nn.Module):
  classes: int
  conv: str

  @nn.compact
  def __call__(self, x):
    for i, (channels, size, stride, pad) in enumerate(CNN6_LAYERS):
      x = nn.Conv(
        channels,
        (size, size),
        (stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        kernel_init=_torch_uniform(size * size * x.shape[-1]),
        conv_general_dilated=layers.convolution(self.conv),
        name=f"conv{i + 1}",
      )(x)
      x = nn.leaky_relu(x, CNN6_SLOPE)
    x = x.reshape(x.shape[0], -1)
    return nn.Dense(
      self.classes,
      use_bias=False,
      kernel_init=_torch_uniform(x.shape[-1]),
      name="dense1",
    )(x)


# name -> (module, one line with its source)
MODELS: dict[str, tuple[Callable, str]] = {
  "mlp": (_MLP, "two hidden layers of 200, McMahan et al. 2017, section 3"),
  "lenet_zhu": (
    _LeNetZhu,
    "sigmoid LeNet of Deep Leakage from Gradients, Zhu et al. 2019",
  ),
  "cnn": (_CNN, "two convolutions and 512 units, McMahan et al. 2017"),
  "convnet": (_ConvNet, "eight convolutions, Geiping et al. 2020"),
  "resnet20": (
    functools.partial(_ResNet, blocks=(3, 3, 3), width=16),
    "He et al. 2016, section 4.2",
  ),
  "resnet18": (
    functools.partial(_ResNet, blocks=(2, 2, 2, 2), width=64),
    "He et al. 2016, with the stem for small images",
  ),
  "cnn6": (_CNN6, "six convolutions without biases, Zhu and Blaschko 2021"),
}

# name -> layers, for models that are a plain stack of them.
_STACKS: dict[str, tuple[Layer, ...]] = {
  "mlp": (
    *(Layer(f"dense{i + 1}", "leaky_relu") for i in range(len(_MLP_HIDDEN))),
    Layer(f"dense{len(_MLP_HIDDEN) + 1}", "identity"),
  ),
  "lenet_zhu": (
    *(
      Layer(f"conv{i + 1}", "sigmoid", stride=stride, padding=2)
      for i, stride in enumerate(_LENET_STRIDES)
    ),
    Layer("dense1", "identity"),
  ),
  "cnn6": (
    *(
      Layer(f"conv{i + 1}", "leaky_relu", CNN6_SLOPE, stride, padding)
      for i, (_, _, stride, padding) in enumerate(CNN6_LAYERS)
    ),
    Layer("dense1", "identity"),
  ),
}


# Operations that read an array in another order, which XLA does not keep.
_VIEWS = {
  *("slice", "pad", "reshape", "squeeze", "transpose", "broadcast_in_dim"),
  "convert_element_type",
}


def activations(model: Model) -> int:
  """Numbers that the forward pass of one image computes, step by step.

  Every intermediate array is counted but views, so that memory that is used
  again counts each time: what a backward pass may keep.
  """

  def count(jaxpr) -> int:
    found = 0
    for equation in jaxpr.eqns:
      inner = [
        getattr(value, "jaxpr", value)
        for value in equation.params.values()
        if hasattr(getattr(value, "jaxpr", value), "eqns")
      ]
      if inner:
        found += sum(map(count, inner))
      elif equation.primitive.name not in _VIEWS:
        found += sum(variable.aval.size for variable in equation.outvars)
    return found

  params = jax.eval_shape(model.init, jax.random.key(0))
  image = jnp.zeros((1, *model.image_shape))
  return count(jax.make_jaxpr(model.apply)(params, image).jaxpr)


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
      and float32 rounding, nothing else.

  Raises:
    UserError: no such model or form, or a module without the fields that are
      set here.
  """
  if name not in MODELS:
    raise errors.unknown_name("model", name, MODELS)
  if conv not in layers.FORMS:
    raise errors.unknown_name("convolution form", conv, layers.FORMS)
  build = MODELS[name][0]
  fields = {"classes": num_classes, "conv": conv}
  try:
    inspect.signature(build).bind(**fields)
  except TypeError as e:
    raise errors.UserError(
      f"model {name!r} cannot be built with classes={num_classes} and"
      f" conv={conv!r}: {e}. Give the module the fields classes (int) and conv"
      " (str, which it may ignore), and all others a default."
    ) from e
  module = build(**fields)
  mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

  @jax.jit
  def init(key):
    sample = jnp.zeros((1, *image_shape), jnp.float32)
    return dict(module.init(key, sample)["params"])

  def apply(params, x: Array) -> Array:
    return module.apply({"params": params}, (x - mean) / std)

  return Model(
    name,
    init,
    apply,
    image_shape,
    num_classes,
    mean,
    std,
    _STACKS.get(name),
  )


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


class Head(NamedTuple):
  """Paths of the classifier's last dense layer: keys of nested dicts."""

  kernel: tuple[str, ...]
  bias: tuple[str, ...] | None


def head(params: Params, classes: int | None = None) -> Head:
  """Finds the classifier's last dense layer.

  Args:
    params: nested dict of parameters (or their shapes).
    classes: number of classes; any where None.

  Raises:
    UserError: no dense layer ends in `classes` units.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  shapes = {tuple(k.key for k in path): leaf.shape for path, leaf in flat}
  kernels = [
    path
    for path, shape in shapes.items()
    if path[-1] == "kernel" and len(shape) == 2 and classes in (None, shape[-1])
  ]
  if not kernels:
    raise errors.UserError(
      f"the model has no last dense layer of {classes or 'any'} units, off"
      " which labels are read and whose inputs some defences hide; its leaves"
      f" are {', '.join(trees.leaf_names(params))}. Attacks can be given the"
      " labels instead."
    )
  kernel = max(kernels, key=lambda path: (len(path[-2]), path))
  bias = (*kernel[:-1], "bias")
  return Head(kernel, bias if bias in shapes else None)


def mix(
  model: Model, x: Array, y: Array, weight: Array, neighbour: Array
) -> tuple[Array, Array]:
  """Images and labels mixed with those of their neighbours.

  Source: Zhang et al. 2018, equation 1.

  Args:
    model: gives the number of classes.
    x: [batch, height, width, channels].
    y: [batch] int32, or [batch, classes] probabilities.
    weight: [], what an image keeps of itself.
    neighbour: [batch] int32, whom each is mixed with.

  Returns:
    Like `x`; [batch, classes] probabilities.
  """
  if y.ndim == 1:
    y = jax.nn.one_hot(y, model.num_classes)

  def mixed(a):
    return weight * a + (1 - weight) * a[neighbour]

  return mixed(x), mixed(y)
