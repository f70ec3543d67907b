"""R-GAP: an image in closed form, layer by layer from the last to the first.

Zhu and Blaschko 2021. Where the output of a layer and the loss gradient with
respect to that output are known, its input solves linear equations: it has to
give that output (weight constraints) and the layer's weight
gradient (gradient constraints). The input, sent back through the
activation before it, is the output of the layer below.

The systems are solved as weighted least squares in float64: each equation
counts by the inverse variance of its error, which is the gradient's rounding
error or, for an adaptive adversary, that of the codec; and for weight
constraints the error that the layers above left. A weak prior, the spread that
inputs of that layer have for noise images, stands in where nothing else does.

Two structures make this cheap. Gradient constraints hold for each input channel
by itself and with one matrix for all, [kernel * outputs, positions]: where they
determine the input alone, the system has as many unknowns as positions. Weight
constraints are sparse. Only layers that need both pay for a dense Cholesky
factorisation.
"""

import math
from typing import NamedTuple

import jax
import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.sparse

from mpqfl_jax import errors
from mpqfl_jax.attacks import core, objectives
from mpqfl_jax.attacks import labels as labels_lib
from mpqfl_jax.types import Array, Layer, Model, Observation, Params

# Share of the prior's deviation below which the gradient constraints alone are
# taken to determine a layer's input.
# Deviation of a gradient that was not sent, far above that of any.
_NOTHING = 1e10
_DETERMINED = 1e-3
# Random probes of the trace of an inverse (Hutchinson 1990), and noise images
# that the prior is estimated from.
_PROBES = 8
_NOISE_IMAGES = 16


class Constraints(NamedTuple):
  """How many equations there are for the input of one layer.

  Attributes:
    layer: its name.
    unknowns: values in its input.
    weight: equations from its output; after a ReLU only active units count, so
      that there may be fewer.
    gradient: independent equations from its weight gradient, at most.
  """

  layer: str
  unknowns: int
  weight: int
  gradient: int


class _Geometry(NamedTuple):
  """A layer as a convolution; a dense one has one position.

  Attributes:
    layer: what it is.
    shape: (height, width, channels) of its input.
    out: the same of its output.
    size: side of its kernel.
  """

  layer: Layer
  shape: tuple[int, int, int]
  out: tuple[int, int, int]
  size: int


def _geometries(model: Model, params: Params) -> list[_Geometry]:
  """The stack's layers with their shapes.

  Raises:
    UserError: the model is no plain stack.
  """
  if model.layers is None:
    raise errors.UserError(
      f"attack 'rgap' needs a plain stack of layers, and {model.name!r} has"
      " pooling, skip connections or normalisation, through which a layer's"
      " input cannot be solved for. Use it with cnn6, mlp or lenet_zhu, or use"
      " inverting_gradients or map."
    )
  found: list[_Geometry] = []
  shape: tuple[int, int, int] = model.image_shape
  for layer in model.layers:
    kernel = params[layer.name]["kernel"].shape
    out: tuple[int, int, int]
    if len(kernel) == 2:
      shape, out, size = (1, 1, kernel[0]), (1, 1, kernel[1]), 1
    else:
      size = kernel[0]
      height, width = (
        (side + 2 * layer.padding - size) // layer.stride + 1
        for side in shape[:2]
      )
      out = (height, width, kernel[3])
    found.append(_Geometry(layer, shape, out, size))
    shape = out
  return found


def constraints(model: Model, params: Params) -> list[Constraints]:
  """The rank analysis: equations and unknowns of every layer.

  Zhu and Blaschko 2021: a layer with fewer equations than unknowns
  leaves its input undetermined. The numbers are upper bounds on ranks: enough
  equations are necessary and, where they are ill-conditioned, not sufficient.

  Args:
    model: the classifier.
    params: its parameters, or their shapes.

  Returns:
    In the order of the network.

  Raises:
    UserError: the model is no plain stack.
  """
  found = []
  for g in _geometries(model, params):
    positions, channels = g.shape[0] * g.shape[1], g.shape[2]
    each = min(g.size**2 * g.out[2], positions)
    last = g.layer is model.layers[-1]  # type: ignore[index]
    found.append(
      Constraints(
        g.layer.name,
        positions * channels,
        0 if last else math.prod(g.out),
        channels * each,
      )
    )
  return found


