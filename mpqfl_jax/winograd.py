"""Convolution by minimal filtering: fewer products, in tiles of the output.

A tile of m outputs of r taps reads m + r - 1 inputs. Seen as polynomials, whose
coefficients the inputs and the taps are, its outputs follow from the values at
m + r - 1 points, so that as many products are enough, where the definition
takes m r of them; on a plane the saving is squared. For 5x5 kernels and tiles
of 4x4 these are 64 products in place of 400. Values at the points, and outputs
from them, are small matrices (`_Axis`): applied along height and width, they
make of the convolution one batched product of matrices over channels, one
matrix a point.

Source: Winograd 1980, Arithmetic Complexity of Computations, chapter 5; Lavin
and Gray 2016, Fast Algorithms for Convolutional Neural Networks, section 4, for
the tiles; points as Barabasz et al. 2020, Error Analysis and Improving the
Accuracy of Winograd Convolution, finds them accurate.

The points lie between -2 and 2 and there are at most eight: outputs and
gradients are within 1e-5 of their length of exact ones, some ten times what
rounding costs the definition in float32. It is spread over a tile, so that an
output whose own inputs are all zero may be a rounding off zero, and an input
that is not finite spoils its whole image.
"""

import functools
import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mpqfl_jax.types import Array

# Points in the order in which they are taken, before the one at infinity.
_POINTS = (0.0, 1.0, -1.0, 2.0, -0.5, -2.0, 0.5)
_Pair = tuple[int, int]


class _Axis(NamedTuple):
  """One side of the plane: `tiles` tiles of `tile` outputs each.

  Attributes:
    tile: outputs of a tile.
    tiles: how many; the last may reach beyond the output.
    size: of the output.
    signal: [points, tiles, inputs], values of each tile's inputs at the points;
      padding is left out.
    taps: [points, kernel], values of the kernel.
    output: [tile, points], a tile's outputs from the products.
  """

  tile: int
  tiles: int
  size: int
  signal: np.ndarray
  taps: np.ndarray
  output: np.ndarray

  @property
  def points(self) -> int:
    return len(self.taps)


def _powers(points: tuple[float, ...], count: int) -> np.ndarray:
  """[points + 1, count]: of each point, and of the one at infinity."""
  infinity = np.zeros(count)
  infinity[-1] = 1
  return np.stack([*(np.power(p, np.arange(count)) for p in points), infinity])


def matrices(tile: int, kernel: int) -> tuple[np.ndarray, ...]:
  """The matrices of one side, as exact as float64 is.

  output @ ((taps @ w) * (signal @ x)) is y, y[i] = sum_k w[k] x[i + k].

  Args:
    tile: outputs.
    kernel: taps.

  Returns:
    output [tile, points], taps [points, kernel], signal [points, points], where
    points = tile + kernel - 1.
  """
  count = tile + kernel - 1
  points = _POINTS[: count - 1]
  output, taps = _powers(points, tile).T, _powers(points, kernel)
  signal = np.linalg.inv(_powers(points, count)).T
  # A point's three vectors may trade factors. Of like lengths they lose least;
  # powers of two lose nothing.
  norms = np.abs(signal).sum(1), np.abs(taps).sum(1), np.abs(output).sum(0)
  scale = np.exp2(np.round(np.log2(norms[0])))
  middle = np.exp2(np.round(np.log2(norms[1] * scale / norms[2]) / 2))
  signal = signal / scale[:, None]
  taps = taps * (scale / middle)[:, None]
  return output * middle, taps, signal


