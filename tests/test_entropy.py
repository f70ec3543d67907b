"""Entropy coding: frames by hand, lengths under transformations, lying frames.

Frames are written here from RFC 8878 alone, block by block.
"""

import pathlib
import struct
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
import zstandard

from benchmarks import wire as bench
from mpqfl_jax import entropy, errors, precision, wire

MAGIC = bytes.fromhex("28b52ffd")
RAW, RLE, RESERVED = 0, 1, 3
PARAMS = {"a": jnp.zeros(1000)}


def block(kind, content, size, last=False):
  return (int(last) | kind << 1 | size << 3).to_bytes(3, "little") + content


# Records of 1000 zeros as float32: a tag, then 4000 zero bytes.
BLOCKS = block(RAW, b"\x01", 1) + block(RLE, b"\0", 4000, last=True)
SIZE = 4001
SINGLE = 0x60  # two bytes of content size, less 256, and no window


def frame(descriptor=SINGLE, rest=b"", size=SIZE, blocks=BLOCKS):
  content = (size - 256).to_bytes(2, "little")
  return MAGIC + bytes([descriptor]) + rest + content + blocks


def codec_of(name, params=PARAMS, coding="zstd", **options):
  return precision.make(name, params, entropy=coding, **options)


def message_of(codec, update, key=0):
  payload, _ = jax.jit(codec.encode)(
    jax.random.key(key), update, codec.init(update)
  )
  return codec.pack(payload)


def around(body, codec, number=1):
  """A message whose coded records are `body`."""
  plain = message_of(codec, PARAMS)
  return wire.reseal(
    plain[:3] + bytes([wire.VERSION | number << 4]) + plain[4:8] + body
  )


def test_a_frame_by_hand_is_read():
  codec = codec_of("none")
  read = codec.unpack(around(frame(), codec))
  np.testing.assert_array_equal(read[0]["values"], np.zeros(1000))


def test_a_message_is_a_header_a_frame_and_a_checksum():
  update = {"a": jnp.asarray(np.arange(1000) % 7 == 0, jnp.float32)}
  for name in ("none", "int8", "topk"):
    codec, plain = codec_of(name), precision.make(name, PARAMS)
    message, long = message_of(codec, update), message_of(plain, update)
    assert len(message) < len(long)
    assert message[:4] == b"MPQ\x14" and message[4:8] == long[4:8]
    records = zstandard.ZstdDecompressor().decompress(message[8:-4])
    assert records == long[8:-4]
    assert message[-4:] == xxhash.xxh32_digest(message[:-4])[::-1]
    assert codec.pack(codec.unpack(message)) == message


def test_what_does_not_shrink_is_sent_as_it_is():
  update = {"a": jax.random.normal(jax.random.key(0), (1000,))}
  codec, plain = codec_of("sign"), precision.make("sign", PARAMS)
  message = message_of(codec, update)
  assert message == message_of(plain, update)
  assert codec.pack(codec.unpack(message)) == message


def test_both_sides_must_have_agreed():
  codec, plain = codec_of("none"), precision.make("none", PARAMS)
  with pytest.raises(wire.WireError, match="agreed was none"):
    plain.unpack(message_of(codec, PARAMS))
  with pytest.raises(wire.WireError, match="coding 2, agreed was zstd"):
    codec.unpack(around(frame(), codec, number=2))
  # A client need not use it.
  codec.unpack(message_of(plain, PARAMS))


def zeros(megabytes):
  run = block(RLE, b"\0", 2**17)
  return run * (8 * megabytes) + block(RLE, b"\0", 1, last=True)