def _taps(g: _Geometry) -> np.ndarray:
  """[outputs, size, size]: input position under each kernel entry, or -1."""
  axes = []
  for side, out in zip(g.shape[:2], g.out[:2], strict=True):
    start = np.arange(out)[:, None] * g.layer.stride - g.layer.padding
    at = start + np.arange(g.size)
    axes.append(np.where((at >= 0) & (at < side), at, -1))
  rows, columns = axes[0][:, None, :, None], axes[1][None, :, None, :]
  inside = (rows >= 0) & (columns >= 0)
  at = np.where(inside, rows * g.shape[1] + columns, -1)
  return at.reshape(-1, g.size, g.size)


def weight_matrix(g: _Geometry, kernel: np.ndarray) -> scipy.sparse.csr_array:
  """The layer as a sparse matrix, [outputs, inputs].

  Args:
    g: its shapes.
    kernel: [size, size, channels in, channels out].
  """
  taps = _taps(g)
  output, row, column = np.nonzero(taps >= 0)
  at = taps[output, row, column]
  inputs, outputs = g.shape[2], g.out[2]
  i = output[:, None, None] * outputs + np.arange(outputs)
  j = at[:, None, None] * inputs + np.arange(inputs)[:, None]
  i, j = np.broadcast_arrays(i, j)
  values = kernel[row, column]
  shape = (math.prod(g.out), math.prod(g.shape))
  return scipy.sparse.csr_array(
    (values.ravel(), (i.ravel(), j.ravel())), shape=shape
  )


def gradient_matrix(g: _Geometry, delta: np.ndarray) -> np.ndarray:
  """Maps one input channel to the weight gradient of that channel.

  Args:
    g: the layer's shapes.
    delta: [outputs, channels out], gradient with respect to its output.

  Returns:
    [size * size * channels out, positions].
  """
  taps = _taps(g)
  matrix = np.zeros((g.size, g.size, g.out[2], g.shape[0] * g.shape[1]))
  for i, j in np.ndindex(g.size, g.size):
    at = taps[:, i, j]
    matrix[i, j][:, at[at >= 0]] = delta[at >= 0].T
  return matrix.reshape(-1, matrix.shape[-1])


def _forward(layer: Layer, z: np.ndarray) -> np.ndarray:
  if layer.activation == "sigmoid":
    return 0.5 * (1 + np.tanh(0.5 * z))
  return np.where(z > 0, z, layer.slope * z)


def _invert(
  layer: Layer, x: np.ndarray, error: float
) -> tuple[np.ndarray, np.ndarray]:
  """Input of an activation and its slope there; both 0 where ReLU cut off."""
  if layer.activation == "sigmoid":
    inside = np.clip(x, 1e-6, 1 - 1e-6)
    return np.log(inside / (1 - inside)), inside * (1 - inside)
  # What ReLU cut off comes back as nothing but the error.
  least = 0.0 if layer.slope else 5 * error
  slope = np.where(x > least, 1.0, layer.slope)
  z = np.divide(x, slope, out=np.zeros_like(x), where=slope > 0)
  return z, slope


class _Estimate(NamedTuple):
  """A layer's input, [inputs], and the deviation of its error."""

  x: np.ndarray
  error: float


def _last_layer(
  gradient: np.ndarray,
  bias_gradient: np.ndarray | None,
  kernel: np.ndarray,
  bias: np.ndarray,
  noise: float,
) -> tuple[_Estimate, np.ndarray, int]:
  """Input of the classifier, gradient of its output, and the label.

  The weight gradient is the outer product of the input x and of probabilities
  minus one-hot label. A bias gradient is the latter itself. Without one, the
  direction of either factor is known, and their scales are those at which the
  softmax of x's own logits is right (for many classes).
  Only the label's entry of the second factor is below zero.
  """
  if bias_gradient is not None:
    delta = bias_gradient
    label = int(np.argmin(delta))
  else:
    left, values, right = np.linalg.svd(gradient, full_matrices=False)
    direction, outer = right[0], values[0] * left[:, 0]
    label = int(np.argmax(np.abs(direction)))
    sign = -np.sign(direction[label])
    direction, outer = sign * direction, sign * outer
    one_hot = np.eye(len(direction))[label]
    # x = scale * outer and delta = direction / scale; probabilities are at most
    # 1, so that the scale is at least the label's entry.
    least = abs(direction[label])

    def mismatch(log_excess):
      scale = least * (1 + np.exp(log_excess))
      logits = scale * (outer @ kernel) + bias
      p = np.exp(logits - logits.max())
      return np.sum((scale * (p / p.sum() - one_hot) - direction) ** 2)

    grid = np.linspace(-20, 20, 801)
    best = grid[np.argmin([mismatch(g) for g in grid])]
    found = scipy.optimize.minimize_scalar(
      mismatch,
      bounds=(best - 0.05, best + 0.05),
      method="bounded",
      options={"xatol": 1e-14},
    )
    delta = direction / (least * (1 + np.exp(found.x)))
  square = max(delta @ delta, 1e-200)
  x = gradient @ delta / square
  return _Estimate(x, noise / math.sqrt(square)), delta, label


