"""Codecs of one leaf: what crosses the wire, and how it is read back.

Every quantiser that keeps one code an entry is the same skeleton, `blockwise`:
cut the leaf into blocks that share side information, fit it, code the entries,
pack the codes. What differs are `numerics.Numerics`, a few lines each.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import (
  bitpack,
  blocking,
  counter,
  fusion,
  native,
  numerics,
  quantize,
  trees,
  wire,
)
from mpqfl_jax.errors import UserError
from mpqfl_jax.types import Array, Bins, Codec, LeafRecord, PyTree

Shape = blocking.Shape


class LeafCodec(NamedTuple):
  """A codec of one leaf of a known shape, see `types.Codec`.

  Attributes:
    name: the rule in words; part of the fingerprint that both sides compare.
    stochastic: whether entries are rounded at random, see `types.Bins`.
    init: () -> state of one client.
    encode: (seed, x, state) -> (payload, state); the seed is one of `counter`,
      the payload a dict.
    decode: payload -> x, float32.
    num_bytes: payload -> int or [] int32, the record's length.
    max_bytes: the longest such record.
    pack: payload on the host -> byte strings.
    unpack: reader -> payload.
    bins: payload -> (lower, upper, variance), see `types.Bins`.
    rule: payload on the host -> the rule that it was sent by, in words.
  """

  name: str
  stochastic: bool
  init: Callable[[], PyTree]
  encode: Callable[[Array, Array, PyTree], tuple[dict, PyTree]]
  decode: Callable[[dict], Array]
  num_bytes: Callable[[dict], Array | int]
  max_bytes: int
  pack: Callable[[dict], list]
  unpack: Callable[[wire.Reader], dict]
  bins: Callable[[dict], tuple[Array, Array, Array]]
  rule: Callable[[dict], str]


def blockwise(
  shape: Shape,
  numeric: numerics.Numerics,
  granularity: str | int = "tensor",
  momentum: float | None = None,
  passes: native.Passes | None = None,
) -> LeafCodec:
  """The codec of a leaf by one quantiser on blocks of it.

  Args:
    shape: the leaf's.
    numeric: what happens inside a block.
    granularity: `tensor` (one block), `channel` (one for each index of the last
      axis; leaves with fewer than two axes are one block) or a number of
      consecutive entries (the last block is padded with zeros).
    momentum: None fits the side information to this update (dynamic range);
      a number fits it to a running mean of the extremes of the client's earlier
      updates, with this share of the past, and saturates (static range).
    passes: what to compute outside of XLA, of a leaf that is one block.

  Returns:
    The leaf's codec.
  """
  count = math.prod(shape)
  if count == 0:
    return empty(shape)
  levels = numeric.levels
  blocks = blocking.Blocks.of(shape, granularity, levels)
  dither = numeric.rounding == "dither"
  if passes is not None and blocks.number > 1:
    raise UserError(
      f"kernels=native with granularity={granularity}: expected tensor."
    )

  fields = fields_of(numeric, count, blocks.number)
  if dither:
    fields.insert(
      0, wire.Field("seed", np.dtype(np.uint32), (2,), lambda seed: True)
    )

  def init():
    if momentum is None:
      return ()
    # NaN: nothing seen yet.
    return jnp.full((2, blocks.number), jnp.nan, jnp.float32)

  def fit(reference):
    return numeric.fit(reference, blocks.axis, blocks.sizes)

  def draw(seed):
    # The server draws dither again: entry by entry, whatever the blocks are.
    if dither:
      return counter.uniform(seed, blocks.shape)
    return blocking.draws(seed, blocks.shape)

  fill, code = blocks.fill, numeric.encode

  def lay(codes):
    return bitpack.parts(blocking.flat(codes, count), levels)

  def write(y, side, uniform):
    return lay(code(y, side, uniform))

  # In one loop of all, the compiler would find a block's scale again for every
  # entry, or whether it is padding, and vectorise nothing.
  if blocks.padding:
    code_type = jnp.uint8 if levels <= 256 else jnp.uint16
    code = fusion.alone(lambda *given: numeric.encode(*given).astype(code_type))
    fill, lay = fusion.alone(fill), fusion.alone(lay)
  elif blocks.axis is not None:
    write = fusion.alone(write)
  if blocks.axis is not None:
    fit = fusion.alone(fit)

  def encode(seed, x, state):
    x = fill(jnp.asarray(x, jnp.float32))
    random = numeric.rounding != "nearest"
    uniform = draw(seed) if random else None
    reference = blocks.whole(x)
    if passes is not None and numeric.side:
      reference = native.extremes(x)
    if momentum is not None:
      extremes = quantize.extremes(reference, blocks.axis)
      seen = jnp.stack([e.reshape(blocks.number) for e in extremes])
      known = jnp.where(jnp.isnan(state), seen, state)
      state = momentum * known + (1 - momentum) * seen
      reference = blocks.cut_extremes(known)
    side = fit(reference)
    side = {name: side[name].reshape(-1) for name in numeric.side}
    spread = {name: blocks.spread(value) for name, value in side.items()}
    payload = {
      name: side[name].astype(sent.dtype) for name, sent in numeric.side.items()
    }
    if dither:
      payload["seed"] = seed
    if passes is not None and passes.write is not None:
      payload["codes"] = passes.write(x.reshape(-1), spread)
    else:
      payload["codes"] = bitpack.join(write(blocks.cut(x), spread, uniform))
    return payload, state

  def read(payload, table=None):
    packed = payload["codes"]
    if table is None:
      is_flat = blocks.number == 1 and len(shape) == 1
      codes = bitpack.unpack(packed, count, levels, is_flat=is_flat)
    else:
      codes = bitpack.look_up(packed, count, levels, table)
    codes = blocks.cut(codes)
    side = {name: blocks.spread(payload[name]) for name in numeric.side}
    uniform = draw(payload["seed"]) if dither else None
    return codes, side, uniform

  def decode(payload):
    if passes is not None:
      return passes.read(payload["codes"], payload).reshape(shape)
    return blocks.join(numeric.decode(*read(payload, numeric.table)))

  def bins(payload):
    codes, side, uniform = read(payload)
    lower, upper, variance = numeric.bins(codes, side, uniform)
    if momentum is not None:
      lower = jnp.where(codes == 0, -jnp.inf, lower)
      upper = jnp.where(codes == levels - 1, jnp.inf, upper)
    return blocks.join(lower), blocks.join(upper), blocks.join(variance)

  name = numeric.name
  if blocks.number > 1:
    name += f" per {granularity}"
  if momentum is not None:
    name += " static"
  return fixed(
    name,
    numeric.tag,
    numeric.rounding == "stochastic",
    fields,
    encode,
    decode,
    bins,
    init,
  )


def fields_of(
  numeric: numerics.Numerics, entries: int, blocks: int
) -> list[wire.Field]:
  """What is sent of `entries` codes in `blocks` blocks."""
  levels = numeric.levels

  def check(packed: np.ndarray) -> bool:
    return bitpack.padding_is_zero(packed, entries, levels) and numeric.valid(
      bitpack.unpack(packed, entries, levels, np)
    )

  size = bitpack.packed_size(entries, levels)
  return [
    *(
      wire.Field(name, np.dtype(side.dtype), (blocks,), side.check)
      for name, side in numeric.side.items()
    ),
    wire.Field("codes", bitpack.packed_type(levels), (size,), check),
  ]


def fixed(
  name: str,
  tag: int,
  stochastic: bool,
  fields: list[wire.Field],
  encode: Callable,
  decode: Callable,
  bins: Callable,
  init: Callable[[], PyTree] = lambda: (),
) -> LeafCodec:
  """A leaf codec whose record has a fixed length: a tag, then `fields`."""
  length = 1 + sum(field.num_bytes for field in fields)

  def unpack(reader):
    wire.read_tag(reader, (tag,))
    return wire.read_fields(fields, reader)

  return LeafCodec(
    name,
    stochastic,
    init,
    encode,
    decode,
    num_bytes=lambda payload: length,
    max_bytes=length,
    pack=lambda payload: [bytes([tag]), *wire.write_fields(fields, payload)],
    unpack=unpack,
    bins=bins,
    rule=lambda payload: name,
  )


def float32(shape: Shape) -> LeafCodec:
  """The codec that changes nothing."""
  if math.prod(shape) == 0:
    return empty(shape)

  def bins(payload):
    x = payload["values"]
    return x, x, jnp.zeros_like(x)

  return fixed(
    "float32",
    tag=1,
    stochastic=False,
    fields=[
      wire.Field(
        "values",
        np.dtype(np.float32),
        shape,
        numerics.between(-quantize.LARGEST, quantize.LARGEST),
      )
    ],
    encode=lambda seed, x, state: ({"values": quantize.finite(x)}, state),
    decode=lambda payload: payload["values"],
    bins=bins,
  )


def empty(shape: Shape) -> LeafCodec:
  """The codec of a leaf without entries: nothing is sent."""
  zeros = jnp.zeros(shape, jnp.float32)
  return fixed(
    "empty",
    tag=0,
    stochastic=False,
    fields=[],
    encode=lambda seed, x, state: ({}, state),
    decode=lambda payload: zeros,
    bins=lambda payload: (zeros, zeros, zeros),
  )


def per_leaf(name: str, template: PyTree, leaves: list[LeafCodec]) -> Codec:
  """The codec of a tree from one codec a leaf.

  Args:
    name: of the policy; part of the fingerprint.
    template: parameters, or their shapes.
    leaves: in the order of `jax.tree.leaves(template)`.

  Returns:
    The codec; its payload is a tuple with one dict a leaf.
  """
  treedef = jax.tree.structure(template)
  agreement = agreement_of(name, template, [leaf.name for leaf in leaves])
  print_ = wire.fingerprint(agreement)
  most = wire.OVERHEAD + sum(leaf.max_bytes for leaf in leaves)
  if most >= 2**31:
    raise UserError(
      f"{name}: messages of up to {most:,} bytes. Expected less than 2 GiB."
    )

  def init(params):
    return tuple(leaf.init() for leaf in leaves)

  def encode(key, update, state):
    seeds = counter.seeds(key, len(leaves))
    parts = zip(leaves, seeds, jax.tree.leaves(update), state, strict=True)
    done = [leaf.encode(*arguments) for leaf, *arguments in parts]
    return tuple(p for p, _ in done), tuple(s for _, s in done)

  def decode(payload):
    values = [c.decode(p) for c, p in zip(leaves, payload, strict=True)]
    return jax.tree.unflatten(treedef, values)

  def num_bytes(payload):
    sizes = [c.num_bytes(p) for c, p in zip(leaves, payload, strict=True)]
    return jnp.int32(wire.OVERHEAD + sum(sizes))

  def pack(payload, coding=None):
    records = []
    for leaf, part in zip(leaves, payload, strict=True):
      records += leaf.pack(part)
    return wire.seal(print_, records, coding)

  def unpack(message, coding=None):
    reader = wire.unseal(message, print_, most, coding)
    payload = tuple(leaf.unpack(reader) for leaf in leaves)
    reader.finish()
    return payload

  def bins(payload):
    parts = [c.bins(p) for c, p in zip(leaves, payload, strict=True)]
    lower, upper, variance = zip(*parts, strict=True)
    return Bins(
      jax.tree.unflatten(treedef, lower),
      jax.tree.unflatten(treedef, upper),
      jax.tree.unflatten(treedef, variance),
      jax.tree.unflatten(treedef, [leaf.stochastic for leaf in leaves]),
    )

  def records(payload):
    names = trees.leaf_names(template)
    return [
      LeafRecord(path, leaf.rule(part), int(leaf.num_bytes(part)))
      for path, leaf, part in zip(names, leaves, payload, strict=True)
    ]

  return Codec(
    init, encode, decode, num_bytes, pack, unpack, bins, records, agreement
  )


def error_feedback(codec: Codec) -> Codec:
  """Adds what earlier rounds lost to this round's update.

  Args:
    codec: any codec.

  Returns:
    The codec whose state also holds the client's residual, update - decoded.

  Source: Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient
  Compression Schemes" (ICML 2019), algorithm 2.
  """

  def init(params):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    return zeros, codec.init(params)

  def encode(key, update, state):
    residual, inner = state
    # What is not finite is dropped, or it would stay in the residual for ever.
    wanted = jax.tree.map(lambda u, r: quantize.finite(u + r), update, residual)
    payload, inner = codec.encode(key, wanted, inner)
    residual = trees.subtract(wanted, codec.decode(payload))
    return payload, (residual, inner)

  # What is chosen for is not the update alone.
  return codec._replace(init=init, encode=encode, proof=None)


def pair(codec: Codec) -> Codec:
  """Sends two trees of one shape, such as SCAFFOLD's two changes.

  Each is a message of its own; the length of the first, 4 bytes, stands before
  both.

  Args:
    codec: of either tree.

  Returns:
    A codec of tuples of two, whose payloads, states and bins are tuples of two.
  """

  def encode(key, updates, states):
    # The first as it would be alone.
    first, one = codec.encode(key, updates[0], states[0])
    second, two = codec.encode(
      jax.random.fold_in(key, 1), updates[1], states[1]
    )
    return (first, second), (one, two)

  def pack(payload):
    return wire.join(codec.pack(payload[0]), codec.pack(payload[1]))

  def records(payload):
    return [
      record._replace(path=f"{name}/{record.path}")
      for name, part in zip(("model", "variate"), payload, strict=True)
      for record in codec.records(part)
    ]

  return Codec(
    init=lambda params: (codec.init(params), codec.init(params)),
    encode=encode,
    decode=lambda payload: tuple(codec.decode(part) for part in payload),
    num_bytes=lambda payload: sum(
      (codec.num_bytes(part) for part in payload),
      start=jnp.int32(wire.LENGTH.size),
    ),
    pack=pack,
    unpack=lambda message: tuple(
      codec.unpack(part) for part in wire.part(message)
    ),
    bins=lambda payload: Bins(
      *zip(*(codec.bins(part) for part in payload), strict=True)
    ),
    records=records,
    agreement=codec.agreement,
  )


def agreement_of(name: str, template: PyTree, rules: list[str]) -> str:
  """A model's shapes and a policy's rules in words, a line a leaf."""
  shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(template)]
  lines = [name]
  for path, shape, rule in zip(
    trees.leaf_names(template), shapes, rules, strict=True
  ):
    lines.append(f"{path} {list(shape)} {rule}")
  return "\n".join(lines)