@functools.cache
def _axis(size: int, pads: _Pair, kernel: int, tile: int) -> _Axis:
  output, taps, values = matrices(tile, kernel)
  outputs = size + sum(pads) - kernel + 1
  count = -(-outputs // tile)
  signal = np.zeros((len(taps), count, size))
  for number, place in itertools.product(range(count), range(len(taps))):
    read = number * tile + place - pads[0]
    if 0 <= read < size:
      signal[:, number, read] = values[:, place]
  return _Axis(tile, count, outputs, signal, taps, output)


def _axes(size: int, pads: _Pair, kernel: int) -> list[_Axis]:
  """One side in tiles of every length that there are points for."""
  if kernel == 1 or size + sum(pads) < kernel:
    return []
  longest = len(_POINTS) + 2 - kernel
  return [_axis(size, pads, kernel, tile) for tile in range(2, longest + 1)]


class Tiling(NamedTuple):
  """How a plane is cut into tiles."""

  rows: _Axis
  columns: _Axis

  @property
  def points(self) -> int:
    return self.rows.points * self.columns.points

  @property
  def tiles(self) -> int:
    return self.rows.tiles * self.columns.tiles


# What moving a number takes, in sums and products of a matrix product: one in
# the tiles' domain, one of the kernel there. Measured on a CPU.
_MOVE_TILE, _MOVE_KERNEL = 40, 30


def tiling(
  size: _Pair,
  pads: tuple[_Pair, _Pair],
  kernel: _Pair,
  batch: int,
  channels: _Pair,
) -> Tiling | None:
  """The fastest tiling of a convolution of stride 1, None where none pays.

  Args:
    size: height and width of the input.
    pads: (before, after) of each.
    kernel: height and width.
    batch: images.
    channels: in and out.
  """
  sides = map(_axes, size, pads, kernel)
  product = 2 * channels[0] * channels[1]

  def cost(plan: Tiling) -> int:
    rows = batch * plan.tiles * (product + _MOVE_TILE * sum(channels))
    return plan.points * (rows + _MOVE_KERNEL * product // 2)

  plans = [Tiling(*pair) for pair in itertools.product(*sides)]
  best = min(plans, key=lambda plan: (cost(plan), plan.points), default=None)
  if best is None:
    return None
  places = batch * best.rows.size * best.columns.size
  plain = places * kernel[0] * kernel[1] * product
  return best if cost(best) < plain else None


def _all(matrix: np.ndarray, x: Array) -> Array:
  return jnp.matmul(matrix.astype(x.dtype), x)


def _each(matrix: np.ndarray, x: Array) -> Array:
  """matrix @ x[i] for each i. XLA would turn x around for one matrix."""
  matrix = matrix.astype(x.dtype)
  return jnp.matmul(jnp.broadcast_to(matrix, (len(x), *matrix.shape)), x)


def _flat(signal: np.ndarray) -> np.ndarray:
  return signal.reshape(-1, signal.shape[-1])


def _signal(x: Array, plan: Tiling) -> Array:
  """x[batch, height, width, channels] -> [points, tiles * batch, channels]."""
  batch, height, width, channels = x.shape
  rows, columns = plan
  x = x.transpose(1, 2, 0, 3).reshape(height, -1)
  x = _all(_flat(rows.signal), x).reshape(-1, width, batch * channels)
  x = _each(_flat(columns.signal), x)
  x = x.reshape(rows.points, rows.tiles, columns.points, -1)
  return x.transpose(0, 2, 1, 3).reshape(plan.points, -1, channels)


def _signal_transposed(v: Array, plan: Tiling, batch: int) -> Array:
  rows, columns = plan
  channels = v.shape[-1]
  v = v.reshape(rows.points, columns.points, rows.tiles, -1)
  v = v.transpose(0, 2, 1, 3)
  v = v.reshape(rows.points * rows.tiles, -1, batch * channels)
  v = _each(_flat(columns.signal).T, v)
  v = _all(_flat(rows.signal).T, v.reshape(len(v), -1))
  v = v.reshape(len(v), -1, batch, channels)
  return v.transpose(2, 0, 1, 3)


def _kernel_matrix(plan: Tiling) -> np.ndarray:
  return np.kron(plan.rows.taps, plan.columns.taps)


def _kernel(w: Array, plan: Tiling) -> Array:
  """[height, width, in, out] -> [points, in, out]."""
  values = _all(_kernel_matrix(plan), w.reshape(-1, w.shape[2] * w.shape[3]))
  return values.reshape(plan.points, *w.shape[2:])


def _output(m: Array, plan: Tiling, batch: int) -> Array:
  """[points, tiles * batch, channels] -> [batch, height, width, channels]."""
  rows, columns = plan
  channels = m.shape[-1]
  m = _each(columns.output, m.reshape(rows.points, columns.points, -1))
  m = _all(rows.output, m.reshape(rows.points, -1))
  m = m.reshape(
    rows.tile, columns.tile, rows.tiles, columns.tiles, batch, channels
  )
  m = m.transpose(4, 2, 0, 3, 1, 5)
  m = m.reshape(
    batch, rows.tiles * rows.tile, columns.tiles * columns.tile, channels
  )
  return m[:, : rows.size, : columns.size]


def _output_transposed(y: Array, plan: Tiling) -> Array:
  rows, columns = plan
  batch, channels = y.shape[0], y.shape[-1]
  beyond = (axis.tiles * axis.tile - axis.size for axis in plan)
  y = jnp.pad(y, ((0, 0), *((0, n) for n in beyond), (0, 0)))
  y = y.reshape(
    batch, rows.tiles, rows.tile, columns.tiles, columns.tile, channels
  )
  y = y.transpose(2, 4, 1, 3, 0, 5).reshape(rows.tile, -1)
  y = _all(rows.output.T, y).reshape(rows.points, columns.tile, -1)
  return _each(columns.output.T, y).reshape(plan.points, -1, channels)


def convolve(x: Array, w: Array, plan: Tiling) -> Array:
  """The convolution.

  Args:
    x: [batch, height, width, in].
    w: [height, width, in, out].
    plan: of these sizes.

  Returns:
    [batch, height, width, out].
  """
  products = _signal(x, plan) @ _kernel(w, plan)
  return _output(products, plan, x.shape[0])


def input_gradient(w: Array, y: Array, plan: Tiling) -> Array:
  """The transpose of `convolve` in its input.

  Args:
    w: [height, width, in, out].
    y: [batch, height, width, out], the gradient to the output.
    plan: of the convolution.

  Returns:
    [batch, height, width, in].
  """
  products = _output_transposed(y, plan) @ jnp.swapaxes(_kernel(w, plan), 1, 2)
  return _signal_transposed(products, plan, y.shape[0])


def kernel_gradient(x: Array, y: Array, plan: Tiling) -> Array:
  """The transpose of `convolve` in its kernel.

  Args:
    x: [batch, height, width, in].
    y: [batch, height, width, out], the gradient to the output.
    plan: of the convolution.

  Returns:
    [height, width, in, out].
  """
  products = jnp.einsum(
    "pti,pto->pio", _signal(x, plan), _output_transposed(y, plan)
  )
  values = _all(_kernel_matrix(plan).T, products.reshape(plan.points, -1))
  taps = (axis.taps.shape[1] for axis in plan)
  return values.reshape(*taps, *products.shape[1:])