def _solve(
  weights: scipy.sparse.csr_array,
  offset: np.ndarray,
  output: np.ndarray,
  output_precision: np.ndarray,
  matrix: np.ndarray,
  gradient: np.ndarray,
  gradient_noise: float,
  mean: np.ndarray,
  deviation: float,
) -> _Estimate:
  """The input of a layer by weighted least squares.

  Args:
    weights: [outputs, inputs], the layer.
    offset: [outputs], its bias.
    output: [outputs], what it gave.
    output_precision: [outputs], inverse deviation of its error.
    matrix: `gradient_matrix` of the layer, [equations, positions].
    gradient: [channels, equations].
    gradient_noise: deviation of its error.
    mean: [inputs], of the prior.
    deviation: of the prior.
  """
  channels, positions = gradient.shape[0], matrix.shape[1]
  n = channels * positions
  prior = deviation**-2
  gram = matrix.T @ matrix / gradient_noise**2
  # [positions, channels]: what is not explained by the prior's mean.
  right = (gradient @ matrix).T / gradient_noise**2
  right -= gram @ mean.reshape(positions, channels)
  if len(matrix) >= positions:
    values, vectors = np.linalg.eigh(gram)
    posterior = 1 / (np.maximum(values, 0) + prior)
    error = math.sqrt(posterior.mean())
    if error < _DETERMINED * deviation:
      change = vectors @ (posterior[:, None] * (vectors.T @ right))
      return _Estimate(mean + change.ravel(), error)
  scaled = weights * output_precision[:, None]
  total = (scaled.T @ scaled).toarray()
  blocks = total.reshape(positions, channels, positions, channels)
  for channel in range(channels):
    blocks[:, channel, :, channel] += gram
  total[np.diag_indices(n)] += prior
  missing = (output - offset - weights @ mean) * output_precision
  side = scaled.T @ missing + right.ravel()
  # The transpose of a symmetric matrix is itself, in the order of LAPACK.
  factor = scipy.linalg.cho_factor(
    total.T, lower=True, overwrite_a=True, check_finite=False
  )
  probes = np.random.default_rng(0).choice([-1.0, 1.0], (n, _PROBES))
  solved = scipy.linalg.cho_solve(
    factor, np.column_stack([side, probes]), check_finite=False
  )
  variance = np.mean(probes * solved[:, 1:])
  return _Estimate(mean + solved[:, 0], math.sqrt(max(variance, 0.0)))


def _rms(a: np.ndarray) -> float:
  return math.sqrt(np.mean(np.square(a)))


