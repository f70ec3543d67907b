"""Feeds mutated messages to every codec's reader.

    python tools/fuzz_wire.py --count=1000000
    python tools/fuzz_wire.py --count=1000000 --entropy=zstd

A message is either refused with `WireError`, or it is one that some client may
have sent: it packs again to the same bytes (under entropy coding, which has no
one shortest form, to the same records) and decodes to finite numbers. Most
mutants get a new checksum, so that they reach the readers of the records. Under
entropy coding, half of them are mutants of the records coded anew, in frames
that a sender of malice may make: any level and window, dictionaries, checksums,
claims of other sizes, more than one frame, megabytes of zeros.
"""

import argparse
import collections
import resource
import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import zstandard

from mpqfl_jax import defenses, precision, wire
from mpqfl_jax import entropy as entropies

PARAMS = {
  "conv1": {"bias": jnp.zeros(5), "kernel": jnp.zeros((3, 3, 2, 5))},
  "dense1": {"kernel": jnp.zeros((31, 4))},
  "empty": {"kernel": jnp.zeros((0, 3))},
  "scalar": {"temperature": jnp.float32(0)},
}
OPTIONS = {"budget": {"bytes": 150}, "guarded": {"bytes": 400}}
VARIANTS = [
  ("int3", {"mode": "affine", "rounding": "dither", "granularity": 32}),
  ("int4", {"power_of_two": True, "granularity": "channel"}),
  ("int5", {"rotate": True, "granularity": 16}),
  ("qsgd", {"levels": 300}),
  ("topk", {"ratio": 0.04}),
  ("prune", {"ratio": 0.4}),
  ("float8", {"format": "e5m2", "granularity": 16}),
  ("int8", {"range": "static", "granularity": "channel"}),
  # Specs and nothing else: the codecs of defences.
  ("dp_pbm(trials=300)", None),
  ("dp_rqm(levels=5)", None),
]


def codec_of(name: str, options: dict | None, entropy: str = "none"):
  """A codec of `PARAMS`."""
  if options is not None:
    return precision.make(name, PARAMS, **options, entropy=entropy)
  codec = defenses.make(name, PARAMS).codec
  coding = entropies.make(entropy)
  return codec if coding is None else entropies.coded(codec, coding)


def build(entropy: str) -> list:
  """(name, codec, the same without coding, decode, messages) of every codec."""
  cases = [(name, OPTIONS.get(name, {})) for name in precision.CODECS]
  rng = np.random.default_rng(0)
  update = jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), PARAMS
  )
  # Repeats shorten a message, or entropy coding would leave all as they are.
  period = {"none": 1000, "zstd": 7}[entropy]
  built = []
  for name, options in [*cases, *VARIANTS]:
    plain, codec = (codec_of(name, options, e) for e in ("none", entropy))
    encode = jax.jit(codec.encode)
    messages = []
    for seed in range(4):
      sent = jax.tree.map(
        lambda x, s=seed: (
          jnp.resize(x.reshape(-1)[:period], x.shape) * (0.0 if s == 3 else 1.0)
        ),
        update,
      )
      payload, _ = encode(jax.random.key(seed), sent, codec.init(PARAMS))
      messages.append(codec.pack(payload))
    title = name + "".join(f" {k}={v}" for k, v in (options or {}).items())
    built.append((title, codec, plain, jax.jit(codec.decode), messages))
  return built


def mutate(message: bytes, other: bytes, rng: np.random.Generator) -> bytes:
  """One mutant of a message."""
  kind = rng.integers(8)
  body = bytearray(message[: -wire.CHECKSUM.size])
  start = wire.HEADER.size if len(body) > wire.HEADER.size else 0
  for _ in range(rng.integers(1, 5)):
    at = int(rng.integers(start, len(body)))
    if kind <= 1:
      body[at] ^= 1 << int(rng.integers(8))
    elif kind <= 3:
      body[at] = int(
        rng.choice([0, 1, 0x7F, 0x80, 0xC0, 0xFF, body[at] - 1]) % 256
      )
    elif kind == 4:
      body[at : at + 4] = rng.bytes(4)
      del body[len(message) - wire.CHECKSUM.size :]
  if kind == 5:
    del body[int(rng.integers(len(body))) :]
  elif kind == 6:
    body += rng.bytes(int(rng.integers(1, 64)))
  elif kind == 7:
    cut = int(rng.integers(len(body)))
    body[cut:] = other[cut : -wire.CHECKSUM.size]
  if rng.integers(10) == 0:
    return bytes(body) + message[-wire.CHECKSUM.size :]
  if len(body) < wire.HEADER.size:
    return bytes(body)
  # A sender of malice can compute checksums.
  return wire.reseal(bytes(body))


