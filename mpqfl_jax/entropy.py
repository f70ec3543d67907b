"""Entropy coding of messages: what is left to save after packing to the bit.

Packed codes are as short as a fixed width allows; how often each value occurs
is not used. zstd's entropy stage (Huffman and finite-state codes over bytes)
uses it. Its matches of repeated strings find little in an update, whose entries
look like noise, so that a small window costs next to nothing and bounds what
a reader needs.

The length of a coded message is known only once it is coded, which happens on
the host: `num_bytes` of such a codec calls back to it for every client, under
`jit`, `scan`, `vmap` and `shard_map` alike, and nothing is kept afterwards.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import zstandard

from mpqfl_jax import errors, specs, wire
from mpqfl_jax.types import Array, Codec, Payload

# The largest window that a reader provides, a block of zstd. A frame cannot
# make it keep more than this beside the records themselves.
WINDOW_LOG = 17

# An operand of a callback above 100 KiB is copied by a thread of the pool whose
# threads, one a device, may all be waiting in callbacks for such copies: on
# several CPU devices the program stands still for ever (jax-ml/jax#24255).
# Smaller operands are copied on the spot.
OPERAND_BYTES = 2**16


def zstd(level: int = 3) -> wire.Coding:
  """Zstandard (RFC 8878): one frame, its content size in its header.

  Args:
    level: 1 (fast) to 22 (small).

  Returns:
    The coding.

  Raises:
    UserError: no such level.
  """
  if isinstance(level, bool) or not isinstance(level, int):
    raise errors.UserError(f"level={level!r}: expected an integer.")
  if not 1 <= level <= zstandard.MAX_COMPRESSION_LEVEL:
    raise errors.UserError(
      f"level={level}: expected 1 to {zstandard.MAX_COMPRESSION_LEVEL}."
    )

  def shrink(records: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(
      level,
      source_size=len(records),
      window_log=WINDOW_LOG,
      write_content_size=True,
      write_checksum=False,
      write_dict_id=False,
    )
    # One for each call: several threads may be here, and it is not theirs.
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    return compressor.compress(records)

  return wire.Coding(f"zstd level {level}", 1, shrink, _expand)


def _expand(frame: memoryview, max_bytes: int) -> bytes:
  """Reads what `shrink` wrote; believes the frame's header in nothing."""
  try:
    claim = zstandard.get_frame_parameters(frame)
    # A frame of unknown size claims the largest number there is.
    if claim.content_size > max_bytes:
      raise wire.WireError(
        f"records of {claim.content_size} bytes in a frame, at most {max_bytes}"
      )
    if claim.window_size > 2**WINDOW_LOG:
      raise wire.WireError(f"a frame needs a window of {claim.window_size}")
    if claim.dict_id or claim.has_checksum:
      raise wire.WireError("a frame has a dictionary or a checksum of its own")
    expanded = zstandard.ZstdDecompressor().decompress(
      frame, allow_extra_data=False
    )
  except zstandard.ZstdError as error:
    raise wire.WireError(f"entropy coding is broken: {error}") from error
  if len(expanded) != claim.content_size:
    raise wire.WireError(
      f"frame of {len(expanded)} bytes claims {claim.content_size}"
    )
  return expanded


# What `entropy` may name: name -> constructor.
CODINGS = {"zstd": zstd}


def make(spec: str) -> wire.Coding | None:
  """Builds the coding that an option names.

  Args:
    spec: `none`, `zstd` or `zstd(level=9)`.

  Raises:
    UserError: no such coding, or options that it does not take.
  """
  if not isinstance(spec, str):
    raise errors.UserError(
      f"entropy={spec!r}: expected none, zstd or zstd(level=9)."
    )
  name, options = specs.parse(spec)
  if name == "none" and not options:
    return None
  if name not in CODINGS:
    raise errors.unknown_name("entropy coding", name, ["none", *CODINGS])
  return specs.call(f"entropy coding {name}", CODINGS[name], options)


def coded(codec: Codec, coding: wire.Coding) -> Codec:
  """The codec whose messages are entropy coded.

  What is decoded stays the same, bit for bit. A message that coding does not
  shorten is sent without it.

  Args:
    codec: any codec.
    coding: both sides know it.

  Returns:
    The codec; its `num_bytes` packs and codes the payload on the host.
  """

  def num_bytes(payload: Payload) -> Array:
    leaves, treedef = jax.tree.flatten(payload)
    shapes = [leaf.shape for leaf in leaves]
    pieces = [_pieces(jnp.asarray(leaf)) for leaf in leaves]

    def length(pieces: list[list[Any]]) -> np.int32:
      flat = [[np.asarray(piece) for piece in leaf] for leaf in pieces]
      whole = [
        np.concatenate(leaf).reshape(shape)
        for leaf, shape in zip(flat, shapes, strict=True)
      ]
      payload = jax.tree.unflatten(treedef, whole)
      return np.int32(len(codec.pack(payload, coding)))

    return jax.pure_callback(
      length,
      jax.ShapeDtypeStruct((), jnp.int32),
      pieces,
      vmap_method="sequential",
    )

  return codec._replace(
    num_bytes=num_bytes,
    pack=functools.partial(codec.pack, coding=coding),
    unpack=functools.partial(codec.unpack, coding=coding),
  )


def _pieces(leaf: Array) -> list[Array]:
  """A leaf's entries in order, cut to what a callback may take."""
  flat = leaf.reshape(-1)
  step = OPERAND_BYTES // flat.dtype.itemsize
  return [flat[i : i + step] for i in range(0, max(flat.size, 1), step)]
