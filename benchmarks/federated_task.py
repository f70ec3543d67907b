"""The work of `benchmarks.federated`, and what it must come to.

The round is written out in NumPy in float64 from the definitions, so that a
system which did less, or something else, shows in the weights that it returns.
"""

import itertools
from typing import Any

import numpy as np

LEARNING_RATE, BATCH, EXAMPLES = 0.05, 16, 64
SIDE, CLASSES = 28, 10
# Clients whose examples differ; those after them hold the same again, in memory
# of their own, so that the expected weights of a large cohort cost no more.
DISTINCT = 10

# (channels in, channels out, stride) of 5x5 convolutions padded by 2; the side
# of pooling after each; the activation; widths of the dense layers.
ARCHITECTURES: dict[str, dict[str, Any]] = {
  "lenet_zhu": {
    "convs": ((1, 12, 2), (12, 12, 2), (12, 12, 1)),
    "pool": 1,
    "sigmoid": True,
    "dense": (588, 10),
  },
  "cnn": {
    "convs": ((1, 32, 1), (32, 64, 1)),
    "pool": 2,
    "sigmoid": False,
    "dense": (3136, 512, 10),
  },
  # For our own plans; the peers' workers have the other two.
  "mlp": {
    "convs": (),
    "pool": 1,
    "sigmoid": False,
    "dense": (784, 200, 200, 10),
  },
}
Arrays = dict[str, np.ndarray]


def make(model: str, clients: int, seed: int = 0) -> Arrays:
  """Images, labels and initial weights.

  Returns:
    `x` [clients, examples, height, width, channels] uint8, `y` [clients,
    examples] int32, and float32 kernels and biases by name.
  """
  rng = np.random.default_rng(seed)
  shape = (DISTINCT, EXAMPLES)
  which = np.arange(clients) % DISTINCT
  task = {
    "x": rng.integers(0, 256, (*shape, SIDE, SIDE, 1), np.uint8)[which],
    "y": rng.integers(0, CLASSES, shape, np.int32)[which],
  }
  shapes: dict[str, tuple[int, ...]] = {}
  for i, (cin, cout, _) in enumerate(ARCHITECTURES[model]["convs"]):
    shapes[f"conv{i + 1}"] = (5, 5, cin, cout)
  widths = ARCHITECTURES[model]["dense"]
  for i, pair in enumerate(itertools.pairwise(widths)):
    shapes[f"dense{i + 1}"] = pair
  for name, kernel in shapes.items():
    bound = 1 / np.sqrt(np.prod(kernel[:-1]))
    for leaf, size in (("kernel", kernel), ("bias", kernel[-1:])):
      draw = rng.uniform(-bound, bound, size)
      task[f"{name}/{leaf}"] = draw.astype(np.float32)
  return task


def layer_products(model: str) -> dict[str, int]:
  """Layer -> multiply-adds of one image's forward pass."""
  found, side = {}, SIDE
  architecture = ARCHITECTURES[model]
  for i, (cin, cout, stride) in enumerate(architecture["convs"]):
    side //= stride
    found[f"conv{i + 1}"] = side * side * 25 * cin * cout
    side //= architecture["pool"]
  for i, (a, b) in enumerate(itertools.pairwise(architecture["dense"])):
    found[f"dense{i + 1}"] = a * b
  return found


def flops_per_client(model: str) -> float:
  """Floating-point operations of a client's epoch: products and sums of the
  layers' forward pass and both gradients; the images need none."""
  macs = list(layer_products(model).values())
  return 2.0 * EXAMPLES * (3 * sum(macs) - macs[0])


def expected(model: str, task: Arrays) -> Arrays:
  """Float64 weights after one round: the mean of the clients' weights."""
  start = {
    name: value.astype(np.float64)
    for name, value in task.items()
    if name not in ("x", "y")
  }
  clients = len(task["y"])
  total = {name: np.zeros_like(value) for name, value in start.items()}
  for client in range(min(clients, DISTINCT)):
    copies = len(range(client, clients, DISTINCT))
    local = dict(start)
    for i in range(0, EXAMPLES, BATCH):
      x = task["x"][client, i : i + BATCH].astype(np.float64) / 255.0
      grads = _gradients(model, local, x, task["y"][client, i : i + BATCH])
      for name, grad in grads.items():
        local[name] = local[name] - LEARNING_RATE * grad
    for name, value in local.items():
      total[name] += copies / clients * value
  return total


