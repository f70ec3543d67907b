"""The wire format against its specification, byte by byte."""

import pathlib
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash

from mpqfl_jax import bitpack, precision, specs, wire

ROOT = pathlib.Path(__file__).parent.parent
PARAMS = {"conv1": {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 3))}}
UPDATE = {
  "conv1": {
    "bias": jnp.array([0.25, -1.0]),
    "kernel": jnp.array([[7.0, -7.0, 1.0], [0.0, 2.0, 3.0]]),
  }
}


def message_of(name, params=PARAMS, update=UPDATE, **options):
  codec = precision.make(name, params, **options)
  payload, _ = codec.encode(jax.random.key(0), update, codec.init(params))
  return codec, codec.pack(payload)


def float32(x):
  return np.float32(x).tobytes()


def test_a_message_by_hand():
  _, message = message_of("int4")
  assert message[:4] == b"MPQ\x04"
  rule = "int4 symmetric nearest"
  text = f"int4\nconv1/bias [2] {rule}\nconv1/kernel [2, 3] {rule}"
  assert message[4:8] == xxhash.xxh32_digest(text.encode())[::-1]
  # bias: scale 1 / 7; 1.75 goes to 2, so that codes are 2 + 7 and 0.
  bias = b"\x14" + float32(np.float32(1) * np.float32(1 / 7)) + bytes([0x09])
  # kernel: scale 1; codes 14 0 8 in the low halves, 7 9 10 in the high ones.
  kernel = b"\x14" + float32(1.0) + bytes([0x7E, 0x90, 0xA8])
  assert message[8:-4] == bias + kernel
  assert message[-4:] == xxhash.xxh32_digest(message[:-4])[::-1]
  assert len(message) == 12 + 6 + 8


def test_affine_record_by_hand():
  _, message = message_of("int8", mode="affine")
  # bias in [-1, 0.25]: scale 1.25 / 255, zero point -128 + 204, sent as 204.
  scale = np.float32(1.25) * np.float32(1 / 255)
  assert message[8:13] == b"\x38" + float32(scale)
  assert message[13:14] == bytes([204])
  assert message[14:16] == bytes([255, 0])


def test_float16_record_by_hand():
  _, message = message_of("float16")
  assert message[8:13] == b"\x02" + np.array([0.25, -1.0], "<f2").tobytes()


def resealed(message, at, new):
  body = bytearray(message[:-4])
  body[at : at + len(new)] = new
  return wire.reseal(bytes(body))


@pytest.mark.parametrize(
  ("at", "new", "what"),
  [
    (0, b"XYZ", "magic"),
    (3, b"\x03", "version"),
    (4, b"\0\0\0\0", "fingerprint"),
    (8, b"\x38", "rule"),
    (9, float32(np.nan), "scale"),
    (9, float32(np.inf), "scale"),
    (9, float32(-1.0), "scale"),
    (9, float32(0.0), "scale"),
    (9, float32(1e38), "scale"),
    (13, b"\xff", "codes"),  # code 15 of a symmetric int4
  ],
)
def test_each_field_is_checked(at, new, what):
  codec, message = message_of("int4")
  codec.unpack(message)
  with pytest.raises(wire.WireError, match=what):
    codec.unpack(resealed(message, at, new))


def test_values_that_are_no_numbers_are_refused():
  for name, width in (("none", 4), ("float16", 2), ("bfloat16", 2)):
    codec, message = message_of(name)
    for exponent in (
      b"\xff\xff\xff\x7f"[-width:],
      b"\x00\x00\x80\xff"[-width:],
    ):
      bad = exponent if name != "float16" else b"\x00\x7c"
      with pytest.raises(wire.WireError):
        codec.unpack(resealed(message, 9, bad))


def test_padding_is_checked():
  codec, message = message_of(
    "int4", {"a": jnp.zeros(3)}, {"a": jnp.array([1.0, -1.0, 0.5])}
  )
  with pytest.raises(wire.WireError, match="codes"):
    codec.unpack(resealed(message, 14, bytes([message[14] | 0x10])))


def test_lengths_are_checked():
  codec, message = message_of("int4")
  for body in (message[:-5], message[:-4] + b"\0", message[:8]):
    with pytest.raises(wire.WireError):
      codec.unpack(wire.reseal(body))


def test_checksum_is_checked():
  codec, message = message_of("int4")
  for at in range(len(message)):
    for bit in range(8):
      broken = bytearray(message)
      broken[at] ^= 1 << bit
      with pytest.raises(wire.WireError):
        codec.unpack(bytes(broken))


def test_sparse_claims_allocate_nothing():
  params = {"a": jnp.zeros(1000)}
  codec, message = message_of(
    "topk", params, {"a": jnp.arange(1000, dtype=jnp.float32)}, ratio=0.01
  )
  bomb = resealed(message, 9, (2**32 - 1).to_bytes(4, "little"))
  tracemalloc.start()
  with pytest.raises(wire.WireError, match="entries"):
    codec.unpack(bomb)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 100_000


def test_a_huge_message_is_refused_by_its_length():
  codec, message = message_of("int4")
  huge = message[:-4] + bytes(50_000_000)
  tracemalloc.start()
  with pytest.raises(wire.WireError, match="at most 26"):
    codec.unpack(huge)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 100_000


@pytest.mark.parametrize(
  "spec",
  [
    *("int8", "int4", "int3", "int16", "int3(rounding=dither)", "mixed_random"),
    *("none", "float16", "bfloat16", "float8", "sign", "ternary", "nf4"),
    *("qsgd", "qsgd(levels=300)", "drive", "topk", "topk(ratio=0.24)"),
    *("prune", "prune(ratio=0.001)", "randomk", "randomk(ratio=1.0)"),
    *("budget(bytes=1000000)", "budget(bytes=10000000)"),
  ],
)
def test_reading_allocates_at_most_the_templates_size(spec):
  name, options = specs.parse(spec)
  params = {"a": jnp.zeros((1000, 4000))}
  update = {"a": jax.random.normal(jax.random.key(0), (1000, 4000))}
  codec, message = message_of(name, params, update, **options)
  codec.unpack(message)
  tracemalloc.start()
  codec.unpack(message)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak <= 16_000_000 + 2**20


def test_megabytes_are_no_burden():
  # 1.66 million parameters, one core, a busy machine: seconds would be a loop.
  params = {"a": jnp.zeros(1_660_000)}
  update = {"a": jax.random.normal(jax.random.key(0), (1_660_000,))}
  for name in ("int4", "int3", "mixed_random"):
    codec, message = message_of(name, params, update)
    read = codec.unpack(message)
    assert codec.pack(read) == message
    np.testing.assert_array_equal(
      codec.decode(read)["a"].shape, params["a"].shape
    )
  assert bitpack.packed_size(1_660_000, 16) == 830_000


@pytest.mark.slow
def test_fuzz():
  done = subprocess.run(
    [sys.executable, ROOT / "tools/fuzz_wire.py", "--count=50000", "--seed=3"],
    capture_output=True,
    text=True,
    check=True,
  )
  assert "50,000 mutants" in done.stdout
  assert "nothing else" in done.stdout
