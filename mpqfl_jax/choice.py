"""A leaf codec whose precision and mode are data, chosen for each update.

Every option shares one compiled program: levels, scales and zero points are
picked out of tables by a traced index, and the codes of all options lie in one
16-bit container until they are packed at the chosen width. The choice is on the
wire, as the tag of the leaf's record.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import (
  bitpack,
  blocking,
  codecs,
  counter,
  numerics,
  quantize,
  wire,
)
from mpqfl_jax.errors import UserError
from mpqfl_jax.types import Array

WITHHELD, FLOAT, SYMMETRIC, AFFINE = range(4)
TAG_WITHHELD = 0x0C


class Option(NamedTuple):
  """One precision and mode that a leaf may be sent in.

  Attributes:
    precision: `none` (nothing is sent, zeros are read), `float16`, or `int1` to
      `int8`.
    mode: `symmetric` or `affine` for integers, empty otherwise.
  """

  precision: str
  mode: str = ""


class Menu(NamedTuple):
  """The options of a choice as tables to index.

  Attributes:
    options: the options.
    rounding: `nearest` or `stochastic`, for all options.
    numerics: of each option, None for a withheld leaf.
    kind: [options] int32, `WITHHELD`, `FLOAT`, `SYMMETRIC` or `AFFINE`.
    low: [options] int32, the smallest code.
    levels: [options] int32, number of codes.
  """

  options: tuple[Option, ...]
  rounding: str
  numerics: tuple[numerics.Numerics | None, ...]
  kind: np.ndarray
  low: np.ndarray
  levels: np.ndarray


def menu(options: Sequence[Option], rounding: str = "nearest") -> Menu:
  """Builds the tables of a choice.

  Args:
    options: at most 256.
    rounding: `nearest` or `stochastic`, for all options.

  Returns:
    The menu.

  Raises:
    UserError: an option names no precision or mode that a choice can hold.
  """
  numerics.require_choice("rounding", rounding, numerics.ROUNDINGS[:2])
  kinds: list[int] = []
  parts: list[numerics.Numerics | None] = []
  for option in options:
    if option.precision == "none":
      kinds.append(WITHHELD)
      parts.append(None)
    elif option.precision == "float16":
      kinds.append(FLOAT)
      parts.append(numerics.cast("float16", rounding))
    elif option.precision in {f"int{bits}" for bits in range(1, 9)}:
      kinds.append(AFFINE if option.mode == "affine" else SYMMETRIC)
      parts.append(
        numerics.integer(int(option.precision[3:]), option.mode, rounding)
      )
    else:
      raise UserError(
        f"precision {option.precision!r} in a choice: expected none, float16 or"
        " int1 to int8."
      )
  levels = [1 if part is None else part.levels for part in parts]
  linear = [kind in (SYMMETRIC, AFFINE) for kind in kinds]
  return Menu(
    tuple(options),
    rounding,
    tuple(parts),
    np.array(kinds, np.int32),
    np.array([-(n // 2) * i for n, i in zip(levels, linear, strict=True)]),
    np.array(levels, np.int32),
  )


def record_bytes(menu: Menu, entries: int) -> np.ndarray:
  """Bytes of a leaf's record in each option, [options] int32."""
  sizes = []
  for numeric in menu.numerics:
    fields = []
    if numeric is not None:
      fields = codecs.fields_of(numeric, entries, blocks=1)
    sizes.append(1 + sum(field.num_bytes for field in fields))
  return np.array(sizes, np.int32)


def encode_as(menu: Menu, choice: Array, seed: Array, x: Array) -> dict:
  """Encodes a leaf in one option.

  Args:
    menu: the options.
    choice: [] int32, index of the option.
    seed: [2] uint32, for stochastic rounding.
    x: the leaf, not empty.

  Returns:
    The payload of `leaf`.
  """
  x = jnp.asarray(x, jnp.float32)
  x = x.reshape(blocking.shape_in_rows(x.size, levels=256))
  kind, low, levels = (
    jnp.asarray(table)[choice] for table in (menu.kind, menu.low, menu.levels)
  )
  stochastic = menu.rounding == "stochastic"
  uniform = blocking.draws(seed, x.shape) if stochastic else None
  if uniform is not None and 3 in menu.levels:
    # Three-valued codes lie in other rows, which are drawn for otherwise.
    three = blocking.draws(seed, blocking.shape_in_rows(x.size, levels=3))
    uniform = jnp.where(levels == 3, three.reshape(x.shape), uniform)
  low = low.astype(jnp.float32)
  high = low + jnp.maximum(levels - 1, 1).astype(jnp.float32)
  # Both grids depend on the extremes alone.
  extremes = jnp.concatenate(quantize.extremes(x), axis=None)
  symmetric = quantize.symmetric_grid(extremes, None, high)
  affine = quantize.affine_grid(extremes, None, low, high, stochastic)
  is_affine = kind == AFFINE
  grid = quantize.Grid(
    jnp.where(is_affine, affine.scale, symmetric.scale),
    jnp.where(is_affine, affine.zero_point, symmetric.zero_point),
    low,
    high,
  )
  codes = quantize.quantize(x, grid, uniform) - low.astype(jnp.int32)
  codes = codes.astype(jnp.uint16)
  half = quantize.to_format(
    quantize.without_nan(x), quantize.FLOAT_FORMATS["float16"], uniform
  )
  half = jax.lax.bitcast_convert_type(half, jnp.uint16)
  codes = jnp.where(kind == FLOAT, half, codes).reshape(-1)
  linear = (kind == SYMMETRIC) | is_affine
  zero_point = jnp.where(is_affine, grid.zero_point - low, 0)
  return {
    "choice": choice.astype(jnp.uint8),
    "scale": jnp.where(linear, grid.scale, 0)[0],
    "zero_point": zero_point[0].astype(jnp.uint8),
    "codes": jnp.where(kind == WITHHELD, jnp.uint16(0), codes),
  }