def invert(
  model: Model, observation: Observation, noise: float
) -> tuple[np.ndarray, int]:
  """The image behind an update of one step on one image.

  Args:
    model: a plain stack of layers.
    observation: what the adversary sees, without leading axes.
    noise: relative error of every gradient, for a blind adversary.

  Returns:
    (image [height, width, channels], not clipped, and its label).

  Raises:
    UserError: the model is no plain stack.
  """
  params = jax.tree.map(lambda a: np.asarray(a, np.float64), observation.params)
  geometries = _geometries(model, params)
  rate = float(observation.learning_rate)
  # Least squares have no meaning for what is not a number.
  update = jax.tree.map(
    lambda a: np.nan_to_num(np.asarray(a, np.float64)) / rate,
    core.told(observation),
  )

  def noise_of(name: str) -> float:
    level = noise * _rms(update[name]["kernel"])
    if observation.bins is not None:
      variance = np.asarray(observation.bins.variance[name]["kernel"])
      known = np.isfinite(variance)
      if known.any():
        # What was left out counts as zero: off by what the others measure.
        typical = np.mean(np.square(rate * update[name]["kernel"][known]))
        error = np.mean(np.where(known, variance, typical))
        level = math.hypot(level, math.sqrt(error) / rate)
      else:
        level = _NOTHING
    return level + 1e-30

  def bias_of(name: str) -> np.ndarray | None:
    """Of the update; None where it, or some of it, was not sent."""
    found = update[name].get("bias")
    if found is None or not np.any(found):
      return None
    if observation.bins is None:
      return found
    variance = np.asarray(observation.bins.variance[name]["bias"])
    return found if np.isfinite(variance).all() else None

  kernels, offsets, matrices = [], [], []
  for g in geometries:
    entry = params[g.layer.name]
    kernel = entry["kernel"].reshape(g.size, g.size, g.shape[2], g.out[2])
    bias = entry.get("bias", np.zeros(g.out[2]))
    kernels.append(kernel)
    offsets.append(np.tile(bias, g.out[0] * g.out[1]))
    matrices.append(weight_matrix(g, kernel))
  priors = []
  spread = np.random.default_rng(0).normal(
    size=(math.prod(model.image_shape), _NOISE_IMAGES)
  )
  for g, matrix, offset in zip(geometries, matrices, offsets, strict=True):
    channel = spread.reshape(-1, g.shape[2], _NOISE_IMAGES)
    mean = np.tile(channel.mean((0, 2)), g.shape[0] * g.shape[1])
    priors.append((mean, _rms(spread - mean[:, None]) + 1e-12))
    spread = _forward(g.layer, matrix @ spread + offset[:, None])
  # Standardised pixels have mean 0 by the model's own normalisation.
  priors[0] = (np.zeros_like(priors[0][0]), 1.0)

  last = geometries[-1].layer.name
  estimate, delta, label = _last_layer(
    update[last]["kernel"],
    bias_of(last),
    params[last]["kernel"],
    offsets[-1],
    noise_of(last),
  )
  back = params[last]["kernel"] @ delta
  if observation.labels is not None:
    label = int(observation.labels.reshape(()))
  below = list(zip(geometries, matrices, offsets, priors, strict=True))[:-1]
  for g, matrix, offset, (mean, deviation) in reversed(below):
    # Float32 was the client's precision in the forward pass too.
    error = math.hypot(estimate.error, 1e-7 * _rms(estimate.x)) + 1e-30
    output, slope = _invert(g.layer, estimate.x, error)
    delta = slope * back
    if g.size == g.shape[0] == g.shape[1] == 1:
      # One position: the gradient of the bias is that of the output.
      shown = bias_of(g.layer.name)
      delta = delta if shown is None else shown
    gradient = update[g.layer.name]["kernel"].reshape(
      g.size * g.size, g.shape[2], g.out[2]
    )
    estimate = _solve(
      matrix,
      offset,
      output,
      slope / error,
      gradient_matrix(g, delta.reshape(-1, g.out[2])),
      gradient.swapaxes(0, 1).reshape(g.shape[2], -1),
      noise_of(g.layer.name),
      mean,
      deviation,
    )
    back = matrix.T @ delta
  x = estimate.x.reshape(model.image_shape)
  return x * model.std + model.mean, label


def rgap(model: Model, work: core.Work, *, noise: float = 1e-7) -> core.Direct:
  """R-GAP: recursive closed-form inversion of a plain stack of layers.

  Zhu and Blaschko 2021, algorithm 1, with several classes instead of two and
  with biases where a layer has them. An adaptive adversary takes the error of
  each layer's gradient from its codec.

  Args:
    model: the classifier that was attacked.
    work: what the client did; only one step on one image.
    noise: relative error of the gradients that a blind adversary expects; the
      default is that of float32 sums.

  Raises:
    UserError: more than one image or step, or a noise that is no such number.
  """
  core.check_single("rgap", work)
  if not 0 < noise < 1:
    raise errors.UserError(
      f"attack 'rgap': noise={noise}, expected a number between 0 and 1."
    )

  @jax.jit
  def distance(x: Array, label: Array, observation: Observation) -> Array:
    update = core.explain(model, observation, x, label[None], work)
    return objectives.squared(update, observation)

  def solve(observation: Observation, given: core.Help) -> core.Answer:
    del given  # There is nothing random in it.
    image, label = invert(model, observation, noise)
    x = np.clip(image, 0, 1).astype(np.float32)[None]
    labels = np.array([label], np.int32)
    return core.Answer(x, labels, float(distance(x, labels, observation)), 1)

  def check(observation: Observation) -> None:
    core.check_labels(observation, work)
    for c in constraints(model, observation.params):
      if c.weight + c.gradient < c.unknowns:
        raise errors.UserError(
          f"attack 'rgap' cannot solve for the input of {c.layer}: its"
          f" {c.unknowns} values have {c.weight} weight and at most"
          f" {c.gradient} gradient constraints. Use map or inverting_gradients,"
          " which add a prior."
        )
    if observation.labels is None:
      labels_lib.check(observation.params, model, 1)

  return core.Direct("rgap", solve, check, 1)
