"""Feeds mutated messages to every codec's reader.

    python tools/fuzz_wire.py --count=1000000

A message is either refused with `WireError`, or it is one that some client may
have sent: it packs again to the same bytes and decodes to finite numbers. Most
mutants get a new checksum, so that they reach the readers of the records.
"""

import argparse
import collections
import time

import jax
import jax.numpy as jnp
import numpy as np

from mpqfl_jax import precision, wire

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
]


def build() -> list:
  """(name, codec, decode, messages) of every codec."""
  cases = [(name, OPTIONS.get(name, {})) for name in precision.CODECS]
  rng = np.random.default_rng(0)
  update = jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), PARAMS
  )
  built = []
  for name, options in [*cases, *VARIANTS]:
    codec = precision.make(name, PARAMS, **options)
    encode = jax.jit(codec.encode)
    messages = []
    for seed in range(4):
      sent = jax.tree.map(
        lambda x, s=seed: x * (0.0 if s == 3 else 1.0), update
      )
      payload, _ = encode(jax.random.key(seed), sent, codec.init(PARAMS))
      messages.append(codec.pack(payload))
    title = name + "".join(f" {k}={v}" for k, v in options.items())
    built.append((title, codec, jax.jit(codec.decode), messages))
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


def main() -> None:
  """Runs the fuzzer and prints what became of the mutants."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--count", type=int, default=100_000)
  parser.add_argument("--seed", type=int, default=0)
  flags = parser.parse_args()
  rng = np.random.default_rng(flags.seed)
  built = build()
  outcome: collections.Counter[str] = collections.Counter()
  began = time.monotonic()
  for i in range(flags.count):
    title, codec, decode, messages = built[i % len(built)]
    message = messages[rng.integers(len(messages))]
    mutant = mutate(message, messages[rng.integers(len(messages))], rng)
    try:
      payload = codec.unpack(mutant)
    except wire.WireError:
      outcome["refused"] += 1
      continue
    outcome["read"] += 1
    if codec.pack(payload) != mutant:
      raise AssertionError(f"{title}: not canonical: {mutant.hex()}")
    if outcome["read"] % 10 == 0:
      finite = [np.isfinite(x).all() for x in jax.tree.leaves(decode(payload))]
      if not all(finite):
        raise AssertionError(f"{title}: not finite: {mutant.hex()}")
      outcome["decoded"] += 1
  seconds = time.monotonic() - began
  print(
    f"{flags.count:,} mutants of {len(built)} codecs in {seconds:.0f} s:"
    f" {outcome['refused']:,} refused with WireError, {outcome['read']:,} valid"
    f" (all packed again to the same bytes, {outcome['decoded']:,} decoded to"
    " finite numbers), nothing else"
  )


if __name__ == "__main__":
  main()