def _gradients(model: str, weights: Arrays, x: np.ndarray, y: np.ndarray):
  """Gradients of the mean softmax cross-entropy, by the chain rule."""
  architecture, tape = ARCHITECTURES[model], []
  for i, (_, _, stride) in enumerate(architecture["convs"]):
    kernel, bias = weights[f"conv{i + 1}/kernel"], weights[f"conv{i + 1}/bias"]
    windows = _windows(x, stride)
    out = np.tensordot(windows, kernel, ((4, 5, 3), (0, 1, 2))) + bias
    out = _activate(out, architecture["sigmoid"])
    pooled = _pool(out, architecture["pool"])
    tape.append((x.shape, windows, out, pooled, stride))
    x = pooled
  features, shape = x.reshape(len(x), -1), x.shape
  inputs, layers = [features], len(architecture["dense"]) - 1
  for i in range(layers):
    layer = f"dense{i + 1}"
    x = inputs[-1] @ weights[f"{layer}/kernel"] + weights[f"{layer}/bias"]
    if i < layers - 1:
      x = _activate(x, architecture["sigmoid"])
    inputs.append(x)
  shifted = np.exp(x - x.max(-1, keepdims=True))
  g = shifted / shifted.sum(-1, keepdims=True)
  g[np.arange(len(y)), y] -= 1
  g /= len(y)
  grads = {}
  for i in reversed(range(layers)):
    if i < layers - 1:
      g = g * _slope(inputs[i + 1], architecture["sigmoid"])
    grads[f"dense{i + 1}/kernel"] = inputs[i].T @ g
    grads[f"dense{i + 1}/bias"] = g.sum(0)
    g = g @ weights[f"dense{i + 1}/kernel"].T
  g = g.reshape(shape)
  for i in reversed(range(len(tape))):
    size, windows, out, pooled, stride = tape[i]
    g = _unpool(g, out, pooled, architecture["pool"])
    g = g * _slope(out, architecture["sigmoid"])
    grads[f"conv{i + 1}/kernel"] = np.tensordot(
      windows, g, ((0, 1, 2), (0, 1, 2))
    ).transpose(1, 2, 0, 3)
    grads[f"conv{i + 1}/bias"] = g.sum((0, 1, 2))
    if i:
      g = _to_input(g, weights[f"conv{i + 1}/kernel"], size, stride)
  return grads


def _windows(x: np.ndarray, stride: int) -> np.ndarray:
  """[batch, height, width, channels, 5, 5] of the padded input."""
  padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
  found = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), (1, 2))
  return found[:, ::stride, ::stride]


def _to_input(g: np.ndarray, kernel: np.ndarray, size, stride: int):
  """Gradient to a convolution's input: each output's share to its window."""
  batch, height, width, channels = size
  padded = np.zeros((batch, height + 4, width + 4, channels))
  rows, cols = stride * g.shape[1], stride * g.shape[2]
  for i in range(5):
    for j in range(5):
      padded[:, i : i + rows : stride, j : j + cols : stride] += (
        g @ kernel[i, j].T
      )
  return padded[:, 2:-2, 2:-2]


def _activate(x: np.ndarray, sigmoid: bool) -> np.ndarray:
  return 1 / (1 + np.exp(-x)) if sigmoid else np.maximum(x, 0)


def _slope(out: np.ndarray, sigmoid: bool) -> np.ndarray:
  return out * (1 - out) if sigmoid else (out > 0).astype(np.float64)


def _blocks(x: np.ndarray, side: int) -> np.ndarray:
  batch, height, width, channels = x.shape
  return x.reshape(batch, height // side, side, width // side, side, channels)


def _pool(x: np.ndarray, side: int) -> np.ndarray:
  return _blocks(x, side).max((2, 4))


def _unpool(g, out, pooled, side: int) -> np.ndarray:
  # Where two are equal both are zero after the activation, whose slope is zero.
  top = _blocks(out, side) == pooled[:, :, None, :, None]
  return (top * g[:, :, None, :, None]).reshape(out.shape)


def error(task: Arrays, found: Arrays, want: Arrays) -> float:
  """Distance of the found update from the expected one, relative to it."""
  gap = sum(float(np.sum((found[n] - want[n]) ** 2)) for n in want)
  size = sum(float(np.sum((task[n] - want[n]) ** 2)) for n in want)
  return float(np.sqrt(gap / size))