BAD = {
  "dictionary": (frame(SINGLE | 1, b"\x05"), "dictionary"),
  "checksum": (frame(SINGLE | 4) + bytes(4), "checksum"),
  "reserved bit": (frame(SINGLE | 8), "broken"),
  "claims less": (frame(size=SIZE - 1), "broken"),
  "claims more": (frame(size=SIZE + 1), "at most 4001"),
  "claims less, less": (frame(size=SIZE - 1, blocks=BLOCKS[:4]), "broken"),
  "claims nothing": (MAGIC + bytes([0, 0]) + BLOCKS, "at most 4001"),
  "claims 2^63": (
    MAGIC + bytes([0xE0]) + (2**63).to_bytes(8, "little") + BLOCKS,
    "at most 4001",
  ),
  "window of 2 GB": (frame(0x40, bytes([21 << 3])), "window of 2147483648"),
  "bomb": (frame(blocks=zeros(100)), "broken"),
  "reserved block": (frame(blocks=block(RESERVED, b"", 4001, True)), "broken"),
  "no last block": (frame(blocks=BLOCKS[:-4] + b"\0\0\0"), "broken"),
  "one byte more": (frame() + b"\0", "broken"),
  "two frames": (frame() + frame(), "broken"),
  "skippable": (struct.pack("<II", 0x184D2A50, 4) + bytes(4), "broken"),
  "skippable of 2 GB": (struct.pack("<II", 0x184D2A50, 2**31), "at most"),
  "skippable first": (
    struct.pack("<II", 0x184D2A50, 4) + bytes(4) + frame(),
    "broken",
  ),
  "nothing": (b"", "broken"),
  "empty": (MAGIC + bytes([0x20, 0]) + block(RAW, b"", 0, True), "no shorter"),
  "no frame": (b"\x01" + bytes(100), "broken"),
  "records too short": (
    frame(size=4000, blocks=BLOCKS[:4] + block(RLE, b"\0", 3999, True)),
    "record needs 4000 bytes",
  ),
  "another rule": (
    frame(blocks=block(RLE, b"\x02", 4001, True)),
    "record has rule 0x02",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_lying_frame_is_one_error_and_no_memory(name):
  body, what = BAD[name]
  codec = codec_of("none")
  message = around(body, codec)
  assert len(message) <= 4 * 1000 + 1 + wire.OVERHEAD
  tracemalloc.start()
  with pytest.raises(wire.WireError, match=what):
    codec.unpack(message)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 50_000


def test_a_frame_must_be_shorter_than_its_records():
  # Raw blocks: the header comes on top.
  params = {"a": jnp.zeros(50)}
  codec = codec_of("none", params)
  records = b"\x01" + bytes(200)
  body = MAGIC + bytes([0x20, 201]) + block(RAW, records, 201, True)
  short = MAGIC + bytes([0x20, 201])
  short += block(RAW, b"\x01", 1) + block(RLE, b"\0", 200, True)
  plain = message_of(precision.make("none", params), params)
  head = plain[:3] + bytes([wire.VERSION | 1 << 4]) + plain[4:8]
  codec.unpack(wire.reseal(head + short))
  with pytest.raises(wire.WireError):
    codec.unpack(wire.reseal(head + body))


@pytest.mark.parametrize("level", [1, 3, 22])
def test_megabytes_need_no_large_window(level):
  # 4 MB, of which only the second half is like noise.
  values = jax.random.normal(jax.random.key(0), (500_000,))
  update = {"a": jnp.concatenate([jnp.zeros(500_000), values])}
  codec = codec_of("none", update, f"zstd(level={level})")
  message = message_of(codec, update)
  claim = zstandard.get_frame_parameters(message[8:-4])
  assert claim.content_size == 4_000_001
  assert claim.window_size <= 2**entropy.WINDOW_LOG
  assert not claim.has_checksum and not claim.dict_id
  tracemalloc.start()
  read = codec.unpack(message)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak <= 4_000_000 + 2**20
  np.testing.assert_array_equal(read[0]["values"], update["a"])
  # The writer's reader takes no wider window from anyone else.
  records = zstandard.ZstdDecompressor().decompress(message[8:-4])
  wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=21)
  body = zstandard.ZstdCompressor(compression_params=wide).compress(records)
  with pytest.raises(wire.WireError, match="window of 2097152"):
    codec.unpack(wire.reseal(message[:8] + body))


@pytest.mark.parametrize(
  "name", ["none", "int3", "topk", "randomk", "mixed_random", "drive"]
)
def test_length_on_the_device_is_that_of_the_message(name):
  codec = codec_of(name)
  encode = jax.jit(codec.encode)

  def length(update):
    payload, _ = codec.encode(jax.random.key(3), update, codec.init(update))
    return codec.num_bytes(payload)

  updates = {
    "a": jax.random.laplace(jax.random.key(1), (4, 1000))
    * jnp.array([[0.0], [1.0], [1e-3], [1.0]])
  }
  want = []
  for i in range(4):
    update = jax.tree.map(lambda x, i=i: x[i], updates)
    payload, _ = encode(jax.random.key(3), update, codec.init(update))
    want.append(len(codec.pack(payload)))
  assert len(set(want)) >= 2 and min(want) < 500
  got = jax.jit(jax.vmap(length))(updates)
  np.testing.assert_array_equal(got, want)
  assert got.dtype == jnp.int32
  scanned = jax.jit(lambda u: jax.lax.scan(lambda c, x: (c, length(x)), 0, u))
  np.testing.assert_array_equal(scanned(updates)[1], want)
  eager = length(jax.tree.map(lambda x: x[0], updates))
  assert int(eager) == want[0] and eager.shape == ()


# Callbacks with large operands stop a program on several CPU devices for ever.
SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 8)
from mpqfl_jax import precision
update = {"a": jnp.zeros(400_000)}
codec = precision.make("int8", update, entropy="zstd(level=1)")

