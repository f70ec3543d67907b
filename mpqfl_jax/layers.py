"""Convolution in forms that run fast where XLA's own do not.

All forms compute the same convolution; which is fastest depends on where it
runs. On a CPU, XLA's convolution is fast only in the layout that it gives to
the entry of a program: inside `scan`, and as a gradient, it misses its fast
kernel, and under `vmap` over kernels it becomes a grouped convolution, which is
slower by an order of magnitude again. The forms here avoid each of these:

  xla        `jax.lax.conv_general_dilated` as it is: one client after another
             on accelerators.
  winograd   in tiles, with fewer products than the definition has
             (`winograd.py`), half the time of `canonical`: many channels, on a
             CPU. Where tiles do not pay, and in low precision, as `canonical`.
  canonical  XLA's convolution with both gradients written as convolutions in
             the canonical layout. Strided ones, and those of few channels, are
             computed as `planes`.
  planes     matrix products over windows laid out with channels first and
             examples last, so that every copy is long and contiguous; the
             gradient to the input is again a product over windows, of the
             gradient of the output: few channels, on a CPU.
  slices     shifted slices of the padded input side by side and one matrix
             product: `vmap` over kernels makes it a batched product, and its
             second derivatives, which attacks need, stay products: attacks
             everywhere, clients side by side on accelerators.

`winograd`, `canonical` and `planes` are primitives with rules of their own. A
convolution (x, w) -> y and its two gradients, (w, y) -> x and (x, y) -> w, are
each linear in both arguments, and the transposes of one are the two others, so
that the three are closed under derivatives of any order, forward and reverse.
Under `vmap` over kernels they become a loop over kernels, never a grouped
convolution.

A Flax module uses any form without knowing: pass `convolution(form)` as the
`conv_general_dilated` argument of `flax.linen.Conv` or `flax.nnx.Conv`.
"""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp

from mpqfl_jax import errors, fusion, pooling, winograd
from mpqfl_jax.types import Array

NHWC = ("NHWC", "HWIO", "NHWC")
_Pair = tuple[int, int]
_Pads = tuple[_Pair, _Pair]


class _Geometry(NamedTuple):
  """What arrays' shapes leave open; `size` and `kernel` are the two sides'."""

  strides: _Pair
  pads: _Pads
  size: _Pair
  kernel: _Pair

  def output(self) -> _Pair:
    """Height and width of the output."""
    height, width = (
      (n + lo + hi - k) // s + 1
      for n, (lo, hi), k, s in zip(
        self.size, self.pads, self.kernel, self.strides, strict=True
      )
    )
    return height, width


def _pair(shape: Sequence[int]) -> _Pair:
  first, second = shape
  return first, second


def _geometry(x: Array, w: Array, strides: _Pair, pads: _Pads) -> _Geometry:
  return _Geometry(strides, pads, _pair(x.shape[1:3]), _pair(w.shape[:2]))


def _xla(x: Array, w: Array, strides: _Pair, pads: _Pads) -> Array:
  return lax.conv_general_dilated(x, w, strides, pads, dimension_numbers=NHWC)


def _slices(x: Array, w: Array, strides: _Pair, pads: _Pads) -> Array:
  height, width = _geometry(x, w, strides, pads).output()
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  sh, sw = strides
  cuts = []
  for i in range(w.shape[0]):
    for j in range(w.shape[1]):
      rows = lax.slice_in_dim(x, i, i + sh * (height - 1) + 1, sh, 1)
      cuts.append(lax.slice_in_dim(rows, j, j + sw * (width - 1) + 1, sw, 2))
  patches = jnp.concatenate(cuts, -1).reshape(-1, w[..., 0].size)
  y = patches @ w.reshape(-1, w.shape[-1])
  return y.reshape(x.shape[0], height, width, w.shape[-1])


def planar(x: Array) -> Array:
  """[batch, height, width, channels] with channels first, batch last.

  It is its own inverse.
  """
  return x.transpose(3, 1, 2, 0)


def _contract(a: Array, b: Array, axis: int) -> Array:
  return lax.dot_general(a, b, (((axis,), (axis,)), ((), ())))