def expand(message: bytes) -> bytes:
  """The message without entropy coding, by zstd's streaming reader."""
  frame = message[wire.HEADER.size : -wire.CHECKSUM.size]
  reader = zstandard.ZstdDecompressor().stream_reader(frame)
  header = bytearray(message[: wire.HEADER.size])
  header[3] &= 0x0F
  return wire.reseal(bytes(header) + reader.read())


def code(message: bytes, rng: np.random.Generator) -> bytes:
  """Codes a message without coding in some frame, honest or not."""
  records = message[wire.HEADER.size : -wire.CHECKSUM.size]
  kind = rng.integers(16)
  if kind == 0:
    # A bomb: the message is short, what it expands to is not.
    records += bytes(int(rng.integers(1, 2**20)))
  parameters = zstandard.ZstdCompressionParameters.from_level(
    int(rng.choice([1, 3, 9])),
    window_log=int(rng.integers(10, 22)),
    write_content_size=bool(kind != 1),
    write_checksum=bool(kind == 2),
  )
  frame = zstandard.ZstdCompressor(compression_params=parameters).compress(
    records
  )
  if kind == 3:
    # One byte is the size of short records, two of longer ones.
    flag = frame[4] >> 6
    width = 1 if flag == 0 else 1 << flag
    frame = frame[:5] + rng.bytes(width) + frame[5 + width :]
  elif kind == 4:
    claim = struct.pack("<Q", int(rng.integers(2**63)))
    frame = frame[:4] + bytes([frame[4] | 0xC0]) + claim + frame[6:]
  elif kind == 5:
    frame = frame[:4] + bytes([frame[4] | 1]) + rng.bytes(1) + frame[5:]
  elif kind == 6:
    window = bytes([int(rng.integers(256))])
    frame = frame[:4] + bytes([frame[4] & 0xDF]) + window + frame[5:]
  elif kind == 7:
    size = int(rng.choice([0, 4, 2**31]))
    extra = struct.pack("<II", 0x184D2A50, size) + bytes(size % 8)
    frame = extra + frame if rng.integers(2) else frame + extra
  elif kind == 8:
    frame += frame if rng.integers(2) else rng.bytes(1)
  header = bytearray(message[: wire.HEADER.size])
  header[3] |= 0x10
  return wire.reseal(bytes(header) + frame)


def mutate_coded(
  message: bytes, other: bytes, rng: np.random.Generator
) -> bytes:
  """One mutant of a message that may be entropy coded."""
  if rng.integers(2):
    return mutate(message, other, rng)
  plain = expand(message) if wire.is_coded(message) else message
  also = expand(other) if wire.is_coded(other) else other
  if rng.integers(2):
    plain = mutate(plain, also, rng)
  if len(plain) < wire.OVERHEAD:
    return plain
  return code(plain, rng)


def peak_kib() -> int:
  """The most memory that this process ever had, KiB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
  """Runs the fuzzer and prints what became of the mutants."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--count", type=int, default=100_000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--entropy", choices=("none", "zstd"), default="none")
  flags = parser.parse_args()
  rng = np.random.default_rng(flags.seed)
  built = build(flags.entropy)
  change = mutate if flags.entropy == "none" else mutate_coded
  outcome: collections.Counter[str] = collections.Counter()
  began = time.monotonic()
  rose = 0
  for i in range(flags.count):
    title, codec, plain, decode, messages = built[i % len(built)]
    message = messages[rng.integers(len(messages))]
    mutant = change(message, messages[rng.integers(len(messages))], rng)
    memory = peak_kib()
    try:
      payload = codec.unpack(mutant)
    except wire.WireError:
      outcome["refused"] += 1
      continue
    finally:
      rose = max(rose, peak_kib() - memory)
    outcome["read"] += 1
    same = mutant
    if wire.is_coded(mutant):
      outcome["coded"] += 1
      same = expand(mutant)
    if plain.pack(payload) != same:
      raise AssertionError(f"{title}: not canonical: {mutant.hex()}")
    if outcome["read"] % 10 == 0:
      finite = [np.isfinite(x).all() for x in jax.tree.leaves(decode(payload))]
      if not all(finite):
        raise AssertionError(f"{title}: not finite: {mutant.hex()}")
      outcome["decoded"] += 1
  seconds = time.monotonic() - began
  print(
    f"{flags.count:,} mutants of {len(built)} codecs in {seconds:.0f} s:"
    f" {outcome['refused']:,} refused with WireError, {outcome['read']:,}"
    f" valid, {outcome['coded']:,} of them entropy coded (all packed again to"
    f" the same records, {outcome['decoded']:,} decoded to finite numbers),"
    f" nothing else; no read raised the peak of memory by more than"
    f" {rose / 1024:.1f} MiB"
  )


if __name__ == "__main__":
  main()