def encode(key):
  update = {"a": jax.random.laplace(key, (400_000,))}
  return codec.encode(key, update, codec.init(update))[0]

def lengths(keys):
  one = lambda key: codec.num_bytes(encode(key))
  scanned = jax.lax.scan(lambda c, key: (c, one(key)), 0, keys)[1]
  return scanned, jax.vmap(one)(keys)

run = jax.jit(jax.shard_map(lengths, mesh=Mesh(jax.devices(), "c"),
                            in_specs=P("c"), out_specs=P("c"), check_vma=False))
keys = jax.random.split(jax.random.key(0), 16)
scanned, batched = run(keys)
want = [len(codec.pack(jax.jit(encode)(key))) for key in keys]
np.testing.assert_array_equal(scanned, want)
np.testing.assert_array_equal(batched, want)
assert len(set(want)) > 4 and max(want) < 390_000
"""


def test_large_payloads_on_many_devices_do_not_wait_for_each_other():
  root = pathlib.Path(__file__).parents[1]
  subprocess.run(
    [sys.executable, "-c", SHARDED], check=True, timeout=120, cwd=root
  )


def test_operands_of_a_callback_are_small():
  for dtype in (jnp.uint8, jnp.uint16, jnp.float32):
    leaf = jnp.arange(200_001).astype(dtype)
    pieces = entropy._pieces(leaf.reshape(3, -1))
    assert max(piece.nbytes for piece in pieces) <= 2**16
    np.testing.assert_array_equal(jnp.concatenate(pieces), leaf)
  assert [p.shape for p in entropy._pieces(jnp.float32(3))] == [(1,)]
  assert [p.shape for p in entropy._pieces(jnp.zeros((0, 3)))] == [(0,)]


def test_decoding_and_bins_are_those_of_the_codec():
  update = {"a": jax.random.laplace(jax.random.key(0), (1000,))}
  codec = codec_of("int4", error_feedback=True, rounding="stochastic")
  plain = precision.make(
    "int4", PARAMS, error_feedback=True, rounding="stochastic"
  )
  for built in (codec, plain):
    state = built.init(update)
    payload, state = built.encode(jax.random.key(1), update, state)
    read = built.unpack(built.pack(payload))
    results = built.decode(read), built.bins(read)[:3], state
    if built is codec:
      want = results
  jax.tree.map(np.testing.assert_array_equal, want, results)


@pytest.mark.parametrize(
  "spec, what",
  [
    ("zstt", "zstd"),
    ("zstd(level=0)", "1 to 22"),
    ("zstd(level=23)", "1 to 22"),
    ("zstd(level=fast)", "integer"),
    ("zstd(levl=3)", "level"),
    (True, "none, zstd"),
  ],
)
def test_mistakes_are_named(spec, what):
  with pytest.raises(errors.UserError, match=what):
    precision.make("int8", PARAMS, entropy=spec)


def test_the_benchmark_packs_neighbours():
  packed = bench.neighbours(np.array([1, 2, 3]), 16)
  assert packed == bytes([0x21, 0x03])
  # 1 + 3 * 2 + 9 * 0 + 27 * 1 + 81 * 2, then 2.
  packed = bench.neighbours(np.array([1, 2, 0, 1, 2, 2]), 3)
  assert packed == bytes([196, 2])