def withheld(shape: codecs.Shape) -> codecs.LeafCodec:
  """The codec of a leaf that is never sent; it decodes to zeros."""
  return leaf(shape, menu([Option("none")]))


def leaf(shape: codecs.Shape, menu: Menu) -> codecs.LeafCodec:
  """The codec of a leaf that is sent in one option of a menu.

  Args:
    shape: the leaf's.
    menu: the options; `encode` draws one uniformly.

  Returns:
    The leaf's codec.
  """
  entries = math.prod(shape)
  if entries == 0:
    return codecs.empty(shape)
  rounding = menu.rounding
  stochastic = rounding == "stochastic"
  sizes = record_bytes(menu, entries)
  tags = [TAG_WITHHELD if n is None else n.tag for n in menu.numerics]
  float16 = numerics.cast("float16", rounding)

  def encode(seed, x, state):
    # A stream of its own, apart from that of the rounding.
    draw = counter.uniform(seed ^ jnp.uint32(0xA5A5A5A5), ())
    choice = (draw * len(menu.options)).astype(jnp.int32)
    return encode_as(menu, choice, seed, x), state

  def linear(payload):
    choice = payload["choice"]
    low = jnp.asarray(menu.low)[choice].astype(jnp.float32)
    affine = jnp.asarray(menu.kind)[choice] == AFFINE
    zero_point = payload["zero_point"].astype(jnp.float32)
    zero_point = jnp.where(affine, zero_point, -low)
    return (payload["codes"].astype(jnp.float32) - zero_point) * payload[
      "scale"
    ]

  def select(payload, withheld, half, value):
    kind = jnp.asarray(menu.kind)[payload["choice"]]
    value = jnp.where(kind == FLOAT, half, value)
    return jnp.where(kind == WITHHELD, withheld, value).reshape(shape)

  def decode(payload):
    half = float16.decode(payload["codes"], {}, None)
    return select(payload, 0.0, half, linear(payload))

  def bins(payload):
    value = linear(payload)
    as_linear = numerics.grid_bins(value, payload["scale"], rounding)
    as_half = float16.bins(payload["codes"], {}, None)
    withheld = -jnp.inf, jnp.inf, jnp.inf
    parts = zip(withheld, as_half, as_linear, strict=True)
    return tuple(select(payload, *part) for part in parts)

  def pack(payload):
    choice = int(payload["choice"])
    record = [bytes([tags[choice]])]
    numeric = menu.numerics[choice]
    if numeric is None:
      return record
    codes = np.asarray(payload["codes"])
    packed = {
      name: np.asarray(payload[name]).reshape(1) for name in numeric.side
    }
    packed["codes"] = bitpack.pack(codes, numeric.levels, np)
    fields = codecs.fields_of(numeric, entries, blocks=1)
    return record + wire.write_fields(fields, packed)

  def unpack(reader):
    choice = wire.read_tag(reader, tags)
    payload = {
      "choice": np.uint8(choice),
      "scale": np.float32(0),
      "zero_point": np.uint8(0),
    }
    numeric = menu.numerics[choice]
    if numeric is None:
      return payload | {"codes": np.zeros(entries, np.uint16)}
    fields = codecs.fields_of(numeric, entries, blocks=1)
    sent = wire.read_fields(fields, reader)
    payload |= {name: sent[name][0] for name in numeric.side}
    codes = bitpack.unpack(sent["codes"], entries, numeric.levels, np)
    return payload | {"codes": codes.astype(np.uint16)}

  names = [" ".join(option).strip() for option in menu.options]
  return codecs.LeafCodec(
    name=f"one of {', '.join(names)}; {rounding}",
    stochastic=stochastic,
    init=lambda: (),
    encode=encode,
    decode=decode,
    num_bytes=lambda payload: jnp.asarray(sizes)[payload["choice"]],
    max_bytes=int(sizes.max()),
    pack=pack,
    unpack=unpack,
    bins=bins,
    rule=lambda payload: f"{names[int(payload['choice'])]} {rounding}",
  )
