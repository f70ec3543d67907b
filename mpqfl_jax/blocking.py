"""How a leaf is cut into blocks that share side information, and into rows."""

from collections.abc import Callable
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mpqfl_jax import bitpack, counter, quantize
from mpqfl_jax.types import Array

Shape = tuple[int, ...]

# Of shorter ones XLA makes no loops over vectors.
_LEAST_PIECE = 16


class Blocks(NamedTuple):
  """How a leaf is cut into blocks that share side information.

  Attributes:
    number: how many blocks there are.
    padding: entries that are missing in the last one.
    axis: axes of `whole` that run along a block, None for all of it.
    sizes: entries of each block, padding not counted; broadcasts against
      `whole`.
    fill: [shape] -> [entries + padding], or as it is where there is none.
    whole: [shape] -> array whose axes run along blocks or across them.
    cut: [shape] or [entries] -> array cut as codes are packed, blocks in pieces
      where need be. Either takes [entries + padding], too.
    shape: of the cut array.
    cut_extremes: [2, number] -> `whole` with two entries a block.
    join: cut array -> [shape].
    spread: [number] -> array that broadcasts against the cut array.
  """

  number: int
  padding: int
  axis: quantize.Axis
  sizes: np.ndarray
  fill: Callable[[Array], Array]
  whole: Callable[[Array], Array]
  cut: Callable[[Array], Array]
  shape: Shape
  cut_extremes: Callable[[Array], Array]
  join: Callable[[Array], Array]
  spread: Callable[[Array], Array]

  @classmethod
  def of(cls, shape: Shape, granularity: str | int, levels: int) -> "Blocks":
    """Blocks of a leaf; see `codecs.blockwise` for `granularity`.

    Args:
      shape: the leaf's.
      granularity: what shares side information.
      levels: how many codes there are.
    """
    entries = math.prod(shape)
    if granularity == "channel" and len(shape) > 1:
      channels = shape[-1]
      cut = shape_in_rows(entries // channels, levels, channels)
      axis = tuple(range(len(cut) - 1))
      side = (*[1] * len(axis), channels)
      return cls(
        number=channels,
        padding=0,
        axis=axis,
        sizes=np.full(side, entries // channels, np.float32),
        fill=lambda x: x,
        whole=lambda x: x.reshape(cut),
        cut=lambda x: x.reshape(cut),
        cut_extremes=lambda extremes: extremes.reshape(2, *side[1:]),
        shape=cut,
        join=lambda y: y.reshape(shape),
        spread=lambda sent: sent.reshape(side),
      )
    if isinstance(granularity, int) and granularity < entries:
      rows = -(-entries // granularity)
      padding = rows * granularity - entries
      sizes = np.full((rows, 1), granularity, np.float32)
      sizes[-1] -= padding
      cut = (rows, granularity)
      packed_rows, multiple = bitpack.rows_of(levels)
      if padding == 0 and entries % multiple == 0:
        # Pieces of blocks where whole blocks do not make such rows.
        piece = math.gcd(granularity, entries // multiple)
        if piece == granularity or piece >= _LEAST_PIECE:
          cut = (packed_rows, entries // piece // packed_rows, piece)

      def fill(x):
        missing = rows * granularity - x.size
        return jnp.pad(x.reshape(-1), (0, missing)) if missing else x

      return cls(
        number=rows,
        padding=padding,
        axis=1,
        sizes=sizes,
        fill=fill,
        whole=lambda x: fill(x).reshape(rows, granularity),
        cut=lambda x: fill(x).reshape(cut),
        cut_extremes=lambda extremes: extremes.T,
        shape=cut,
        join=lambda y: y.reshape(-1)[:entries].reshape(shape),
        spread=lambda sent: jnp.repeat(sent, granularity // cut[-1]).reshape(
          *cut[:-1], 1
        ),
      )
    cut = shape_in_rows(entries, levels)
    return cls(
      number=1,
      padding=0,
      axis=None,
      sizes=np.full((1,), entries, np.float32),
      fill=lambda x: x,
      whole=lambda x: x.reshape(cut),
      cut=lambda x: x.reshape(cut),
      cut_extremes=lambda extremes: extremes.reshape(-1),
      shape=cut,
      join=lambda y: y.reshape(shape),
      spread=lambda sent: sent.reshape(1),
    )


def shape_in_rows(lead: int, levels: int, *rest: int) -> Shape:
  """[lead, *rest], in the rows that `bitpack` packs best where it can be.

  Halves are of eight codes, however few would do: draws depend on them, and
  `choice` draws for codes of any width at once.
  """
  rows, _ = bitpack.rows_of(levels)
  multiple = 8 if rows == 2 else rows
  return (lead, *rest) if lead % multiple else (rows, lead // rows, *rest)


def draws(seed: Array, cut: Shape) -> Array:
  """Draws for the rounding of an array: of two halves, two of every hash."""
  if len(cut) == 1 or cut[0] != 2:
    return counter.uniform(seed, cut)
  return counter.uniform_halves(seed, math.prod(cut)).reshape(cut)


def flat(y: Array, entries: int) -> Array:
  """The first entries of an array, which keeps its shape if they are all."""
  return y if y.size == entries else y.reshape(-1)[:entries]
