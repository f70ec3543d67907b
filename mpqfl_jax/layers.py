"""Convolution and pooling in forms that run fast where XLA's own do not.

All forms compute the same convolution; which is fastest depends on where it
runs. On a CPU, XLA's convolution is fast only in the layout that it gives to
the entry of a program: inside `scan`, and as a gradient, it misses its fast
kernel, and under `vmap` over kernels it becomes a grouped convolution, which is
slower by an order of magnitude again. The forms here avoid each of these:

  xla        `jax.lax.conv_general_dilated` as it is: GPU and TPU.
  canonical  XLA's convolution with both gradients written as convolutions in
             the canonical layout: loops over clients on a CPU, many channels.
  slices     shifted slices of the padded input side by side and one matrix
             product: `vmap` over kernels makes it a batched product, and its
             second derivatives, which attacks need, stay products.
  planes     the same with channels before positions, so that the copies are
             long and contiguous: few channels.

A Flax module uses them without knowing: pass `convolution(form)` as the
`conv_general_dilated` argument of `flax.linen.Conv` or `flax.nnx.Conv`.
"""

from collections.abc import Callable, Sequence
import functools

import jax
from jax import lax
import jax.numpy as jnp

from mpqfl_jax import errors
from mpqfl_jax.types import Array

_NHWC = ("NHWC", "HWIO", "NHWC")
_Pads = tuple[tuple[int, int], tuple[int, int]]


def _xla(x: Array, w: Array, strides: Sequence[int], pads: _Pads) -> Array:
  return lax.conv_general_dilated(x, w, strides, pads, dimension_numbers=_NHWC)


def _windows(
  x: Array, w: Array, strides: Sequence[int], pads: _Pads, axis: int
) -> tuple[list[Array], int, int]:
  """One strided slice of padded x for each kernel position; height, width."""
  padding = [(0, 0)] * 4
  padding[axis], padding[axis + 1] = pads
  x = jnp.pad(x, padding)
  sh, sw = strides
  height = (x.shape[axis] - w.shape[0]) // sh + 1
  width = (x.shape[axis + 1] - w.shape[1]) // sw + 1
  cuts = []
  for i in range(w.shape[0]):
    for j in range(w.shape[1]):
      rows = lax.slice_in_dim(x, i, i + sh * (height - 1) + 1, sh, axis)
      cuts.append(
        lax.slice_in_dim(rows, j, j + sw * (width - 1) + 1, sw, axis + 1)
      )
  return cuts, height, width


def _slices(x: Array, w: Array, strides: Sequence[int], pads: _Pads) -> Array:
  cuts, height, width = _windows(x, w, strides, pads, axis=1)
  patches = jnp.concatenate(cuts, -1).reshape(-1, w[..., 0].size)
  y = patches @ w.reshape(-1, w.shape[-1])
  return y.reshape(x.shape[0], height, width, w.shape[-1])


def _planes(x: Array, w: Array, strides: Sequence[int], pads: _Pads) -> Array:
  cuts, height, width = _windows(
    x.transpose(3, 0, 1, 2), w, strides, pads, axis=2
  )
  patches = jnp.concatenate(cuts, 0).reshape(w[..., 0].size, -1)
  y = w.reshape(-1, w.shape[-1]).T @ patches
  y = y.reshape(w.shape[-1], x.shape[0], height, width)
  return y.transpose(1, 2, 3, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _canonical(x: Array, w: Array, pads: _Pads) -> Array:
  return _xla(x, w, (1, 1), pads)


def _canonical_fwd(x, w, pads):
  return _canonical(x, w, pads), (x, w)


def _canonical_bwd(pads, residuals, g):
  x, w = residuals
  # dL/dx is the full correlation of g with the flipped kernel; dL/dw is the
  # correlation of x with g as the kernel, batch and channels trading places.
  flipped = w[::-1, ::-1].transpose(0, 1, 3, 2)
  back: _Pads = tuple(  # type: ignore[assignment]
    (k - 1 - lo, k - 1 - hi)
    for k, (lo, hi) in zip(w.shape[:2], pads, strict=True)
  )
  dx = _canonical(g, flipped, back)
  dw = _xla(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), (1, 1), pads)
  return dx, dw.transpose(1, 2, 0, 3)


_canonical.defvjp(_canonical_fwd, _canonical_bwd)


def _canonical_or_planes(x, w, strides, pads):
  # Strided gradients are dilated convolutions, which have no canonical form;
  # with few input channels the copies of `planes` cost less than the padding
  # of the channels in XLA's kernel.
  if tuple(strides) != (1, 1) or w.shape[2] * w.shape[3] < 256:
    return _planes(x, w, strides, pads)
  return _canonical(x, w, pads)


FORMS: dict[str, Callable] = {
  "xla": _xla,
  "canonical": _canonical_or_planes,
  "slices": _slices,
  "planes": _planes,
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
    nhwc = lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC)
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
    return compute(lhs, rhs, tuple(window_strides), pads)

  return conv_general_dilated


def max_pool(x: Array, window: int) -> Array:
  """Maximum over windows that do not overlap; a rest at the edge is cut off.

  Args:
    x: [batch, height, width, channels].
    window: side length; also the stride.

  Returns:
    [batch, height // window, width // window, channels].
  """
  batch, height, width, channels = x.shape
  h, w = height // window, width // window
  x = x[:, : h * window, : w * window]
  return x.reshape(batch, h, window, w, window, channels).max((2, 4))