def _windows(x: Array, geometry: _Geometry) -> Array:
  """Planar x -> [kernel height * width * channels, positions * batch]."""
  height, width = geometry.output()
  (sh, sw), (kh, kw) = geometry.strides, geometry.kernel
  # Split into phases of the stride, a window's cuts are contiguous.
  rows, cols = height + (kh - 1) // sh, width + (kw - 1) // sw
  padding = [(0, 0, 0)] * 4
  for axis, full in ((1, rows * sh), (2, cols * sw)):
    low = geometry.pads[axis - 1][0]
    padding[axis] = (low, full - low - x.shape[axis], 0)
  channels, batch = x.shape[0], x.shape[3]
  x = lax.pad(x, jnp.zeros((), x.dtype), padding)
  x = x.reshape(channels, rows, sh, cols, sw, batch)
  # In two steps, of five cuts each for a 5x5 kernel, not in one of 25.
  x = jnp.concatenate(
    [x[:, :, :, j // sw : j // sw + width, j % sw] for j in range(kw)], 0
  )
  x = jnp.concatenate(
    [x[:, i // sh : i // sh + height, i % sh] for i in range(kh)], 0
  )
  return x.reshape(kh * kw * channels, -1)


def _planes_y(x: Array, w: Array, geometry: _Geometry) -> Array:
  windows = _windows(planar(x), geometry)
  y = _contract(w.reshape(-1, w.shape[-1]), windows, 0)
  return planar(y.reshape(w.shape[-1], *geometry.output(), x.shape[0]))


def _planes_w(x: Array, y: Array, geometry: _Geometry) -> Array:
  windows = _windows(planar(x), geometry)
  w = _contract(planar(y).reshape(y.shape[-1], -1), windows, 1)
  return w.T.reshape(*geometry.kernel, x.shape[-1], y.shape[-1])


def _interleave(x: Array) -> Array:
  """[phases, phases, channels, height, width, batch] -> planar."""
  sh, sw, channels, height, width, batch = x.shape
  rows = [jnp.stack([x[i, j] for j in range(sw)], 3) for i in range(sh)]
  x = jnp.stack(rows, 2)
  return x.reshape(channels, height * sh, width * sw, batch)


def _planes_x(w: Array, y: Array, geometry: _Geometry) -> Array:
  """All phases of the input as channels of one convolution of y.

  Padded input u = s q + r gets y[q - t] w[r + s t] from every tap t, so that
  phase r is a convolution of y with the flipped taps of its phase.
  """
  strides = geometry.strides
  taps, first, count, pads = [], [], [], []
  for axis, s in enumerate(strides):
    low = geometry.pads[axis][0]
    last = (low + geometry.size[axis] - 1) // s
    taps.append(-(-geometry.kernel[axis] // s))
    first.append(low // s)
    count.append(last - first[axis] + 1)
    pads.append((taps[axis] - 1 - first[axis], last + 1 - y.shape[1 + axis]))
  cin, cout = w.shape[2:]
  sh, sw = strides
  fill = [
    (0, t * s - k, 0)
    for t, s, k in zip(taps, strides, geometry.kernel, strict=True)
  ]
  v = lax.pad(w, jnp.zeros((), w.dtype), (*fill, (0, 0, 0), (0, 0, 0)))
  v = v.reshape(taps[0], sh, taps[1], sw, cin, cout)[::-1, :, ::-1]
  v = v.transpose(0, 2, 5, 1, 3, 4).reshape(-1, sh * sw * cin)
  inner = _Geometry(
    (1, 1), (pads[0], pads[1]), _pair(y.shape[1:3]), _pair(taps)
  )
  x = _contract(v, _windows(planar(y), inner), 0)
  x = x.reshape(sh, sw, cin, *count, y.shape[0])
  x = fusion.alone(_interleave)(x) if strides != (1, 1) else x[0, 0]
  top, left = (
    pad[0] - f * s
    for pad, f, s in zip(geometry.pads, first, strides, strict=True)
  )
  height, width = geometry.size
  return planar(x[:, top : top + height, left : left + width])


def _few_channels(strides: _Pair, cin: int, cout: int) -> bool:
  return strides != (1, 1) or cin * cout < 256


def _canonical_y(x: Array, w: Array, geometry: _Geometry) -> Array:
  if _few_channels(geometry.strides, *w.shape[2:]):
    return _planes_y(x, w, geometry)
  return _xla(x, w, (1, 1), geometry.pads)


def _canonical_x(w: Array, y: Array, geometry: _Geometry) -> Array:
  if _few_channels(geometry.strides, *w.shape[2:]):
    return _planes_x(w, y, geometry)
  # The full correlation of y with the flipped kernel.
  flipped = w[::-1, ::-1].transpose(0, 1, 3, 2)
  (kh, kw), ((top, bottom), (left, right)) = geometry.kernel, geometry.pads
  back = (kh - 1 - top, kh - 1 - bottom), (kw - 1 - left, kw - 1 - right)
  return _xla(y, flipped, (1, 1), back)


def _canonical_w(x: Array, y: Array, geometry: _Geometry) -> Array:
  if _few_channels(geometry.strides, x.shape[-1], y.shape[-1]):
    return _planes_w(x, y, geometry)
  # Correlation of x with y as the kernel, batch and channels trading places.
  w = _xla(
    x.transpose(3, 1, 2, 0), y.transpose(1, 2, 0, 3), (1, 1), geometry.pads
  )
  return w.transpose(1, 2, 0, 3)


_CANONICAL = {"x": _canonical_x, "w": _canonical_w, "y": _canonical_y}


def _winograd(wanted: str) -> Callable:
  tiled = {
    "x": winograd.input_gradient,
    "w": winograd.kernel_gradient,
    "y": winograd.convolve,
  }[wanted]
  plain = _CANONICAL[wanted]

  def compute(a, b, geometry):
    shapes = {
      role: array.shape
      for role, array in zip(_operands(wanted), (a, b), strict=True)
    }
    batch = shapes["x" if wanted != "x" else "y"][0]
    cin = shapes["x"][-1] if wanted == "w" else shapes["w"][2]
    cout = shapes["y"][-1] if wanted == "w" else shapes["w"][3]
    tiling = None
    precise = a.dtype in (jnp.float32, jnp.float64)
    if precise and not _few_channels(geometry.strides, cin, cout):
      tiling = winograd.tiling(
        geometry.size, geometry.pads, geometry.kernel, batch, (cin, cout)
      )
    return plain(a, b, geometry) if tiling is None else tiled(a, b, tiling)

  return compute


# form -> which of the three arrays is wanted -> how to compute it.
_COMPUTE: dict[str, dict[str, Callable]] = {
  "winograd": {role: _winograd(role) for role in _CANONICAL},
  "canonical": _CANONICAL,
  "planes": {"x": _planes_x, "w": _planes_w, "y": _planes_y},
}

# Arrays have a leading axis of kernels: x[kernels, batch, height, width,
# channels_in], w[kernels, height, width, channels_in, channels_out],
# y[kernels, batch, height, width, channels_out]. The operands are the two that
# are not wanted, in this order.
_ROLES = ("x", "w", "y")
_bilinear = core.Primitive("bilinear_convolution")


def _operands(wanted: str) -> tuple[str, str]:
  first, second = (role for role in _ROLES if role != wanted)
  return first, second


def _bind(wanted: str, form: str, geometry: _Geometry, **arrays: Array):
  return _bilinear.bind(
    *(arrays[role] for role in _operands(wanted)),
    wanted=wanted,
    form=form,
    geometry=geometry,
  )


def _compute(a, b, *, wanted, form, geometry):
  one = functools.partial(_COMPUTE[form][wanted], geometry=geometry)
  if a.shape[0] == 1:
    return one(a[0], b[0])[None]
  return lax.map(lambda pair: one(*pair), (a, b))


def _abstract(a, b, *, wanted, form, geometry):
  if wanted == "y":
    shape = (*a.shape[:2], *geometry.output(), b.shape[-1])
  elif wanted == "x":
    shape = (*b.shape[:2], *geometry.size, a.shape[-2])
  else:
    shape = (a.shape[0], *geometry.kernel, a.shape[-1], b.shape[-1])
  return a.update(shape=shape)


def _transpose(operand: int):
  """The gradient to one operand: that array is the one wanted."""

  def rule(cotangent, a, b, *, wanted, form, geometry):
    mine, other = _operands(wanted)[operand], _operands(wanted)[1 - operand]
    given = {wanted: cotangent, other: (a, b)[1 - operand]}
    return _bind(mine, form, geometry, **given)

  return rule


def _batch(args, dims, *, wanted, form, geometry):
  names = _operands(wanted)
  size = next(
    a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None
  )
  arrays = {}
  if wanted != "w" and dims[names.index("w")] is None:
    # One kernel for all: the new axis is a part of the batch.
    for name, array, dim in zip(names, args, dims, strict=True):
      if name != "w":
        array = jnp.moveaxis(array, dim, 1)
        array = array.reshape(array.shape[0], -1, *array.shape[3:])
      arrays[name] = array
    out = _bind(wanted, form, geometry, **arrays)
    return out.reshape(out.shape[0], size, -1, *out.shape[2:]), 1
  for name, array, dim in zip(names, args, dims, strict=True):
    if dim is None:
      array = jnp.broadcast_to(array, (size, *array.shape))
    else:
      array = jnp.moveaxis(array, dim, 0)
    arrays[name] = array.reshape(-1, *array.shape[2:])
  out = _bind(wanted, form, geometry, **arrays)
  return out.reshape(size, -1, *out.shape[1:]), 0


_bilinear.def_impl(
  jax.jit(_compute, static_argnames=("wanted", "form", "geometry"))
)
_bilinear.def_abstract_eval(_abstract)
ad.defbilinear(_bilinear, _transpose(0), _transpose(1))
batching.primitive_batchers[_bilinear] = _batch
mlir.register_lowering(
  _bilinear, mlir.lower_fun(_compute, multiple_results=False)
)


def _primitive(form: str) -> Callable:
  def compute(x, w, strides, pads):
    geometry = _geometry(x, w, strides, pads)
    return _bind("y", form, geometry, x=x[None], w=w[None])[0]

  return compute


# The form in which attacks compute, which differentiate twice: 32 searches side
# by side take a thirteenth of the time of `xla` on an H200, too.
ATTACK_FORM = "slices"

FORMS: dict[str, Callable] = {
  "xla": _xla,
  "winograd": _primitive("winograd"),
  "canonical": _primitive("canonical"),
  "planes": _primitive("planes"),
  "slices": _slices,
}


def convolution(form: str) -> Callable:
  """A stand-in for `jax.lax.conv_general_dilated` in the given form.

  Args:
    form: one of `FORMS`.

  Returns:
    A function of (lhs[batch, height, width, channels_in],
    rhs[height, width, channels_in, channels_out], window_strides, padding, ...)
    with the meaning of `jax.lax.conv_general_dilated`. Dilated and grouped
    convolutions and other layouts go to XLA in every form.

  Raises:
    UserError: no such form.
  """
  if form not in FORMS:
    raise errors.unknown_name("convolution form", form, FORMS)
  compute = FORMS[form]

  def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision=None,
    **kwargs,
  ) -> Array:
    numbers = lax.conv_dimension_numbers(
      lhs.shape, rhs.shape, dimension_numbers
    )
    nhwc = lax.conv_dimension_numbers(lhs.shape, rhs.shape, NHWC)
    plain = (
      numbers == nhwc
      and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
      and feature_group_count == batch_group_count == 1
    )
    if form == "xla" or not plain:
      return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        **kwargs,
      )
    if isinstance(padding, str):
      padding = lax.padtype_to_pads(
        lhs.shape[1:3], rhs.shape[:2], window_strides, padding
      )
    pads: _Pads = tuple(tuple(p) for p in padding)  # type: ignore[assignment]
    return compute(lhs, rhs, _pair(window_strides), pads)

  return conv_general_dilated


def block(
  form: str,
  x: Array,
  kernel: Array,
  bias: Array,
  strides: tuple[int, int],
  padding: str | _Pads,
  activation: Callable[[Array], Array],
  pool: int = 1,
) -> Array:
  """activation(max_pool(convolution + bias)), in the layout that suits.

  The pooling comes first, on fewer entries after it: bias and activation do not
  decrease, so that the values are the same. They are applied to a matrix, whose
  long rows XLA vectorises on a CPU as it does not with four short axes.

  Args:
    form: one of `FORMS`.
    x: [batch, height, width, channels_in].
    kernel: [height, width, channels_in, channels_out].
    bias: [channels_out].
    strides, padding: as of `jax.lax.conv_general_dilated`.
    activation: a function of one number that does not decrease.
    pool: side of the pooling's windows.

  Returns:
    [batch, height, width, channels_out].
  """

  def pooled(z):
    return pooling.max_pool(z, pool) if pool > 1 else z

  z = convolution(form)(x, kernel, strides, padding, dimension_numbers=NHWC)
  few = _few_channels(strides, *kernel.shape[2:])
  if form == "planes" or (form in ("canonical", "winograd") and few):
    z = pooled(planar(z))
    flat = activation(z.reshape(z.shape[0], -1) + bias[:, None])
    return planar(flat.reshape(z.shape))
  z = pooled(z)
  return activation(z.reshape(-1, z.shape[-1]) + bias).reshape(z.shape)
